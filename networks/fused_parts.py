"""Split LoRAs for fused weights (such as qkv) into LoRAs for their parts, and join such parts."""

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
from networks.deltas import LORA, ROWS, strength
from networks.kinds.composing import MAGNITUDES, MARKS, OF_MAGNITUDES
from networks.kinds.factors import DOWN, UP, Factors
from networks.lora_products import diagonal_blocks, fused_sizes
from networks.module_names import FAMILIES, Relative, relatives
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


def part_rows(part: WeightPart, height: int, full_height: int) -> slice | Tensor | None:
    """Return the rows of a part in a fused weight; None if they do not fit.

    If the part is the fused weight with its halves swapped, the result is the index of each row.

    `height` and `full_height` are the numbers of rows of the part and of the fused weight.
    """
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


def default_rows(part: WeightPart, full_height: int) -> slice | None:
    """Return the rows of a part, if the fused weight has the proportions of the published model; else None.

    Used for input rotations, whose tensors do not show how many rows a module has. If the two halves of a
    weight are swapped, all rows are returned, because the rotation is the same for each row.
    """
    if not is_cut(part):
        return slice(0, full_height)
    siblings = [sibling for sibling in _find_siblings(part.ours, {part.theirs}) if is_cut(sibling)]
    unit, rest = divmod(full_height, sum(sibling.default_height for sibling in siblings))
    rows = part_rows(part, unit * part.default_height, full_height)
    return rows if not rest and isinstance(rows, slice) else None


def is_cut(part: WeightPart) -> bool:
    """Return whether a part is a slice of the fused weight, not all of its rows (possibly swapped)."""
    return part.index is not None and part.index != SWAPPED


