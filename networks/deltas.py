"""Group the factors of a network by module; find their ranks, alphas and biases.

`networks.delta` computes the change of the weight. The factors of a module are named by the ends of their
tensor names in files.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from networks.kinds import composing
from networks.kinds.composing import MAGNITUDES
from networks.kinds.factors import DOWN, UP, Factors
from protocols.loading import TensorInfo

CPU, META = torch.device("cpu"), torch.device("meta")

LORA = (DOWN, UP)
SET = "set_weight"  # ComfyUI's: replaces the model's weight at any strength except 0
# rows (first, last + 1) of the factors' change that belong to the module, if it is a part of a layer that
# other programs fuse and its kind (LoKr) cannot be cut by rows. Only used in memory.
ROWS = "reelsmith_rows"
PARTS = (*composing.PARTS, "alpha", "diff", "diff_b", SET, ROWS)
OF_BIAS = {"diff_b": None, "lora_up.bias": None}.keys()  # in order of precedence
OF_LOW_RANK = {"alpha", *LORA, *OF_BIAS}  # parts of plain LoRAs
# parts of files that our networks of other kinds do not train: Tucker cores, magnitudes, full differences
UNTRAINED = {*composing.CORES, MAGNITUDES, "diff", "diff_b"}


def group_by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`{"lora_unet_x.lora_down.weight": t}` -> `{"lora_unet_x": {"lora_down.weight": t}}`."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.partition(".")
        modules.setdefault(module, {})[part] = tensor
    return modules


def ungroup(modules: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Return the factors of all modules by tensor name, the reverse of `group_by_module`."""
    return {f"{name}.{part}": tensor for name, factors in modules.items() for part, tensor in factors.items()}


def without_alpha(factors: Factors) -> Factors:
    """Return the factors without alpha, which has no value on the meta device."""
    return {part: tensor for part, tensor in factors.items() if part != "alpha"}


def hollow(like: Tensor | TensorInfo) -> Tensor:
    """Return a tensor of the same shape and dtype on the meta device, to compute shapes without memory."""
    return torch.empty(like.shape, dtype=like.dtype, device=META)


def add_missing_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by module; factors with a rank but no alpha get alpha = rank, as an integer."""
    modules = group_by_module(tensors)
    for module, factors in modules.items():
        rank = None if "alpha" in factors else rank_of(factors)
        if rank is not None:
            modules[module] = {"alpha": torch.tensor(rank, dtype=torch.int64), **factors}
    return ungroup(modules)


def drop_unused_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop NaN or infinite alphas of modules without a rank, in which alpha has no effect."""
    usable = dict(tensors)
    for module, factors in group_by_module(tensors).items():
        if len(factors) > 1 and rank_of(factors) is None and not is_number(factors.get("alpha")):
            usable.pop(f"{module}.alpha", None)
    return usable


def drop_replaced(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Drop the changes of weights that `set_weight` replaces; return the tensors and the affected modules.

    As in ComfyUI, an affected module keeps only the change of its bias.
    """
    kept: dict[str, Factors] = {}
    replaced: list[str] = []
    for module, factors in group_by_module(tensors).items():
        if SET in factors and factors.keys() - {SET, *OF_BIAS}:
            bias = bias_of(factors, CPU)
            factors = {SET: factors[SET]} if bias is None else {SET: factors[SET], "diff_b": bias}
            replaced.append(module)
        kept[module] = factors
    return (ungroup(kept) if replaced else tensors), replaced


def is_number(alpha: Tensor | None) -> bool:
    """Return whether alpha is a single finite number."""
    return alpha is not None and alpha.numel() == 1 and math.isfinite(float(alpha))


def rank_of(factors: Factors) -> int | None:
    """Return the rank of the factors; None for whole matrices and single numbers."""
    for part in composing.RANK_PARTS:
        if part in factors and factors[part].ndim:
            return int(factors[part].shape[0])
    return None


def sizes_of(files: Sequence[Mapping[str, Tensor]]) -> tuple[list[int], list[float]]:
    """Return the distinct ranks and alphas in files, sorted; kinds without a rank contribute their sizes."""
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


def rows_in(factors: Factors) -> tuple[int, int]:
    """Return `ROWS` of a part: its first row in the joined layer, and the row after its last one."""
    first, last = factors[ROWS].tolist()
    return int(first), int(last)


def strength(factors: Factors) -> float:
    """Return alpha / rank. A missing or zero alpha means alpha = rank; whole matrices are not scaled."""
    rank = rank_of(factors)
    if rank is None or "alpha" not in factors:
        return 1.0
    return float(factors["alpha"]) / rank or 1.0


def split_strength(strength: float) -> tuple[float, float]:
    """Split alpha / rank into a scale of the down and one of the up matrix, of similar size.

    The scale of the up matrix is a power of two. If `strength` is a power of two, both scales are, and
    multiplying the matrices by them is exact.
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


def bias_of(factors: Factors, device: torch.device) -> Tensor | None:
    """Return the change of the module's bias at multiplier 1, float32, a new tensor, or None."""
    if "diff_b" in factors:
        return factors["diff_b"].to(device, torch.float32, copy=True)
    if "lora_up.bias" in factors:
        return strength(factors) * factors["lora_up.bias"].to(device, torch.float32)
    return None
