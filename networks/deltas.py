"""Compute the change of a weight by a LoRA, LoHa or LoKr. The factors of a module are named by the ends of
their tensor names in files.

Sources: LoRA, Hu et al. 2021, arXiv 2106.09685; LoHa and LoKr, also in their tensor forms, Yeh et al. 2023,
arXiv 2309.14859; DoRA, Liu et al. 2024, arXiv 2402.09353.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modules.checkpoints.finite import is_finite
from modules.contract.loading import TensorInfo
from modules.devices import dtype_name

Factors = Mapping[str, Tensor]  # "lora_down.weight" -> tensor: the factors of one module
CPU, META = torch.device("cpu"), torch.device("meta")

LORA = ("lora_down.weight", "lora_up.weight")
# rows (first, last + 1) of the factors' change that are the module's: it is a part of a layer that other
# programs join, and a LoKr has no factor with these rows. No file holds it.
ROWS = "reelsmith_rows"
PARTS = (
    *LORA,
    *("lora_mid.weight", "lora_up.bias", "alpha", "diff", "diff_b", "dora_scale"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    ROWS,
)
# magnitudes: out x 1 (x 1 ...), one of each output, or 1 x in (x 1 ...), one of each input
DORA = "dora_scale"
OF_BIAS = {"diff_b": None, "lora_up.bias": None}.keys()  # in order of precedence
OF_LOW_RANK = {"alpha", *LORA, *OF_BIAS}  # of plain LoRAs: two matrices change the weight
_NO_MATRICES = {"alpha", "diff", DORA, ROWS, *OF_BIAS}
_PAIRS = (
    LORA,
    ("hada_w1_a", "hada_w1_b"),
    ("hada_w2_a", "hada_w2_b"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
)


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
        if "alpha" not in factors and (rank := rank_of(factors)) is not None:
            modules[module] = {"alpha": torch.tensor(rank, dtype=torch.int64), **factors}
    return ungroup(modules)


def drop_unused_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without non-finite alphas of modules without a rank, where alpha scales nothing."""
    unused = [
        f"{module}.alpha"
        for module, factors in group_by_module(tensors).items()
        if len(factors) > 1 and rank_of(factors) is None and not _is_number(factors.get("alpha"))
    ]
    return {name: tensor for name, tensor in tensors.items() if name not in unused}


def _is_number(alpha: Tensor | None) -> bool:
    return alpha is not None and alpha.numel() == 1 and math.isfinite(float(alpha))


def find_fault(factors: Factors) -> str | None:
    """Return the reason why these factors define no change of a weight; None if they do."""
    for pair in _PAIRS:
        if (pair[0] in factors) != (pair[1] in factors):
            there, absent = pair if pair[0] in factors else pair[::-1]
            return f"it has {there} but no {absent}"
    if not any(part in factors for part in (*LORA, "diff", "diff_b", "hada_w1_a", "lokr_w1", "lokr_w1_a")):
        return f"it has only {', '.join(factors)}"
    if "hada_w1_a" in factors and "hada_w2_a" not in factors:
        return "it has hada_w1_a but no hada_w2_a"
    if ("lokr_w1" in factors or "lokr_w1_a" in factors) and not (
        "lokr_w2" in factors or "lokr_w2_a" in factors
    ):
        return "it has lokr_w1 but no lokr_w2"
    for part, tensor in factors.items():
        if part not in _NO_MATRICES and (tensor.ndim < 2 or not tensor.numel()):
            return f"its {part} has the shape {list(tensor.shape)}"
    if DORA in factors and (factors[DORA].ndim < 2 or factors[DORA].numel() not in factors[DORA].shape[:2]):
        return f"its {DORA} has the shape {list(factors[DORA].shape)}"
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
    # the size of the weight is known only with the model
    sized = without_alpha(factors)
    shown = ", ".join(f"{part} {list(one.shape)}" for part, one in sized.items())
    try:
        delta, bias = weight_delta(sized, META), bias_delta(sized, META)
    except (RuntimeError, IndexError):
        return f"its factors do not go together: {shown}"
    if delta is not None and bias is not None and bias.numel() != _rows_of_change(delta):
        return f"its bias has {bias.numel()} values, its weight {_rows_of_change(delta)} rows: {shown}"
    return None


def _rows_of_change(delta: Tensor) -> int:
    return len(delta) if delta.ndim else 0


