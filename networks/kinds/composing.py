"""What the tools for networks and the phases of a training ask all kinds for. Standard library only."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from networks.kinds import KINDS, LORA
from networks.kinds.contract import Factors, InputRotation, NetworkKind

PARTS = tuple(part for kind in KINDS for part in kind.parts)
MARKS = {mark: kind for kind in KINDS for mark in kind.marks}  # -> its kind
CORES = frozenset(core for kind in KINDS for core in kind.cores)
RANK_PARTS = tuple(part for kind in KINDS for part in kind.rank_parts)
PAIRS = tuple(pair for kind in KINDS for pair in kind.pairs)
ROTATING = tuple(kind for kind in KINDS if kind.load_rotation is not None)
# the kind with magnitudes, its part ("": there is none) and its name
MAGNITUDE_KIND = next((kind for kind in KINDS if kind.magnitudes), None)
MAGNITUDES = "" if MAGNITUDE_KIND is None else MAGNITUDE_KIND.magnitudes
OF_MAGNITUDES = "" if MAGNITUDE_KIND is None else MAGNITUDE_KIND.name
# kinds whose change of a weight is a product of other factors than a LoRA's
PRODUCTS = tuple(kind.name for kind in KINDS if kind.load_change is not None)
NEEDING_WEIGHT = tuple(part for kind in KINDS if kind.needs_weight for part in kind.parts)
ENDS = {end: part for kind in KINDS for end, part in kind.ends.items()}  # other programs' -> our parts
# beginnings of the names of modules whose files grow with --network_dim
RANKED_NETWORKS = tuple(kind.network_module for kind in KINDS if kind.is_sized_by_rank)
BY_MODULE = {kind.network_module: kind for kind in KINDS if kind.network_module}
SWITCHES = {kind.switch: kind for kind in KINDS if kind.switch}  # arguments of a LoRA -> their kinds
# arguments of LoRAs that act with --dim_from_weights
WITH_FILE = {name for kind in KINDS if kind.is_with_file for name in (kind.switch, *kind.numbers)}
OTHER_MODULES = {name: advice for kind in KINDS for name, advice in kind.other_modules.items()}


def kinds_in(parts: Collection[str]) -> list[NetworkKind]:
    """Return the kinds of which a module has parts, given the names of all of its parts."""
    return [kind for kind in KINDS if any(mark in parts for mark in kind.marks)]


def kinds_of_parts(parts: Collection[str]) -> list[NetworkKind]:
    """Return the kinds of which a module has any part, even if others are missing, as in damaged files."""
    return [kind for kind in KINDS if any(part in parts for part in kind.parts)]


def kind_with(parts: Collection[str], has: Callable[[NetworkKind], object]) -> NetworkKind | None:
    """Return the first kind of a module's parts that has a property; None if there is none."""
    return next((kind for kind in kinds_in(parts) if has(kind)), None)


def rotating_kind(parts: Collection[str]) -> NetworkKind | None:
    """Return the kind that rotates the inputs of a module; None for others."""
    return kind_with(parts, lambda kind: kind.load_rotation)


def is_rotating(parts: Collection[str]) -> bool:
    return rotating_kind(parts) is not None


def rotation_of(parts: Collection[str]) -> InputRotation | None:
    """Return how the inputs of a module are rotated; None for kinds that do not rotate."""
    kind = rotating_kind(parts)
    return None if kind is None or kind.load_rotation is None else kind.load_rotation()


def kind_of_files(names: Iterable[str], kinds: Iterable[NetworkKind]) -> NetworkKind | None:
    """Return the first of some kinds of which a file has tensors, given their names."""
    names = tuple(names)
    return next((kind for kind in kinds if any(name.endswith(kind.marks) for name in names)), None)


def parts_by_rows(parts: Collection[str]) -> set[str] | None:
    """Return the parts of kinds whose first axis are the rows of the weight; None if one has another axis."""
    by_rows: set[str] = set()
    for kind in kinds_of_parts(parts):
        of_kind = set() if kind.parts_by_rows is None else kind.parts_by_rows(parts)
        if of_kind is None:
            return None
        by_rows |= of_kind
    return by_rows


def load_decompose() -> Callable[..., Any]:
    """Return the function for the addition of a module with magnitudes to its weight."""
    assert MAGNITUDE_KIND is not None
    assert MAGNITUDE_KIND.load_decompose is not None
    return MAGNITUDE_KIND.load_decompose()


def is_flat(key: str) -> bool:
    """Return whether the tensor of this name in a file is to become a column."""
    return any(kind.is_flat is not None and kind.is_flat(key) for kind in KINDS)


def usual_key(key: str) -> str:
    """Return the name of a tensor in a file with our name of its part, if a kind knows another one."""
    for kind in KINDS:
        if kind.usual_key is not None:
            key = kind.usual_key(key)
    return key


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
    """Return the names of all kinds whose files are read, with their forms."""
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
        if kind.size_of is None:
            continue
        of_kind = [size for size in map(kind.size_of, modules) if size is not None]
        if of_kind:
            sizes.setdefault(kind.size_word, []).extend(of_kind)
    return sizes
