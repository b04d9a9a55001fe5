"""Values and functions that combine all network kinds, for tools and training. Standard library only."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from networks.kinds import KINDS, LORA
from networks.kinds.contract import NetworkKind
from networks.kinds.factors import Factors

# Here and in `kinds.contract`, a part is the ending of a tensor's name, such as `lora_up.weight`
PARTS = tuple(part for kind in KINDS for part in kind.parts)
# name of a factor by which a kind is recognized -> the kind
KIND_BY_FACTOR = {mark: kind for kind in KINDS for mark in kind.marks}
TUCKER_CORES = frozenset(core for kind in KINDS for core in kind.cores)
FACTORS_WITH_RANK_AXIS = tuple(part for kind in KINDS for part in kind.rank_parts)
FACTOR_PAIRS = tuple(pair for kind in KINDS for pair in kind.pairs)
# the kind with magnitudes, its part and its name; "" if there is no such kind
MAGNITUDE_KIND = next((kind for kind in KINDS if kind.magnitudes), None)
MAGNITUDES = "" if MAGNITUDE_KIND is None else MAGNITUDE_KIND.magnitudes
MAGNITUDE_KIND_NAME = "" if MAGNITUDE_KIND is None else MAGNITUDE_KIND.name
# kinds whose weight change is a product of factors other than a LoRA's
PRODUCT_KIND_NAMES = tuple(
    kind.name for kind in KINDS if kind.marks and kind is not LORA and not kind.needs_weight
)
FACTORS_NEEDING_WEIGHT = tuple(part for kind in KINDS if kind.needs_weight for part in kind.parts)
# values of --network_module whose files grow with --network_dim
RANKED_NETWORKS = tuple(kind.network_module for kind in KINDS if kind.is_sized_by_rank)
BY_MODULE = {kind.network_module: kind for kind in KINDS if kind.network_module}
# kinds that extend a LoRA if --network_args enable them
VARIANTS = tuple(kind for kind in KINDS if kind.switch)
SWITCHES = {kind.switch: kind for kind in VARIANTS}
# --network_args of LoRAs that are used with --dim_from_weights too
WITH_FILE = {name for kind in KINDS if kind.is_with_file for name in (kind.switch, *kind.numbers)}


def find_kinds_with_factors(parts: Collection[str]) -> list[NetworkKind]:
    """Return the kinds (LoRA, LoHa, ...) that use any of these factor names, even if others are missing."""
    return [kind for kind in KINDS if any(part in parts for part in kind.parts)]


def find_network_kind(names: Iterable[str], kinds: Iterable[NetworkKind]) -> NetworkKind | None:
    """Return the first of `kinds` whose factor names occur in the tensor names; None if there is none."""
    names = tuple(names)
    return next((kind for kind in kinds if any(name.endswith(kind.marks) for name in names)), None)


def list_kinds(is_listed: Callable[[NetworkKind], object], last: str = "or") -> str:
    """Return the names of the network kinds that `is_listed` selects, such as "LoRA, LoHa or LoKr"."""
    return in_series([kind.name for kind in KINDS if is_listed(kind)], last)


def in_series(names: Sequence[str], last: str = "or") -> str:
    """Join names as in "LoRA, LoHa or LoKr"; return "" if there are no names."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} {last} {names[-1]}"


def list_additive() -> str:
    """Return the names of trainable kinds (LoRA, ...) whose change does not depend on the frozen weight."""
    return list_kinds(lambda kind: kind.network_module and not kind.needs_weight)


def get_module_kind(name: str | None) -> NetworkKind:
    """Return the kind (LoRA, LoHa, ...) that a network module trains; LoRA for modules of other packages."""
    return BY_MODULE.get(name or "", LORA)


def sizes_by_word(modules: Iterable[Factors]) -> Mapping[str, list[int]]:
    """Return the sizes of modules without a rank, by the name of the size, such as `block size`."""
    modules = list(modules)
    sizes_by_word: dict[str, list[int]] = {}
    for kind in KINDS:
        sizes = [size for size in map(kind.size.measure, modules) if size is not None]
        if sizes:
            sizes_by_word.setdefault(kind.size.word, []).extend(sizes)
    return sizes_by_word