def rank_of(factors: Factors) -> int | None:
    """Return the rank of the factors; None for whole matrices and single numbers."""
    for part in ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if part in factors and factors[part].ndim:
            return int(factors[part].shape[0])
    return None


def sizes_of(files: Sequence[Mapping[str, Tensor]]) -> tuple[list[int], list[float]]:
    """Return the distinct ranks and alphas of the modules that have a rank, sorted."""
    modules = [factors for tensors in files for factors in group_by_module(tensors).values()]
    ranked = [(rank, factors) for factors in modules if (rank := rank_of(factors))]
    alphas = {float(factors.get("alpha", 0)) or float(rank) for rank, factors in ranked}
    return sorted({rank for rank, _ in ranked}), sorted(alphas)


def size_of(factors: Factors) -> tuple[int, int] | None:
    """Return rows and columns of the matrix that the factors change; None if they are none for a matrix."""
    shapes = {part: tuple(one.shape) for part, one in factors.items() if part in PARTS}
    if any(len(shape) != 2 for part, shape in shapes.items() if part not in _NO_MATRICES):
        return None
    if "diff" in shapes:
        return (shapes["diff"][0], shapes["diff"][1]) if len(shapes["diff"]) == 2 else None
    if LORA[0] in shapes and LORA[1] in shapes:
        return shapes[LORA[1]][0], shapes[LORA[0]][1]
    if "hada_w1_a" in shapes and "hada_w1_b" in shapes and "hada_t1" not in shapes:
        return shapes["hada_w1_a"][0], shapes["hada_w1_b"][1]
    first, second = (_shape_of_lokr(shapes, f"lokr_w{n}") for n in "12")
    if first is None or second is None or "lokr_t2" in shapes:
        return None
    return first[0] * second[0], first[1] * second[1]


def _shape_of_lokr(shapes: Mapping[str, tuple[int, ...]], name: str) -> tuple[int, ...] | None:
    if name in shapes:
        return shapes[name]
    factors = shapes.get(f"{name}_a"), shapes.get(f"{name}_b")
    return None if factors[0] is None or factors[1] is None else (factors[0][0], factors[1][1])


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
    down, up = strength, 1.0
    while 0 < abs(down) * 2 < up:
        down, up = down * 2, up / 2
    return down, up


def fold_strength(factors: Factors) -> Factors:
    """Return LoRA factors with alpha / rank multiplied into them by `split_strength`, without alpha."""
    down, up = split_strength(strength(factors))
    by = {LORA[0]: down, LORA[1]: up, "lora_up.bias": strength(factors)}
    return {
        part: (one.float() * by[part]).to(one.dtype) if part in by else one
        for part, one in factors.items()
        if part != "alpha"
    }


def has_input_magnitudes(factors: Factors) -> bool:
    return DORA in factors and len(factors[DORA]) < factors[DORA].numel()


def rows_of(factors: Factors, rows: slice | Tensor) -> Factors | None:
    """Return factors for only these rows of the change, or None if that is impossible.

    It is for LoKr, whose rows are not rows of a factor, and for DoRA with magnitudes by input, whose norms
    need all rows. rows: a slice, for views, or row numbers in any order.
    """
    if {"lokr_w1", "lokr_w1_a", ROWS} & factors.keys() or has_input_magnitudes(factors):
        return None
    cut = dict(factors)
    for part in factors.keys() & {LORA[1], "diff", "diff_b", "lora_up.bias", DORA}:
        cut[part] = factors[part][rows]
    for part, core in (("hada_w1_a", "hada_t1"), ("hada_w2_a", "hada_t2")):
        if part in factors:  # beside a core it is stored r x out
            cut[part] = factors[part][:, rows] if core in factors else factors[part][rows]
    return cut


def part_of(factors: Factors, first: int, last: int) -> Factors:
    """Return the factors of a part of a joined layer: these rows of the change, cut where factors have rows.

    Others keep their factors and get `ROWS`. By output, magnitudes of a DoRA are cut, too.
    """
    cut = rows_of(factors, slice(first, last))
    if cut is None:
        cut = {**factors, ROWS: torch.tensor([first, last])}
        for part in factors.keys() & {DORA, *OF_BIAS}:
            if part != DORA or not has_input_magnitudes(factors):
                cut[part] = factors[part][first:last]
    # copies: files cannot hold tensors that share memory
    return {part: tensor.clone() for part, tensor in cut.items()}


