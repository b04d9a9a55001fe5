"""Split LoRAs for fused weights (such as qkv) into LoRAs for their parts, and join LoRAs of parts.

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
from networks.delta import Delta, read_delta
from networks.kinds.composing import KIND_BY_FACTOR, MAGNITUDE_KIND_NAME, MAGNITUDES
from networks.kinds.factors import DOWN, UP, Factors
from networks.lora_products import count_fused_part_rows, diagonal_blocks
from networks.module_factors import (
    BIAS_FACTORS,
    CPU,
    LORA_FACTORS,
    PLAIN_LORA_FACTORS,
    ROW_RANGE,
    SET_WEIGHT,
    compute_scaling,
    group_by_module,
    read_row_range,
    ungroup,
)
from networks.module_names import FAMILIES, RelatedModule, related_modules
from networks.names.layouts import BEFORE_REST, OURS, REST, SWAPPED, FamilyNames, RowsByHead, WeightPart

logger = getLogger(__name__)
_BIAS = "lora_up.bias"


class FusionError(Exception):
    """Why the LoRA of a fused module cannot be split, or why the LoRAs of its parts cannot be joined."""


class FusedPiece(NamedTuple):
    """The factors for one part (such as q, k or v) of a fused module."""

    name: str  # module name of the part in its own layout
    part: WeightPart
    factors: Factors


class RowFactors(NamedTuple):
    """LoRA factors for some rows of a fused weight."""

    row_slice: slice
    factors: Factors


def find_part_rows(part: WeightPart, part_rows: int, fused_rows: int) -> slice | Tensor | None:
    """Return the rows that a part (such as k) has in a fused weight (such as qkv).

    Args:
        part: The part.
        part_rows: Number of rows of the part.
        fused_rows: Number of rows of the fused weight.

    Returns:
        A slice; if the part is the fused weight with swapped halves, the index of each row; None if the rows
        do not fit.
    """
    if not is_row_slice(part):
        if part_rows != fused_rows:
            return None
        if part.index == SWAPPED:
            return torch.arange(fused_rows).roll(fused_rows // 2)
        return slice(0, fused_rows)  # the part is the whole weight under another name
    assert part.index is not None
    # the last parts are counted from the end, because earlier parts may have different row counts
    if part.index == REST:
        start = fused_rows - part_rows
    elif part.index == BEFORE_REST:
        start = fused_rows - 2 * part_rows
    else:
        start = part.index * part_rows
    return slice(start, start + part_rows) if 0 <= start <= fused_rows - part_rows else None


def find_default_rows(part: WeightPart, fused_rows: int) -> slice | None:
    """Return the rows of a part in a fused weight with the proportions of the published model.

    This is for input rotations, whose tensors do not show how many rows a module has. If the part is the
    whole weight, perhaps with swapped halves, all rows are returned, because each row is rotated alike.

    Args:
        part: The part.
        fused_rows: Number of rows of the fused weight.

    Returns:
        The rows; None if the fused weight has other proportions.
    """
    if not is_row_slice(part):
        return slice(0, fused_rows)
    # the number of rows of each part, as a multiple of the smallest part's
    relative_rows = [sibling.relative_rows for sibling in _list_parts_like(part)]
    smallest_part_rows, remainder = divmod(fused_rows, sum(relative_rows))
    if remainder:
        return None
    rows = find_part_rows(part, smallest_part_rows * part.relative_rows, fused_rows)
    return rows if isinstance(rows, slice) else None


def _list_parts_like(part: WeightPart) -> list[WeightPart]:
    """Return all parts of a fused weight with own rows, such as q, k and v, given one of them."""
    siblings = _list_fused_parts(part.fused_path, {part.part_path})
    return [sibling for sibling in siblings if is_row_slice(sibling)]


def is_row_slice(part: WeightPart) -> bool:
    """Return whether a part is only some rows of the fused weight, rather than all (perhaps swapped)."""
    return part.index is not None and part.index != SWAPPED


def convert_fused_layers(
    tensors: Mapping[str, Tensor], rows_in_model: Callable[[str], int | None]
) -> dict[str, Tensor]:
    """Fit LoRAs of another layout to a model's modules: split fused modules and join parts.

    Args:
        tensors: Tensors under our names, with our prefix; tensors without the prefix are unchanged.
        rows_in_model: Returns the number of rows of a module's weight; None if the model lacks the module.
    """
    return join_parts(split_fused(tensors, rows_in_model), rows_in_model)


def split_fused(
    tensors: Mapping[str, Tensor], rows_in_model: Callable[[str], int | None]
) -> dict[str, Tensor]:
    """Split LoRAs for fused modules into LoRAs for their parts; warn of LoRAs that cannot be split.

    Each part gets the full down factor and alpha, and its rows of the up factor. Parts that the model lacks
    are left out. Modules that are not fused, cannot be split, or have no part in the model are unchanged.

    Args:
        tensors: Tensors under our names, with our prefix.
        rows_in_model: Returns the number of rows of a module's weight; None if the model lacks the module.
    """
    modules = group_by_module(tensors)
    new_modules: dict[str, Factors] = {}
    for name, factors in modules.items():
        rows_by_part: dict[RelatedModule, int | None] = {}
        if rows_in_model(name) is None:
            rows_by_part = _count_part_rows(name, modules, rows_in_model)
        model_has_parts = any(rows_by_part.values())
        if not model_has_parts:
            new_modules[name] = factors
            continue
        try:
            new_modules.update(_split_factors(factors, rows_by_part))
        except FusionError as reason:
            logger.warning(f"{name}: {reason}; it is not split")
            new_modules[name] = factors
    return ungroup(new_modules)


def _count_part_rows(
    name: str, modules_in_file: Collection[str], rows_in_model: Callable[[str], int | None]
) -> dict[RelatedModule, int | None]:
    """Return the row counts of a module's parts, without parts that have their own LoRA."""
    # The row count is None for a part that the model lacks.
    rows_by_part: dict[RelatedModule, int | None] = {}
    for related in related_modules(name.removeprefix(OURS)):
        related_name = OURS + related.name
        if not related.is_part or related_name in modules_in_file:
            continue
        num_rows = rows_in_model(related_name)
        # Families split modules differently. If the model lacks a part with all rows, that part is just
        # another name of the module, not a missing part.
        if num_rows is not None or is_row_slice(related.part):
            rows_by_part[related] = num_rows
    return rows_by_part


