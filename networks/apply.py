"""Merge LoRAs into the weights of a model, parameter by parameter: at load time or when LoRAs are switched.

A `Change` is one LoRA's effect on one parameter. `networks.gated_loras` wraps the forward instead.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from checkpoints.opening import open_checkpoint
from modules.console import list_some
from modules.errors import CheckpointError
from modules.integers import ceil_div
from networks.delta import Delta, read_deltas
from networks.depth_variants import fit_depths
from networks.fused_loras import (
    FusedPiece,
    FusionError,
    find_default_rows,
    find_part_rows,
    is_row_slice,
    join_rotations,
)
from networks.key_formats import split_tensor_name
from networks.kinds.algebra import MismatchError
from networks.kinds.composing import MAGNITUDE_KIND_NAME
from networks.loading import (
    LoraFile,
    WeightedLora,
    reject_unknown,
    warn_about_absent_modules,
    warn_about_other_family,
)
from networks.module_factors import BIAS_FACTORS, CPU, ROW_RANGE, SET_WEIGHT, read_row_range, to_meta_tensor
from networks.module_names import RelatedModule, from_alias, related_modules, select_family
from networks.names.layouts import FIRST_LAYERS, OURS, FamilyNames
from networks.rank_masks import read_rank_rule
from networks.rounding import (
    SMALL_WEIGHT,
    LoraRounding,
    RandomRounding,
    SampledRows,
    compute_rounding_seed,
    narrow_dtype,
)
from networks.unused_tensors import describe_text_side
from networks.use_options import NEAREST
from runtime.offload.sharding import gather_weight, set_weight

logger = getLogger(__name__)
# family of the model in messages if its names match several families: in diffusers' layout all names of
# HunyuanVideo are also names of FramePack
LIKELY_MODEL = "hunyuan_video"
_NEEDS_WHOLE_WEIGHT = (
    f"{MAGNITUDE_KIND_NAME} magnitudes by input refer to the whole weight, but the model has only parts of it"
)
_BLOCK_ELEMENTS = 1 << 20  # elements of a weight that are changed at a time: 4 MB in float32


@dataclass(frozen=True)
class Change:
    """What one LoRA changes about one model parameter, scaled by `weighted_lora.multiplier`."""

    weighted_lora: WeightedLora
    delta: Delta
    parameter_name: str = "weight"  # or bias
    row_slice: slice | None = None  # rows of the parameter that the LoRA changes; None: all
    rotations: Tensor | None = None  # R - I of an input rotation; None until `to` computes it

    def change_shape(self) -> tuple[int, ...]:
        """Return the shape of the change: of the addition, or of the weight that replaces the old weight.

        Raises:
            MismatchError: If the shapes of the factors do not match.
        """
        if self.parameter_name == "bias":
            bias = self.delta.compute_bias_change(CPU)
            assert bias is not None
            return tuple(bias.shape)
        if self.delta.replaces_weight:
            return tuple(self.delta.factors[SET_WEIGHT].shape)
        shape = self.delta.change_shape()
        assert shape is not None
        return shape

    def fit(
        self, related: RelatedModule | None, weight: Tensor, name: str, model: str, option: str = ""
    ) -> "Change":
        """Return the change for those rows of a weight that it has, and check that its shape fits.

        A LoRA for q changes only some rows of a fused qkv weight; a LoRA for qkv is cut for a q weight.

        Args:
            related: The LoRA's module if it is a part of the weight (q of qkv) or contains it; else None.
            weight: The weight.
            name: Name of the weight, for messages.
            model: Name of the model, for messages.
            option: Option that sets the LoRA file, for messages.

        Raises:
            CheckpointError: If the shapes differ.
        """
        path = self.weighted_lora.lora.path
        if self.delta.rotation is not None:  # its shape differs from the weight's
            return self._fit_rotation(related, weight, name, f"{option}{path} does not fit {model}")
        try:
            if self.delta.has_row_range and self.delta.has_input_magnitudes:
                # a part of a LoRA layer, with DoRA magnitudes that need the norms of the whole layer
                change = self._expand_to_whole_layer(related, weight)
            elif related is not None:
                change = self._fit_to_related_module(related, weight)
            else:
                change = self
            shape = list(change.change_shape())  # raises MismatchError if the factors do not match each other
        except MismatchError as error:
            raise CheckpointError(
                f"{path}: the factors for {name} do not match each other ({error}).", path
            ) from error
        changed_rows = weight if change.row_slice is None else weight[change.row_slice]
        expected = list(changed_rows.shape)
        is_dora = change.delta.normalization is not None
        if shape == expected and not is_dora:
            return change
        reason = change._describe_mismatch(shape, expected)
        if reason:
            raise CheckpointError(f"{option}{path} does not fit {model}: for {name} it has {reason}", path)
        return change

    def _fit_rotation(
        self, related: RelatedModule | None, weight: Tensor, name: str, error_prefix: str
    ) -> "Change":
        """Return an input rotation (OFT) limited to those rows of the weight that the LoRA's module covers.

        Args:
            related: The LoRA's module if it is a part of the weight (q of qkv) or contains it; else None.
            weight: The weight.
            name: Name of the weight.
            error_prefix: Start of error messages, such as "x.safetensors does not fit this model".

        Raises:
            CheckpointError: If the rotation does not fit.
        """
        path = self.weighted_lora.lora.path
        rotation = self.delta.rotation
        assert rotation is not None
        reason = rotation.find_misfit(self.delta.factors[rotation.factor_name], weight, name)
        if reason:
            raise CheckpointError(f"{error_prefix}: {reason}", path)
        if related is None or not related.is_part:
            return self
        rows = find_default_rows(related.part, len(weight))
        if rows is None:
            raise CheckpointError(
                f"{error_prefix}: {related.name} is a part of {name}, whose {len(weight)} rows are not those "
                f"of a published model.\n  Pass {rotation.title} that was trained for this model.",
                path,
            )
        return self if rows == slice(0, len(weight)) else replace(self, row_slice=rows)

    def _describe_mismatch(self, shape: list[int], expected: list[int]) -> str:
        """Return why shape or DoRA magnitudes do not fit, as the end of "it has ..."; "" if they fit."""
        can_be_reshaped = math.prod(shape) == math.prod(expected) and shape[:1] == expected[:1]
        if not can_be_reshaped:
            families = " or ".join(family.name for family in self.weighted_lora.lora.families())
            kind = f" It is for {families}." if families else ""
            return f"{shape}, the model {expected}.{kind}\n  Pass a LoRA that was trained for this model."
        magnitudes = self.delta.magnitudes
        if magnitudes is None or self.parameter_name != "weight":
            return ""
        # one magnitude for each input or output
        axis = 1 if self.delta.has_input_magnitudes else 0
        if len(expected) > 1 and magnitudes.numel() == expected[axis]:
            return ""
        return f"{magnitudes.numel()} {MAGNITUDE_KIND_NAME} magnitudes, the model {expected}."

    def _expand_to_whole_layer(self, related: RelatedModule | None, weight: Tensor) -> "Change":
        """Return the change of the whole fused LoRA layer; this change covers only some of its rows."""
        # Per-input DoRA magnitudes need the norms of the whole layer, which the weight must therefore
        # contain.
        layer_size = self.delta.matrix_size()
        first_row, end_row = read_row_range(self.delta.factors)  # this change's rows in the layer
        weight_contains_part = related is not None and related.is_part and is_row_slice(related.part)
        if related is None or not weight_contains_part or layer_size is None:
            raise MismatchError(_NEEDS_WHOLE_WEIGHT)
        rows = find_part_rows(related.part, end_row - first_row, len(weight))
        if not isinstance(rows, slice):
            raise MismatchError(_NEEDS_WHOLE_WEIGHT)
        layer_start = rows.start - first_row  # row of the weight at which the layer begins
        layer_factors = {name: tensor for name, tensor in self.delta.factors.items() if name != ROW_RANGE}
        layer_rows = slice(layer_start, layer_start + layer_size[0])
        return replace(self, delta=replace(self.delta, factors=layer_factors), row_slice=layer_rows)

    def _fit_to_related_module(self, related: RelatedModule, weight: Tensor) -> "Change":
        """Return the change for a weight that contains the LoRA's module, or that is a part of it."""
        # A LoRA for q gets the rows of q in a qkv weight. A LoRA for qkv is cut to the rows of a q weight. If
        # the row counts do not match, the change is returned unchanged, and `fit` reports its shape.
        # Which rows of the larger of LoRA and weight are the smaller one
        # None if they do not match.
        lora_rows = self.change_shape()[0]
        weight_rows = len(weight)
        if related.is_part:
            part_rows = lora_rows
            whole_rows = weight_rows
            relation = "it is a part of the weight"
        else:
            part_rows = weight_rows
            whole_rows = lora_rows
            relation = "the weight is a part of it"
        if is_row_slice(related.part) and part_rows >= whole_rows:
            raise MismatchError(
                f"{related.name} has {lora_rows} rows, the weight {weight_rows}, although {relation}"
            )
        rows = find_part_rows(related.part, part_rows, whole_rows)
        if rows is None:
            return self
        if isinstance(rows, slice):
            if related.is_part:  # the weight contains the LoRA's module
                return replace(self, row_slice=rows)
            has_all_rows = rows == slice(0, self.change_shape()[0])
            if has_all_rows:
                return self
        # the weight is a part of the LoRA's module, or has its halves in another order
        if self.delta.has_input_magnitudes:
            raise MismatchError(_NEEDS_WHOLE_WEIGHT)
        sliced_delta = self.delta.select_rows(rows)
        if sliced_delta is None:  # a LoKr has no factors per row: compute the full matrix, then slice
            sliced_delta = self.delta.compute_rows(rows, weight.device)
        return replace(self, delta=sliced_delta)

    @property
    def replaces_weight(self) -> bool:
        """Return whether this LoRA replaces the weight and discards earlier LoRAs' changes, as in ComfyUI."""
        return (
            self.delta.replaces_weight
            and self.parameter_name == "weight"
            and self.weighted_lora.multiplier != 0
        )

    def add_to(self, total: Tensor, block_rows: slice | None, weight: Tensor) -> None:
        """Add the LoRA's change for one block of rows to `total`.

        Args:
            total: Float32 sum of all changes of these rows, modified in place.
            block_rows: Rows of the parameter in the block, possibly with a step; None for all rows.
            weight: These rows before any change, float32. A change that replaces the weight overwrites them.
        """
        if self.row_slice is not None:
            overlap = _find_overlap(self.row_slice, block_rows, len(total))
            if overlap is not None:
                change = replace(self, row_slice=None)
                change.add_to(total[overlap.in_block], overlap.in_change, weight[overlap.in_block])
            return
        if self.delta.rotation is not None:
            # Add the change by an input rotation to `total`; the matrices already include the multiplier
            rotation = self.delta.rotation
            assert rotation is not None
            rotations = self.rotations
            if rotations is None:
                rotations = self._make_rotations(total.device)
            total.add_(rotation.weight_change(weight, rotations))
            return
        delta = self.delta
        if block_rows is not None:  # a LoKr, for which `select_rows` returns None, is never split into blocks
            delta = self.delta.select_rows(block_rows) or self.delta
        is_for_weight = self.parameter_name == "weight"
        if is_for_weight and delta.replaces_weight:
            if self.replaces_weight:  # not with a multiplier of 0
                weight.copy_(delta.factors[SET_WEIGHT].reshape(weight.shape))
                total.zero_()  # earlier changes are replaced too
            return
        if not is_for_weight:
            addition = delta.compute_bias_change(total.device)
        elif delta.normalization is None:
            addition = delta.compute_change(total.device)
        else:
            has_frozen_norms = self.weighted_lora.lora.has_frozen_norms
            addition = delta.compute_normalized_change(weight, total.device, has_frozen_norms)
        assert addition is not None
        total.add_(addition.reshape(total.shape), alpha=self.weighted_lora.multiplier)

    def _make_rotations(self, device: torch.device) -> Tensor:
        """Return R - I of the input rotation, scaled by the LoRA's strength, on the device."""
        rotation = self.delta.rotation
        assert rotation is not None
        values = self.delta.factors[rotation.factor_name].to(device)
        return rotation.compute_rotations(values, self.weighted_lora.multiplier)

    def to(self, device: torch.device) -> "Change":
        """Return a copy on the device; an input rotation gets its matrices R - I computed there."""
        if self.delta.rotation is not None:
            return replace(self, rotations=self._make_rotations(device))
        return replace(self, delta=self.delta.to(device))