def weight_delta(factors: Factors, device: torch.device) -> Tensor | None:
    """Return the change of the module's weight at multiplier 1: out x in (x kernel), float32, a new
    tensor.

    For DoRA this is the change before `decompose`. None if only the bias changes.
    Raises RuntimeError if the factors do not match.
    """
    f = {part: tensor.to(device, torch.float32) for part, tensor in factors.items() if part != ROWS}
    scale = strength(factors)
    changes = [f["diff"].clone()] if "diff" in f else []
    if LORA[0] in f:
        down, up = f[LORA[0]], f[LORA[1]] * scale  # r x in (x kernel), out x r (x 1 x 1)
        if "lora_mid.weight" in f:
            down = torch.einsum("r s ..., s i -> r i ...", f["lora_mid.weight"], down.flatten(1))
        changes.append((up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:]))
    if "hada_w1_a" in f:
        first = _product(f["hada_w1_a"] * scale, f["hada_w1_b"], f.get("hada_t1"))
        changes.append(first.mul_(_product(f["hada_w2_a"], f["hada_w2_b"], f.get("hada_t2"))))
    if "lokr_w1" in f or "lokr_w1_a" in f:
        first = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
        second = f.get("lokr_w2")
        if second is None:
            second = _product(f["lokr_w2_a"], f["lokr_w2_b"], f.get("lokr_t2"))
        shaped = (first * scale).reshape(*first.shape, *[1] * (second.ndim - first.ndim))
        changes.append(torch.kron(shaped, second.contiguous()))
    total = functools.reduce(Tensor.add_, changes) if changes else None
    return total[slice(*rows_in(factors))] if total is not None and ROWS in factors else total


def other_channels(factors: Factors, weight: Tensor) -> str | None:
    """Describe factors for a first layer that differs from this weight only in its input channels.

    weight: out x in x kernel. Image-to-video models take more channels, and LoRAs of text-to-video models
    are added to them.
    """
    delta = weight_delta(without_alpha(factors), META)
    if delta is None or delta.ndim != weight.ndim or delta.ndim < 2 or delta.shape[1] == weight.shape[1]:
        return None
    if (delta.shape[0], *delta.shape[2:]) != (weight.shape[0], *weight.shape[2:]):
        return None
    return f"its first layer takes {delta.shape[1]} channels, the model's {weight.shape[1]}"


def decompose(weight: Tensor, delta: Tensor, magnitudes: Tensor, by_frozen_norms: bool = False) -> Tensor:
    """Return DoRA's addition to a weight at multiplier 1, float32.

    The sum of weight and delta gets new norms, by output or by input: `magnitudes * sum / norm - weight`.
    Multipliers scale this difference, so that 0 changes nothing. weight, delta: out x in (x kernel).
    magnitudes: out x 1 (x 1 ...) or 1 x in (x 1 ...). by_frozen_norms: those by output are divided by the
    norms of the weight alone, as ComfyUI does.
    """
    weight, magnitudes = weight.float(), magnitudes.to(weight.device, torch.float32)
    whole = weight + delta.reshape(weight.shape)
    kept = 1 if len(magnitudes) < magnitudes.numel() else 0
    norms = norms_of(weight if by_frozen_norms and not kept else whole, kept)
    return whole.mul_(magnitudes.reshape(norms.shape) / norms).sub_(weight)


def norms_of(weight: Tensor, kept: int = 0) -> Tensor:
    """Return a weight's norms by output (kept = 0) or input (kept = 1), float32, never 0."""
    others = [axis for axis in range(weight.ndim) if axis != kept]
    norms = torch.linalg.vector_norm(weight, dim=others, keepdim=True, dtype=torch.float32)
    return norms + torch.finfo(torch.float32).eps  # as LyCORIS and ComfyUI have it


def bias_delta(factors: Factors, device: torch.device) -> Tensor | None:
    """Return the change of the module's bias at multiplier 1, float32, a new tensor, or None."""
    if "diff_b" in factors:
        return factors["diff_b"].to(device, torch.float32, copy=True)
    if "lora_up.bias" in factors:
        return strength(factors) * factors["lora_up.bias"].to(device, torch.float32)
    return None


def stored_bias(factors: Factors) -> Tensor | None:
    bias = bias_delta(factors, CPU)
    return None if bias is None else bias.to(factors[next(part for part in OF_BIAS if part in factors)].dtype)


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """Return a @ b; with a core r x r x kernel, b acts on its axis 1 and a (stored r x out) on its axis 0."""
    if core is None:
        return a @ b
    return torch.einsum("p q ..., p o, q i -> o i ...", core, a, b)