def for_model(tensors: Mapping[str, Tensor], height: Callable[[str], int | None]) -> dict[str, Tensor]:
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
    are unchanged. The arguments are those of `for_model`.
    """
    modules = deltas.group_by_module(tensors)
    apart: dict[str, Factors] = {}
    for name, factors in modules.items():
        rows_by_part = _rows_of_parts(name, modules, height) if height(name) is None else {}
        pieces = _cut(factors, rows_by_part) if any(rows_by_part.values()) else {name: factors}
        if isinstance(pieces, str):
            logger.warning(f"{name}: {pieces}; it stays whole")
            pieces = {name: factors}
        apart.update(pieces)
    return deltas.ungroup(apart)


def _rows_of_parts(
    name: str, modules: Collection[str], height: Callable[[str], int | None]
) -> dict[Relative, int | None]:
    """Return the rows of those parts of a module that have no separate LoRA; None for parts the model lacks.

    Args:
        name: Name of the module.
        modules: Modules with LoRAs.
        height: Returns the number of rows of a module's weight; None if the model lacks the module.
    """
    rows_by_part: dict[Relative, int | None] = {}
    for relative in relatives(name.removeprefix(OURS)):
        part_name = OURS + relative.name
        if not relative.is_part or part_name in modules:
            continue
        rows = height(part_name)
        # Families split modules differently. A relative for all rows that the model lacks is just another
        # name of the module, not a missing part.
        if rows is not None or is_cut(relative.part):
            rows_by_part[relative] = rows
    return rows_by_part


def _cut(factors: Factors, row_counts: Mapping[Relative, int | None]) -> dict[str, Factors] | str:
    """Cut the factors of a fused weight; return those of each part, or the reason why it cannot be cut.

    `row_counts` is the number of rows of each part; None for a part that the model does not have.
    """
    parts_here = {relative: rows for relative, rows in row_counts.items() if rows is not None}
    delta = read_delta(factors)
    if delta.rotation is not None:  # it rotates the input, which all parts share
        return {OURS + relative.name: factors for relative in parts_here}
    num_rows = _height_to_cut(delta)
    if num_rows is None:
        return "its change is no matrix"
    rows_of_part = _places_of_parts(parts_here, num_rows)
    fits = len(rows_of_part) == len(parts_here)
    if len(parts_here) == len(row_counts):  # the model has all parts: together they must cover the weight
        fits = fits and sum(parts_here.values()) == num_rows
    if not fits:
        shown = " + ".join(map(str, parts_here.values()))
        return f"its {num_rows} rows are not those of its parts, which have {shown}"
    if delta.has_input_magnitudes:
        return f"its {OF_MAGNITUDES} magnitudes are by input, so they belong to the whole weight"
    pieces: dict[str, Factors] = {}
    ordered = sorted(rows_of_part, key=lambda relative: _start_of(rows_of_part[relative]))
    parts = joined_blocks(factors, [parts_here[relative] for relative in ordered])
    if parts:  # it was joined from LoRAs of the parts, which are restored with their own ranks
        return {OURS + relative.name: part for relative, part in zip(ordered, parts, strict=True)}
    for relative, rows in rows_of_part.items():
        piece = _part_of(delta, rows)
        if piece is None:
            return f"its halves are to be swapped, which {delta.name_indivisible()} has no form for"
        pieces[OURS + relative.name] = piece.factors
    return pieces


def joined_blocks(factors: Factors, split_sizes: Sequence[int]) -> list[Factors]:
    """Return the LoRAs of the parts that this LoRA was joined from; [] if it was trained as a whole.

    Args:
        factors: Factors of the module, by name of the part.
        split_sizes: Rows of the parts.
    """
    is_plain = UP in factors and factors.keys() <= {"alpha", *LORA}
    if not is_plain or len(split_sizes) < 2:
        return []
    blocks = diagonal_blocks(factors[UP], split_sizes)
    return [] if blocks is None else cut_blocks(factors, blocks)


def cut_blocks(factors: Factors, blocks: Sequence[Tensor]) -> list[Factors]:
    """Return the LoRA of each block of a block-diagonal up factor."""
    downs = factors[DOWN].chunk(len(blocks))
    pieces: list[Factors] = [{DOWN: down, UP: up} for down, up in zip(downs, blocks, strict=True)]
    if "alpha" not in factors:
        return pieces
    alpha = torch.tensor(strength(factors) * (len(factors[DOWN]) // len(blocks)))
    return [{**piece, "alpha": alpha} for piece in pieces]


def _height_to_cut(delta: Delta) -> int | None:
    """Return the number of rows of a change; None if it is not a matrix."""
    size = delta.size()
    if size is not None:
        return size[0]
    return len(delta.factors[UP]) if UP in delta.factors else None


def _places_of_parts(
    rows_by_part: Mapping[Relative, int], full_height: int
) -> dict[Relative, slice | Tensor]:
    """Return the rows of each part in the full weight; parts whose rows do not fit are left out."""
    places: dict[Relative, slice | Tensor] = {}
    for relative, height in rows_by_part.items():
        rows = part_rows(relative.part, height, full_height)
        if rows is not None:
            places[relative] = rows
    return places


def _start_of(rows: slice | Tensor) -> int:
    """Return the first row of a part; 0 for swapped halves, which contain all rows."""
    return int(rows.start) if isinstance(rows, slice) else 0


def _part_of(delta: Delta, rows: slice | Tensor) -> Delta | None:
    """Return the delta for these rows; None if a kind cannot swap its halves."""
    if isinstance(rows, slice):
        return delta.part(rows.start, rows.stop)
    return delta.rows(rows)


def fuse(
    tensors: Mapping[str, Tensor],
    height: Callable[[str], int | None] | None = None,
    family: FamilyNames | None = None,
) -> dict[str, Tensor]:
    """Join the LoRAs for parts of a module into one for the module; warn of LoRAs that cannot be joined.

    Without `height`, all parts are joined. The number of rows is then inferred from the parts of all blocks,
    or from the published model for a part that no block has. The change of the weight stays the same. The
    rank is the sum of the parts' ranks, or their common rank if they share one down factor.

    Args:
        tensors: Tensors under our names, with our prefix; tensors without the prefix are unchanged.
        height: Returns the number of rows of a fused module's weight; None if the model lacks the module:
            its parts are then returned unchanged.
        family: Family of the modules; None for any.
    """
    modules = deltas.group_by_module(tensors)
    fused: dict[str, Factors] = {}
    pieces_by_name: dict[str, list[FusedPiece]] = {}  # fused module -> its parts
    for name, factors in modules.items():
        module = _find_full(name, height, family)
        if module is None or OURS + module.name in modules:
            fused[name] = factors
            continue
        piece = FusedPiece(name, module.part, factors)
        pieces_by_name.setdefault(OURS + module.name, []).append(piece)
    likely = _guess_rows(pieces_by_name.values()) if height is None else {}
    for into, pieces in pieces_by_name.items():
        rows = likely[pieces[0].part.ours] if height is None else height(into)
        joined = _join(pieces, rows or 0, is_for_model=height is not None)
        if isinstance(joined, str):
            logger.warning(f"{into}: {joined}; they stay apart")
            fused.update({piece.name: piece.factors for piece in pieces})
        else:
            fused[into] = joined
    return deltas.ungroup(fused)


def _find_full(
    name: str, height: Callable[[str], int | None] | None, family: FamilyNames | None
) -> Relative | None:
    """Return the fused module that contains a module; None if there is none or the model lacks it."""
    for relative in relatives(name.removeprefix(OURS), family):
        if not relative.is_part and (height is None or height(OURS + relative.name) is not None):
            return relative
    return None


def _guess_rows(fused: Iterable[Sequence[FusedPiece]]) -> dict[str, int]:
    """Estimate the number of rows of each fused weight from its parts; all blocks have the same number."""
    rows_by_path: dict[str, dict[int | None, int]] = {}  # path of the weight -> index of a part -> its rows
    paths: set[str] = set()  # paths of the parts in their own layout
    for piece in itertools.chain.from_iterable(fused):
        paths.add(piece.part.theirs)
        rows = rows_by_path.setdefault(piece.part.ours, {})
        height = read_delta(piece.factors).height()
        if height is not None:
            rows[piece.part.index] = height
    return {ours: _guess_height(_find_siblings(ours, paths), rows) for ours, rows in rows_by_path.items()}


def _find_siblings(ours: str, paths: Collection[str]) -> list[WeightPart]:
    """Return the parts of a weight, in the families that have one of these paths.

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


