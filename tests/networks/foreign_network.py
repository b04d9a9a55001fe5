"""A network module of another maker with the usual `create_network(...)`, as small as can be: a learned bias
per Linear; or, with `algo=full`, weights of its own in place of the model's, which it takes away as LyCORIS
does.
"""

from typing import Any

import torch
from torch import Tensor, nn


class BiasNetwork(nn.Module):
    """Adds multiplier * bias to the output of each Linear of the blocks."""

    def __init__(
        self, unet: nn.Module, multiplier: float, dim: int, alpha: float, arguments: dict[str, Any]
    ) -> None:
        super().__init__()
        self.multiplier, self.dim, self.alpha, self.arguments = multiplier, dim, alpha, arguments
        self.targets = {
            name.replace(".", "_"): module
            for name, module in unet.named_modules()
            if name.startswith("blocks.")
        }
        self.targets = {
            name: module for name, module in self.targets.items() if isinstance(module, nn.Linear)
        }

    def apply_to(
        self, text_encoder: object, unet: nn.Module, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        assert apply_unet
        assert not apply_text_encoder
        for name, module in self.targets.items():
            self.register_parameter(name, nn.Parameter(0.01 * torch.randn(module.out_features)))
            module.forward = self._patched(module.forward, name)  # type: ignore[method-assign]

    def _patched(self, forward: Any, name: str) -> Any:
        def call(x: Tensor) -> Tensor:
            bias = nn.functional.dropout(self.get_parameter(name), 0.5, self.training)
            return forward(x) + self.multiplier * bias.to(x.dtype)

        return call

    def prepare_optimizer_params(
        self, text_encoder_lr: float | None, unet_lr: float, learning_rate: float
    ) -> list[dict[str, Any]]:
        return [{"params": self.parameters(), "lr": unet_lr}]

    def on_epoch_start(self, text_encoder: object, unet: nn.Module) -> None:
        self.train()


class FullNetwork(nn.Module):
    """Holds a copy of the weight of each Linear of the blocks; the state dict has the differences to what
    they were.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        linears = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
        self.targets = {name: module for name, module in linears.items() if name.startswith("blocks.")}

    def apply_to(
        self, text_encoder: object, unet: nn.Module, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        for name, module in self.targets.items():
            for leaf in ("weight", "bias"):
                own = nn.Parameter(module.get_parameter(leaf).detach().clone())
                self.register_parameter(f"{name}.{leaf}".replace(".", "_"), own)
                delattr(module, leaf)
            module.forward = self._forward(name.replace(".", "_"))  # type: ignore[method-assign]

    def _forward(self, name: str) -> Any:
        def call(x: Tensor) -> Tensor:
            return nn.functional.linear(
                x, self.get_parameter(f"{name}_weight"), self.get_parameter(f"{name}_bias")
            )

        return call


def create_network(
    multiplier: float,
    network_dim: int,
    network_alpha: float,
    vae: object,
    text_encoder: object,
    unet: nn.Module,
    **kwargs: Any,
) -> nn.Module:
    if kwargs.get("algo") == "full":
        assert torch.is_grad_enabled()
        return FullNetwork(unet)
    return BiasNetwork(unet, multiplier, network_dim, network_alpha, kwargs)