def _split_factors(factors: Factors, rows_by_part: Mapping[RelatedModule, int | None]) -> dict[str, Factors]:
    """Split the factors of a fused module; return {module name of each part: factors}."""
    known_rows = {part: rows for part, rows in rows_by_part.items() if rows is not None}
    delta = read_delta(factors)
    if delta.rotation is not None:  # it rotates the input, which all parts share
        return {OURS + part.name: factors for part in known_rows}
    slices = _find_part_slices(delta, known_rows, model_has_all=len(known_rows) == len(rows_by_part))
    if delta.has_input_magnitudes:
        raise FusionError(
            f"its {MAGNITUDE_KIND_NAME} magnitudes are by input, so they belong to the whole weight"
        )
    ordered = sorted(slices, key=lambda part: _get_first_row(slices[part]))
    # a LoRA that was joined from LoRAs of the parts is split into them again, with their own ranks
    separate_loras = joined_blocks(factors, [known_rows[part] for part in ordered])
    if separate_loras:
        return {OURS + part.name: lora for part, lora in zip(ordered, separate_loras, strict=True)}
    return {OURS + part.name: _cut_rows(delta, rows).factors for part, rows in slices.items()}


def _cut_rows(delta: Delta, rows: slice | Tensor) -> Delta:
    """Return the change of some rows, or of all rows in another order; raise FusionError if it cannot."""
    if isinstance(rows, slice):
        return delta.slice_rows(rows.start, rows.stop)
    swapped = delta.select_rows(rows)
    if swapped is None:
        kind = delta.describe_indivisible_kind()
        raise FusionError(f"its halves must be swapped, which {kind} does not support")
    return swapped


