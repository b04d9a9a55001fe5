"""Cast the factors of all LoRAs to autocast's dtype, once for each pass of the model.

If each layer casts its own factors, it launches two kernels in the forward pass, two when a checkpointed
block is recomputed, and two for the gradients; another kernel applies the scale. On a fast GPU, a step with
few tokens waits for the host to launch these. Here, all layers are cast together before the model runs, and
up factors are multiplied by `multiplier * alpha / rank`. All gradients of a pass are cast back together. The
down factors of layers with the same input become one matrix (networks/shared_inputs.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from modules.private_torch import copy_each, scale_each
from networks.adjacent_weights import join_weights
from networks.lora_layer import LoraLayer
from networks.shared_inputs import SharedInput


def cast_before_pass(
    model: nn.Module, layers: Sequence[nn.Module], shared_inputs: Sequence[Sequence[str]] = ()
) -> None:
    """Cast LoRA factors before each forward pass of `model`, which contains their frozen layers.

    Without autocast, or if factors already have its dtype, layers use the factors themselves.

    Args:
        model: The network.
        layers: Its trainable layers; layers that are not LoRAs are ignored.
        shared_inputs: For each group of modules that get the same tensor, the endings of their paths.
    """
    lora_layers = [layer for layer in layers if isinstance(layer, LoraLayer)]
    if lora_layers:
        groups = group_layers(model, lora_layers, shared_inputs)
        model.register_forward_pre_hook(lambda *_: cast_factors(groups))


def join_groups(groups: Sequence[Sequence[LoraLayer]]) -> None:
    """Make the frozen weights of each group adjacent in memory, except those that `join_weights` refuses.

    Args:
        groups: Groups of layers with the same input.
    """
    for group in groups:
        if len(group) > 1:
            join_weights([layer.original for layer in group], group[0].lora_down.weight.device)


def group_layers(
    model: nn.Module, layers: Sequence[LoraLayer], shared_inputs: Sequence[Sequence[str]]
) -> list[list[LoraLayer]]:
    """Group layers that get the same tensor and have equal ranks; most groups have one layer.

    Args:
        model: Network that contains the frozen modules.
        layers: LoRA layers of these modules; layers with a shared input are linear.
        shared_inputs: For each group of modules that get the same tensor, the endings of their paths.
    """
    input_by_ending = {ending: index for index, endings in enumerate(shared_inputs) for ending in endings}
    paths = {id(module): path for path, module in model.named_modules()}
    # path of the block, index of the shared input in it, and rank; for a layer alone, its path and no index
    groups: dict[tuple[str, int | None, int], list[LoraLayer]] = {}
    for layer in layers:
        path = paths[id(layer.original)]
        rank = layer.lora_up.weight.shape[1]
        key: tuple[str, int | None, int] = path, None, rank
        # a dropout may skip one layer of a group, and magnitudes need each layer's own output
        can_share = layer.dropouts is None and layer.combine_outputs is None
        for ending, input_index in input_by_ending.items():
            if can_share and path.endswith(f".{ending}"):
                key = path.removesuffix(ending), input_index, rank
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def cast_factors(groups: Sequence[Sequence[LoraLayer]]) -> None:
    """Set `cast_factors` and `shared_input` of all layers for a pass under the current autocast.

    A layer's `cast_factors` are its down and up factors in autocast's dtype. Layers that get the same tensor
    also get a `shared_input`, which multiplies it by all their down factors in one product. Before the first
    pass on a GPU, the frozen weights of each group are joined in memory.

    Args:
        groups: Groups of layers that get the same tensor; most have one layer.
    """
    layers = [layer for group in groups for layer in group]
    parameter = layers[0].lora_down.weight
    device_type = parameter.device.type
    dtype = parameter.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    is_first_pass = layers[0].cast_factors is None
    for layer in layers:
        layer.cast_factors = None  # free the copies of the last pass before new copies are made
        layer.shared_input = None
    if dtype == parameter.dtype:
        return
    # not on a CPU, which gains nothing from fewer kernels, and whose weights may be memory-mapped
    if is_first_pass and device_type != "cpu":
        join_groups(groups)
    # One matrix per group of its down factors, and one of its up factors times their scales
    layers = [layer for group in groups for layer in group]
    downs = [layer.lora_down.weight for layer in layers]
    ups = [layer.lora_up.weight for layer in layers]
    # down factors stay unscaled
    scales = [1.0] * len(downs) + [layer.multiplier * layer.scale for layer in layers]
    group_sizes = [len(group) for group in groups]
    matrices = _Cast.apply(scales, group_sizes + group_sizes, dtype, *downs, *ups)
    downs, ups = matrices[: len(groups)], matrices[len(groups) :]
    for group, down, up in zip(groups, downs, ups, strict=True):
        if len(group) == 1:
            group[0].cast_factors = down, up
        else:
            _share_input(group, down, up)


def _share_input(group: Sequence[LoraLayer], down: Tensor, up: Tensor) -> None:
    """Give the layers of a group their factors, and an object that multiplies their common input."""
    ranks = [layer.rank for layer in group]
    ups = up.split([len(layer.lora_up.weight) for layer in group])
    shared = SharedInput(group, ranks, down, ups, up)
    for layer, layer_down, layer_up in zip(group, down.split(ranks), ups, strict=True):
        layer.cast_factors = layer_down, layer_up
        layer.shared_input = shared


class _Cast(torch.autograd.Function):
    """Stacks each group of factors to one matrix, cast and multiplied by their scales, with few kernels."""

    @staticmethod
    def forward(
        ctx: Any, scales: list[float], group_sizes: list[int], dtype: torch.dtype, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        """Stack the rows of each group of consecutive factors into a matrix, cast and scaled.

        Args:
            ctx: Context of autograd.
            scales: Scale of each factor.
            group_sizes: Number of factors in each matrix.
            dtype: Dtype of the matrices.
            factors: Down factors of all groups, whose scale is 1, then the up factors.
        """
        ctx.set_materialize_grads(False)
        ctx.scales = scales
        ctx.dtype = factors[0].dtype
        ctx.split_sizes = []  # for each matrix, the number of rows of its factors
        matrices: list[Tensor] = []
        factor_views: list[Tensor] = []  # rows of a matrix for each factor
        start = 0
        for group_size in group_sizes:
            group = factors[start : start + group_size]
            split_sizes = [len(factor) for factor in group]
            matrix = group[0].new_empty((sum(split_sizes), *group[0].shape[1:]), dtype=dtype)
            ctx.split_sizes.append(split_sizes)
            matrices.append(matrix)
            factor_views += matrix.split(split_sizes)
            start += group_size
        copy_each(factor_views, factors)
        # in place, after the cast: a product in float32 would need more memory
        num_downs = len(factors) // 2
        scale_each(factor_views[num_downs:], scales[num_downs:])
        return tuple(matrices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients of the factors; None for layers that did not run in this pass."""
        narrow_gradients: list[Tensor | None] = []  # for the cast factors
        for gradient, split_sizes in zip(gradients, ctx.split_sizes, strict=True):
            if gradient is None:
                narrow_gradients += [None] * len(split_sizes)
            else:
                narrow_gradients += gradient.split(split_sizes)
        existing = {index: each for index, each in enumerate(narrow_gradients) if each is not None}
        wide_gradients = [torch.empty_like(each, dtype=ctx.dtype) for each in existing.values()]
        copy_each(wide_gradients, list(existing.values()))
        scale_each(wide_gradients, [ctx.scales[index] for index in existing])
        by_index = dict(zip(existing, wide_gradients, strict=True))
        factor_gradients = [by_index.get(index) for index in range(len(narrow_gradients))]
        return None, None, None, *factor_gradients  # None for scales, group sizes and dtype