def list_changes(weighted_lora: WeightedLora, delta: Delta) -> list[Change]:
    """Return the changes that a LoRA makes to a module's bias and weight, as up to two `Change` objects."""
    changes: list[Change] = []
    parts = delta.factors.keys()
    if parts & BIAS_FACTORS:
        changes.append(Change(weighted_lora, delta, "bias"))
    if parts - BIAS_FACTORS - {"alpha"}:
        changes.append(Change(weighted_lora, delta, "weight"))
    return changes


class FoundChange(NamedTuple):
    """A LoRA's change that applies to a parameter, possibly under a module name of another layout."""

    key: str  # module and parameter as the LoRA names them: `lora_unet_x.weight`
    change: Change
    related: RelatedModule | None  # the LoRA's module; None if it is the parameter's own module


class _Overlap(NamedTuple):
    """Rows that both a block of a parameter and a LoRA's change cover."""

    in_block: slice  # indices into the block
    in_change: slice  # indices into the change's own rows; has the step of the block


def _find_overlap(changed_rows: slice, block_rows: slice | None, block_length: int) -> _Overlap | None:
    """Return the rows that both a block of a parameter and a LoRA's change cover; None if there are none."""
    block_start = 0 if block_rows is None else block_rows.start
    step = 1 if block_rows is None else block_rows.step or 1
    # row i of the block is row block_start + i * step of the parameter; find the i whose row is changed
    first = max(0, ceil_div(changed_rows.start - block_start, step))
    end = min(block_length, ceil_div(changed_rows.stop - block_start, step))
    if first >= end:
        return None
    offset = block_start - changed_rows.start
    in_change = slice(offset + first * step, offset + end * step, step)
    return _Overlap(slice(first, end), in_change)