def _find_part_slices(
    delta: Delta, known_rows: Mapping[RelatedModule, int], model_has_all: bool
) -> dict[RelatedModule, slice | Tensor]:
    """Return the rows of each part in a fused weight; raise FusionError if the row counts do not match."""
    size = delta.matrix_size()
    if size is None and UP not in delta.factors:
        raise FusionError("its change is not a matrix")
    num_rows = len(delta.factors[UP]) if size is None else size[0]
    slices: dict[RelatedModule, slice | Tensor] = {}
    for related, part_rows in known_rows.items():
        rows = find_part_rows(related.part, part_rows, num_rows)
        if rows is not None:
            slices[related] = rows
    fits = len(slices) == len(known_rows)
    if model_has_all:
        fits = fits and sum(known_rows.values()) == num_rows
    if not fits:
        row_counts = " + ".join(map(str, known_rows.values()))
        raise FusionError(f"its {num_rows} rows are not those of its parts, which have {row_counts}")
    return slices


def joined_blocks(factors: Factors, split_sizes: Sequence[int]) -> list[Factors]:
    """Return the LoRAs that were joined into this one, which has a block-diagonal up factor; [] if none were.

    Args:
        factors: Factors of the module, by factor name.
        split_sizes: Number of rows of each part.
    """
    is_plain = UP in factors and factors.keys() <= {"alpha", *LORA_FACTORS}
    if not is_plain or len(split_sizes) < 2:
        return []
    blocks = diagonal_blocks(factors[UP], split_sizes)
    return [] if blocks is None else cut_blocks(factors, blocks)


def cut_blocks(factors: Factors, blocks: Sequence[Tensor]) -> list[Factors]:
    """Return one LoRA for each block of a block-diagonal up factor; all have the same rank."""
    downs = factors[DOWN].chunk(len(blocks))
    pieces: list[Factors] = [{DOWN: down, UP: up} for down, up in zip(downs, blocks, strict=True)]
    if "alpha" not in factors:
        return pieces
    rank = len(factors[DOWN]) // len(blocks)
    alpha = torch.tensor(compute_scaling(factors) * rank)  # alpha / rank stays the same
    return [{**piece, "alpha": alpha} for piece in pieces]


def _get_first_row(rows: slice | Tensor) -> int:
    """Return the first row of a part; 0 for swapped halves, which cover all rows."""
    return int(rows.start) if isinstance(rows, slice) else 0


def join_parts(
    tensors: Mapping[str, Tensor],
    rows_in_model: Callable[[str], int | None] | None = None,
    family: FamilyNames | None = None,
) -> dict[str, Tensor]:
    """Join the LoRAs for parts of a module into one for the module; warn of LoRAs that cannot be joined.

    The weight changes stay the same. The rank of a joined LoRA is the sum of the parts' ranks, or their
    common rank if they share one down factor.

    Args:
        tensors: Tensors under our names, with our prefix; tensors without the prefix are unchanged.
        rows_in_model: Returns the number of rows of a fused module's weight, or None if the model lacks the
            module, whose parts are then unchanged. Without this function, all parts are joined, and the
            number of rows is estimated from the parts in all blocks and from the published model.
        family: Family of the modules; None for any.
    """
    modules = group_by_module(tensors)
    pieces_by_module = _find_pieces(modules, rows_in_model, family)
    num_rows = _count_rows_by_module(pieces_by_module, rows_in_model)
    part_names = {piece.name for pieces in pieces_by_module.values() for piece in pieces}
    new_modules: dict[str, Factors] = {}
    for name, factors in modules.items():
        if name not in part_names:
            new_modules[name] = factors
    for name, pieces in pieces_by_module.items():
        try:
            joined = _join_pieces(pieces, num_rows[name], allows_full_matrix=rows_in_model is not None)
            new_modules[name] = joined
        except FusionError as reason:
            logger.warning(f"{name}: {reason}; they are not joined")
            new_modules.update({piece.name: piece.factors for piece in pieces})
    return ungroup(new_modules)


