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
from networks.joined_weights import join_weights
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


def join_groups(groups: Sequence[Sequence[LoraLayer]]) -> None:
    """Put the frozen weights of each group together, where they are plain.

    Args:
        groups: Layers that have a common input, together.
    """
    for group in groups:
        if len(group) > 1:
            join_weights([layer.original for layer in group], group[0].lora_down.weight.device)


def group_layers(
    model: nn.Module, layers: Sequence[LoraLayer], shared_inputs: Sequence[Sequence[str]]
) -> list[list[LoraLayer]]:
    """Return the layers of a model in groups of equal rank that get the same tensor; most have one layer.

    Args:
        model: Network that contains the frozen modules.
        layers: LoRAs on them; those with a common input are linear.
        shared_inputs: For each group, the endings of the paths of its modules, as in `DitSpec`.
    """
    groups = {ending: index for index, endings in enumerate(shared_inputs) for ending in endings}
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[tuple[str, int, int] | str, list[LoraLayer]] = {}
    for layer in layers:
        path = paths[id(layer.original)]
        key: tuple[str, int, int] | str = path
        # layers with a dropout, which may skip only one of them, or with magnitudes compute separately
        if layer.dropouts is None and layer.combine is None:
            for ending, index in groups.items():
                if path.endswith(f".{ending}"):
                    key = path.removesuffix(ending), index, layer.lora_up.weight.shape[1]
        found.setdefault(key, []).append(layer)
    return list(found.values())


def cast_factors(groups: Sequence[Sequence[LoraLayer]]) -> None:
    """Set `cast_factors` and `shared_input` of layers, for a pass under the present autocast.

    Before the first pass on a GPU, the frozen weights of each group are put together.

    Args:
        groups: Layers that have a common input, together.
    """
    layers = [layer for group in groups for layer in group]
    parameter = layers[0].lora_down.weight
    kind = parameter.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else parameter.dtype
    is_first = layers[0].cast_factors is None
    for layer in layers:
        layer.cast_factors = None  # frees the copies of the last pass before new ones are made
        layer.shared_input = None
    if dtype == parameter.dtype:
        return
    # a CPU computes for longer than the host needs, and its weights may be those in the file
    if is_first and kind != "cpu":
        join_groups(groups)
    downs = [layer.lora_down.weight for layer in layers]
    ups = [layer.lora_up.weight for layer in layers]
    scales = [1.0] * len(downs) + [layer.multiplier * layer.scale for layer in layers]
    counts = [len(group) for group in groups]
    # one matrix for each group with all its down factors, then one with the up factors
    matrices = _Cast.apply(scales, counts + counts, dtype, *downs, *ups)
    for group, down, up in zip(groups, matrices, matrices[len(groups) :], strict=False):
        if len(group) == 1:
            group[0].cast_factors = down, up
            continue
        ranks = [layer.rank for layer in group]
        ups_of_group = up.split([len(layer.lora_up.weight) for layer in group])
        shared = SharedInput(group, ranks, down, ups_of_group, up)
        for layer, *factors in zip(group, down.split(ranks), ups_of_group, strict=True):
            layer.cast_factors = factors[0], factors[1]
            layer.shared_input = shared


class _Cast(torch.autograd.Function):
    """Cast factors, times their scales, in few kernels (the backward pass too); some in a common matrix."""

    @staticmethod
    def forward(
        ctx: Any, scales: list[float], counts: list[int], dtype: torch.dtype, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        """Return matrices, each of the next so many factors as `counts` says."""
        ctx.set_materialize_grads(False)
        ctx.scales = scales
        ctx.dtype = factors[0].dtype
        ctx.split_sizes = []  # of the factors in each matrix
        matrices, rows = list[Tensor](), list[Tensor]()
        start = 0
        for count in counts:
            members = factors[start : start + count]
            split_sizes = [len(member) for member in members]
            matrix = members[0].new_empty((sum(split_sizes), *members[0].shape[1:]), dtype=dtype)
            ctx.split_sizes.append(split_sizes)
            matrices.append(matrix)
            rows += matrix.split(split_sizes)
            start += count
        copy_each(rows, factors)
        # in place: a product in float32 would be half of a LoRA more at the peak. Down factors have no scale
        half = len(factors) // 2
        scale_each(rows[half:], scales[half:])
        return tuple(matrices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Return gradients of the factors; None for layers that this pass did not reach."""
        of_factors: list[Tensor | None] = []
        for gradient, split_sizes in zip(gradients, ctx.split_sizes, strict=True):
            of_factors += [None] * len(split_sizes) if gradient is None else gradient.split(split_sizes)
        reached = {index: gradient for index, gradient in enumerate(of_factors) if gradient is not None}
        wide = [torch.empty_like(gradient, dtype=ctx.dtype) for gradient in reached.values()]
        copy_each(wide, list(reached.values()))
        scale_each(wide, [ctx.scales[index] for index in reached])
        by_index = dict(zip(reached, wide, strict=True))
        return None, None, None, *(by_index.get(index) for index in range(len(of_factors)))