def _guess_height(siblings: Sequence[WeightPart], rows: Mapping[int | None, int]) -> int:
    """Estimate the number of rows of a weight from some of its parts; 0 if no part is known.

    Args:
        siblings: All parts of the weight.
        rows: Number of rows by index of the part.
    """
    reference = next((part for part in siblings if rows.get(part.index)), None)
    if reference is None:
        return 0
    if not is_cut(reference):  # it covers the whole weight
        return rows[reference.index]
    # default heights are relative: scale them so that the known part has its real height
    unit = rows[reference.index] // reference.default_height
    height = 0
    for part in siblings:
        if not is_cut(part):
            continue
        part_height = rows.get(part.index)
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
    is_full_weight = first.part.index is None and len(pieces) == 1
    if is_full_weight:
        return first.factors
    if any(read_delta(piece.factors).rotation is not None for piece in pieces):
        return join_rotations(pieces)
    if not all(_is_low_rank_matrix(piece.factors) for piece in pieces):
        return _join_others(pieces, num_rows, is_for_model)
    all_rows = [part_rows(piece.part, len(piece.factors[UP]), num_rows) for piece in pieces]
    # a weight whose halves are swapped is a single part, with the index of each of its rows
    if isinstance(all_rows[0], Tensor):
        swapped = read_delta(first.factors).rows(all_rows[0])
        return f"its {OF_MAGNITUDES} magnitudes are by input" if swapped is None else swapped.factors
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
    siblings = _find_siblings(first.part.ours, {first.part.theirs})
    joined_paths = {piece.part.theirs for piece in pieces}
    rotations = [(piece.factors, read_delta(piece.factors).rotation) for piece in pieces]
    if is_cut(first.part) and any(is_cut(part) and part.theirs not in joined_paths for part in siblings):
        title = next(rotation.title for _, rotation in rotations if rotation is not None)
        return f"{title} rotates only some of its parts"
    values = [factors[rotation.part] for factors, rotation in rotations if rotation is not None]
    if len(values) < len(pieces) or not all(torch.equal(value, values[0]) for value in values):
        return "its parts are rotated differently"
    return first.factors