def _count_rows_by_module(
    pieces_by_module: Mapping[str, Sequence[FusedPiece]], rows_in_model: Callable[[str], int | None] | None
) -> dict[str, int]:
    """Return the number of rows of each fused module's weight, in the model or else by an estimate."""
    if rows_in_model is not None:
        return {name: rows_in_model(name) or 0 for name in pieces_by_module}
    # by path
    # Estimate the row counts of fused weights, by path with `{n}`, from their parts in all blocks
    pieces_by_weight = pieces_by_module.values()
    pieces = list(itertools.chain.from_iterable(pieces_by_weight))
    part_paths = {piece.part.part_path for piece in pieces}  # in the layout of the parts
    # path of a fused weight -> index of a part in it -> number of the part's rows
    rows_by_path: dict[str, dict[int | None, int]] = {}
    for piece in pieces:
        rows_by_index = rows_by_path.setdefault(piece.part.fused_path, {})
        # None for an input rotation, whose tensors do not reveal it
        num_rows = read_delta(piece.factors).count_rows()
        if num_rows is not None:
            rows_by_index[piece.part.index] = num_rows
    estimates: dict[str, int] = {}
    for path, rows_by_index in rows_by_path.items():
        estimates[path] = _estimate_rows(_list_fused_parts(path, part_paths), rows_by_index)
    return {name: estimates[pieces[0].part.fused_path] for name, pieces in pieces_by_module.items()}


def _find_pieces(
    modules: Mapping[str, Factors],
    rows_in_model: Callable[[str], int | None] | None,
    family: FamilyNames | None,
) -> dict[str, list[FusedPiece]]:
    """Return the modules that are parts of a fused module, by the name of the fused module."""
    # Parts of a fused module that has its own factors are left out. The arguments are those of `join_parts`.
    pieces_by_module: dict[str, list[FusedPiece]] = {}
    for name, factors in modules.items():
        fused_module = _find_fused_module(name, rows_in_model, family)
        if fused_module is not None and OURS + fused_module.name not in modules:
            piece = FusedPiece(name, fused_module.part, factors)
            pieces_by_module.setdefault(OURS + fused_module.name, []).append(piece)
    return pieces_by_module


def _find_fused_module(
    name: str, rows_in_model: Callable[[str], int | None] | None, family: FamilyNames | None
) -> RelatedModule | None:
    """Return the fused module that contains a module; None if there is none or the model does not have it."""
    for related in related_modules(name.removeprefix(OURS), family):
        contains_module = not related.is_part
        if contains_module and (rows_in_model is None or rows_in_model(OURS + related.name) is not None):
            return related
    return None


def _list_fused_parts(fused_path: str, paths: Collection[str]) -> list[WeightPart]:
    """Return the parts of a fused weight, for the families in which one of the given paths is a part."""
    # Other families may fuse different parts under the same name.
    siblings: dict[str, WeightPart] = {}
    for family in FAMILIES:
        parts = [part for part in (*family.parts, *family.joined) if part.fused_path == fused_path]
        if any(part.part_path in paths for part in parts):
            siblings |= {part.part_path: part for part in parts}
    return list(siblings.values())


def _estimate_rows(parts: Sequence[WeightPart], known_rows: Mapping[int | None, int]) -> int:
    """Estimate the number of rows of a fused weight from its parts in a file; 0 if the file has none."""
    # The rows of a part that is not in the file are estimated from those of a part that is, because published
    # models have a fixed ratio between them (`WeightPart.relative_rows`).
    reference = next((part for part in parts if known_rows.get(part.index)), None)
    if reference is None:
        return 0
    if not is_row_slice(reference):  # it covers the whole weight
        return known_rows[reference.index]
    smallest_part_rows = known_rows[reference.index] // reference.relative_rows
    total = 0
    for part in parts:
        if not is_row_slice(part):
            continue
        part_rows = known_rows.get(part.index)
        if not part_rows:
            part_rows = smallest_part_rows * part.relative_rows
            if part.relative_rows > reference.relative_rows:
                logger.info(
                    f"{part.part_path} is not in the file; it is assumed to have {part.relative_rows} times "
                    "as many rows as the parts next to it"
                )
        total += part_rows
    return total


def _join_pieces(pieces: Sequence[FusedPiece], num_rows: int, allows_full_matrix: bool) -> Factors:
    """Return factors for a fused weight, given the factors of its parts."""
    first = pieces[0]
    is_renamed_weight = len(pieces) == 1 and first.part.index is None
    if is_renamed_weight:
        return first.factors
    if any(read_delta(piece.factors).rotation is not None for piece in pieces):
        return join_rotations(pieces)
    if not all(_is_low_rank_matrix(piece.factors) for piece in pieces):
        return _join_any_kind(pieces, num_rows, allows_full_matrix)
    row_indices = find_part_rows(first.part, len(first.factors[UP]), num_rows)
    if isinstance(row_indices, Tensor):  # the only part is the whole weight with swapped halves
        return _swap_halves(first.factors, row_indices)
    # Join plain LoRAs or DoRAs of parts such as q, k and v; raise FusionError if row counts disagree
    slices: list[slice] = []
    for piece in pieces:
        rows = find_part_rows(piece.part, len(piece.factors[UP]), num_rows)
        if isinstance(rows, slice):
            slices.append(rows)
    if len(slices) < len(pieces):
        raise FusionError(f"its parts do not fit into {num_rows} rows")
    _check_magnitudes([piece.factors for piece in pieces], num_rows)
    return _join_low_rank(_sort_by_rows(pieces, slices), num_rows)


