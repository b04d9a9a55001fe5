"""Split LoRAs for fused weights (such as qkv) into LoRAs for their parts, and join LoRAs for parts.

The height of a weight is its number of rows (output channels).
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoints.dialects import stack_heads
from modules.errors import CheckpointError
from networks import deltas
from networks.delta import Delta, read_delta
from networks.deltas import LORA_FACTORS, ROW_RANGE, strength
from networks.kinds.composing import KIND_BY_FACTOR, MAGNITUDE_KIND_NAME, MAGNITUDES
from networks.kinds.factors import DOWN, UP, Factors
from networks.lora_products import diagonal_blocks, fused_sizes
from networks.module_names import FAMILIES, RelatedModule, find_related_modules
from networks.names.layouts import BEFORE_REST, OURS, REST, SWAPPED, FamilyNames, RowsByHead, WeightPart

logger = getLogger(__name__)
_BIAS = "lora_up.bias"


class FusedPiece(NamedTuple):
    """The factors for one part of a fused module."""

    name: str  # module name of the part in its own layout
    part: WeightPart
    factors: Factors


class PlacedFactors(NamedTuple):
    """The factors for some rows of a fused weight."""

    rows: slice
    factors: Factors


def find_rows_of_part(part: WeightPart, height: int, full_height: int) -> slice | Tensor | None:
    """Return the rows of a part in a fused weight.

    Args:
        part: The part.
        height: Number of rows of the part.
        full_height: Number of rows of the fused weight.

    Returns:
        A slice; for a part that is the fused weight with swapped halves, the index of each row; None if the
        rows do not fit.
    """
    # None: another name of the whole weight
    if part.index is None or part.index == SWAPPED:
        if height != full_height:
            return None
        if part.index is None:
            return slice(0, full_height)
        return torch.arange(full_height).roll(full_height // 2)
    # the last parts are counted from the end, because the parts before them may be of other heights
    from_end = {REST: 1, BEFORE_REST: 2}.get(part.index)
    start = part.index * height if from_end is None else full_height - from_end * height
    return slice(start, start + height) if 0 <= start <= full_height - height else None


def find_default_rows(part: WeightPart, full_height: int) -> slice | None:
    """Return the rows of a part if the fused weight has the proportions of the published model; else None.

    This is for input rotations, whose tensors do not show how many rows a module has. If the two halves of a
    weight are swapped, all rows are returned, because the rotation is the same for each row.
    """
    if not is_row_slice(part):  # all rows, possibly with swapped halves
        return slice(0, full_height)
    siblings = [sibling for sibling in _find_siblings(part.ours, {part.theirs}) if is_row_slice(sibling)]
    # heights of parts are multiples of a unit
    unit, remainder = divmod(full_height, sum(sibling.default_height for sibling in siblings))
    if remainder:
        return None
    rows = find_rows_of_part(part, unit * part.default_height, full_height)
    return rows if isinstance(rows, slice) else None


def is_row_slice(part: WeightPart) -> bool:
    """Return whether a part is a slice of the fused weight, not all of its rows (possibly swapped)."""
    return part.index is not None and part.index != SWAPPED


def convert_fused_layers(
    tensors: Mapping[str, Tensor], height: Callable[[str], int | None]
) -> dict[str, Tensor]:
    """Fit LoRAs of another layout to the modules of a model: split fused modules and join parts.

    Args:
        tensors: Tensors under our names, with our prefix; tensors without the prefix are unchanged.
        height: Returns the number of rows of a module's weight; None if the model lacks the module.
    """
    return fuse(cut(tensors, height), height)


def cut(tensors: Mapping[str, Tensor], height: Callable[[str], int | None]) -> dict[str, Tensor]:
    """Split LoRAs for fused modules into LoRAs for their parts; warn of LoRAs that cannot be split.

    Each part gets the full down factor and alpha, and its rows of the up factor. Parts that the model does
    not have are left out. Modules that are not fused, that cannot be split, or that have no part in the model
    are unchanged.

    Args:
        tensors: Tensors under our names, with our prefix.
        height: Returns the number of rows of a module's weight; None if the model lacks the module.
    """
    modules = deltas.group_by_module(tensors)
    result: dict[str, Factors] = {}
    for name, factors in modules.items():
        row_counts = {}
        if height(name) is None:  # the model does not have the module, perhaps only its parts
            row_counts = _count_rows_of_parts(name, modules, height)
        # not fused, or the model has none of its parts
        if not any(row_counts.values()):
            result[name] = factors
            continue
        pieces = _cut(factors, row_counts)
        if isinstance(pieces, str):  # the reason why it cannot be split
            logger.warning(f"{name}: {pieces}; it stays whole")
            pieces = {name: factors}
        result.update(pieces)
    return deltas.ungroup(result)


def _count_rows_of_parts(
    name: str, modules: Collection[str], height: Callable[[str], int | None]
) -> dict[RelatedModule, int | None]:
    """Return the parts of a module that have no LoRA of their own, with their numbers of rows.

    The number is None for a part that the model does not have.

    Args:
        name: Name of the module.
        modules: Modules with LoRAs.
        height: Returns the number of rows of a module's weight; None if the model lacks the module.
    """
    row_counts: dict[RelatedModule, int | None] = {}
    for related in find_related_modules(name.removeprefix(OURS)):
        part_name = OURS + related.name
        # also not a part with a LoRA of its own in the file
        if not related.is_part or part_name in modules:
            continue
        num_rows = height(part_name)
        # Families split modules differently. A part with all rows that the model lacks is just another name
        # of the module, not a missing part.
        if num_rows is not None or is_row_slice(related.part):
            row_counts[related] = num_rows
    return row_counts


def _cut(factors: Factors, row_counts: Mapping[RelatedModule, int | None]) -> dict[str, Factors] | str:
    """Cut the factors of a fused weight; return those of each part, or the reason why it cannot be cut.

    `row_counts` is the number of rows of each part; None for a part that the model does not have.
    """
    heights = {related: rows for related, rows in row_counts.items() if rows is not None}
    delta = read_delta(factors)
    if delta.rotation is not None:  # it rotates the input, which all parts share
        return {OURS + related.name: factors for related in heights}
    num_rows = _height_to_cut(delta)
    if num_rows is None:
        return "its change is no matrix"
    rows_by_part = _find_rows(heights, num_rows)
    fits = len(rows_by_part) == len(heights)
    if len(heights) == len(row_counts):  # the model has all parts: together they must cover the weight
        fits = fits and sum(heights.values()) == num_rows
    if not fits:
        part_heights = " + ".join(map(str, heights.values()))
        return f"its {num_rows} rows are not those of its parts, which have {part_heights}"
    if delta.has_input_magnitudes:
        return f"its {MAGNITUDE_KIND_NAME} magnitudes are by input, so they belong to the whole weight"
    ordered = sorted(rows_by_part, key=lambda related: _start_of(rows_by_part[related]))
    separate_loras = joined_blocks(factors, [heights[related] for related in ordered])
    if separate_loras:  # the LoRA was joined from LoRAs of the parts, which are restored with their own ranks
        return {OURS + related.name: lora for related, lora in zip(ordered, separate_loras, strict=True)}
    pieces: dict[str, Factors] = {}
    for related, rows in rows_by_part.items():
        piece = _part_of(delta, rows)
        if piece is None:
            return f"its halves are to be swapped, which {delta.name_indivisible()} has no form for"
        pieces[OURS + related.name] = piece.factors
    return pieces


def joined_blocks(factors: Factors, split_sizes: Sequence[int]) -> list[Factors]:
    """Return the LoRAs of the parts that this LoRA was joined from; [] if it was not joined.

    A joined LoRA has a block-diagonal up factor.

    Args:
        factors: Factors of the module, by name of the part.
        split_sizes: Numbers of rows of the parts.
    """
    is_plain = UP in factors and factors.keys() <= {"alpha", *LORA_FACTORS}
    if not is_plain or len(split_sizes) < 2:
        return []
    blocks = diagonal_blocks(factors[UP], split_sizes)
    return [] if blocks is None else cut_blocks(factors, blocks)


def cut_blocks(factors: Factors, blocks: Sequence[Tensor]) -> list[Factors]:
    """Return a LoRA for each block of a block-diagonal up factor, with equal ranks."""
    downs = factors[DOWN].chunk(len(blocks))
    pieces: list[Factors] = [{DOWN: down, UP: up} for down, up in zip(downs, blocks, strict=True)]
    if "alpha" not in factors:
        return pieces
    rank = len(factors[DOWN]) // len(blocks)
    alpha = torch.tensor(strength(factors) * rank)  # alpha / rank stays the same
    return [{**piece, "alpha": alpha} for piece in pieces]


def _height_to_cut(delta: Delta) -> int | None:
    """Return the number of rows of a change; None if it is not a matrix."""
    size = delta.matrix_size()
    if size is not None:
        return size[0]
    return len(delta.factors[UP]) if UP in delta.factors else None


def _find_rows(heights: Mapping[RelatedModule, int], full_height: int) -> dict[RelatedModule, slice | Tensor]:
    """Return the rows of each part in the full weight; parts whose rows do not fit are left out."""
    rows_by_part: dict[RelatedModule, slice | Tensor] = {}
    for related, height in heights.items():
        rows = find_rows_of_part(related.part, height, full_height)
        if rows is not None:
            rows_by_part[related] = rows
    return rows_by_part


def _start_of(rows: slice | Tensor) -> int:
    """Return the first row of a part; 0 for swapped halves, which are all rows."""
    return int(rows.start) if isinstance(rows, slice) else 0


def _part_of(delta: Delta, rows: slice | Tensor) -> Delta | None:
    """Return the delta for these rows; None if a kind cannot swap its halves."""
    if isinstance(rows, slice):
        return delta.slice_rows(rows.start, rows.stop)
    return delta.select_rows(rows)


def fuse(
    tensors: Mapping[str, Tensor],
    height: Callable[[str], int | None] | None = None,
    family: FamilyNames | None = None,
) -> dict[str, Tensor]:
    """Join the LoRAs for parts of a module into one for the module; warn of LoRAs that cannot be joined.

    The changes of the weights stay the same. The rank of a joined LoRA is the sum of the parts' ranks, or
    their common rank if they share one down factor.

    Args:
        tensors: Tensors under our names, with our prefix; tensors without the prefix are unchanged.
        height: Returns the number of rows of a fused module's weight, or None if the model lacks the module,
            whose parts are then unchanged. Without this function, all parts are joined, and the number of
            rows is estimated from the parts in all blocks and from the published model.
        family: Family of the modules; None for any.
    """
    modules = deltas.group_by_module(tensors)
    fused: dict[str, Factors] = {}
    pieces_by_module: dict[str, list[FusedPiece]] = {}  # fused module -> its parts
    for name, factors in modules.items():
        module = _find_fused(name, height, family)
        # no part, or the file has the fused module too
        if module is None or OURS + module.name in modules:
            fused[name] = factors
            continue
        piece = FusedPiece(name, module.part, factors)
        pieces_by_module.setdefault(OURS + module.name, []).append(piece)
    estimated_heights = _estimate_heights(pieces_by_module.values()) if height is None else {}
    for name, pieces in pieces_by_module.items():
        if height is None:
            num_rows = estimated_heights[pieces[0].part.ours]
        else:
            num_rows = height(name) or 0
        joined = _join(pieces, num_rows, is_for_model=height is not None)
        if isinstance(joined, str):  # the reason why they cannot be joined
            logger.warning(f"{name}: {joined}; they stay apart")
            fused.update({piece.name: piece.factors for piece in pieces})
        else:
            fused[name] = joined
    return deltas.ungroup(fused)


def _find_fused(
    name: str, height: Callable[[str], int | None] | None, family: FamilyNames | None
) -> RelatedModule | None:
    """Return the fused module that contains a module; None if there is none, or if the model lacks it."""
    for related in find_related_modules(name.removeprefix(OURS), family):
        if not related.is_part and (height is None or height(OURS + related.name) is not None):
            return related
    return None


def _estimate_heights(fused: Iterable[Sequence[FusedPiece]]) -> dict[str, int]:
    """Estimate the number of rows of fused weights, by path with `{n}`, from their parts in all blocks."""
    # path of the weight -> index of a part -> its rows
    heights_by_path: dict[str, dict[int | None, int]] = {}
    part_paths: set[str] = set()  # in the layout of the parts
    for piece in itertools.chain.from_iterable(fused):
        part_paths.add(piece.part.theirs)
        heights = heights_by_path.setdefault(piece.part.ours, {})
        # None for an input rotation, whose tensors do not show it
        height = read_delta(piece.factors).count_rows()
        if height is not None:
            heights[piece.part.index] = height
    estimates = {}
    for path, heights in heights_by_path.items():
        estimates[path] = _estimate_height(_find_siblings(path, part_paths), heights)
    return estimates


def _find_siblings(ours: str, paths: Collection[str]) -> list[WeightPart]:
    """Return the parts of our weight `ours`, in the families that have a part with one of the given paths.

    Other families may fuse different parts under the same name.
    """
    siblings: dict[str, WeightPart] = {}
    for family in FAMILIES:
        parts = (*family.parts, *family.joined)
        if not any(part.theirs in paths for part in parts):
            continue
        for part in parts:
            if part.ours == ours:
                siblings[part.theirs] = part
    return list(siblings.values())


def _estimate_height(siblings: Sequence[WeightPart], known_heights: Mapping[int | None, int]) -> int:
    """Estimate the number of rows of a fused weight from the parts in a file; 0 if the file has none.

    Args:
        siblings: All parts of the weight.
        known_heights: Number of rows by index of the part.
    """
    reference = next((part for part in siblings if known_heights.get(part.index)), None)
    if reference is None:
        return 0
    if not is_row_slice(reference):  # it covers the whole weight
        return known_heights[reference.index]
    # default heights are relative: scale them so that the known part has its real height
    unit = known_heights[reference.index] // reference.default_height
    height = 0
    for part in siblings:
        if not is_row_slice(part):
            continue
        part_height = known_heights.get(part.index)
        height += part_height or unit * part.default_height
        if not part_height and part.default_height > reference.default_height:
            logger.info(
                f"{part.theirs} is not in the file; it is assumed to have {part.default_height} times as "
                "many rows as the parts next to it"
            )
    return height


def _join(pieces: Sequence[FusedPiece], num_rows: int, is_for_model: bool = False) -> Factors | str:
    """Return factors for a weight with `num_rows` rows, or the reason why the parts cannot be joined.

    Args:
        pieces: Factors of the parts.
        num_rows: Number of rows of the weight.
        is_for_model: Whether parts whose factors cannot be joined become full differences. These are large,
            so files get the parts separately.
    """
    first = pieces[0]
    # a part without an index has all rows: it is the same weight under another name
    is_full_weight = first.part.index is None and len(pieces) == 1
    if is_full_weight:
        return first.factors
    if any(read_delta(piece.factors).rotation is not None for piece in pieces):
        return join_rotations(pieces)
    # other kinds, or plain LoRAs together with others
    if not all(_is_low_rank_matrix(piece.factors) for piece in pieces):
        return _join_others(pieces, num_rows, is_for_model)
    # the rows of the weight that each part stands for
    all_rows = [find_rows_of_part(piece.part, len(piece.factors[UP]), num_rows) for piece in pieces]
    if isinstance(all_rows[0], Tensor):  # a weight with swapped halves is its only part
        swapped = read_delta(first.factors).select_rows(all_rows[0])
        return f"its {MAGNITUDE_KIND_NAME} magnitudes are by input" if swapped is None else swapped.factors
    slices = [rows for rows in all_rows if isinstance(rows, slice)]
    if len(slices) < len(all_rows):
        return f"its parts do not fit into {num_rows} rows"
    error = _find_error_of_magnitudes([piece.factors for piece in pieces], num_rows)
    if error:
        return error
    return _join_low_rank(_in_order(pieces, slices), num_rows)


def join_rotations(pieces: Sequence[FusedPiece]) -> Factors | str:
    """Return the rotation that all parts of a weight share, or the reason why they do not share one."""
    first = pieces[0]
    values: list[Tensor] = []  # values of the rotations
    title = ""
    for piece in pieces:
        rotation = read_delta(piece.factors).rotation
        if rotation is not None:
            values.append(piece.factors[rotation.factor_name])
            title = title or rotation.title
    # a part of the weight for which the file has no tensors is not rotated
    joined_paths = {piece.part.theirs for piece in pieces}
    siblings = _find_siblings(first.part.ours, {first.part.theirs})
    if is_row_slice(first.part) and any(
        is_row_slice(part) and part.theirs not in joined_paths for part in siblings
    ):
        return f"{title} rotates only some of its parts"
    # parts without a rotation, or with different values
    if len(values) < len(pieces) or not all(torch.equal(value, values[0]) for value in values):
        return "its parts are rotated differently"
    return first.factors


def _is_low_rank_matrix(factors: Factors) -> bool:
    """Return whether these are the factors of a LoRA or DoRA for a linear layer, without a core."""
    others = set(factors) - {"alpha", *LORA_FACTORS, MAGNITUDES, _BIAS}
    return not others and factors[UP].ndim == 2


def _in_order(pieces: Sequence[FusedPiece], slices: Sequence[slice]) -> list[PlacedFactors]:
    """Return the factors of the parts in the order of their rows."""
    placed = [PlacedFactors(rows, piece.factors) for rows, piece in zip(slices, pieces, strict=True)]
    return sorted(placed, key=lambda part: part.rows.start)


def _find_error_of_magnitudes(parts: Sequence[Factors], height: int) -> str:
    """Return the reason why the magnitudes of parts cannot be joined; "" if there is none."""
    if not any(MAGNITUDES in factors for factors in parts):
        return ""
    if any(MAGNITUDES not in factors or read_delta(factors).has_input_magnitudes for factors in parts):
        return f"only {MAGNITUDE_KIND_NAME} magnitudes by output, for all of its rows, can be put together"
    if sum(len(factors[MAGNITUDES]) for factors in parts) != height:
        return f"its parts have {MAGNITUDE_KIND_NAME} magnitudes for less than its {height} rows"
    return ""


def _join_low_rank(placed: Sequence[PlacedFactors], height: int) -> Factors:
    """Return a single LoRA for all parts.

    Its up factor is block-diagonal (each part's up factor is in the rows of the part), unless all parts share
    one down factor.

    Args:
        placed: Factors with their rows, in the order of the rows; ranks are joined in the same order.
        height: Number of rows of the weight.
    """
    scales = [strength(part.factors) for part in placed]
    scale = scales[0]
    if scales.count(scale) < len(scales):  # different alpha / rank are multiplied into the up factors
        placed = [PlacedFactors(part.rows, _fold_into_up(part.factors)) for part in placed]
        scale = 1.0
    downs = [part.factors[DOWN] for part in placed]
    # parts that were cut from one LoRA have the same down factor
    is_shared = all(torch.equal(down, downs[0]) for down in downs)
    down = downs[0] if is_shared else torch.cat(downs)
    joined: dict[str, Tensor] = {
        "alpha": torch.tensor(scale * len(down)),
        DOWN: down,
        UP: _join_ups(placed, height, len(down), is_shared),
    }
    for name in (MAGNITUDES, _BIAS):
        if any(name in part.factors for part in placed):
            joined[name] = _stack_rows(placed, name, height)
    return joined


def _join_ups(placed: Sequence[PlacedFactors], height: int, rank: int, is_shared: bool) -> Tensor:
    """Return the joined up factor.

    Args:
        placed: Factors with their rows.
        height: Number of rows of the weight.
        rank: Rank of the joined LoRA.
        is_shared: Whether the parts share their down factor, and thus all columns.
    """
    joined = placed[0].factors[UP].new_zeros(height, rank)
    first_column = 0
    for part in placed:
        up = part.factors[UP]
        joined[part.rows, first_column : first_column + up.shape[1]] = up
        if not is_shared:
            first_column += up.shape[1]
    return joined


def _fold_into_up(factors: Factors) -> Factors:
    """Return LoRA factors with alpha / rank multiplied into the up factor and its bias."""
    scale = strength(factors)
    folded = dict(factors)
    for name in (UP, _BIAS):
        if name in factors:
            folded[name] = (factors[name].float() * scale).to(factors[name].dtype)
    return folded


def _stack_rows(placed: Sequence[PlacedFactors], name: str, height: int) -> Tensor:
    """Stack one tensor of each part of a fused weight along rows; rows of parts without this tensor are 0.

    Args:
        placed: Factors of each part, with the rows of the fused weight that the part stands for.
        name: Name of the tensor in the factors, such as that of the up factor.
        height: Number of rows of the fused weight.
    """
    parts_with_tensor = [part for part in placed if name in part.factors]
    first = parts_with_tensor[0].factors[name]
    stacked = first.new_zeros(height, *first.shape[1:])
    for part in parts_with_tensor:
        stacked[part.rows] = part.factors[name]
    return stacked


def _join_others(pieces: Sequence[FusedPiece], height: int, is_for_model: bool) -> Factors | str:
    """Join parts that are not all plain LoRAs; return the factors, or why they cannot be joined."""
    slices: list[slice] = []
    for piece in pieces:
        part_height = read_delta(piece.factors).count_rows()
        rows = find_rows_of_part(piece.part, part_height, height) if part_height else None
        if isinstance(rows, slice):
            slices.append(rows)
    # a part that is no slice of rows was skipped above
    if len(slices) < len(pieces):
        return "its parts are no matrices, or do not fit the rows of the weight"
    placed = _in_order(pieces, slices)
    ranges = [(part.rows.start, part.rows.stop) for part in placed]
    if _are_gapless(ranges, height):
        # parts that were cut from one layer get that layer's factors again
        layer = _one_layer([part.factors for part in placed])
        if layer is not None:
            return layer
    if not is_for_model:
        return "only plain LoRAs, or the parts of one layer, can be joined"
    # `is_for_model`: a model may get the full matrix, a file may not
    return _full_difference(placed, height)


def _are_gapless(ranges: Sequence[tuple[int, int]], height: int) -> bool:
    """Return whether ranges of rows, in order, cover a weight of this height without gaps or overlaps."""
    starts = [start for start, _ in ranges]
    stops = [stop for _, stop in ranges]
    return starts == [0, *stops[:-1]] and stops[-1] == height


def _full_difference(placed: Sequence[PlacedFactors], height: int) -> Factors | str:
    """Return the full change of a weight with `height` rows, float32, or the reason why there is none.

    Args:
        placed: Factors with their rows, in the order of the rows.
        height: Number of rows of the weight.
    """
    parts = [read_delta(part.factors) for part in placed]
    if any(part.replaces_weight for part in parts):
        return f"{deltas.SET} is only for some of its rows"
    if any(part.has_input_magnitudes for part in parts):
        return f"its {MAGNITUDE_KIND_NAME} magnitudes are by input, so they belong to the parts"
    magnitudes = [part.magnitudes for part in parts if part.magnitudes is not None]
    if magnitudes:  # then every row of the weight needs one
        covered = sum(part.rows.stop - part.rows.start for part in placed)
        if len(magnitudes) < len(parts) or covered < height:
            return f"its parts have {MAGNITUDE_KIND_NAME} magnitudes for less than its {height} rows"
    changes = [part.compute_change(deltas.CPU) for part in parts]
    # None: a part without a change of the weight, such as an input rotation
    input_shapes = {None if change is None else change.shape[1:] for change in changes}
    input_shape = input_shapes.pop()
    if input_shapes or input_shape is None:
        return "its parts have different inputs"
    joined = {"diff": _write_rows(placed, changes, torch.zeros(height, *input_shape))}
    if magnitudes:
        joined[MAGNITUDES] = torch.cat(magnitudes)
    biases = [part.compute_bias_change(deltas.CPU) for part in parts]
    if any(bias is not None for bias in biases):
        joined["diff_b"] = _write_rows(placed, biases, torch.zeros(height))
    return joined


def _write_rows(placed: Sequence[PlacedFactors], values: Sequence[Tensor | None], total: Tensor) -> Tensor:
    """Write the values of each part into its rows of `total`, and return it."""
    for part, rows in zip(placed, values, strict=True):
        if rows is not None:
            total[part.rows] = rows
    return total


def _one_layer(parts: Sequence[Factors]) -> Factors | None:
    """Return the factors of the layer that was split by rows into these parts; None if they are unrelated."""
    first = parts[0]
    names = first.keys()
    delta = read_delta(first)
    by_rows = (
        delta.find_factors_with_rows()
    )  # names of tensors with one row per output; the parts share the others
    if by_rows is None or any(part.keys() != names for part in parts):
        return None
    if (
        ROW_RANGE in names
    ):  # the parts keep the factors of the full layer; only magnitudes and biases are split
        by_rows &= {MAGNITUDES, *deltas.BIAS_FACTORS}
        size = delta.matrix_size()
        if size is None or not _are_gapless([deltas.read_row_range(part) for part in parts], size[0]):
            return None
    # tensors that belong to the whole layer must be equal in all parts
    shared = names - by_rows - {ROW_RANGE}
    for name in shared:
        if not all(torch.equal(part[name], first[name]) for part in parts):
            return None
    layer = {name: first[name] for name in shared}
    for name in by_rows:
        layer[name] = torch.cat([part[name] for part in parts])
    return layer


def resolve_rows(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Turn parts with a `ROW_RANGE` entry, which files cannot contain, into parts with their own factors.

    Such a part has the factors of the whole fused layer, and this entry says which rows are its own.
    If the factors cannot be cut into rows, the part gets the full difference of its rows.

    Raises:
        CheckpointError: If a part has magnitudes by input, because they belong to the full layer.
    """
    modules = deltas.group_by_module(tensors)
    if not any(ROW_RANGE in factors for factors in modules.values()):
        return tensors
    resolved: dict[str, Factors] = {}
    for name, factors in modules.items():
        resolved[name] = factors if ROW_RANGE not in factors else _resolve_part(name, factors)
    return deltas.ungroup(resolved)


def _resolve_part(name: str, factors: Factors) -> Factors:
    """Return one part's factors from those of the fused layer, whose `ROW_RANGE` has the part's rows."""
    delta = read_delta(factors)
    if delta.has_input_magnitudes:
        raise CheckpointError(
            f"{name} is a part of a joined layer whose {MAGNITUDE_KIND_NAME} magnitudes are by input: they "
            "belong to the whole layer, which this model has in parts.\n"
            "  Convert the file with the program that made it."
        )
    start, stop = deltas.read_row_range(factors)
    # factors that can be cut stay small; the full change of the rows otherwise
    cut_factors = delta.factors_of_rows(start, stop)
    if cut_factors is not None:
        return cut_factors
    change = delta.compute_change(deltas.CPU)
    assert change is not None
    # every kind has one of the parts in MARKS
    dtype = next(factors[part].dtype for part in factors if part in KIND_BY_FACTOR)
    resolved: dict[str, Tensor] = {"diff": change.to(dtype).clone()}
    if MAGNITUDES in factors:
        resolved[MAGNITUDES] = factors[MAGNITUDES]
    bias = delta.bias_in_file_dtype()
    if bias is not None:
        resolved["diff_b"] = bias
    return resolved


def stack_rows(
    path: Path, tensors: dict[str, Tensor], rule: RowsByHead, stored: Iterable[str]
) -> dict[str, Tensor]:
    """Return a LoRA whose fused layers have all rows of q first, then k, then v.

    Args:
        path: Path of the file.
        tensors: Tensors under our names.
        rule: Layers whose rows some programs order by head, and the pattern of these programs' names.
        stored: Names in the file.

    Raises:
        CheckpointError: If the rows of a layer cannot be divided into heads, or cannot be reordered.
    """
    if not any(re.search(rule.mark, name) for name in stored):  # no file of a program with rows by head
        return tensors
    ending = rule.ending.replace(".", "_")
    modules = deltas.group_by_module(tensors)
    for name, factors in modules.items():
        delta = read_delta(factors)
        num_rows = delta.count_rows() if name.endswith(ending) else None
        # another layer, or factors that do not show a number of rows
        if num_rows is None:
            continue
        stacked = None
        if num_rows % (3 * rule.head_width) == 0:  # q, k and v of each head
            row_order = stack_heads(torch.arange(num_rows), rule.head_width)
            stacked = delta.select_rows(row_order)
        if stacked is None:
            raise CheckpointError(
                f"{path} cannot be used: {name} has {num_rows} rows, and its program has them by head, "
                f"{rule.head_width} of each query, key and value.\n  Give a plain LoRA that was trained for "
                "this model.",
                path,
            )
        modules[name] = dict(stacked.factors)
    return deltas.ungroup(modules)


def mend_split_alphas(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Tensor]:
    """Correct the alphas of a LoRA that was trained with sd-scripts' `split_qkv`; return all tensors.

    sd-scripts joins the factors of k parts into one LoRA with k times the rank, but saves the alpha of one
    part, so alpha / rank would be k times too small. These modules have block-diagonal up factors.
    """
    mended = dict(tensors)
    trained_alpha = metadata.get("ss_network_alpha", "").removesuffix(".0")  # as `:g` writes a number below
    num_mended = 0
    for name, factors in deltas.group_by_module(tensors).items():
        # not a plain LoRA
        if set(factors) != {"alpha", *LORA_FACTORS}:
            continue
        down = factors[DOWN]
        up = factors[UP]
        alpha = factors["alpha"]
        if f"{float(alpha):g}" != trained_alpha:
            continue  # the alpha has already been adapted to the joined rank
        parts = [related.part for related in find_related_modules(name.removeprefix(OURS)) if related.is_part]
        # a module of these names can be fused of so many parts
        num_parts = len({part.index for part in parts if is_row_slice(part)})
        row_counts = fused_sizes(num_parts, len(up), down.shape[1])
        if row_counts and diagonal_blocks(up, row_counts) is not None:
            mended[f"{name}.alpha"] = alpha * len(row_counts)  # like the joined rank, k times that of a part
            num_mended += 1
    if num_mended:
        logger.info(f"{path}: the alphas of {num_mended} modules with split factors are set right")
    return mended
