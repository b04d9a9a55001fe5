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
from networks import deltas
from networks.delta import Delta, read_deltas
from networks.deltas import CPU, ROWS, SET
from networks.depth_variants import fit_depths
from networks.fused_parts import FusedPiece, default_rows, is_cut, join_rotations, part_rows
from networks.key_formats import module_of_tensor
from networks.kinds.algebra import MismatchError
from networks.kinds.composing import OF_MAGNITUDES
from networks.loading import LoraFile, LoraUse, reject_unknown, warn_of_absent, warn_of_other_family
from networks.module_names import RelatedModule, alias, related_modules, select_family
from networks.names.layouts import FIRST_LAYERS, OURS
from networks.rank_masks import rule_of
from networks.rounding import (
    SMALL_WEIGHT,
    LoraRounding,
    RandomRounding,
    SampledRows,
    narrow_dtype,
    seed_of,
)
from networks.unused_tensors import text_side_of
from networks.use_options import NEAREST
from runtime.offload.sharding import gather_weight, set_weight

logger = getLogger(__name__)
# family of the model in messages if its names match several families: in diffusers' layout all names of
# HunyuanVideo are also names of FramePack
LIKELY_MODEL = "hunyuan_video"
_NEEDS_WHOLE_WEIGHT = (
    f"{OF_MAGNITUDES} magnitudes by input are of the whole weight, the model has parts of it"
)
_BLOCK_ELEMENTS = 1 << 20  # elements of a weight that are changed at once: 4 MB in float32


