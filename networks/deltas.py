"""Compute the change of a weight by the factors of a network of any kind, and check factors. The factors of a
module are named by the ends of their tensor names in files.

What differs between kinds is in `networks/kinds/`. Source of LoRA: Hu et al. 2021, arXiv 2106.09685.
"""

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from checkpoints.finite import is_finite
from contract.loading import TensorInfo
from modules.devices import dtype_name
from networks.kinds import KINDS, composing, contract
from networks.kinds.composing import MAGNITUDES, kinds_in, rotating_kind

Factors = Mapping[str, Tensor]  # "lora_down.weight" -> tensor: the factors of one module
CPU, META = torch.device("cpu"), torch.device("meta")

DOWN, UP = contract.DOWN, contract.UP
LORA = (DOWN, UP)
SET = "set_weight"  # ComfyUI's: takes the place of the model's weight at any strength but 0
# rows (first, last + 1) of the factors' change that are the module's: it is a part of a layer that other
# programs join, and a LoKr has no factor with these rows. No file holds it.
ROWS = "reelsmith_rows"
PARTS = (*composing.PARTS, "alpha", "diff", "diff_b", SET, ROWS)
OF_BIAS = {"diff_b": None, "lora_up.bias": None}.keys()  # in order of precedence
OF_LOW_RANK = {"alpha", *LORA, *OF_BIAS}  # of plain LoRAs: two matrices change the weight
_NO_MATRICES = {"alpha", "diff", SET, MAGNITUDES, ROWS, *OF_BIAS}
_WHOLE = {"diff", "diff_b", SET}  # whole differences, weights and biases
# of networks that are products of factors: what is added but not trained: cores, magnitudes and whole changes
UNTRAINED = {*composing.CORES, MAGNITUDES, "diff", "diff_b"}
# by the name of a kind: the change of a weight by its factors in float32 and alpha / rank
_CHANGES = {kind.name: kind.load_change() for kind in KINDS if kind.load_change is not None}


def group_by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`{"lora_unet_x.lora_down.weight": t}` -> `{"lora_unet_x": {"lora_down.weight": t}}`."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.partition(".")
        modules.setdefault(module, {})[part] = tensor
    return modules


def ungroup(modules: Mapping[str, Factors]) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for name, factors in modules.items() for part, tensor in factors.items()}


def without_alpha(factors: Factors) -> Factors:
    """Return the factors without alpha, which has no value on the meta device."""
    return {part: tensor for part, tensor in factors.items() if part != "alpha"}


def hollow(like: Tensor | TensorInfo) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=META)


def add_missing_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in our order; factors with a rank and without alpha get alpha = rank, an integer."""
    modules = group_by_module(tensors)
    for module, factors in modules.items():
        rank = None if "alpha" in factors else rank_of(factors)
        if rank is not None:
            modules[module] = {"alpha": torch.tensor(rank, dtype=torch.int64), **factors}
    return ungroup(modules)


def drop_unused_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without non-finite alphas of modules without a rank, where alpha scales nothing."""
    usable = dict(tensors)
    for module, factors in group_by_module(tensors).items():
        if len(factors) > 1 and rank_of(factors) is None and not _is_number(factors.get("alpha")):
            usable.pop(f"{module}.alpha", None)
    return usable


