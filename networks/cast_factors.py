"""The factors of LoRAs in autocast's dtype, cast once for each pass of the model.

A layer that casts its own factors starts two kernels in the forward pass, two when a checkpointed block is
computed again and two for their gradients, and a third one scales what is between the factors. On a fast GPU
a step of few tokens waits for the host to start these. Here all layers are cast together, the up factors
times `multiplier * alpha / rank`, before the model runs. All gradients of a pass are cast back together. The
down factors of layers with a common input become one matrix (networks/shared_inputs.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modules.private_torch import copy_each, scale_each
from networks.lora_layer import LoraLayer
from networks.shared_inputs import SharedInput


def cast_before_pass(
    model: nn.Module, layers: Sequence[nn.Module], shared_inputs: Sequence[Sequence[str]] = ()
) -> None:
    """Cast the factors of LoRAs whenever `model`, which contains their frozen layers, is called.

    Without autocast, or with factors in its dtype, layers use their own factors.

    Args:
        model: Network.
        layers: Layers of a LoRA on it.
        shared_inputs: Modules that get the same tensor, as in `DitSpec`.
    """
    of_loras = [layer for layer in layers if isinstance(layer, LoraLayer)]
    if of_loras:
        groups = group_layers(model, of_loras, shared_inputs)
        model.register_forward_pre_hook(lambda *_: cast_factors(groups))


def group_layers(
    model: nn.Module, layers: Sequence[LoraLayer], shared_inputs: Sequence[Sequence[str]]
) -> list[list[LoraLayer]]:
    """Return the layers of a model in groups that get the same tensor; most have one layer.

    Args:
        model: Network that contains the frozen modules.
        layers: LoRAs on them; those with a common input are linear.
        shared_inputs: For each group, the endings of the paths of its modules, as in `DitSpec`.
    """
    groups = {ending: index for index, endings in enumerate(shared_inputs) for ending in endings}
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[tuple[str, int] | str, list[LoraLayer]] = {}
    for layer in layers:
        path = paths[id(layer.original)]
        key: tuple[str, int] | str = path
        # layers with a dropout, which may skip only one of them, or with magnitudes compute separately
        if layer.dropouts is None and layer.combine is None:
            for ending, index in groups.items():
                if path.endswith(f".{ending}"):
                    key = path.removesuffix(ending), index
        found.setdefault(key, []).append(layer)
    return list(found.values())


def cast_factors(groups: Sequence[Sequence[LoraLayer]]) -> None:
    """Set `cast_factors` and `shared_input` of layers, for a pass under the present autocast.

    Args:
        groups: Layers that have a common input, together.
    """
    layers = [layer for group in groups for layer in group]
    parameter = layers[0].lora_down.weight
    kind = parameter.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
    for layer in layers:
        layer.cast_factors = None  # frees the copies of the last pass before new ones are made
        layer.shared_input = None
    if dtype == parameter.dtype:
        return
    scales = [layer.multiplier * layer.scale for layer in layers]
    counts = [len(group) for group in groups]
    factors = [layer.lora_down.weight for layer in layers] + [layer.lora_up.weight for layer in layers]
    copies = _Cast.apply(scales, counts, dtype, *factors)
    # first one matrix for each group with all its down factors, then the up factors of all layers
    ups = iter(copies[len(groups) :])
    for group, joined in zip(groups, copies, strict=False):
        ranks = [layer.rank for layer in group]
        downs = joined.split(ranks) if len(group) > 1 else (joined,)
        ups_of_group: list[Tensor] = []
        for layer, down in zip(group, downs, strict=True):
            up = next(ups)
            layer.cast_factors = (down, up)
            ups_of_group.append(up)
        if len(group) > 1:
            shared = SharedInput(group, ranks, joined, ups_of_group)
            for layer in group:
                layer.shared_input = shared


class _Cast(torch.autograd.Function):
    """Cast down factors, and up factors times their scales, in few kernels (the backward pass too)."""

    @staticmethod
    def forward(
        ctx: Any, scales: list[float], counts: list[int], dtype: torch.dtype, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.scales = scales
        ctx.dtype = factors[0].dtype
        ctx.heights = []  # of the factors in each matrix
        joined, rows = list[Tensor](), list[Tensor]()
        start = 0
        for count in counts:
            downs = factors[start : start + count]
            heights = [len(down) for down in downs]
            matrix = downs[0].new_empty((sum(heights), *downs[0].shape[1:]), dtype=dtype)
            ctx.heights.append(heights)
            joined.append(matrix)
            rows += matrix.split(heights)
            start += count
        ups = [torch.empty_like(factor, dtype=dtype) for factor in factors[len(scales) :]]
        copy_each([*rows, *ups], factors)
        # in place: a product in float32 would be half of a LoRA more at the peak
        scale_each(ups, scales)
        return *joined, *ups

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Return gradients of the factors; None for layers that this pass did not reach."""
        scales = [1.0] * len(ctx.scales) + ctx.scales
        num_groups = len(ctx.heights)
        of_factors: list[Tensor | None] = []
        for gradient, heights in zip(gradients, ctx.heights, strict=False):
            of_factors += [None] * len(heights) if gradient is None else gradient.split(heights)
        of_factors += gradients[num_groups:]
        reached = {index: gradient for index, gradient in enumerate(of_factors) if gradient is not None}
        wide = [torch.empty_like(gradient, dtype=ctx.dtype) for gradient in reached.values()]
        copy_each(wide, list(reached.values()))
        scale_each(wide, [scales[index] for index in reached])
        by_index = dict(zip(reached, wide, strict=True))
        return None, None, None, *(by_index.get(index) for index in range(len(of_factors)))
