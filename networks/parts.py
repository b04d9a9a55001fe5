"""LoRAs of layouts that split a fused weight: which rows belong to which part, splitting and joining."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import getLogger
from pathlib import Path

import torch
from torch import Tensor

from modules.errors import CheckpointError
from networks import deltas
from networks.deltas import DORA, LORA, ROWS, Factors, strength
from networks.lora_products import diagonal_blocks, fused_heights
from networks.module_names import FAMILIES, Relative, relatives
from networks.names.layouts import BEFORE_REST, OURS, REST, SWAPPED, FamilyNames, WeightPart

logger = getLogger(__name__)
Pieces = Sequence[tuple[WeightPart, Factors]]  # of one fused module


def part_rows(part: WeightPart, own: int, whole: int) -> slice | Tensor | None:
    """Return the rows of a part in a fused weight; None if they do not fit. own, whole: numbers of rows."""
    if part.index is None or part.index == SWAPPED:
        if own != whole:
            return None
        return slice(0, whole) if part.index is None else torch.arange(whole).roll(whole // 2)
    from_end = {REST: 1, BEFORE_REST: 2}.get(part.index)
    start = part.index * own if from_end is None else whole - from_end * own
    return slice(start, start + own) if 0 <= start <= whole - own else None


def is_cut(part: WeightPart) -> bool:
    return part.index is not None and part.index != SWAPPED


def for_model(tensors: Mapping[str, Tensor], height: Callable[[str], int | None]) -> dict[str, Tensor]:
    """Convert LoRAs of another layout to the modules that a model has: split fused ones or join parts.

    tensors: under our names, with our prefix; others are unchanged. height: module -> number of rows of its
    weight, None if the model lacks the module.
    """
    return fuse(cut(tensors, height), height)


def cut(tensors: Mapping[str, Tensor], height: Callable[[str], int | None]) -> dict[str, Tensor]:
    """Split LoRAs for fused modules into LoRAs for their parts; warn of LoRAs that cannot be split.

    Arguments as for `for_model`. Each part has the whole down factor and alpha, and its rows of the up
    factor. Parts that the model does not have are left out. Other modules, those that cannot be split, and
    those without any part in the model are unchanged.
    """
    modules = deltas.group_by_module(tensors)
    apart: dict[str, Factors] = {}
    for name, factors in modules.items():
        parts = () if height(name) is not None else relatives(name.removeprefix(OURS))
        heights = {
            one: height(OURS + one.name) for one in parts if one.is_part and OURS + one.name not in modules
        }
        # families split modules in different ways: a name for all rows that the model lacks is no part
        heights = {one: rows for one, rows in heights.items() if rows is not None or is_cut(one.part)}
        found = _cut(factors, heights) if any(heights.values()) else {name: factors}
        if isinstance(found, str):
            logger.warning(f"{name}: {found}; it stays whole")
            found = {name: factors}
        apart.update(found)
    return deltas.ungroup(apart)


def _cut(factors: Factors, heights: Mapping[Relative, int | None]) -> dict[str, Factors] | str:
    """Return the factors of each part that has a height, or the reason why there are none."""
    size, given = deltas.size_of(factors), [rows for rows in heights.values() if rows is not None]
    if size is None and LORA[1] not in factors:
        return "its change is no matrix"
    whole = len(factors[LORA[1]]) if size is None else size[0]
    places = {one: part_rows(one.part, rows, whole) for one, rows in heights.items() if rows is not None}
    if any(rows is None for rows in places.values()) or (len(given) == len(heights) and sum(given) != whole):
        return f"its {whole} rows are not those of its parts, which have {' + '.join(map(str, given))}"
    if deltas.has_input_magnitudes(factors):
        return "its DoRA magnitudes are by input, so they belong to the whole weight"
    pieces: dict[str, Factors] = {}
    for one, rows in places.items():
        if isinstance(rows, slice):
            pieces[OURS + one.name] = deltas.part_of(factors, rows.start, rows.stop)
        elif rows is not None:  # with swapped halves
            swapped = deltas.rows_of(factors, rows)
            if swapped is None:
                return "its halves are to be swapped, which a LoKr has no form for"
            pieces[OURS + one.name] = swapped
    return pieces


def fuse(
    tensors: Mapping[str, Tensor],
    height: Callable[[str], int | None] | None = None,
    family: FamilyNames | None = None,
) -> dict[str, Tensor]:
    """Join the LoRAs for parts of a module to one for the module; warn of LoRAs that cannot be joined.

    tensors: under our names, with our prefix; others are unchanged. height: fused module -> number of rows of
    its weight, None if the model lacks it: its parts then stay as they are. Without `height` every part is
    joined, and heights come from the parts, also those in other blocks; if no block has the last part of a
    weight, its height is that of all published models. family: of the modules; None: any. The
    change of the weight stays the same. The rank is the sum of the parts' ranks, or their rank if they share
    one down factor.
    """
    modules = deltas.group_by_module(tensors)
    found: dict[str, list[str]] = {}  # fused module -> the modules that are parts of it
    fused: dict[str, Factors] = {}
    parts: dict[str, WeightPart] = {}
    for name, factors in modules.items():
        # the module of our layout that it is part of, and that the model has
        wholes = (other for other in relatives(name.removeprefix(OURS), family) if not other.is_part)
        larger = next((one for one in wholes if height is None or height(OURS + one.name) is not None), None)
        if larger is None or OURS + larger.name in modules:
            fused[name] = factors
        else:
            found.setdefault(OURS + larger.name, []).append(name)
            parts[name] = larger.part
    pieces = {into: [(parts[name], modules[name]) for name in names] for into, names in found.items()}
    likely = _likely_heights(pieces.values()) if height is None else {}
    for into, names in found.items():
        rows = likely[pieces[into][0][0].ours] if height is None else height(into)
        joined = _join(pieces[into], rows or 0, is_for_model=height is not None)
        if isinstance(joined, str):
            logger.warning(f"{into}: {joined}; they stay apart")
            fused.update({name: modules[name] for name in names})
        else:
            fused[into] = joined
    return deltas.ungroup(fused)


def _likely_heights(found: Iterable[Pieces]) -> dict[str, int]:
    """Estimate the rows of each fused weight, equal in all blocks, from its parts."""
    heights: dict[str, dict[int | None, int]] = {}  # path -> index of a part -> its rows
    of_families = [(*family.parts, *family.joined) for family in FAMILIES]
    seen: set[str] = set()
    for part, factors in itertools.chain.from_iterable(found):
        seen.add(part.theirs)
        rows = heights.setdefault(part.ours, {})
        if (height := deltas.height_of(factors)) is not None:
            rows[part.index] = height
    likely = {}
    for ours, rows in heights.items():
        # families may stack other parts under one name
        lists = (one for one in of_families if any(part.theirs in seen for part in one))
        siblings = {part.theirs: part for one in lists for part in one if part.ours == ours}
        known = next((part for part in siblings.values() if rows.get(part.index)), None)
        if known is None:
            likely[ours] = 0
            continue
        if not is_cut(known):  # not a part, but the whole weight
            likely[ours] = rows[known.index]
            continue
        unit = rows[known.index] // known.usual_height
        others = [part for part in siblings.values() if is_cut(part)]
        likely[ours] = sum(rows.get(part.index) or unit * part.usual_height for part in others)
        for part in others:
            if not rows.get(part.index) and part.usual_height > known.usual_height:
                logger.info(
                    f"{part.theirs} is not in the file; it is assumed to have {part.usual_height} times as "
                    "many rows as the parts beside it"
                )
    return likely


def _join(pieces: Pieces, height: int, is_for_model: bool = False) -> Factors | str:
    """Return factors for a weight of this height, or the reason why there are none.

    is_for_model: whole differences are made of what no factors can be joined of. They are large: files get
    them apart.
    """
    (part, factors), *others = pieces
    if part.index is None and not others:
        return factors
    if any(
        set(factors) - {"alpha", *LORA, DORA, "lora_up.bias"} or factors[LORA[1]].ndim != 2
        for _, factors in pieces
    ):
        return _join_others(pieces, height, is_for_model)
    places = [part_rows(part, len(factors[LORA[1]]), height) for part, factors in pieces]
    if isinstance(places[0], Tensor):  # with swapped halves
        swapped = deltas.rows_of(factors, places[0])
        return "its DoRA magnitudes are by input" if swapped is None else swapped
    slices = [place for place in places if isinstance(place, slice)]
    if len(slices) < len(places):
        return f"its parts do not fit into {height} rows"
    if any(DORA in factors for _, factors in pieces):
        if any(DORA not in factors or deltas.has_input_magnitudes(factors) for _, factors in pieces):
            return "only DoRA magnitudes by output, for all of its rows, can be put together"
        if sum(len(factors[DORA]) for _, factors in pieces) != height:
            return f"its parts have DoRA magnitudes for less than its {height} rows"
    # the up factor has the parts' up factors as blocks, each in its rows; ranks in the order of the rows
    order = sorted(range(len(slices)), key=lambda one: slices[one].start)
    slices, parts = [slices[one] for one in order], [pieces[one][1] for one in order]
    downs, ups = [factors[LORA[0]] for factors in parts], [factors[LORA[1]] for factors in parts]
    scales = [strength(factors) for factors in parts]
    if scales.count(scales[0]) < len(scales):
        ups = [(up.float() * scale).to(up.dtype) for up, scale in zip(ups, scales, strict=True)]
        scales, name = [1.0] * len(scales), "lora_up.bias"
        parts = [
            {**one, name: (strength(one) * one[name].float()).to(one[name].dtype)} if name in one else one
            for one in parts
        ]
    shared = all(torch.equal(down, downs[0]) for down in downs)
    down = downs[0] if shared else torch.cat(downs)
    up = ups[0].new_zeros(height, len(down))
    start = 0
    for factor, rows in zip(ups, slices, strict=True):
        up[rows, start : start + factor.shape[1]] = factor
        start += 0 if shared else factor.shape[1]
    whole: dict[str, Tensor] = {"alpha": torch.tensor(scales[0] * len(down)), LORA[0]: down, LORA[1]: up}
    for name in (DORA, "lora_up.bias"):
        given = [
            (factors[name], rows) for factors, rows in zip(parts, slices, strict=True) if name in factors
        ]
        if given:
            whole[name] = given[0][0].new_zeros(height, *given[0][0].shape[1:])
            for tensor, rows in given:
                whole[name][rows] = tensor
    return whole


def _join_others(pieces: Pieces, height: int, is_for_model: bool) -> Factors | str:
    """Return factors for a weight made of parts that are no plain LoRAs, or the reason why there are none."""
    heights = [deltas.height_of(factors) for _, factors in pieces]
    places = [part_rows(part, rows, height) for (part, _), rows in zip(pieces, heights, strict=True) if rows]
    slices = [place for place in places if isinstance(place, slice)]
    if len(slices) < len(pieces):
        return "its parts are no matrices, or do not fit the rows of the weight"
    order = sorted(range(len(slices)), key=lambda one: slices[one].start)
    slices, parts = [slices[one] for one in order], [pieces[one][1] for one in order]
    is_whole = [one.start for one in slices] == [0, *(one.stop for one in slices[:-1])]
    is_whole = is_whole and slices[-1].stop == height
    if is_whole and (found := _one_layer(parts)) is not None:
        return found
    if not is_for_model:
        return "only plain LoRAs, or the parts of one layer, can be joined"
    return _whole_difference(parts, slices, height)


def _whole_difference(parts: Sequence[Factors], slices: Sequence[slice], height: int) -> Factors | str:
    """Return the change of a weight of this height by its parts, float32, or the reason why there is none.

    slices: the rows of each part, in order.
    """
    if any(deltas.has_input_magnitudes(one) for one in parts):
        return "its DoRA magnitudes are by input, so they belong to the parts"
    covered = sum(rows.stop - rows.start for rows in slices)
    magnitudes = [one[DORA] for one in parts if DORA in one]
    if magnitudes and (len(magnitudes) < len(parts) or covered < height):
        return f"its parts have DoRA magnitudes for less than its {height} rows"
    changes = [deltas.weight_delta(one, deltas.CPU) for one in parts]
    columns = {None if one is None else one.shape[1:] for one in changes}
    if len(columns) > 1 or None in columns:
        return "its parts have different inputs"
    whole = torch.zeros(height, *next(iter(columns - {None})) or ())
    for rows, change in zip(slices, changes, strict=True):
        assert change is not None
        whole[rows] = change
    joined = {"diff": whole}
    if magnitudes:
        joined[DORA] = torch.cat(magnitudes)
    biases = [deltas.bias_delta(one, deltas.CPU) for one in parts]
    if any(bias is not None for bias in biases):
        joined["diff_b"] = torch.zeros(height)
    for rows, bias in zip(slices, biases, strict=True):
        if bias is not None:
            joined["diff_b"][rows] = bias
    return joined


# of a layer's parts: what has the part's rows; everything else is the whole layer's
_BY_ROWS = {LORA[1], "diff", "diff_b", "lora_up.bias", DORA, "hada_w1_a", "hada_w2_a", ROWS}


def _one_layer(parts: Sequence[Factors]) -> Factors | None:
    """Return the factors of a layer that was taken apart into these parts, by rows; None if it was not."""
    first = parts[0]
    if any(one.keys() != first.keys() or "hada_t1" in one or "hada_t2" in one for one in parts):
        return None
    by_rows = first.keys() & _BY_ROWS - {ROWS}
    if deltas.has_input_magnitudes(first):
        by_rows -= {DORA}
    if ROWS in first:  # their factors have no rows of their own, but for what is beside them
        by_rows &= {DORA, *deltas.OF_BIAS}
        ends = [deltas.rows_in(one) for one in parts]
        size = deltas.size_of(first)
        if size is None or [start for start, _ in ends] != [0, *(end for _, end in ends[:-1])]:
            return None
        if ends[-1][1] != size[0]:
            return None
    shared = first.keys() - by_rows - {ROWS}
    if not all(torch.equal(one[part], first[part]) for one in parts for part in shared):
        return None
    return {
        **{part: first[part] for part in shared},
        **{part: torch.cat([one[part] for one in parts]) for part in by_rows},
    }


def settle_rows(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a LoRA in which the parts of joined layers are forms that files have, without `ROWS`.

    A LoKr whose blocks lie between the parts is cut, another becomes whole differences, in the dtype of its
    factors. Raises CheckpointError for DoRA magnitudes by input: they belong to the whole layer.
    """
    modules = deltas.group_by_module(tensors)
    if not any(ROWS in factors for factors in modules.values()):
        return tensors
    settled: dict[str, Factors] = {}
    for name, factors in modules.items():
        settled[name] = factors if ROWS not in factors else _settled(name, factors)
    return deltas.ungroup(settled)