def _swap_halves(factors: Factors, row_indices: Tensor) -> Factors:
    """Return the factors for a weight whose rows are reordered by `row_indices`."""
    swapped = read_delta(factors).select_rows(row_indices)
    if swapped is None:
        raise FusionError(f"its {MAGNITUDE_KIND_NAME} magnitudes are by input")
    return swapped.factors


def join_rotations(pieces: Sequence[FusedPiece]) -> Factors:
    """Return the factors of the input rotation (OFT) that all parts of a weight share.

    Raises:
        FusionError: If a part is not rotated, or is rotated differently.
    """
    rotation_values: list[Tensor] = []
    title = ""
    for piece in pieces:
        rotation = read_delta(piece.factors).rotation
        if rotation is not None:
            rotation_values.append(piece.factors[rotation.factor_name])
            title = title or rotation.title
    # all parts of the weight, such as q, k and v, or one part with all rows
    first_part = pieces[0].part
    paths = {piece.part.part_path for piece in pieces}
    if is_row_slice(first_part) and not all(part.part_path in paths for part in _list_parts_like(first_part)):
        raise FusionError(f"{title} rotates only some of its parts")
    all_are_rotated = len(rotation_values) == len(pieces)
    if not all_are_rotated or not all(torch.equal(values, rotation_values[0]) for values in rotation_values):
        raise FusionError("its parts are rotated differently")
    return pieces[0].factors


def _is_low_rank_matrix(factors: Factors) -> bool:
    """Return whether these are a linear layer's LoRA or DoRA factors, without a core matrix between them."""
    further_factors = factors.keys() - PLAIN_LORA_FACTORS - {MAGNITUDES}
    return not further_factors and UP in factors and factors[UP].ndim == 2


def _sort_by_rows(pieces: Sequence[FusedPiece], slices: Sequence[slice]) -> list[RowFactors]:
    """Pair the factors of each part with its rows of the fused weight, sorted by rows."""
    parts = [RowFactors(rows, piece.factors) for rows, piece in zip(slices, pieces, strict=True)]
    return sorted(parts, key=lambda part: part.row_slice.start)


def _check_magnitudes(part_factors: Sequence[Factors], num_rows: int) -> None:
    """Raise FusionError if the parts' DoRA magnitudes cannot be joined to one magnitude per row."""
    if not any(MAGNITUDES in factors for factors in part_factors):
        return
    for factors in part_factors:
        if MAGNITUDES not in factors or read_delta(factors).has_input_magnitudes:
            raise FusionError(
                f"only {MAGNITUDE_KIND_NAME} magnitudes by output, for all of its rows, can be joined"
            )
    if sum(len(factors[MAGNITUDES]) for factors in part_factors) != num_rows:
        raise FusionError(
            f"its parts have {MAGNITUDE_KIND_NAME} magnitudes for less than its {num_rows} rows"
        )