def _is_low_rank_matrix(factors: Factors) -> bool:
    """Return whether these are the factors of a LoRA or DoRA for a matrix, without a core."""
    others = set(factors) - {"alpha", *LORA, MAGNITUDES, _BIAS}
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
        return f"only {OF_MAGNITUDES} magnitudes by output, for all of its rows, can be put together"
    if sum(len(factors[MAGNITUDES]) for factors in parts) != height:
        return f"its parts have {OF_MAGNITUDES} magnitudes for less than its {height} rows"
    return ""


def _join_low_rank(placed: Sequence[PlacedFactors], height: int) -> Factors:
    """Return a single LoRA whose up factor is block-diagonal: each part's up factor lies in the part's rows.

    Args:
        placed: Factors with their rows, in the order of the rows; ranks are joined in the same order.
        height: Number of rows of the weight.
    """
    scales = [strength(part.factors) for part in placed]
    scale = scales[0]
    if scales.count(scale) < len(scales):  # different alpha / rank: multiply each into its up factor
        placed = [PlacedFactors(part.rows, _fold_into_up(part.factors)) for part in placed]
        scale = 1.0
    downs = [part.factors[DOWN] for part in placed]
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
    """Return an up factor that has the parts' up factors as blocks.

    Args:
        placed: Factors with their rows.
        height: Number of rows of the weight.
        rank: Rank of the joined LoRA.
        is_shared: Whether the parts share their down factor.
    """
    joined = placed[0].factors[UP].new_zeros(height, rank)
    start = 0
    for part in placed:
        up = part.factors[UP]
        joined[part.rows, start : start + up.shape[1]] = up
        if not is_shared:
            start += up.shape[1]
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
    """Stack a tensor of the parts to one with the weight's rows; rows of parts without the tensor are 0."""
    having = [part for part in placed if name in part.factors]
    first = having[0].factors[name]
    stacked = first.new_zeros(height, *first.shape[1:])
    for part in having:
        stacked[part.rows] = part.factors[name]
    return stacked


def _join_others(pieces: Sequence[FusedPiece], height: int, is_for_model: bool) -> Factors | str:
    """Join parts that are not all plain LoRAs; return the factors, or the reason why there are none."""
    slices: list[slice] = []
    for piece in pieces:
        part_height = read_delta(piece.factors).height()
        rows = part_rows(piece.part, part_height, height) if part_height else None
        if isinstance(rows, slice):
            slices.append(rows)
    if len(slices) < len(pieces):
        return "its parts are no matrices, or do not fit the rows of the weight"
    placed = _in_order(pieces, slices)
    ranges = [(part.rows.start, part.rows.stop) for part in placed]
    if _are_gapless(ranges, height):
        layer = _one_layer([part.factors for part in placed])
        if layer is not None:
            return layer
    if not is_for_model:
        return "only plain LoRAs, or the parts of one layer, can be joined"
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
    if any(part.sets_weight for part in parts):
        return f"{deltas.SET} is only for some of its rows"
    if any(part.has_input_magnitudes for part in parts):
        return f"its {OF_MAGNITUDES} magnitudes are by input, so they belong to the parts"
    magnitudes = [part.magnitudes for part in parts if part.magnitudes is not None]
    if magnitudes:
        covered = sum(part.rows.stop - part.rows.start for part in placed)
        if len(magnitudes) < len(parts) or covered < height:
            return f"its parts have {OF_MAGNITUDES} magnitudes for less than its {height} rows"
    changes = [part.dense(deltas.CPU) for part in parts]
    inputs = {None if change is None else change.shape[1:] for change in changes}
    shape = inputs.pop()
    if inputs or shape is None:
        return "its parts have different inputs"
    joined = {"diff": _place_rows(placed, changes, torch.zeros(height, *shape))}
    if magnitudes:
        joined[MAGNITUDES] = torch.cat(magnitudes)
    biases = [part.bias(deltas.CPU) for part in parts]
    if any(bias is not None for bias in biases):
        joined["diff_b"] = _place_rows(placed, biases, torch.zeros(height))
    return joined


