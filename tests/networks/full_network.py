"""A network module that trains weights of its own in place of the model's, and takes these away, as LyCORIS'
`algo=full` does.
"""

from typing import Any

import torch
from torch import Tensor, nn


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
) -> FullNetwork:
    assert torch.is_grad_enabled()
    return FullNetwork(unet)
