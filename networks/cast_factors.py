"""The factors of LoRAs in autocast's dtype, cast once for each pass of the model.

A layer that casts its own factors starts two kernels in the forward pass, two when a checkpointed block is
computed again and two for their gradients, and a third one scales what is between the factors. On a fast GPU
a step of few tokens waits for the host to start these. Here all layers are cast together, the up factors
times `multiplier * alpha / rank`, before the model runs. All gradients of a pass are cast back together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modules.private_torch import copy_each, scale_each
from networks.lora_layer import LoraLayer


def cast_before_pass(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Cast the factors of linear LoRAs whenever `model`, which contains their frozen layers, is called.

    Without autocast, or with factors in its dtype, layers use their own factors.
    """
    linear = [
        layer for layer in layers if isinstance(layer, LoraLayer) and isinstance(layer.original, nn.Linear)
    ]
    if linear:
        model.register_forward_pre_hook(lambda *_: cast_factors(linear))


def cast_factors(layers: Sequence[LoraLayer]) -> None:
    """Set `cast_factors` of layers, for a pass under the present autocast."""
    parameter = layers[0].lora_down.weight
    kind = parameter.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
    for layer in layers:
        layer.cast_factors = None  # frees those of the last pass before there are others
    if dtype == parameter.dtype:
        return
    scales = [layer.multiplier * layer.scale for layer in layers]
    downs = [layer.lora_down.weight for layer in layers]
    ups = [layer.lora_up.weight for layer in layers]
    copies = _Cast.apply(scales, dtype, *downs, *ups)
    for layer, down, up in zip(layers, copies[: len(layers)], copies[len(layers) :], strict=True):
        layer.cast_factors = (down, up)


class _Cast(torch.autograd.Function):
    """Cast down factors, and up factors times their scales, in few kernels (the backward pass too)."""

    @staticmethod
    def forward(ctx: Any, scales: list[float], dtype: torch.dtype, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.scales = scales
        ctx.dtype = factors[0].dtype
        copies = [torch.empty_like(factor, dtype=dtype) for factor in factors]
        copy_each(copies, factors)
        # in place: a product in float32 would be half of a LoRA more at the peak
        scale_each(copies[len(scales) :], scales)
        return tuple(copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Return gradients of the factors; None for layers that this pass did not reach."""
        scales = [1.0] * len(ctx.scales) + ctx.scales
        reached = {index: gradient for index, gradient in enumerate(gradients) if gradient is not None}
        wide = [torch.empty_like(gradient, dtype=ctx.dtype) for gradient in reached.values()]
        copy_each(wide, list(reached.values()))
        scale_each(wide, [scales[index] for index in reached])
        by_index = dict(zip(reached, wide, strict=True))
        return None, None, *(by_index.get(index) for index in range(len(gradients)))