def _join_low_rank(parts: Sequence[RowFactors], num_rows: int) -> Factors:
    """Return a single LoRA for all parts of a weight."""
    # Its up factor is block-diagonal (each part's up factor in the part's rows), unless all parts share one
    # down factor.
    if any("diff_b" in part.factors for part in parts):
        parts = [RowFactors(part.row_slice, _with_bias_difference(part.factors)) for part in parts]
    scale = compute_scaling(parts[0].factors)  # alpha / rank
    if any(compute_scaling(part.factors) != scale for part in parts):
        parts = [RowFactors(part.row_slice, _fold_into_up(part.factors)) for part in parts]
        scale = 1.0
    downs = [part.factors[DOWN] for part in parts]
    # parts that were cut from one LoRA have the same down factor
    is_shared = all(torch.equal(down, downs[0]) for down in downs)
    down = downs[0] if is_shared else torch.cat(downs)
    joined: dict[str, Tensor] = {
        "alpha": torch.tensor(scale * len(down)),
        DOWN: down,
        UP: _join_up_factors(parts, num_rows, rank=len(down), shares_down=is_shared),
    }
    for name in (MAGNITUDES, *BIAS_FACTORS):
        if any(name in part.factors for part in parts):
            # Stack one factor of each part of a fused weight along rows, with zeros for parts that lack it
            parts_with_tensor = [part for part in parts if name in part.factors]
            first = parts_with_tensor[0].factors[name]
            stacked = first.new_zeros(num_rows, *first.shape[1:])
            for part in parts_with_tensor:
                stacked[part.row_slice] = part.factors[name]
            joined[name] = stacked
    return joined


def _join_up_factors(parts: Sequence[RowFactors], num_rows: int, rank: int, shares_down: bool) -> Tensor:
    """Return the joined up factor, num_rows x rank."""
    joined = parts[0].factors[UP].new_zeros(num_rows, rank)
    first_column = 0
    for part in parts:
        up = part.factors[UP]
        joined[part.row_slice, first_column : first_column + up.shape[1]] = up
        if not shares_down:
            first_column += up.shape[1]
    return joined


def _with_bias_difference(factors: Factors) -> Factors:
    """Return LoRA factors with the change of the bias, if any, as `diff_b`, which alpha does not scale."""
    bias = read_delta(factors).bias_in_file_dtype()
    if bias is None:
        return factors
    others = {name: tensor for name, tensor in factors.items() if name not in BIAS_FACTORS}
    return {**others, "diff_b": bias}


def _fold_into_up(factors: Factors) -> Factors:
    """Return LoRA factors with alpha / rank multiplied into the up factor and its bias."""
    scale = compute_scaling(factors)
    folded = dict(factors)
    for name in (UP, _BIAS):
        if name in factors:
            folded[name] = (factors[name].float() * scale).to(factors[name].dtype)
    return folded


def _join_any_kind(pieces: Sequence[FusedPiece], num_rows: int, allows_full_matrix: bool) -> Factors:
    """Return the factors of a weight whose parts are not all plain LoRAs, or raise FusionError."""
    # Parts that were cut from one layer get that layer's factors back. Otherwise, a model gets the full
    # matrix of the change, which is too large for a file.
    slices = _find_slices(pieces, num_rows)
    if slices is None:
        raise FusionError("its parts are not matrices, or do not fit the rows of the weight")
    parts = _sort_by_rows(pieces, slices)
    ranges = [(part.row_slice.start, part.row_slice.stop) for part in parts]
    if _cover_all_rows(ranges, num_rows):
        layer = _restore_layer([part.factors for part in parts])
        if layer is not None:
            return layer
    if not allows_full_matrix:
        raise FusionError("only plain LoRAs, or the parts of one layer, can be joined")
    return _join_full_matrices(parts, num_rows)


def _find_slices(pieces: Sequence[FusedPiece], num_rows: int) -> list[slice] | None:
    """Return each part's rows of a weight with `num_rows` rows; None if a part has none."""
    slices: list[slice] = []
    for piece in pieces:
        part_rows = read_delta(piece.factors).count_rows()
        rows = find_part_rows(piece.part, part_rows, num_rows) if part_rows else None
        if not isinstance(rows, slice):
            return None
        slices.append(rows)
    return slices


def _cover_all_rows(ranges: Sequence[tuple[int, int]], num_rows: int) -> bool:
    """Return whether sorted row ranges cover all rows of a weight without gaps or overlaps."""
    starts = [start for start, _ in ranges]
    stops = [stop for _, stop in ranges]
    return starts == [0, *stops[:-1]] and stops[-1] == num_rows