def _join_equal_rotations(found_changes: Sequence[FoundChange]) -> list[FoundChange]:
    """Replace one LoRA's equal rotations of q, k and v with a single rotation of the fused qkv weight."""
    # Parts with different rotations stay separate; `Change.fit` then finds the rows of each.
    rotated_parts: dict[int, list[FusedPiece]] = {}  # by id of the `WeightedLora`
    for key, change, related in found_changes:
        if change.delta.rotation is not None and related is not None and related.is_part:
            part = FusedPiece(key, related.part, change.delta.factors)
            rotated_parts.setdefault(id(change.weighted_lora), []).append(part)
    if not rotated_parts:
        return [*found_changes]
    # id of the `WeightedLora` -> keys of its parts with equal rotations
    joined_keys: dict[int, list[str]] = {}
    for lora_id, parts in rotated_parts.items():
        with contextlib.suppress(FusionError):
            join_rotations(parts)  # raises if they are not equal
            joined_keys[lora_id] = [part.name for part in parts]
    remaining: list[FoundChange] = []
    for found in found_changes:
        keys = joined_keys.get(id(found.change.weighted_lora), [])
        if found.key not in keys:
            remaining.append(found)
        elif found.key == keys[0]:
            # the first part now represents the whole weight; the other parts are dropped
            remaining.append(found._replace(related=None))
    return remaining