@dataclass(frozen=True)
class Change:
    """The effect of one LoRA on one parameter of a model, scaled by `use.multiplier`."""

    use: LoraUse
    delta: Delta
    leaf: str = "weight"  # or bias
    rows: slice | None = None  # rows of the parameter that the LoRA is for; None: all
    rotations: Tensor | None = None  # matrices of `InputRotation.make`; None until `to` computes them

    def shape(self) -> tuple[int, ...]:
        """Return the shape of the addition, or of the replacement weight.

        Raises:
            MismatchError: If the shapes of the factors do not match.
        """
        if self.leaf == "bias":
            bias = self.delta.bias(CPU)
            assert bias is not None
            return tuple(bias.shape)
        if self.delta.sets_weight:
            return tuple(self.delta.factors[SET].shape)
        shape = self.delta.shape()
        assert shape is not None
        return shape

    def fit(
        self, relative: RelatedModule | None, weight: Tensor, name: str, model: str, option: str = ""
    ) -> "Change":
        """Return the change fitted to a weight, which may be a part of the LoRA's module or contain it.

        Args:
            relative: How the weight and the LoRA's module are related; None if they are the same.
            weight: The weight.
            name: Name of the weight, for messages.
            model: Name of the model, for messages.
            option: Option that names the file, for messages.

        Raises:
            CheckpointError: If the shapes differ.
        """
        path = self.use.lora.path
        if self.delta.rotation is not None:  # its shape is not that of the weight
            return self._fit_rotation(relative, weight, name, f"{option}{path} does not fit {model}")
        # the computation of the shape also checks that the factors match
        try:
            if self.delta.is_part and self.delta.has_input_magnitudes:
                # a part of a LoRA layer, with DoRA magnitudes that need the norms of the whole layer
                change = self._join_factors(relative, weight)
            else:
                change = self if relative is None else self._place_factors(relative, weight)
            shape = list(change.shape())
        except MismatchError as error:
            raise CheckpointError(
                f"{path}: the factors for {name} do not go together ({error}).", path
            ) from error
        # a change with `rows` is only for these rows of the weight
        expected = list((weight if change.rows is None else weight[change.rows]).shape)
        # the magnitudes of a DoRA are checked below, even if the shape fits
        if shape == expected and change.delta.normalization is None:
            return change
        # other shapes may have the same elements; with a normalization, the number of magnitudes must fit too
        reason = change._describe_error(shape, expected)
        if reason:
            raise CheckpointError(f"{option}{path} does not fit {model}: for {name} it has {reason}", path)
        return change

    def _fit_rotation(
        self, relative: RelatedModule | None, weight: Tensor, name: str, misfit: str
    ) -> "Change":
        """Return an input rotation fitted to a weight.

        The rotation applies to all rows of the weight, or only to the rows of one part if the LoRA's module
        is that part.

        Args:
            relative: How the weight and the LoRA's module are related; None if they are the same.
            weight: The weight.
            name: Name of the weight.
            misfit: Start of the message, which says which file does not fit which model.

        Raises:
            CheckpointError: If the rotation does not fit.
        """
        path = self.use.lora.path
        rotation = self.delta.rotation
        assert rotation is not None
        reason = rotation.find_misfit(self.delta.factors[rotation.part], weight, name)
        if reason:
            raise CheckpointError(f"{misfit}: {reason}", path)
        if relative is None or not relative.is_part:
            return self
        rows = default_rows(relative.part, len(weight))
        if rows is None:
            raise CheckpointError(
                f"{misfit}: {relative.name} is a part of {name}, whose {len(weight)} rows are not those of a "
                f"published model.\n  Give {rotation.title} that was trained for this model.",
                path,
            )
        return self if rows == slice(0, len(weight)) else replace(self, rows=rows)

    def _describe_error(self, shape: list[int], expected: list[int]) -> str:
        """Return why the change does not fit, as the end of a sentence "it has ..."; "" if it fits.

        Args:
            shape: Shape of the change.
            expected: Shape of the rows of the parameter that the change is for.
        """
        if math.prod(shape) != math.prod(expected) or shape[:1] != expected[:1]:
            families = " or ".join(family.name for family in self.use.lora.families())
            kind = f" It is for {families}." if families else ""
            return f"{shape}, the model {expected}.{kind}\n  Give a LoRA that was trained for this model."
        magnitudes = self.delta.magnitudes
        if magnitudes is None or self.leaf != "weight":
            return ""
        # one magnitude for each input or output
        axis = 1 if self.delta.has_input_magnitudes else 0
        if len(expected) > 1 and magnitudes.numel() == expected[axis]:
            return ""
        return f"{magnitudes.numel()} {OF_MAGNITUDES} magnitudes, the model {expected}."

    def _join_factors(self, relative: RelatedModule | None, weight: Tensor) -> "Change":
        """Return the change of the whole LoRA layer that this change is one part of.

        DoRA magnitudes by input need the norms of the whole layer, which the weight must therefore contain.

        Args:
            relative: How the weight and the part are related; None if they are the same.
            weight: The weight.

        Raises:
            MismatchError: If the weight holds only a part of the layer.
        """
        size = self.delta.size()
        first_row, end_row = deltas.rows_in(self.delta.factors)  # rows of the layer that this change has
        # only a weight that contains the part's layer has all its rows
        if relative is None or not relative.is_part or not is_cut(relative.part) or size is None:
            raise MismatchError(_NEEDS_WHOLE_WEIGHT)
        rows = part_rows(relative.part, end_row - first_row, len(weight))
        if not isinstance(rows, slice):
            raise MismatchError(_NEEDS_WHOLE_WEIGHT)
        layer_start = rows.start - first_row  # row of the weight at which the layer begins
        # without `ROWS`, the factors are those of the whole layer
        factors = {part: tensor for part, tensor in self.delta.factors.items() if part != ROWS}
        whole = replace(self.delta, factors=factors)
        return replace(self, delta=whole, rows=slice(layer_start, layer_start + size[0]))

    def _place_factors(self, relative: RelatedModule, weight: Tensor) -> "Change":
        """Return the change for a related weight: a part of the LoRA's module, or one that contains it.

        If the numbers of rows do not match, the change is returned unchanged, and `fit` reports its shape.

        Raises:
            MismatchError: If the part has as many rows as the whole, or if magnitudes need the whole weight.
        """
        num_rows = self.shape()[0]
        weight_rows = len(weight)
        if relative.is_part:
            rows_of_part = num_rows
            rows_of_whole = weight_rows
            relation = "it is a part of the weight"
        else:
            rows_of_part = weight_rows
            rows_of_whole = num_rows
            relation = "the weight is a part of it"
        if is_cut(relative.part) and rows_of_part >= rows_of_whole:
            raise MismatchError(
                f"{relative.name} has {num_rows} rows, the weight {weight_rows}, although {relation}"
            )
        rows = part_rows(relative.part, rows_of_part, rows_of_whole)
        # the LoRA's module is a part of the weight: only these rows are changed
        if isinstance(rows, slice) and relative.is_part:
            return replace(self, rows=rows)
        # None: the numbers of rows do not match; all rows: there is nothing to cut
        if rows is None or rows == slice(0, num_rows):
            return self
        # the weight is a part of the LoRA's module: take only its rows of the change
        if self.delta.has_input_magnitudes:
            raise MismatchError(_NEEDS_WHOLE_WEIGHT)
        cut = self.delta.rows(rows)
        if cut is None:  # a LoKr has no factors for single rows: compute the full matrix, then slice it
            cut = self.delta.dense_rows(rows, weight.device)
        return replace(self, delta=cut)

    @property
    def sets_weight(self) -> bool:
        """Return whether this change replaces the weight and all earlier changes, as in ComfyUI."""
        return self.delta.sets_weight and self.leaf == "weight" and self.use.multiplier != 0

    def add_to(self, total: Tensor, block: slice | None, weight: Tensor) -> None:
        """Add the change to `total`, the float32 sum of changes for some rows of the parameter.

        Args:
            total: Sum of changes of these rows, changed in place.
            block: Rows of the parameter, possibly with a step; None for all.
            weight: These rows before any change, float32. A change that replaces the weight is written into
                them.
        """
        # the change is only for some rows: find those that are in the block
        if self.rows is not None:
            overlap = _find_overlap(self.rows, block, len(total))
            if overlap is None:
                return
            block = overlap.in_change
            total = total[overlap.in_block]
            weight = weight[overlap.in_block]
        rotation = self.delta.rotation
        if rotation is not None:  # the rotation includes the multiplier
            rotations = self.rotations
            if rotations is None:
                rotations = self._make_rotations(total.device)
            total.add_(rotation.of_weight(weight, rotations))
            return
        delta = self.delta
        if block is not None:  # a LoKr, for which `rows` returns None, is never split into blocks
            delta = self.delta.rows(block) or self.delta
        if self.leaf == "bias":
            addition = delta.bias(total.device)
        elif delta.sets_weight:
            # it replaces the weight and all earlier changes; at a multiplier of 0 it does nothing
            if self.sets_weight:
                weight.copy_(delta.factors[SET].reshape(weight.shape))
                total.zero_()
            return
        elif delta.normalization is None:
            addition = delta.dense(total.device)
        else:
            addition = delta.addition(weight, total.device, self.use.lora.has_frozen_norms)
        assert addition is not None
        total.add_(addition.reshape(total.shape), alpha=self.use.multiplier)

    def _make_rotations(self, device: torch.device) -> Tensor:
        """Return R - I of the input rotation at the strength of the LoRA, on a device."""
        rotation = self.delta.rotation
        assert rotation is not None
        return rotation.make(self.delta.factors[rotation.part].to(device), self.use.multiplier)

    def to(self, device: torch.device) -> "Change":
        """Return the change with its factors on a device; an input rotation also gets its matrices."""
        if self.delta.rotation is not None:
            return replace(self, rotations=self._make_rotations(device))
        return replace(self, delta=self.delta.to(device))