def _place_rows(placed: Sequence[PlacedFactors], values: Sequence[Tensor | None], total: Tensor) -> Tensor:
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
    by_rows = delta.row_parts()  # names of factors with one row per output; the parts share the others
    if by_rows is None or any(part.keys() != names for part in parts):
        return None
    if ROWS in names:  # only magnitudes and biases have rows of the part
        by_rows &= {MAGNITUDES, *deltas.OF_BIAS}
        size = delta.size()
        if size is None or not _are_gapless([deltas.rows_in(part) for part in parts], size[0]):
            return None
    shared = names - by_rows - {ROWS}
    for name in shared:
        if not all(torch.equal(part[name], first[name]) for part in parts):
            return None
    layer = {name: first[name] for name in shared}
    for name in by_rows:
        layer[name] = torch.cat([part[name] for part in parts])
    return layer


def resolve_rows(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Give each part that is marked by `ROWS` factors of its own, because files cannot store the mark.

    A LoKr whose blocks of rows do not straddle two parts is cut; other factors become full differences, in
    the dtype of the factors.

    Raises:
        CheckpointError: For magnitudes by input, because they belong to the full layer.
    """
    modules = deltas.group_by_module(tensors)
    if not any(ROWS in factors for factors in modules.values()):
        return tensors
    resolved: dict[str, Factors] = {}
    for name, factors in modules.items():
        resolved[name] = factors if ROWS not in factors else _resolve_part(name, factors)
    return deltas.ungroup(resolved)


def _resolve_part(name: str, factors: Factors) -> Factors:
    """Return the factors of a part of a joined layer without `ROWS`."""
    delta = read_delta(factors)
    if delta.has_input_magnitudes:
        raise CheckpointError(
            f"{name} is a part of a joined layer whose {OF_MAGNITUDES} magnitudes are by input: they belong "
            "to the whole layer, which this model has in parts.\n"
            "  Convert the file with the program that made it."
        )
    # a LoRA or LoKr whose rows can be cut stays one; others become the full difference of their rows
    blocks = delta.blocks(*deltas.rows_in(factors))
    if blocks is not None:
        return blocks
    change = delta.dense(deltas.CPU)
    assert change is not None
    dtype = next(factors[part].dtype for part in factors if part in MARKS)
    resolved: dict[str, Tensor] = {"diff": change.to(dtype).clone()}
    if MAGNITUDES in factors:
        resolved[MAGNITUDES] = factors[MAGNITUDES]
    bias = delta.stored_bias()
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
        rule: Layers whose rows some programs order by head, and the pattern that reveals these programs.
        stored: Names in the file; they show whether its program orders rows by head.

    Raises:
        CheckpointError: If the number of rows is not a multiple of whole heads.
    """
    if not any(re.search(rule.mark, name) for name in stored):
        return tensors
    ending = rule.ending.replace(".", "_")
    modules = deltas.group_by_module(tensors)
    for name, factors in modules.items():
        delta = read_delta(factors)
        num_rows = delta.height() if name.endswith(ending) else None
        if num_rows is None:
            continue
        stacked = None
        if num_rows % (3 * rule.head_width) == 0:
            stacked = delta.rows(stack_heads(torch.arange(num_rows), rule.head_width))
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
    """Restore the alphas of a LoRA that was trained with sd-scripts' `split_qkv`; return all tensors.

    Such a file joins the factors of k parts to one with k times the rank, but keeps the alpha of one part, so
    that alpha / rank would be k times too small. Block-diagonal up factors reveal these modules.
    """
    mended = dict(tensors)
    trained_alpha = metadata.get("ss_network_alpha", "").removesuffix(".0")
    changed = 0
    for name, factors in deltas.group_by_module(tensors).items():
        if set(factors) != {"alpha", *LORA}:
            continue
        down = factors[DOWN]
        up = factors[UP]
        alpha = factors["alpha"]
        if f"{float(alpha):g}" != trained_alpha:
            continue  # the alpha was adapted to the joined rank already
        parts = [relative.part for relative in relatives(name.removeprefix(OURS)) if relative.is_part]
        # an index of None or SWAPPED stands for the full weight, not for some of its rows
        num_parts = len({part.index for part in parts} - {None, SWAPPED})
        row_counts = fused_sizes(num_parts, len(up), down.shape[1])
        if row_counts and diagonal_blocks(up, row_counts) is not None:
            mended[f"{name}.alpha"] = alpha * len(row_counts)  # like the joined rank, k times that of a part
            changed += 1
    if changed:
        logger.info(f"{path}: the alphas of {changed} modules with split factors are set right")
    return mended