def _split_rows(weight: Tensor, changes: Sequence[Change]) -> list[slice] | list[None]:
    """Split the rows of a weight into blocks, which are changed one at a time to save memory."""
    # Small weights are not split, nor are weights that are replaced or whose change cannot be cut (LoKr).
    if not changes or not weight.numel():
        return []
    if weight.ndim == 0 or any(change.replaces_weight for change in changes):
        return [None]
    num_rows = len(weight)
    rows_per_block = max(1, _BLOCK_ELEMENTS * num_rows // weight.numel())
    # `select_rows` returns None for a change that cannot be cut, whichever rows are requested
    if rows_per_block >= num_rows or any(change.delta.select_rows(slice(0, 1)) is None for change in changes):
        return [None]
    starts = range(0, num_rows, rows_per_block)
    return [slice(start, min(start + rows_per_block, num_rows)) for start in starts]


def _sum_changes(
    changes: Sequence[Change], rows: slice | None, weight: Tensor, sample: SampledRows | None = None
) -> Tensor:
    """Return the float32 sum of all changes to some rows of a parameter."""
    total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    for change in changes:
        change.add_to(total, rows, weight)
        if sample is not None:
            sampled_total = torch.atleast_1d(total)[sample.rows] if rows is None else total
            sample.record_sum(change.weighted_lora.lora.path, sampled_total)
    return total


def _round_into(
    weight: Tensor, original: Tensor, total: Tensor, random_rounding: RandomRounding | None, start: int = 0
) -> None:
    """Write original values plus changes into a weight, or into some of its rows, rounded to its dtype."""
    is_small_weight = start == 0 and weight.numel() <= SMALL_WEIGHT
    exact_change = total.clone() if random_rounding is not None and is_small_weight else None
    total.add_(original)
    if random_rounding is not None and exact_change is not None:
        # rounds several times, and keeps the draw that alters the change least
        random_rounding.round_small(total, exact_change)
    elif random_rounding is not None:
        random_rounding.round(total, start)
    weight.copy_(total)


def _explain_other_family(lora: LoraFile, model: FamilyNames | None) -> str:
    """Return a sentence that names the families of a LoRA and of the model; "" unless they differ."""
    family = lora.family()
    if family is None or model is None or family is model:
        return ""
    return f" It is for {family.name}, the model is {model.name}."


class LoraPatch:
    """Weight patch that adds LoRAs to weights by name: `patch(name, weight) -> weight`.

    The result is W + multiplier * (alpha / rank) * up @ down, or W R^T for an input rotation R. The changes
    of all files are computed from the original W, summed in float32 on the weight's device and rounded once.
    DoRA adds multiplier * (new weight - W). A `set_weight` replaces W for its own file and all later files.
    After loading, `check()` reports changes without a weight, and the share that survives rounding.
    """

    def __init__(
        self,
        weighted_loras: Sequence[WeightedLora],
        parameter_names: Iterable[str] | None = None,
        model: Path | None = None,
        rounding: LoraRounding | None = None,
        is_masked: bool = False,
        family: str | None = None,
    ) -> None:
        """Collect the changes of all LoRA files by parameter name.

        Args:
            weighted_loras: LoRA files in the order in which they are added.
            parameter_names: Tensor names of a model file in another layout, such as diffusers'.
            model: File of the model, for messages.
            rounding: How changed 16-bit weights are rounded; None rounds to the nearest.
            is_masked: Whether the changes cannot be merged because their ranks are masked by the noise level.
            family: Family of the model if the caller knows it.
        """
        self._is_masked = is_masked
        self._family = family
        lora_families = {weighted_lora.lora.trusted_family for weighted_lora in weighted_loras}
        lora_family = lora_families.pop() if len(lora_families) == 1 else None
        is_for_model = lora_family is not None and lora_family.name == family
        # family of the model and of all files, to search only its layouts; None searches all families
        self._common_family = lora_family if is_for_model else None
        self._weighted_loras = tuple(weighted_loras)
        self._rounding = rounding
        self._path = model
        self._model = "this model" if model is None else str(model)
        # parameter, as in `lora_unet_blocks_0_ffn_0.weight` -> its changes by all LoRAs
        self._changes_by_key: dict[str, list[Change]] = {}
        for weighted_lora in weighted_loras:
            for lora_module, delta in read_deltas(weighted_lora.lora.modules()).items():
                for change in list_changes(weighted_lora, delta):
                    key = f"{lora_module}.{change.parameter_name}"
                    self._changes_by_key.setdefault(key, []).append(change)
        # parameter -> its changes that are not merged: see `networks.unmerged_loras`
        self.unmerged: dict[str, list[Change]] = {}
        self._keys_in_model: set[str] = set()  # keys, in any layout, of weights that were passed in
        # id of a `WeightedLora` -> its keys that change a weight
        self._applied_keys: dict[int, set[str]] = {
            id(weighted_lora): set() for weighted_lora in weighted_loras
        }
        # id of a `WeightedLora` -> clause about its first layer if the input channels differ
        self._channel_errors: dict[int, str] = {}
        self._modules: dict[str, None] = {}  # modules of the weights passed in so far, in order
        # parameter -> its changes that match the patterns; filled by `_find_changes`
        self._changes_by_parameter: dict[str, list[FoundChange]] = {}
        # module name in the model file -> our name; {} if no family has such modules
        self._our_module_names: dict[str, str] = {}
        modules = dict.fromkeys(split_tensor_name(name)[0] for name in parameter_names or ())
        model_family = select_family(modules, family)
        if model_family is not None:
            self._our_module_names = {module: from_alias(module, model_family) for module in modules}

    def __call__(self, name: str, weight: Tensor, target: torch.dtype | None = None) -> Tensor:
        """Return the changed weight as a new tensor, or `weight` itself if nothing changes it.

        Args:
            name: Name of the weight.
            weight: The weight; it is not modified.
            target: Dtype that the caller will round the result to; None for the weight's dtype.

        Raises:
            CheckpointError: If a LoRA's shape does not match the weight.
        """
        return self.add_to(name, weight.clone(), target) if self._find_changes(name) else weight

    def add_to(self, name: str, weight: Tensor, target: torch.dtype | None = None) -> Tensor:
        """Add the LoRAs to a weight in place and return it; on the meta device, only compare shapes.

        1. Find the changes of this weight, and split its rows into blocks to save memory.
        2. If some rows are sampled, use them to select how the sums are rounded.
        3. For each block, sum the changes and round the changed values to the weight's dtype.

        A change of the first layer for a different number of input channels is skipped; `check` reports it.

        Args:
            name: Name of the weight.
            weight: The weight.
            target: Dtype that the caller will round the result to; None for the weight's dtype.

        Raises:
            CheckpointError: If the shape of a LoRA does not fit the weight.
        """
        changes = self._fit_changes(name, weight)  # raises if a shape does not fit
        if weight.is_meta:
            return weight
        blocks = _split_rows(weight, changes)
        if not blocks:
            return weight
        if weight.device != CPU or any(change.delta.rotation is not None for change in changes):
            # once for all blocks; this also computes the matrices of rotations, even on the CPU
            changes = [change.to(weight.device) for change in changes]
        dtype = narrow_dtype(weight.dtype, target)
        is_replaced = any(change.replaces_weight for change in changes)
        can_lose_changes = dtype is not None and not is_replaced
        sample = None  # some rows; `_select_rounding` uses them to estimate how much rounding would lose
        if can_lose_changes and self._rounding is not None and self._rounding.needs_samples:
            sample = SampledRows(weight)
        is_single_block = blocks == [None]
        if is_single_block:
            # a replacement is written into a float32 copy, so that it is rounded only once
            original = weight.to(torch.float32, copy=True) if is_replaced else weight
            total = _sum_changes(changes, None, original, sample)
            random_rounding = self._select_rounding(name, weight.device, dtype, sample)
            _round_into(weight, original, total, random_rounding)
            return weight
        if sample is not None:  # fill the sample first, because it decides how all blocks are rounded
            _sum_changes(changes, sample.rows, weight[sample.rows], sample)
        random_rounding = self._select_rounding(name, weight.device, dtype, sample)
        num_rounded = 0  # number of elements; the random numbers depend on the position in the weight
        for rows in blocks:
            block = weight[rows]
            _round_into(block, block, _sum_changes(changes, rows, block), random_rounding, start=num_rounded)
            num_rounded += block.numel()
        return weight

    def sample_changes(self, name: str, weight: Tensor) -> SampledRows | None:
        """Return some rows of a weight with what each LoRA adds to them; None if a LoRA replaces the weight.

        Args:
            name: Name of the weight.
            weight: The weight; it is not modified.

        Raises:
            CheckpointError: If the shape of a LoRA does not fit the weight.
        """
        changes = self._fit_changes(name, weight)
        if not changes or any(change.replaces_weight for change in changes):
            return None
        sample = SampledRows(weight)
        is_single_block = _split_rows(weight, changes) == [None]
        rows = None if is_single_block else sample.rows
        _sum_changes(changes, rows, weight if rows is None else weight[rows], sample)
        return sample

    def _select_rounding(
        self, name: str, device: torch.device, dtype: torch.dtype | None, sample: SampledRows | None
    ) -> RandomRounding | None:
        """Return the stochastic rounding of a parameter; None if it is rounded to the nearest."""
        if self._rounding is None or not self._rounding.decide_and_count(dtype, sample):
            return None
        assert dtype is not None
        # the seed depends only on our name and the factors, so a model is rounded equally in any layout
        module, parameter_name = split_tensor_name(name)
        factors: list[Tensor] = []
        for found_change in self._find_changes(name):
            factors += found_change.change.delta.factors.values()
        seed = compute_rounding_seed(
            f"{self._our_module_names.get(module, module)}.{parameter_name}", factors
        )
        return self._rounding.make_random_rounding(dtype, device, seed)

    def leave_unmerged(self, name: str, shape: tuple[int, ...]) -> bool:
        """Record changes of a weight that stays quantized in `unmerged`, to be applied at run time.

        Some changes must be merged instead: DoRA, which depends on the weight; a full matrix, which is as
        large as the weight; a change that replaces the weight.

        Returns:
            True if the changes were recorded or there are none; False, with nothing recorded, if one must be
            merged.

        Raises:
            CheckpointError: If the shape of a LoRA does not fit the weight.
        """
        placeholder = torch.empty(1).expand(shape)  # takes no memory
        changes = self._fit_changes(name, placeholder)
        if any(change.delta.normalization is not None or change.delta.has_full_matrix for change in changes):
            return False
        if changes and not self._is_masked:
            # biases are not quantized, so their changes are merged
            changes = [replace(change, delta=change.delta.without_bias()) for change in changes]
        if changes:
            self.unmerged[name] = changes
        return True

    def _fit_changes(self, name: str, weight: Tensor) -> list[Change]:
        """Return the changes of a parameter, fitted to it; raise CheckpointError if a size differs."""
        found_changes = self._find_changes(name)
        if found_changes and name.endswith(FIRST_LAYERS):
            found_changes = self._drop_other_channels(found_changes, weight)
        for found in found_changes:
            self._applied_keys[id(found.change.weighted_lora)].add(found.key)
        fitted_changes: list[Change] = []
        for _, change, related in _join_equal_rotations(found_changes):
            fitted = change.fit(related, weight, name, self._model)
            was_expanded = change.delta.has_row_range and not fitted.delta.has_row_range
            if was_expanded:  # each part (q, k, v) became the change of the whole layer: keep only the first
                first_row, _ = read_row_range(change.delta.factors)
                if first_row > 0:
                    continue
            fitted_changes.append(fitted)
        return fitted_changes

    def _drop_other_channels(self, found_changes: Sequence[FoundChange], weight: Tensor) -> list[FoundChange]:
        """Drop changes of a first layer with another number of input channels, which `check` reports."""
        # A text-to-video LoRA for an image-to-video model has such a layer: the rest of the LoRA is used.
        remaining: list[FoundChange] = []
        for found in found_changes:
            channel_error = found.change.delta.describe_channel_mismatch(weight)
            if channel_error is None:
                remaining.append(found)
            else:
                self._channel_errors[id(found.change.weighted_lora)] = channel_error
        return remaining

    @torch.no_grad()
    def bake(self, network: nn.Module, to_published_name: Callable[[str], str] = str) -> None:
        """Merge the changes into a loaded network, whose weights may be sharded; call `check` afterwards.

        Args:
            network: The network.
            to_published_name: Maps a parameter name of the network to the name in published checkpoints.
        """
        for name, parameter in network.named_parameters(remove_duplicate=False):
            if self.changes_parameter(to_published_name(name)):
                set_weight(parameter, self(to_published_name(name), gather_weight(parameter.data)))

    def changes_parameter(self, name: str) -> bool:
        """Return whether any LoRA file changes the parameter of this name."""
        return bool(self._find_changes(name))

    def check(self) -> None:
        """Warn of LoRA modules that the model lacks, and of LoRAs trained for a different model.

        Raises:
            CheckpointError: If the model lacks all modules of a LoRA.
        """
        self.reject_misfits()
        family = select_family(self._modules, self._family or LIKELY_MODEL)
        for weighted_lora in self._weighted_loras:
            selected_keys = self._list_selected_keys(weighted_lora)
            changes_only_text_encoders = not selected_keys and weighted_lora.lora.text_tensors
            if not changes_only_text_encoders:
                self._report_use(weighted_lora, selected_keys, family)
        if self._rounding is not None:
            self._rounding.report(len(self.unmerged))

    def _report_use(
        self, weighted_lora: WeightedLora, selected_keys: Sequence[str], family: FamilyNames | None
    ) -> None:
        """Log how many weights a LoRA changed; warn of modules that the model lacks and of other families."""
        lora = weighted_lora.lora
        absent_keys = [key for key in selected_keys if key not in self._keys_in_model]
        if id(weighted_lora) in self._channel_errors:
            logger.warning(
                f"{lora.path}: {self._channel_errors[id(weighted_lora)]}; the rest is used without it"
            )
        # True only for projections of a text encoder; `reject_misfits` has rejected all other such LoRAs
        are_all_absent = bool(selected_keys) and len(absent_keys) == len(selected_keys)
        num_applied = len(self._applied_keys[id(weighted_lora)])
        if not are_all_absent and num_applied == 0:
            logger.warning(f"{lora.path} changes nothing, because its patterns leave no tensor that fits")
            return
        if not are_all_absent:
            logger.info(
                f"{lora.path}: {num_applied} weights changed, multiplier {weighted_lora.multiplier:g}"
            )
        rank_rule = read_rank_rule(lora.metadata)
        # a merged T-LoRA has all ranks active at all noise levels
        if rank_rule is not None and not self._is_masked:
            logger.warning(rank_rule.explain_merging(lora.path))
        warn_about_other_family(lora, family, self._modules)
        if absent_keys:
            warn_about_absent_modules(
                lora.path,
                absent_keys,
                total=len(selected_keys),
                statement=f"weights are not in {self._model}",
                model=family,
                modules=self._modules,
                encoder=lora.encoder,
            )

    def reject_misfits(self) -> None:
        """Raise CheckpointError if the model lacks all modules of a LoRA."""
        for weighted_lora in self._weighted_loras:
            keys = self._list_selected_keys(weighted_lora)
            if keys and not self._keys_in_model.intersection(keys) and not weighted_lora.lora.may_lack(keys):
                if not weighted_lora.lora.encoder:
                    reject_unknown(weighted_lora.lora)
                raise self._make_misfit_error(weighted_lora.lora, keys)

    def _make_misfit_error(self, lora: LoraFile, keys: list[str]) -> CheckpointError:
        """Return the error for a LoRA whose modules the model lacks."""
        family = select_family(self._modules, self._family or LIKELY_MODEL)
        if self._path is not None and family is None and not lora.encoder:
            return CheckpointError(
                f"{self._model} is not a transformer that LoRAs can be merged into: it has modules such as "
                f"{list_some(list(self._modules), 3)}.\n  Pass the model's own file.",
                self._path,
            )
        text_parts = describe_text_side(keys)
        if text_parts:
            return CheckpointError(
                f"{lora.path} changes only {text_parts}, which are not in {self._model}.\n"
                "  Merge it into the model's file with merge_lora.py.",
                self._path or lora.path,
            )
        names_in_file = keys
        if lora.encoder:
            names_in_file = [f"{lora.encoder}_{key.removeprefix(OURS)}" for key in keys]
        return CheckpointError(
            f"{lora.path} does not fit {self._model}, which has none of its {len(keys)} weights, such as "
            f"{list_some(names_in_file, 2)}.{_explain_other_family(lora, family)}\n"
            "  Pass a LoRA that was trained for this model.",
            self._path or lora.path,
        )

    def _find_changes(self, name: str) -> list[FoundChange]:
        """Return the changes of a model parameter (cached), and record its keys and module as present."""
        # A LoRA may name the parameter's module itself, a part of it (q for qkv), or a module that contains
        # it.
        if name in self._changes_by_parameter:
            return self._changes_by_parameter[name]
        module, parameter_name = split_tensor_name(name)
        module = self._our_module_names.get(module, module)
        self._modules.setdefault(module)  # a dictionary as an ordered set
        lora_modules: list[tuple[str, RelatedModule | None]] = [(module, None)]  # None: the module itself
        family = self._common_family
        if family is None or family.parts or family.joined:  # otherwise it has no fused weights
            lora_modules += [(related.name, related) for related in related_modules(module, family)]
        changes: list[FoundChange] = []
        for lora_module, related in lora_modules:
            key = f"{OURS}{lora_module}.{parameter_name}"
            self._keys_in_model.add(key)
            for change in self._changes_by_key.get(key, []):
                if change.weighted_lora.selects(change.delta.factors, OURS + lora_module, OURS + module):
                    changes.append(FoundChange(key, change, related))
        self._changes_by_parameter[name] = changes
        return changes

    def _list_selected_keys(self, weighted_lora: WeightedLora) -> list[str]:
        """Return the keys of those changes of a LoRA that its patterns select."""
        applied_keys = self._applied_keys[id(weighted_lora)]
        selected_keys: list[str] = []
        for key, changes in self._changes_by_key.items():
            module = key.partition(".")[0]
            for change in changes:
                if change.weighted_lora is not weighted_lora:
                    continue
                # an applied key may match only by the module's name in the model, which is not known here
                if key in applied_keys or weighted_lora.selects(change.delta.factors, module):
                    selected_keys.append(key)
        return selected_keys


class OriginalWeights:
    """Weight patch that keeps the original weights of all modules that LoRAs change, for switching LoRAs.

    Load the model with this as `Placement.patch`; then `switch` adds LoRAs to the originals, in the same
    dtype, on the same device and in the same order as loading does, so the weights are bit-identical.
    The originals are kept in host memory. 8-bit weights and swapped blocks are not supported.
    """

    def __init__(
        self,
        weighted_loras: Sequence[WeightedLora],
        to_published_name: Callable[[str], str] = str,
        rounding: str = NEAREST,
    ) -> None:
        """Prepare to keep the original weights that any of the LoRAs changes.

        Args:
            weighted_loras: All LoRAs that may be switched to.
            to_published_name: Maps a parameter name of the network to the name in published files.
            rounding: A value of --lora_rounding.
        """
        self._patch_of_all_loras = LoraPatch(weighted_loras)
        self._to_published_name = to_published_name
        self._rounding = LoraRounding(rounding)
        self._originals: dict[str, Tensor] = {}

    def __call__(self, name: str, weight: Tensor, target: torch.dtype | None = None) -> Tensor:
        """Keep a copy of the weight if a LoRA changes it; return the weight unchanged.

        Args:
            name: Name of the weight.
            weight: The weight.
            target: Not used: `switch` reads the dtype from the network.

        Raises:
            CheckpointError: If the shape of a LoRA does not fit the weight.
        """
        name_in_file = self._to_published_name(name)
        # on the meta device, `add_to` only compares shapes and records which changes apply
        self._patch_of_all_loras.add_to(name_in_file, to_meta_tensor(weight))
        if self._patch_of_all_loras.changes_parameter(name_in_file):
            self._originals[name] = weight.detach().to(CPU, copy=True)
        return weight

    def keep(self, network: nn.Module) -> None:
        """Keep the original weights of a network that was loaded without this patch."""
        for name, parameter in network.named_parameters():
            self(name, parameter)

    def check(self) -> None:
        """Warn of LoRA modules that the model lacks; raise CheckpointError if it lacks a whole LoRA."""
        self._patch_of_all_loras.check()

    @torch.no_grad()
    def switch(self, network: nn.Module, weighted_loras: Sequence[WeightedLora]) -> None:
        """Restore the original weights of the loaded network and add these LoRAs to them."""
        patch = LoraPatch(weighted_loras, rounding=self._rounding)
        for name, original in self._originals.items():
            parameter = network.get_parameter(name)
            weight = patch(self._to_published_name(name), original.to(parameter.device), parameter.dtype)
            parameter.copy_(weight)
        self._rounding.report()


def check_loras_fit(
    model: Path,
    weighted_loras: Sequence[WeightedLora],
    companion: Path | None = None,
    family: str | None = None,
) -> None:
    """Compare names and shapes of LoRAs with the header of a transformer file before it is loaded.

    Args:
        model: The transformer file.
        weighted_loras: LoRA files with their strengths.
        companion: File with additional tensors of the model; None if there is none.
        family: Family of the model if the caller knows it.

    Raises:
        CheckpointError: If the shape of a LoRA does not fit, or if the model lacks all of its modules.
    """
    if not weighted_loras:
        return
    with contextlib.ExitStack() as opened:
        checkpoint = opened.enter_context(open_checkpoint(model))
        if companion is not None:
            checkpoint = checkpoint.join(opened.enter_context(open_checkpoint(companion)))
        if any(weighted_lora.lora.depth_variants for weighted_lora in weighted_loras):
            weighted_loras = fit_depths(weighted_loras, checkpoint.tensors, model)
        patch = LoraPatch(weighted_loras, checkpoint.tensors, model, family=family)
        for name, info in checkpoint.tensors.items():
            # on the meta device, `add_to` only compares shapes; both calls record which modules exist
            if info.packing is None or info.packing.pad == 1:
                patch.add_to(name, to_meta_tensor(info))
            else:  # padded rows: the stored shape may exceed the weight's, so only compare names
                patch.changes_parameter(name)
    patch.reject_misfits()