def _join_full_matrices(parts: Sequence[RowFactors], num_rows: int) -> Factors:
    """Return the full float32 change of a weight with `num_rows` rows from the changes of its parts."""
    part_deltas = [read_delta(part.factors) for part in parts]
    _check_full_matrices(part_deltas, parts, num_rows)
    # The full change of a weight; raise FusionError if its parts differ in the shape of a row
    changes = [delta.compute_change(CPU) for delta in part_deltas]
    row_shapes = {None if change is None else change.shape[1:] for change in changes}
    row_shape = row_shapes.pop()
    # None for a part that does not change the weight
    if row_shapes or row_shape is None:
        raise FusionError("its parts have different inputs")
    joined = {"diff": _write_rows(parts, changes, torch.zeros(num_rows, *row_shape))}
    magnitudes = [delta.magnitudes for delta in part_deltas if delta.magnitudes is not None]
    if magnitudes:
        joined[MAGNITUDES] = torch.cat(magnitudes)
    biases = [delta.compute_bias_change(CPU) for delta in part_deltas]
    if any(bias is not None for bias in biases):
        joined["diff_b"] = _write_rows(parts, biases, torch.zeros(num_rows))
    return joined


def _check_full_matrices(part_deltas: Sequence[Delta], parts: Sequence[RowFactors], num_rows: int) -> None:
    """Raise FusionError if a part replaces the weight, or if only some rows would have DoRA magnitudes."""
    if any(delta.replaces_weight for delta in part_deltas):
        raise FusionError(f"{SET_WEIGHT} is only for some of its rows")
    if any(delta.has_input_magnitudes for delta in part_deltas):
        raise FusionError(f"its {MAGNITUDE_KIND_NAME} magnitudes are by input, so they belong to the parts")
    num_with_magnitudes = sum(delta.magnitudes is not None for delta in part_deltas)
    covered_rows = sum(part.row_slice.stop - part.row_slice.start for part in parts)
    if num_with_magnitudes and (num_with_magnitudes < len(parts) or covered_rows < num_rows):
        raise FusionError(
            f"its parts have {MAGNITUDE_KIND_NAME} magnitudes for less than its {num_rows} rows"
        )


def _write_rows(parts: Sequence[RowFactors], values: Sequence[Tensor | None], total: Tensor) -> Tensor:
    """Write the values of each part into its rows of `total`; return `total`."""
    for part, part_values in zip(parts, values, strict=True):
        if part_values is not None:
            total[part.row_slice] = part_values
    return total


def _restore_layer(parts: Sequence[Factors]) -> Factors | None:
    """Return the factors of the layer that was split by rows into these parts; None if they do not match."""
    stacked_names = _find_factors_to_stack(parts)
    if stacked_names is None:
        return None
    first, *others = parts
    shared_names = first.keys() - stacked_names - {ROW_RANGE}
    for name in shared_names:
        if not all(torch.equal(part[name], first[name]) for part in others):
            return None
    layer = {name: first[name] for name in shared_names}
    for name in stacked_names:
        layer[name] = torch.cat([part[name] for part in parts])
    return layer


def _find_factors_to_stack(parts: Sequence[Factors]) -> set[str] | None:
    """Return the factors of which each part has its own rows; None if the parts are not from one layer."""
    names = parts[0].keys()
    delta = read_delta(parts[0])
    split_names = delta.find_factors_with_rows()
    if split_names is None or any(part.keys() != names for part in parts):
        return None
    if ROW_RANGE not in names:
        return split_names
    # each part has the full layer's factors and a range of rows; only magnitudes and biases are split
    layer_size = delta.matrix_size()
    ranges = [read_row_range(part) for part in parts]
    if layer_size is None or not _cover_all_rows(ranges, layer_size[0]):
        return None
    return split_names & {MAGNITUDES, *BIAS_FACTORS}


