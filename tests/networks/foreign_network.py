"""A network module of another maker with the usual `create_network(...)`, as small as can be: a learned bias
per Linear.
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


def create_network(
    multiplier: float,
    network_dim: int,
    network_alpha: float,
    vae: object,
    text_encoder: object,
    unet: nn.Module,
    **kwargs: Any,
) -> BiasNetwork:
    return BiasNetwork(unet, multiplier, network_dim, network_alpha, kwargs)