def drop_replaced(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors without parts of weights that `set_weight` replaces, and their modules.

    As ComfyUI has it, only a bias keeps its change then.
    """
    kept: dict[str, Factors] = {}
    replaced: list[str] = []
    for module, factors in group_by_module(tensors).items():
        if SET in factors and factors.keys() - {SET, *OF_BIAS}:
            bias = bias_delta(factors, CPU)
            factors = {SET: factors[SET]} if bias is None else {SET: factors[SET], "diff_b": bias}
            replaced.append(module)
        kept[module] = factors
    return (ungroup(kept) if replaced else tensors), replaced


def _is_number(alpha: Tensor | None) -> bool:
    return alpha is not None and alpha.numel() == 1 and math.isfinite(float(alpha))


def find_fault(factors: Factors) -> str | None:
    """Return the reason why these factors define no change of a weight; None if they do."""
    for find in (_find_absent_factor, _find_wrong_shape, _find_wrong_value, _find_mismatch):
        fault = find(factors)
        if fault is not None:
            return fault
    return None


def _find_absent_factor(factors: Factors) -> str | None:
    for first, second in composing.PAIRS:
        if first in factors and second not in factors:
            return f"it has {first} but no {second}"
        if second in factors and first not in factors:
            return f"it has {second} but no {first}"
    rotating = rotating_kind(factors)
    others = [part for part in factors if rotating is not None and part not in (*rotating.parts, "alpha")]
    if rotating is not None and others:
        return f"it has {', '.join(others)} next to a rotation ({rotating.parts[0]}), which is not supported"
    if not factors.keys() & {*composing.MARKS, *_WHOLE}:
        return f"it has only {', '.join(factors)}"
    for kind in kinds_in(factors):
        fault = None if kind.find_absent is None else kind.find_absent(factors)
        if fault is not None:
            return fault
    return None


def _find_wrong_shape(factors: Factors) -> str | None:
    for part, tensor in factors.items():
        if part not in _NO_MATRICES and (tensor.ndim < 2 or not tensor.numel()):
            return f"its {part} has the shape {list(tensor.shape)}"
    for kind in KINDS:
        fault = None if kind.find_wrong_shape is None else kind.find_wrong_shape(factors)
        if fault is not None:
            return fault
    return None


def _find_wrong_value(factors: Factors) -> str | None:
    if "alpha" in factors and not _is_number(factors["alpha"]):
        return "its alpha is NaN or infinite, or more than one number"
    for part, tensor in factors.items():
        if part == ROWS:
            continue
        if part != "alpha" and not tensor.is_floating_point():
            return f"its {part} is of the type {dtype_name(tensor.dtype)}, which no factor is"
        if not is_finite(tensor):
            wrong = tensor.numel() - int(torch.isfinite(tensor.float()).sum())
            return f"{wrong} of {tensor.numel()} values of its {part} are NaN or infinite"
    return None


def _find_mismatch(factors: Factors) -> str | None:
    """Return the reason why the factors have no product; None if they have. The weight's size is known only
    with the model.
    """
    sized = without_alpha(factors)
    shown = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in sized.items())
    try:
        delta = weight_delta(sized, META)
        bias = bias_delta(sized, META)
    except (RuntimeError, IndexError):
        return f"its factors do not go together: {shown}"
    if delta is None or bias is None:
        return None
    rows = len(delta) if delta.ndim else 0
    if bias.numel() != rows:
        return f"its bias has {bias.numel()} values, its weight {rows} rows: {shown}"
    return None


def rank_of(factors: Factors) -> int | None:
    """Return the rank of the factors; None for whole matrices and single numbers."""
    for part in composing.RANK_PARTS:
        if part in factors and factors[part].ndim:
            return int(factors[part].shape[0])
    return None


def sizes_of(files: Sequence[Mapping[str, Tensor]]) -> tuple[list[int], list[float]]:
    """Return the distinct ranks and alphas of the modules that have a rank, sorted; of a kind without ranks
    its sizes.
    """
    ranks: set[int] = set()
    alphas: set[float] = set()
    for tensors in files:
        modules = group_by_module(tensors).values()
        for sizes in composing.sizes_by_word(modules).values():
            ranks.update(sizes)
        for factors in modules:
            rank = rank_of(factors)
            if rank:
                ranks.add(rank)
                alphas.add(float(factors.get("alpha", 0)) or float(rank))
    return sorted(ranks), sorted(alphas)


def size_of(factors: Factors) -> tuple[int, int] | None:
    """Return rows and columns of the matrix that the factors change; None if they are none for a matrix."""
    shapes = {part: tuple(tensor.shape) for part, tensor in factors.items() if part in PARTS}
    if any(len(shape) != 2 for part, shape in shapes.items() if part not in _NO_MATRICES):
        return None
    whole = shapes.get("diff", shapes.get(SET))
    if whole is not None:
        return (whole[0], whole[1]) if len(whole) == 2 else None
    if not composing.CORES.isdisjoint(shapes):
        return None
    for kind in kinds_in(shapes):
        if kind.extent is None:
            continue
        with contextlib.suppress(KeyError):  # without one of its factors
            rows, columns = kind.extent(shapes)
            return rows, math.prod(columns)
    return None


def height_of(factors: Factors) -> int | None:
    """Return the rows of a module that the factors are for, see `ROWS`; None if they tell none."""
    if ROWS in factors:
        first, last = rows_in(factors)
        return last - first
    size = size_of(factors)
    return None if size is None else size[0]


def rows_in(factors: Factors) -> tuple[int, int]:
    first, last = factors[ROWS].tolist()
    return int(first), int(last)


def strength(factors: Factors) -> float:
    """Return alpha / rank. A missing or zero alpha means alpha = rank; whole matrices are not scaled."""
    rank = rank_of(factors)
    if rank is None or "alpha" not in factors:
        return 1.0
    return float(factors["alpha"]) / rank or 1.0


def split_strength(strength: float) -> tuple[float, float]:
    """Return factors for the down and the up matrix whose product is `strength`, of similar size.

    The factor of the up matrix is a power of two, and so is the other one if `strength` is: then folding it
    into the matrices is exact.
    """
    down = strength
    up = 1.0
    while 0 < abs(down) * 2 < up:
        down = down * 2
        up = up / 2
    return down, up


def fold_strength(factors: Factors) -> Factors:
    """Return LoRA factors with alpha / rank multiplied into them by `split_strength`, without alpha."""
    by_down, by_up = split_strength(strength(factors))
    by_part = {DOWN: by_down, UP: by_up, "lora_up.bias": strength(factors)}
    folded: dict[str, Tensor] = {}
    for part, tensor in factors.items():
        if part in by_part:
            folded[part] = (tensor.float() * by_part[part]).to(tensor.dtype)
        elif part != "alpha":
            folded[part] = tensor
    return folded


def has_input_magnitudes(factors: Factors) -> bool:
    return MAGNITUDES in factors and len(factors[MAGNITUDES]) < factors[MAGNITUDES].numel()


def rows_of(factors: Factors, rows: slice | Tensor) -> Factors | None:
    """Return factors for only these rows of the change, or None if that is impossible.

    It is for kinds whose rows are not rows of a factor, such as LoKr, and for magnitudes by input, whose
    norms need all rows. rows: a slice, for views, or row numbers in any order.
    """
    if ROWS in factors or has_input_magnitudes(factors):
        return None
    cut = dict(factors)
    for part in factors.keys() & {*_WHOLE, MAGNITUDES}:
        cut[part] = factors[part][rows]
    for kind in composing.kinds_of_parts(factors):
        if kind.rows_of is None:
            continue
        of_kind = kind.rows_of(factors, rows)
        if of_kind is None:
            return None
        cut |= of_kind
    return cut


def part_of(factors: Factors, first: int, last: int) -> Factors:
    """Return the factors of one part of a joined layer: of the rows `first` to `last` of its change.

    Factors that have these rows are cut. If a kind has no factor with them (LoKr), all factors stay, and
    `ROWS` records the rows; only biases, and a DoRA's magnitudes if there is one for each output, are cut.
    """
    cut = rows_of(factors, slice(first, last))
    if cut is None:
        cut = {**factors, ROWS: torch.tensor([first, last])}
        for part in factors.keys() & {MAGNITUDES, *OF_BIAS}:
            if part != MAGNITUDES or not has_input_magnitudes(factors):
                cut[part] = factors[part][first:last]
    # copies: files cannot hold tensors that share memory
    return {part: tensor.clone() for part, tensor in cut.items()}


def weight_delta(factors: Factors, device: torch.device) -> Tensor | None:
    """Return the change of the module's weight at multiplier 1: out x in (x kernel), float32, a new
    tensor.

    With magnitudes this is the change before these. None if only the bias changes, for a rotation of inputs,
    and for a weight that is set.
    Raises RuntimeError if the factors do not match.
    """
    wide = {part: tensor.to(device, torch.float32) for part, tensor in factors.items() if part != ROWS}
    scale = strength(factors)
    changes: list[Tensor] = []
    if "diff" in wide:
        changes.append(wide["diff"].clone())
    if DOWN in wide:
        changes.append(_lora_delta(wide, scale))
    for kind in kinds_in(wide):
        if kind.name in _CHANGES:
            changes.append(_CHANGES[kind.name](wide, scale))
    if not changes:
        return None
    total = functools.reduce(Tensor.add_, changes)
    return total[slice(*rows_in(factors))] if ROWS in factors else total


def _lora_delta(factors: Factors, scale: float) -> Tensor:
    down = factors[DOWN]  # r x in (x kernel)
    up = factors[UP] * scale  # out x r (x 1 x 1)
    if "lora_mid.weight" in factors:
        down = torch.einsum("r s ..., s i -> r i ...", factors["lora_mid.weight"], down.flatten(1))
    return (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])


def other_channels(factors: Factors, weight: Tensor) -> str | None:
    """Describe factors for a first layer that differs from this weight only in its input channels.

    weight: out x in x kernel. Image-to-video models take more channels, and LoRAs of text-to-video models
    are added to them.
    """
    delta = weight_delta(without_alpha(factors), META)
    if delta is None or delta.ndim != weight.ndim or delta.ndim < 2 or delta.shape[1] == weight.shape[1]:
        return None
    if delta.shape[0] != weight.shape[0] or delta.shape[2:] != weight.shape[2:]:
        return None
    return f"its first layer takes {delta.shape[1]} channels, the model's {weight.shape[1]}"


def bias_delta(factors: Factors, device: torch.device) -> Tensor | None:
    """Return the change of the module's bias at multiplier 1, float32, a new tensor, or None."""
    if "diff_b" in factors:
        return factors["diff_b"].to(device, torch.float32, copy=True)
    if "lora_up.bias" in factors:
        return strength(factors) * factors["lora_up.bias"].to(device, torch.float32)
    return None


def stored_bias(factors: Factors) -> Tensor | None:
    """Return the change of the module's bias in the dtype of its factor, or None."""
    bias = bias_delta(factors, CPU)
    if bias is None:
        return None
    part = next(part for part in OF_BIAS if part in factors)
    return bias.to(factors[part].dtype)