def changes_of(use: LoraUse, delta: Delta) -> list[Change]:
    """Return the changes that a LoRA makes to a module's bias and weight."""
    changes: list[Change] = []
    parts = delta.factors.keys()
    if parts & deltas.OF_BIAS:
        changes.append(Change(use, delta, "bias"))
    if parts - deltas.OF_BIAS - {"alpha"}:
        changes.append(Change(use, delta, "weight"))
    return changes


class FoundChange(NamedTuple):
    """A change that applies to a parameter, possibly under the module name of another layout."""

    key: str  # module and leaf as the LoRA names them: `lora_unet_x.weight`
    change: Change
    relative: (
        RelatedModule | None
    )  # how the parameter and the LoRA's module are related; None: the same module


class _Overlap(NamedTuple):
    """The rows that a block of a parameter and a change have in common."""

    in_block: slice  # indices into the block
    in_change: slice  # indices into the change's own rows; has the step of the block


def _find_overlap(change: slice, block: slice | None, num_rows: int) -> _Overlap | None:
    """Return the rows of a block that a change of some rows of the parameter affects; None if there are none.

    Args:
        change: Rows of the parameter that the change is for.
        block: Rows of the parameter in the block, possibly with a step; None for all.
        num_rows: Number of rows in the block.
    """
    start = 0 if block is None else block.start
    step = 1 if block is None else block.step or 1
    # row i of the block is row start + i * step of the parameter; find the i whose row is in the change
    first = max(0, ceil_div(change.start - start, step))
    end = min(num_rows, ceil_div(change.stop - start, step))
    if first >= end:
        return None
    # rows of the change count from its start: row i of the block is row offset + i * step of the change
    offset = start - change.start
    return _Overlap(slice(first, end), slice(offset + first * step, offset + end * step, step))


