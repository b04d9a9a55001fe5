"""fp8 on devices without fp8 units, and what of a network is in fp8: what tests compare with."""

import torch
from torch import Tensor, nn

from checkpoints.stored.fp8 import is_fp8


def quantized_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Return the quantized layers of a network by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and is_quantized(layer)
    }


def is_quantized(layer: nn.Linear) -> bool:
    """Return whether the layer has an 8-bit weight."""
    return is_fp8(layer.weight.dtype)


def emulated_product(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    fast_sums: bool,
) -> Tensor:
    """Compute a `Product` in plain float32, on devices without fp8 units: slow, for tests only.

    Sums are exact regardless of `fast_sums`.
    """
    with torch.autocast(a.device.type, enabled=False):
        out = (a.float() @ b.float()) * scale_a * scale_b
        return (out if bias is None else out + bias.float()).to(dtype)