def _settled(name: str, factors: Factors) -> Factors:
    if deltas.has_input_magnitudes(factors):
        raise CheckpointError(
            f"{name} is a part of a joined layer whose DoRA magnitudes are by input: they belong to the "
            "whole layer, which this model has in parts.\n  Convert the file with the program that made it."
        )
    (start, stop), others = deltas.rows_in(factors), {part for part in factors if part != ROWS}
    first = next((part for part in ("lokr_w1", "lokr_w1_a") if part in factors), None)
    size = deltas.size_of(factors)
    assert size is not None
    if first is not None:
        block = size[0] // len(factors[first])  # rows of the second matrix
        if not start % block and not stop % block:
            rows = factors[first][start // block : stop // block].clone()
            return {**{part: factors[part] for part in others}, first: rows}
    change = deltas.weight_delta(factors, deltas.CPU)
    assert change is not None
    dtype = next(factors[part].dtype for part in factors if part.startswith(("lokr_w1", "lora_down")))
    settled: dict[str, Tensor] = {"diff": change.to(dtype).clone()}
    if DORA in factors:
        settled[DORA] = factors[DORA]
    bias = deltas.stored_bias(factors)
    return settled if bias is None else {**settled, "diff_b": bias}


def mend_split_alphas(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return a LoRA's tensors with the alphas that it was trained with, for files of sd-scripts' `split_qkv`.

    These files join the parts' factors to one of k times the rank, but keep the alpha of one part, so that
    alpha / rank would be k times too small. Block-diagonal up factors show them.
    """
    mended, trained = dict(tensors), metadata.get("ss_network_alpha", "").removesuffix(".0")
    for name, factors in deltas.group_by_module(tensors).items():
        if set(factors) != {"alpha", *LORA} or f"{float(factors['alpha']):g}" != trained:
            continue
        parts = {other.part.index for other in relatives(name.removeprefix(OURS)) if other.is_part}
        count = len(parts - {None, SWAPPED})
        heights = fused_heights(count, len(factors[LORA[1]]), factors[LORA[0]].shape[1])
        if heights and diagonal_blocks(factors[LORA[1]], heights) is not None:
            mended[f"{name}.alpha"] = factors["alpha"] * len(heights)
    if changed := sum(mended[name] is not tensors[name] for name in tensors):
        logger.info(f"{path}: the alphas of {changed} modules with split factors are set right")
    return mended