def resolve_rows(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Convert parts with a `ROW_RANGE`, which files cannot contain, to parts with their own factors.

    Such a part has the factors of the whole fused layer, and `ROW_RANGE` says which rows are its own. If the
    factors cannot be cut by rows, the part gets the full difference of its rows.

    Raises:
        CheckpointError: If a part has per-input magnitudes, because they belong to the full layer.
    """
    modules = group_by_module(tensors)
    if not any(ROW_RANGE in factors for factors in modules.values()):
        return tensors
    resolved: dict[str, Factors] = {}
    for name, factors in modules.items():
        resolved[name] = factors if ROW_RANGE not in factors else _resolve_part(name, factors)
    return ungroup(resolved)


def _resolve_part(name: str, factors: Factors) -> Factors:
    """Return a part's own factors, given the fused layer's factors and the part's `ROW_RANGE`."""
    delta = read_delta(factors)
    if delta.has_input_magnitudes:
        raise CheckpointError(
            f"{name} is a part of a joined layer whose {MAGNITUDE_KIND_NAME} magnitudes are by input: they "
            "belong to the whole layer, which this model has in separate parts.\n"
            "  Convert the file with the program that made it."
        )
    start, stop = read_row_range(factors)
    sliced_factors = delta.slice_factors(start, stop)
    if sliced_factors is not None:
        return sliced_factors
    # the kind cannot be cut there: compute the full matrix of the part's rows
    change = delta.compute_change(CPU)
    assert change is not None
    dtype = next(factors[factor_name].dtype for factor_name in factors if factor_name in KIND_BY_FACTOR)
    resolved: dict[str, Tensor] = {"diff": change.to(dtype).clone()}
    if MAGNITUDES in factors:
        resolved[MAGNITUDES] = factors[MAGNITUDES]
    bias = delta.bias_in_file_dtype()
    if bias is not None:
        resolved["diff_b"] = bias
    return resolved


def stack_rows(
    path: Path, tensors: dict[str, Tensor], rule: RowsByHead, names_in_file: Iterable[str]
) -> dict[str, Tensor]:
    """Return a LoRA whose fused layers have all rows of q first, then k, then v.

    Some programs order the rows by head instead: [q0 k0 v0, q1 k1 v1, ...].

    Args:
        path: Path of the file.
        tensors: Tensors under our names.
        rule: Layers whose rows some programs order by head, and a pattern of these programs' names.
        names_in_file: Names in the file.

    Raises:
        CheckpointError: If the rows of a layer cannot be divided into heads, or cannot be reordered.
    """
    has_rows_by_head = any(re.search(rule.file_pattern, name) for name in names_in_file)
    if not has_rows_by_head:
        return tensors
    ending = rule.ending.replace(".", "_")
    modules = group_by_module(tensors)
    for name, factors in modules.items():
        if not name.endswith(ending):
            continue
        delta = read_delta(factors)
        num_rows = delta.count_rows()
        if num_rows is None:  # the factors do not reveal it
            continue
        reordered = None
        if num_rows % (3 * rule.head_width) == 0:  # q, k and v of each head
            row_order = stack_heads(torch.arange(num_rows), rule.head_width)
            reordered = delta.select_rows(row_order)
        if reordered is None:
            raise CheckpointError(
                f"{path} cannot be used: {name} has {num_rows} rows, which its program orders by head, "
                f"{rule.head_width} of each query, key and value.\n  Pass a plain LoRA that was trained for "
                "this model.",
                path,
            )
        modules[name] = dict(reordered.factors)
    return ungroup(modules)


def correct_split_alphas(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Tensor]:
    """Correct the alphas of a LoRA that was trained with sd-scripts' `split_qkv`; return all tensors.

    sd-scripts joins the factors of k parts into one LoRA with k times the rank, but saves the alpha of
    one part, so alpha / rank would be k times too small. These modules have block-diagonal up factors.
    """
    corrected = dict(tensors)
    trained_alpha = metadata.get("ss_network_alpha", "").removesuffix(".0")  # as `:g` formats it below
    num_corrected = 0
    for name, factors in group_by_module(tensors).items():
        is_plain_lora = set(factors) == {"alpha", *LORA_FACTORS}
        if not is_plain_lora or f"{float(factors['alpha']):g}" != trained_alpha:
            continue
        # How many parts of a fused module have their own factors in a plain LoRA's
        # 0 if they share them.
        part_indices: set[int | None] = set()
        for related in related_modules(name.removeprefix(OURS)):
            if related.is_part and is_row_slice(related.part):
                part_indices.add(related.part.index)
        up = factors[UP]
        row_counts = count_fused_part_rows(len(part_indices), rows=len(up), columns=factors[DOWN].shape[1])
        has_own_factors = bool(row_counts) and diagonal_blocks(up, row_counts) is not None
        num_parts = len(row_counts) if has_own_factors else 0
        if num_parts:
            corrected[f"{name}.alpha"] = factors["alpha"] * num_parts
            num_corrected += 1
    if num_corrected:
        logger.info(f"{path}: the alphas of {num_corrected} modules with split factors are corrected")
    return corrected
