"""Group the factors of a network by module; find their ranks, alphas and biases.

`networks.delta` computes the change of the weight. A part is the ending of a factor's tensor name in files,
such as `lora_up.weight`.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from networks.kinds import composing
from networks.kinds.composing import MAGNITUDES
from networks.kinds.factors import DOWN, UP, Factors
from protocols.loading import TensorInfo

CPU = torch.device("cpu")
META = torch.device("meta")

LORA_FACTORS = (DOWN, UP)
SET_WEIGHT = "set_weight"  # in files of ComfyUI: replaces the model's weight, at any strength except 0
# Factor used only in memory, for a part of a fused layer if its kind (LoKr) cannot be cut by rows. The other
# factors are the fused layer's; this tensor has the part's rows (first, last + 1)
ROW_RANGE = "reelsmith_rows"
FACTOR_NAMES = (*composing.PARTS, "alpha", "diff", "diff_b", SET_WEIGHT, ROW_RANGE)
BIAS_FACTORS = {"diff_b": None, "lora_up.bias": None}.keys()  # an ordered set: the first existing one is used
PLAIN_LORA_FACTORS = {"alpha", *LORA_FACTORS, *BIAS_FACTORS}  # parts of plain LoRAs
# parts that our LoHas and LoKrs do not train: Tucker cores, magnitudes, full differences
UNTRAINABLE_FACTORS = {*composing.TUCKER_CORES, MAGNITUDES, "diff", "diff_b"}


def group_by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group tensors by module: {"x.lora_down.weight": t} -> {"x": {"lora_down.weight": t}}."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, factor_name = name.partition(".")
        modules.setdefault(module, {})[factor_name] = tensor
    return modules


def ungroup(modules: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Return the factors of all modules by tensor name; the inverse of `group_by_module`."""
    tensors: dict[str, Tensor] = {}
    for module, factors in modules.items():
        for factor_name, tensor in factors.items():
            tensors[f"{module}.{factor_name}"] = tensor
    return tensors


def without_alpha(factors: Factors) -> Factors:
    """Return the factors without alpha, which has no value on the meta device."""
    return {name: tensor for name, tensor in factors.items() if name != "alpha"}


def to_meta_tensor(like: Tensor | TensorInfo) -> Tensor:
    """Return an empty tensor of the same shape and dtype on the meta device."""
    return torch.empty(like.shape, dtype=like.dtype, device=META)


def add_missing_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add alphas equal to the rank (int64) for modules that have a rank but no alpha."""
    modules = group_by_module(tensors)
    for module, factors in modules.items():
        rank = None if "alpha" in factors else get_lora_rank(factors)
        if rank is not None:
            modules[module] = {"alpha": torch.tensor(rank, dtype=torch.int64), **factors}
    return ungroup(modules)


def drop_unused_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop NaN or infinite alphas from modules without a rank, where alpha has no effect."""
    remaining = dict(tensors)
    for module, factors in group_by_module(tensors).items():
        if len(factors) > 1 and get_lora_rank(factors) is None and not is_number(factors.get("alpha")):
            remaining.pop(f"{module}.alpha", None)
    return remaining


def drop_replaced(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Drop changes of weights that `set_weight` replaces; return the tensors and the affected modules.

    As in ComfyUI, only the replacement and the change of the bias remain.
    """
    modules: dict[str, Factors] = {}
    affected: list[str] = []
    for module, factors in group_by_module(tensors).items():
        if SET_WEIGHT in factors and factors.keys() - {SET_WEIGHT, *BIAS_FACTORS}:
            bias = make_bias_change(factors, CPU)
            factors = {SET_WEIGHT: factors[SET_WEIGHT]}
            if bias is not None:
                factors = {**factors, "diff_b": bias}
            affected.append(module)
        modules[module] = factors
    return (ungroup(modules) if affected else tensors), affected


def is_number(alpha: Tensor | None) -> bool:
    """Return whether alpha is a single finite number; False for None."""
    return alpha is not None and alpha.numel() == 1 and math.isfinite(float(alpha))


def get_lora_rank(factors: Factors) -> int | None:
    """Return the rank of the factors; None for full matrices and for kinds without a rank."""
    for name in composing.FACTORS_WITH_RANK_AXIS:
        if name in factors and factors[name].ndim:
            return int(factors[name].shape[0])
    return None


def list_sizes(files: Sequence[Mapping[str, Tensor]]) -> tuple[list[int], list[float]]:
    """Return the sorted distinct ranks (or block sizes and so on, without a rank) and alphas in files."""
    ranks: set[int] = set()
    alphas: set[float] = set()
    for tensors in files:
        modules = group_by_module(tensors).values()
        for sizes in composing.sizes_by_word(modules).values():
            ranks.update(sizes)
        for factors in modules:
            rank = get_lora_rank(factors)
            if rank:
                ranks.add(rank)
                alphas.add(float(factors.get("alpha", 0)) or float(rank))
    return sorted(ranks), sorted(alphas)


def read_row_range(factors: Factors) -> tuple[int, int]:
    """Return (start, stop) of the rows of the fused layer that a part covers, from `ROW_RANGE`."""
    first, last = factors[ROW_RANGE].tolist()
    return int(first), int(last)


def compute_scaling(factors: Factors) -> float:
    """Return alpha / rank; 1 if alpha is missing or 0, or if the factors have no rank."""
    rank = get_lora_rank(factors)
    if rank is None or "alpha" not in factors:
        return 1.0
    return float(factors["alpha"]) / rank or 1.0


def split_scaling(scaling: float) -> tuple[float, float]:
    """Split alpha / rank into two factors of similar size, for the down and the up matrix.

    The second factor is a power of two. If `scaling` is a power of two, both are, so multiplying is exact.
    """
    down_factor = scaling
    up_factor = 1.0
    while 0 < abs(down_factor) * 2 < up_factor:
        down_factor = down_factor * 2
        up_factor = up_factor / 2
    return down_factor, up_factor


def fold_scaling(factors: Factors) -> Factors:
    """Multiply alpha / rank into both factors (the up factor gets a power of two), and drop alpha."""
    down_factor, up_factor = split_scaling(compute_scaling(factors))
    multipliers = {DOWN: down_factor, UP: up_factor, "lora_up.bias": compute_scaling(factors)}
    folded: dict[str, Tensor] = {}
    for name, tensor in factors.items():
        if name in multipliers:
            folded[name] = (tensor.float() * multipliers[name]).to(tensor.dtype)
        elif name != "alpha":
            folded[name] = tensor
    return folded


def make_bias_change(factors: Factors, device: torch.device) -> Tensor | None:
    """Return the change of the module's bias at multiplier 1 as a new float32 tensor; None without one."""
    if "diff_b" in factors:
        return factors["diff_b"].to(device, torch.float32, copy=True)
    if "lora_up.bias" in factors:
        return compute_scaling(factors) * factors["lora_up.bias"].to(device, torch.float32)
    return None
