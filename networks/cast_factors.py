"""Cast the factors of all LoRAs to autocast's dtype, once for each pass of the model.

If each layer casts its own factors, it launches two kernels in the forward pass, two when a checkpointed
block is recomputed, and two for the gradients; another kernel applies the scale. On a fast GPU, a step with
few tokens waits for the host to launch these. Here, all layers are cast together before the model runs, and
up factors are multiplied by `multiplier * alpha / rank`. All gradients of a pass are cast back together. The
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
        model: The network.
        layers: Layers on it; those that are not LoRAs are ignored.
        shared_inputs: For each group of modules that get the same tensor, the endings of their paths.
    """
    lora_layers = [layer for layer in layers if isinstance(layer, LoraLayer)]
    if lora_layers:
        groups = group_layers(model, lora_layers, shared_inputs)
        model.register_forward_pre_hook(lambda *_: cast_factors(groups))


def join_groups(groups: Sequence[Sequence[LoraLayer]]) -> None:
    """Join the frozen weights of each group in memory, except for those that `join_weights` cannot join.

    Args:
        groups: Groups of layers with a common input.
    """
    for group in groups:
        if len(group) > 1:
            join_weights([layer.original for layer in group], group[0].lora_down.weight.device)


def group_layers(
    model: nn.Module, layers: Sequence[LoraLayer], shared_inputs: Sequence[Sequence[str]]
) -> list[list[LoraLayer]]:
    """Group the layers of a model that get the same tensor and have equal ranks; most groups have one layer.

    Args:
        model: Network that contains the frozen modules.
        layers: LoRAs on them; those with a common input are linear.
        shared_inputs: For each group of modules that get the same tensor, the endings of their paths.
    """
    index_by_ending = {ending: index for index, endings in enumerate(shared_inputs) for ending in endings}
    paths = {id(module): path for path, module in model.named_modules()}
    groups: dict[tuple[str, int, int] | str, list[LoraLayer]] = {}
    for layer in layers:
        path = paths[id(layer.original)]
        key: tuple[str, int, int] | str = path  # a group of its own
        # layers with dropouts (which may skip one of them) or magnitudes are computed separately
        if layer.dropouts is None and layer.combine_outputs is None:
            for ending, index in index_by_ending.items():
                if path.endswith(f".{ending}"):
                    # one group for each block (the path without the ending), tensor and rank
                    key = path.removesuffix(ending), index, layer.lora_up.weight.shape[1]
        groups.setdefault(key, []).append(layer)
    return list(groups.values())


def cast_factors(groups: Sequence[Sequence[LoraLayer]]) -> None:
    """Set `cast_factors` and `shared_input` of all layers for a pass under the current autocast.

    A layer's `cast_factors` are its down and up factor in autocast's dtype. Layers that get the same tensor
    also get a `shared_input`, which multiplies it by all their down factors at once. Before the first pass on
    a GPU, the frozen weights of each group are joined in memory.

    Args:
        groups: Groups of layers that get the same tensor; most have one layer.
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
    # not on a CPU, which gains nothing from fewer kernels, and whose weights may be mapped from the file
    if is_first and kind != "cpu":
        join_groups(groups)
    downs = [layer.lora_down.weight for layer in layers]
    ups = [layer.lora_up.weight for layer in layers]
    # down factors stay unscaled
    scales = [1.0] * len(downs) + [layer.multiplier * layer.scale for layer in layers]
    counts = [len(group) for group in groups]
    # One matrix for each group with all its down factors, stacked along rows, then one for each group with
    # its up factors; `_Cast` makes them all, and casts their gradients back
    matrices = _Cast.apply(scales, counts + counts, dtype, *downs, *ups)
    # not strict: `matrices` also has the up matrices after the down matrices
    for group, down, up in zip(groups, matrices, matrices[len(groups) :], strict=False):
        if len(group) == 1:
            group[0].cast_factors = down, up
            continue
        ranks = [layer.rank for layer in group]
        ups_of_group = up.split([len(layer.lora_up.weight) for layer in group])
        shared = SharedInput(group, ranks, down, ups_of_group, up)
        for layer, layer_down, layer_up in zip(group, down.split(ranks), ups_of_group, strict=True):
            layer.cast_factors = layer_down, layer_up
            layer.shared_input = shared


class _Cast(torch.autograd.Function):
    """Cast the factors of each group into one matrix, multiplied by their scales, with few kernels."""

    @staticmethod
    def forward(
        ctx: Any, scales: list[float], counts: list[int], dtype: torch.dtype, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        """Stack the rows of each group of consecutive factors into a matrix; `counts` has the group sizes."""
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
            # views of the matrix, one for each factor: copying into them fills the matrix
            rows += matrix.split(split_sizes)
            start += count
        copy_each(rows, factors)
        # Scaled in place, after the cast: a product in float32 would need more memory. The first half of the
        # factors are down factors, whose scale is 1
        half = len(factors) // 2
        scale_each(rows[half:], scales[half:])
        return tuple(matrices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients of the factors; None for layers that did not run in this pass."""
        narrow: list[Tensor | None] = []  # gradients of the cast factors
        for gradient, split_sizes in zip(gradients, ctx.split_sizes, strict=True):
            narrow += [None] * len(split_sizes) if gradient is None else gradient.split(split_sizes)
        existing = {index: gradient for index, gradient in enumerate(narrow) if gradient is not None}
        wide = [torch.empty_like(gradient, dtype=ctx.dtype) for gradient in existing.values()]
        copy_each(wide, list(existing.values()))
        scale_each(wide, [ctx.scales[index] for index in existing])
        by_index = dict(zip(existing, wide, strict=True))
        factor_gradients = [by_index.get(index) for index in range(len(narrow))]
        return None, None, None, *factor_gradients  # None for scales, counts and dtype