def _join_equal_rotations(found: Sequence[FoundChange]) -> list[FoundChange]:
    """Join the rotations of a parameter's parts into one for the whole parameter, if they are equal.

    Parts with different rotations stay separate; `Change.fit` then finds the rows of each.
    """
    pieces: dict[int, list[FusedPiece]] = {}  # by id of the `LoraUse`
    for key, change, relative in found:
        if change.delta.rotation is not None and relative is not None and relative.is_part:
            piece = FusedPiece(key, relative.part, change.delta.factors)
            pieces.setdefault(id(change.use), []).append(piece)
    # `join_rotations` returns the reason as a string if rotations differ
    uses_with_equal_rotations = {
        use_id for use_id, parts in pieces.items() if not isinstance(join_rotations(parts), str)
    }
    joined: list[FoundChange] = []
    for found_change in found:
        use_id = id(found_change.change.use)
        is_piece = any(piece.name == found_change.key for piece in pieces.get(use_id, ()))
        if not is_piece or use_id not in uses_with_equal_rotations:
            joined.append(found_change)
        elif found_change.key == pieces[use_id][0].name:
            # the first part stands for all of them; the other parts are dropped
            joined.append(found_change._replace(relative=None))
    return joined


def _split_rows(weight: Tensor, changes: Sequence[Change]) -> list[slice] | list[None]:
    """Split the rows of a weight into blocks, which are changed one after another to save memory.

    A small weight, one that is replaced, or a change that cannot be cut by rows (LoKr) is not split.

    Returns:
        [None] for all rows at once; [] if there is nothing to change.
    """
    if not changes or not weight.numel():
        return []
    if weight.ndim == 0 or any(change.sets_weight for change in changes):
        return [None]
    num_rows = len(weight)
    rows_per_block = max(1, _BLOCK_ELEMENTS * num_rows // weight.numel())
    # `rows` returns None for a change that cannot be cut, whichever rows are asked for
    if rows_per_block >= num_rows or any(change.delta.rows(slice(0, 1)) is None for change in changes):
        return [None]
    starts = range(0, num_rows, rows_per_block)
    return [slice(start, min(start + rows_per_block, num_rows)) for start in starts]


def _sum_changes(
    changes: Sequence[Change], rows: slice | None, weight: Tensor, sample: SampledRows | None = None
) -> Tensor:
    """Return the sum of changes for some rows of a parameter, float32.

    Args:
        changes: Changes of the parameter.
        rows: Rows of the parameter to compute; None for all.
        weight: Original values of these rows. A change that replaces the weight is written into them.
        sample: Records what each file adds to the sampled rows; None to record nothing. If `rows` is given
            too, the rows must be the sampled ones.
    """
    total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    for change in changes:
        change.add_to(total, rows, weight)
        if sample is not None:
            sample.record_sum(change.use.lora.path, sample.of(total) if rows is None else total)
    return total


def _round_into(
    weight: Tensor, base: Tensor, total: Tensor, at_random: RandomRounding | None, start: int = 0
) -> None:
    """Write the sum of the base values and the changes into some elements of a parameter.

    Args:
        weight: Elements of the parameter, changed in place.
        base: Values of the elements before the changes.
        total: Sum of the changes.
        at_random: Source of stochastic rounding; None rounds to the nearest value.
        start: Number of elements of the parameter that precede these.
    """
    # a small weight is rounded several times, and the draw that alters the change least is kept
    change = total.clone() if at_random is not None and weight.numel() <= SMALL_WEIGHT else None
    total.add_(base)
    # start 0: the whole weight, not a later block of it
    if at_random is not None and change is not None and start == 0:
        at_random.round_small(total, change)
    elif at_random is not None:
        at_random.round(total, start)
    weight.copy_(total)


class LoraPatch:
    """Add LoRAs to weights by name: `patch(name, weight) -> weight`, a `WeightPatch`.

    The result is W + multiplier * (alpha / rank) * up @ down, or W R^T for an input rotation R. The changes
    of all files are computed from the original W, summed in float32 on the weight's device and rounded once.
    DoRA adds multiplier * (new weight - W). A `set_weight` replaces W for its own file and all later files.
    After loading, `check()` reports changes without a weight, and the share that rounding keeps.
    """

    def __init__(
        self,
        uses: Sequence[LoraUse],
        parameter_names: Iterable[str] | None = None,
        model: Path | None = None,
        rounding: LoraRounding | None = None,
        is_masked: bool = False,
        family: str | None = None,
    ) -> None:
        """Read the changes of all files by parameter name.

        Args:
            uses: LoRA files in the order in which they are added.
            parameter_names: Tensor names of a model file in another layout, such as that of diffusers.
            model: File of the model, for messages.
            rounding: How changed 16-bit weights are rounded; None rounds to the nearest.
            is_masked: Whether the changes cannot be merged because their ranks are masked by the noise level.
            family: Family of the model if the caller knows it.
        """
        self._is_masked = is_masked
        self._family = family
        written_for = {use.lora.written_for for use in uses}
        common_family = written_for.pop() if len(written_for) == 1 else None
        # if the model and all files are of one family, search only its layouts; None searches all families
        self._layouts = common_family if common_family is not None and common_family.name == family else None
        self._uses = tuple(uses)
        self._rounding = rounding
        self._path = model
        self._model = "this model" if model is None else str(model)
        # "lora_unet_blocks_0_ffn_0.weight" -> its changes
        self._changes: dict[str, list[Change]] = {}
        for use in uses:
            for module, delta in read_deltas(use.lora.modules()).items():
                for change in changes_of(use, delta):
                    key = f"{module}.{change.leaf}"
                    self._changes.setdefault(key, []).append(change)
        # parameter -> its changes that are not merged: see `networks.unmerged_loras`
        self.unmerged: dict[str, list[Change]] = {}
        self._seen: set[str] = set()  # keys, in any layout, of weights that were passed in
        # id of a use -> its keys that change a weight
        self._used: dict[int, set[str]] = {id(use): set() for use in uses}
        # id of a use -> clause about the input channels of its first layer, if the model's number differs
        self._channel_errors: dict[int, str] = {}
        self._modules: dict[str, None] = {}  # modules of the weights passed in so far, as an ordered set
        # parameter -> its changes that match the patterns; filled by `_find`
        self._found: dict[str, list[FoundChange]] = {}
        # module name in the model's file -> our name; {} if no family has such modules
        self._renamed: dict[str, str] = {}
        modules = dict.fromkeys(module_of_tensor(name)[0] for name in parameter_names or ())
        names = select_family(modules, family)
        if names is not None:
            self._renamed = {module: alias(module, names) for module in modules}

    def __call__(self, name: str, weight: Tensor, target: torch.dtype | None = None) -> Tensor:
        """Return the changed weight as a new tensor, or `weight` itself if nothing changes it.

        Args:
            name: Name of the weight.
            weight: The weight; it is not changed.
            target: Dtype to which the caller rounds the changed weight; None for that of the weight.

        Raises:
            CheckpointError: If the shape of a LoRA does not fit the weight.
        """
        return self.add_to(name, weight.clone(), target) if self._find(name) else weight

    def add_to(self, name: str, weight: Tensor, target: torch.dtype | None = None) -> Tensor:
        """Change the weight in place and return it; on the meta device, only compare shapes.

        Rows are processed in blocks, so that no second copy of the weight is needed. A change of the first
        layer for a different number of input channels is skipped, and `check` reports it.

        Args:
            name: Name of the weight.
            weight: The weight.
            target: Dtype to which the caller rounds the changed weight; None for that of the weight.

        Raises:
            CheckpointError: If the shape of a LoRA does not fit the weight.
        """
        changes = self._fit_changes(name, weight)
        # on the meta device, `_fit_changes` has already compared the shapes
        blocks = [] if weight.is_meta else _split_rows(weight, changes)
        if not blocks:
            return weight
        if weight.device != CPU or any(change.delta.rotation is not None for change in changes):
            # once for all blocks; on the CPU only rotations need it, to compute their matrices
            changes = [change.to(weight.device) for change in changes]
        dtype = narrow_dtype(weight.dtype, target)
        sample = None  # some rows, which show how much rounding to 16 bits would lose
        base = weight
        if any(change.sets_weight for change in changes):
            # the change overwrites the values before the changes, which must not be rounded on the way
            base = weight.to(torch.float32, copy=True)
        elif dtype is not None and self._rounding is not None and self._rounding.needs_samples:
            sample = SampledRows(weight)
        if blocks == [None]:  # all rows at once: `_sum_changes` takes the sample on the way
            total = _sum_changes(changes, None, base, sample)
            at_random = self._select_rounding(name, weight.device, dtype, sample)
            _round_into(weight, base, total, at_random)
            return weight
        if sample is not None:  # the rounding is chosen before the first block, so compute the sample first
            _sum_changes(changes, sample.rows, weight[sample.rows], sample)
        at_random = self._select_rounding(name, weight.device, dtype, sample)
        start = 0
        for rows in blocks:
            part = weight[rows]
            total = _sum_changes(changes, rows, part)
            _round_into(part, part, total, at_random, start=start)
            start += part.numel()  # elements of the weight so far, which place its random numbers
        return weight

    def _select_rounding(
        self, name: str, device: torch.device, dtype: torch.dtype | None, sample: SampledRows | None
    ) -> RandomRounding | None:
        """Return the random rounding of a parameter; None if it is rounded to the nearest.

        Args:
            name: Name of the parameter.
            device: Device of the parameter.
            dtype: 16-bit dtype that the weight is rounded to; None if it stays in float32.
            sample: Rows on which rounding to the nearest is judged; None if no sample is needed.
        """
        if self._rounding is None or not self._rounding.decide_and_count(dtype, sample):
            return None
        assert dtype is not None
        # the seed depends on our name and the factors only: a model in any layout is rounded alike
        module, leaf = module_of_tensor(name)
        factors = [factor for found in self._find(name) for factor in found.change.delta.factors.values()]
        seed = seed_of(f"{self._renamed.get(module, module)}.{leaf}", factors)
        return self._rounding.make_random_rounding(dtype, device, seed)

    def leave_unmerged(self, name: str, shape: tuple[int, ...]) -> bool:
        """Record the changes of a weight kept in 8 or 4 bits in `unmerged`, to be applied at run time.

        Some changes must be merged instead: DoRA, which depends on the weight; a full matrix, which is as
        large as the weight; a change that replaces the weight.

        Returns:
            True if the changes were recorded or there are none; False, with nothing recorded, if one must be
            merged.

        Raises:
            CheckpointError: If the shape of a LoRA does not fit the weight.
        """
        # fitted to the shape, which raises for a LoRA of another model
        changes = self._fit_changes(name, torch.empty(1).expand(shape))  # a stand-in that takes no memory
        if any(change.delta.normalization is not None or change.delta.is_full for change in changes):
            return False
        if changes:
            self.unmerged[name] = changes
        return True

    def _fit_changes(self, name: str, weight: Tensor) -> list[Change]:
        """Return the changes of a parameter, fitted to it; raise CheckpointError if a size differs.

        Args:
            name: Name of the parameter.
            weight: The parameter, or a stand-in of its shape.
        """
        found_changes = self._find(name)
        rotations = [found for found in found_changes if found.change.delta.rotation is not None]
        if rotations:
            # rotations count as used before those of several parts are joined into one
            for key, change, _ in rotations:
                self._used[id(change.use)].add(key)
            found_changes = _join_equal_rotations(found_changes)
        fitted_changes = []
        for key, change, relative in found_changes:
            if name.endswith(FIRST_LAYERS):
                channel_error = change.delta.find_other_channels(weight)
                if channel_error is not None:
                    # left out: `find_other_channels` found that only the input channels differ
                    self._channel_errors[id(change.use)] = channel_error
                    continue
            self._used[id(change.use)].add(key)
            fitted = change.fit(relative, weight, name, self._model)
            # parts of a joined layer may become the change of the whole layer: only the first part adds it
            if change.delta.is_part and not fitted.delta.is_part:
                first_row, _ = deltas.rows_in(change.delta.factors)
                if first_row > 0:
                    continue
            fitted_changes.append(fitted)
        return fitted_changes

    @torch.no_grad()
    def bake(self, network: nn.Module, published: Callable[[str], str] = str) -> None:
        """Merge the changes into a loaded network, whose weights may be sharded; call `check` afterwards.

        Args:
            network: The network.
            published: Returns the name that a parameter has in published files.
        """
        for name, parameter in network.named_parameters(remove_duplicate=False):
            if self.touches(published(name)):
                set_weight(parameter, self(published(name), gather_weight(parameter.data)))

    def touches(self, name: str) -> bool:
        """Return whether any file changes the parameter of this name."""
        return bool(self._find(name))

    def check(self) -> None:
        """Warn of LoRA modules that the model lacks, and of LoRAs trained for another model.

        Raises:
            CheckpointError: If the model lacks all modules of a LoRA.
        """
        self.reject_misfits()
        family = select_family(self._modules, self._family or LIKELY_MODEL)
        for use in self._uses:
            path = use.lora.path
            keys = self._list_keys(use)  # names of the parameters that the LoRA's patterns select
            used = self._used[id(use)]  # those of them that changed a weight
            if not keys and use.lora.text_tensors:
                continue  # it changes only text encoders
            if id(use) in self._channel_errors:
                logger.warning(f"{path}: {self._channel_errors[id(use)]}; the rest is used without it")
            lacks_all = bool(keys) and not self._seen.intersection(keys)  # reported as absent below
            if not used and not lacks_all:
                logger.warning(f"{path} changes nothing, because its patterns leave no tensor that fits")
                continue
            if not lacks_all:
                logger.info(f"{path}: {len(used)} weights changed, multiplier {use.multiplier:g}")
            rule = rule_of(use.lora.metadata)
            # a T-LoRA that is merged acts with all ranks at all levels
            if not self._is_masked and rule is not None:
                logger.warning(f"{path} {rule.kind.merged}")
            warn_of_other_family(use.lora, family, self._modules)
            absent = [key for key in keys if key not in self._seen]
            if absent:
                warn_of_absent(
                    path,
                    absent,
                    total=len(keys),
                    what=f"weights are not in {self._model}",
                    model=family,
                    modules=self._modules,
                    encoder=use.lora.encoder,
                )
        if self._rounding is not None:
            self._rounding.report(len(self.unmerged))

    def reject_misfits(self) -> None:
        """Raise CheckpointError if the model lacks all modules of a LoRA."""
        for use in self._uses:
            keys = self._list_keys(use)
            if keys and not self._seen.intersection(keys) and not use.lora.may_lack(keys):
                raise self._make_misfit_error(use.lora, keys)

    def _make_misfit_error(self, lora: LoraFile, keys: list[str]) -> CheckpointError:
        """Return the error for a LoRA whose modules the model lacks.

        Args:
            lora: The LoRA file.
            keys: Names of the parameters that the LoRA changes.
        """
        if not lora.encoder:
            reject_unknown(lora)  # raises if no known model has modules of these names
        family = select_family(self._modules, self._family or LIKELY_MODEL)
        if self._path is not None and family is None and not lora.encoder:
            return CheckpointError(
                f"{self._model} is no transformer that a LoRA could be added to: it has modules such as "
                f"{list_some(list(self._modules), 3)}.\n  Give the model's own file.",
                self._path,
            )
        text_parts = text_side_of(keys)
        if text_parts:
            return CheckpointError(
                f"{lora.path} changes {text_parts} alone, which are not in {self._model}.\n"
                "  Merge it into the model's file with merge_lora.py.",
                self._path or lora.path,
            )
        # name them as in the file: with the prefix of the text encoder
        if lora.encoder:
            keys = [f"{lora.encoder}_{key.removeprefix(OURS)}" for key in keys]
        lora_family = lora.family()
        reason = ""
        if lora_family is not None and family is not None and lora_family is not family:
            reason = f" It is for {lora_family.name}, the model is {family.name}."
        return CheckpointError(
            f"{lora.path} does not fit {self._model}, which has none of its {len(keys)} weights, such as "
            f"{list_some(keys, 2)}.{reason}\n  Give a LoRA that was trained for this model.",
            self._path or lora.path,
        )

    def _find(self, name: str) -> list[FoundChange]:
        """Return the changes of a parameter, found by its own module name or that of another layout."""
        if name not in self._found:
            module, leaf = module_of_tensor(name)
            module = self._renamed.get(module, module)
            self._modules.setdefault(module)  # a dictionary as an ordered set
            # names under which a LoRA may change the module; None: its own name, else how the two are related
            relations: list[tuple[str, RelatedModule | None]] = [(module, None)]
            layouts = self._layouts
            # a family without fused or joined weights has no related names
            if layouts is None or layouts.parts or layouts.joined:
                relations += [(relative.name, relative) for relative in related_modules(module, layouts)]
            self._seen.update(f"{OURS}{relative_name}.{leaf}" for relative_name, _ in relations)
            changes: list[FoundChange] = []
            for relative_name, relative in relations:
                key = f"{OURS}{relative_name}.{leaf}"
                for change in self._changes.get(key, []):
                    if change.use.keeps(change.delta.factors, OURS + relative_name, OURS + module):
                        changes.append(FoundChange(key, change, relative))
            self._found[name] = changes
        return self._found[name]

    def _list_keys(self, use: LoraUse) -> list[str]:
        """Return the keys of a LoRA's changes that match its patterns."""
        keys: list[str] = []
        for key, changes in self._changes.items():
            module = key.partition(".")[0]
            for change in changes:
                if change.use is not use:
                    continue
                # a used key may match only by the module's name in the model, which is not known here
                if key in self._used[id(use)] or use.keeps(change.delta.factors, module):
                    keys.append(key)
        return keys


class OriginalWeights:
    """Keep the original weights of all modules that LoRAs change, for switching LoRAs; a `WeightPatch`.

    Load the model with this as `Placement.patch`; then `switch` adds LoRAs to the originals, in the same
    dtype, on the same device and in the same order as loading does, so that the weights are equal to the bit.
    The originals are kept in host memory. Weights in 8 bits and swapped blocks are not supported.
    """

    def __init__(
        self, uses: Sequence[LoraUse], published: Callable[[str], str] = str, rounding: str = NEAREST
    ) -> None:
        """Prepare to keep the weights that any of the LoRAs changes.

        Args:
            uses: All LoRAs that may be switched to.
            published: Returns the name that a parameter has in published files.
            rounding: A value of --lora_rounding.
        """
        self._all = LoraPatch(uses)
        self._published = published
        self._rounding = LoraRounding(rounding)
        self._originals: dict[str, Tensor] = {}

    def __call__(self, name: str, weight: Tensor, target: torch.dtype | None = None) -> Tensor:
        """Keep a copy of the weight if a LoRA changes it, and return the weight unchanged.

        Args:
            name: Name of the weight.
            weight: The weight.
            target: Unused here: `switch` reads the dtype from the network.

        Raises:
            CheckpointError: If the shape of a LoRA does not fit the weight.
        """
        # the name of the weight in published files, which LoRAs go by
        published = self._published(name)
        # on the meta device, `add_to` only compares shapes and notes which changes apply
        self._all.add_to(published, deltas.hollow(weight))
        if self._all.touches(published):
            self._originals[name] = weight.detach().to(CPU, copy=True)
        return weight

    def keep(self, network: nn.Module) -> None:
        """Keep the originals of a network that was loaded without this patch."""
        for name, parameter in network.named_parameters():
            self(name, parameter)

    def check(self) -> None:
        """Warn of LoRA modules that the model lacks; raise CheckpointError if it lacks all of a LoRA."""
        self._all.check()

    @torch.no_grad()
    def switch(self, network: nn.Module, uses: Sequence[LoraUse]) -> None:
        """Reset the loaded network to its original weights, with these LoRAs added."""
        patch = LoraPatch(uses, rounding=self._rounding)
        for name, original in self._originals.items():
            parameter = network.get_parameter(name)
            weight = patch(self._published(name), original.to(parameter.device), parameter.dtype)
            parameter.copy_(weight)
        self._rounding.report()


def check_loras_fit(
    model: Path, uses: Sequence[LoraUse], companion: Path | None = None, family: str | None = None
) -> None:
    """Compare names and shapes of LoRAs with the header of a transformer's file, before it is loaded.

    Args:
        model: File of the transformer.
        uses: LoRA files with their strengths.
        companion: File with additional tensors of the model; None if there is none.
        family: Family of the model if the caller knows it.

    Raises:
        CheckpointError: If the shape of a LoRA does not fit, or if the model lacks all of its modules.
    """
    if not uses:
        return
    with contextlib.ExitStack() as opened:
        checkpoint = opened.enter_context(open_checkpoint(model))
        if companion is not None:
            checkpoint = checkpoint.join(opened.enter_context(open_checkpoint(companion)))
        if any(use.lora.grown for use in uses):
            uses = fit_depths(uses, checkpoint.tensors, model)
        patch = LoraPatch(uses, checkpoint.tensors, model, family=family)
        for name, info in checkpoint.tensors.items():
            # `hollow`: only the shape of the tensor, no values
            if info.packing is None or info.packing.pad == 1:
                patch.add_to(name, deltas.hollow(info))
            else:  # padded rows: the stored shape may exceed that of the weight, so only compare names
                patch.touches(name)
    patch.reject_misfits()
