"""What the tools for networks and the phases of a training ask all kinds for. Standard library only."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from networks.kinds import KINDS, LORA
from networks.kinds.contract import NetworkKind
from networks.kinds.factors import Factors

PARTS = tuple(part for kind in KINDS for part in kind.parts)
MARKS = {mark: kind for kind in KINDS for mark in kind.marks}  # -> its kind
CORES = frozenset(core for kind in KINDS for core in kind.cores)
RANK_PARTS = tuple(part for kind in KINDS for part in kind.rank_parts)
# kinds that rotate inputs: their own parts do nothing without the weight, unlike magnitudes
ROTATING = tuple(kind for kind in KINDS if kind.marks and kind.needs_weight)
PAIRS = tuple(pair for kind in KINDS for pair in kind.pairs)
# the kind with magnitudes, its part ("": there is none) and its name
MAGNITUDE_KIND = next((kind for kind in KINDS if kind.magnitudes), None)
MAGNITUDES = "" if MAGNITUDE_KIND is None else MAGNITUDE_KIND.magnitudes
OF_MAGNITUDES = "" if MAGNITUDE_KIND is None else MAGNITUDE_KIND.name
# kinds whose change of a weight is a product of other factors than a LoRA's
PRODUCTS = tuple(kind.name for kind in KINDS if kind.marks and kind is not LORA and not kind.needs_weight)
NEEDING_WEIGHT = tuple(part for kind in KINDS if kind.needs_weight for part in kind.parts)
ENDS = {end: part for kind in KINDS for end, part in kind.ends.items()}  # other programs' -> our parts
# of names in files: those of tensors that become columns, and spellings with what takes their place
FLAT = re.compile("|".join(kind.flat for kind in KINDS if kind.flat) or r"(?!)")
SPELLINGS = tuple((re.compile(old), new) for kind in KINDS for old, new in kind.spellings.items())
# beginnings of the names of modules whose files grow with --network_dim
RANKED_NETWORKS = tuple(kind.network_module for kind in KINDS if kind.is_sized_by_rank)
BY_MODULE = {kind.network_module: kind for kind in KINDS if kind.network_module}
VARIANTS = tuple(kind for kind in KINDS if kind.switch)  # that arguments of a LoRA ask for
SWITCHES = {kind.switch: kind for kind in VARIANTS}
# arguments of LoRAs that act with --dim_from_weights
WITH_FILE = {name for kind in KINDS if kind.is_with_file for name in (kind.switch, *kind.numbers)}
OTHER_MODULES = {name: advice for kind in KINDS for name, advice in kind.other_modules.items()}


def kinds_of_parts(parts: Collection[str]) -> list[NetworkKind]:
    """Return the kinds to which any part of a module belongs, even if the module is incomplete."""
    return [kind for kind in KINDS if any(part in parts for part in kind.parts)]


def kind_of_files(names: Iterable[str], kinds: Iterable[NetworkKind]) -> NetworkKind | None:
    """Return the first of `kinds` that occurs in a file with these tensor names; None if none does."""
    names = tuple(names)
    return next((kind for kind in kinds if any(name.endswith(kind.marks) for name in names)), None)


def list_kinds(is_listed: Callable[[NetworkKind], object], last: str = "or") -> str:
    """Return the names of some kinds, as in "LoRA, LoHa or LoKr"."""
    return in_series([kind.name for kind in KINDS if is_listed(kind)], last)


def in_series(names: Sequence[str], last: str = "or") -> str:
    """Return names as in "LoRA, LoHa or LoKr"; "" if there are none."""
    return f" {last} ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def list_additive() -> str:
    """Return the names of the kinds that add to weights, whatever these are."""
    return list_kinds(lambda kind: kind.network_module and not kind.needs_weight)


def list_read_kinds() -> str:
    """Return the names of all kinds of files that can be loaded, with their variants."""
    return ", ".join(
        f"{kind.name} ({kind.read_form})" if kind.read_form else kind.name for kind in KINDS if kind.parts
    )


def kind_of_module(name: str | None) -> NetworkKind:
    """Return the kind that a network module trains; other packages' modules count as LoRAs."""
    return BY_MODULE.get(name or "", LORA)


def sizes_by_word(modules: Iterable[Factors]) -> Mapping[str, list[int]]:
    """Return the sizes of modules of kinds without a rank, by the kind's word for its size (`block size`)."""
    modules = list(modules)
    sizes: dict[str, list[int]] = {}
    for kind in KINDS:
        of_kind = [size for size in map(kind.size_of, modules) if size is not None]
        if of_kind:
            sizes.setdefault(kind.size_word, []).extend(of_kind)
    return sizes
