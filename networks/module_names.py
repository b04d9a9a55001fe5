"""Look up modules by their names in LoRA files, in our layout and others (`networks.names`)."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

from modules.families import read_names
from networks.names.layouts import BEFORE_REST, REST, SWAPPED, TRAINED_ON, FamilyNames, WeightPart
from networks.names.texts import TEXTS_NUMBERED

FAMILIES: tuple[FamilyNames, ...] = tuple(family for names in read_names() for family in names.LORA)
_DIGITS = re.compile(r"\d+")


def family_named(name: str) -> FamilyNames:
    return next(one for one in FAMILIES if one.name == name)


def choose_family(names: Iterable[str], hint: str | None = None) -> FamilyNames | None:
    """Return the family of a model whose modules have these underscored names; None if no list holds any.

    Ties go to the family named `hint`, then to one where these names are modules, not only aliases, then to
    the first (only SD 1 and 2 have equal names). LoRAs have only some modules: use `likely_families` for
    them.
    """
    names = list(names)
    found = _knowing(names, hint)
    own = [sum(_tables(one).own.find(name) is not None for name in names) for one in found]
    return found[own.index(max(own))] if found else None


def _knowing(names: Sequence[str], hint: str | None) -> list[FamilyNames]:
    """Return the families that know most of the names; only the one named `hint` if it is among them."""
    hinted = [one for one in FAMILIES if one.name == hint]
    if names and hinted and all(_place(name, hinted[0]) for name in names):
        return hinted  # without the tables of the others
    # while some family knows all names, others are ruled out at the first name that they lack
    found = [one for one in FAMILIES if names and all(_place(name, one) for name in names)]
    if not found:
        counts = {one: sum(_place(name, one) is not None for name in names) for one in FAMILIES}
        found = [one for one, known in counts.items() if known == max(counts.values()) > 0]
    return [one for one in found if one in hinted] or found


SizeOf = Callable[[str], tuple[int, int] | None]
# a complete list of blocks identifies a model only from this length: shorter ones may be chosen blocks
_LONG = 16


def likely_families(names: Iterable[str], size_of: SizeOf, hint: str | None = None) -> list[FamilyNames]:
    """Return the families that a LoRA may be for: several if names, sizes and numbers of blocks do not tell
    them apart; [] if no family has such names.

    names: of its modules, underscored. size_of: name -> rows and columns of its change; None if unknown.
    hint: the family that its metadata or the user name.
    """
    names = list(names)
    found = _knowing(names, hint)
    if len(found) < 2:
        return found
    kinds = {_DIGITS.sub("n", name): name for name in reversed(names)}
    sizes = {name: size for name in kinds.values() if (size := size_of(name)) is not None}
    levels = {family: _agreement(family, names, sizes) for family in found}
    best = max(levels.values())
    chosen = [family for family in found if levels[family] == best]
    # if the numbers of blocks do not decide, the others are possible too
    return chosen if len(chosen) == 1 else [one for one in found if levels[one] >= min(best, _AS_RELEASED)]


def sizes_fit(family: FamilyNames, names: Iterable[str], size_of: SizeOf) -> bool:
    """Return whether a LoRA's modules can have these sizes in the family. Arguments as `likely_families`."""
    sizes = {name: size for name in names if (size := size_of(name)) is not None}
    return _agreement(family, [], sizes) != _CONTRADICTS


def have_same_names(families: Sequence[FamilyNames]) -> bool:
    """Return whether names mean the same in all of these families, as in Stable Diffusion 1 and 2."""
    return len({(one.aliases, one.parts, one.joined, one.further) for one in families}) == 1


_CONTRADICTS, _IN_PROPORTION, _AS_RELEASED, _COMPLETE = range(4)


def _agreement(family: FamilyNames, names: Sequence[str], sizes: Mapping[str, tuple[int, int]]) -> int:
    """Return how well sizes of modules and block numbers in names agree with a family's released models."""
    rules = list(_rules(family, sizes))
    numbers: dict[str, set[int]] = {}
    for name in names:
        path, number, _ = _place(name, family) or ("", "", False)
        if "{n}" in path and number:
            numbers.setdefault(path.partition(".")[0], set()).add(int(number))
    level = _CONTRADICTS
    for width, lists in family.released or ((0, ()),):
        depths = dict(lists)
        if any(max(own) >= depths.get(name, max(own) + 1) for name, own in numbers.items()):
            continue
        if width and not _agree(rules, width):
            continue
        own = [(numbers[name], depth) for name, depth in lists if name in numbers]
        is_long = any(depth >= _LONG for _, depth in own)
        is_complete = is_long and all(len(given) == depth for given, depth in own)
        level = max(level, _COMPLETE if is_complete else _AS_RELEASED)
    if level == _CONTRADICTS and rules:
        size, rows, columns = rules[0]
        fitting = size[1] / columns if columns else size[0] / rows
        level = _IN_PROPORTION if _agree(rules, fitting) else _CONTRADICTS
    return level


def _rules(
    family: FamilyNames, sizes: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], float, float]]:
    """Yield (size, rows, columns) of modules in the family's `sides`; the latter in widths, 0: unknown."""
    for name, size in sizes.items():
        path, _, is_cut = _place(name, family) or ("", "", False)
        for end, rows, columns in family.sides:
            if f".{path}".endswith(end) and (columns or not is_cut):
                yield size, 0 if is_cut else rows, columns
                break


def _agree(rules: Iterable[tuple[tuple[int, int], float, float]], width: float) -> bool:
    """Return whether all sizes satisfy the rules for blocks of this width."""
    return all(
        not of or abs(side - of * width) < 1
        for size, *sides in rules
        for side, of in zip(size, sides, strict=True)
    )


def read_family(metadata: Mapping[str, str]) -> FamilyNames | None:
    """Return the family that a LoRA file's metadata name; None if they name none, or an unknown one."""
    version = metadata.get(TRAINED_ON, "")
    architecture = metadata.get("modelspec.architecture", "").removesuffix("/lora")

    named = next((one for one in FAMILIES if version == one.name or architecture == one.architecture), None)
    begun = [
        (len(start), family)
        for family in FAMILIES
        for start in family.versions
        if version.lower().startswith(start) or architecture.lower().startswith(start)
    ]
    # "flux_2_dev" begins with FLUX.1's "flux" too
    return named or max(begun, key=lambda pair: pair[0], default=(0, None))[1]


def module_path(name: str, family: FamilyNames) -> str | None:
    """Return `blocks.0.self_attn.q` for `blocks_0_self_attn_q`; None if the family lacks the module.

    A parameter that is no module's weight counts as a module: `blocks.0.modulation`. A module that is stacked
    in another layout gets its path there.
    """
    tables = _tables(family)
    return tables.own.find(name) or (tables.renamed.find(name) if family.joined else None)


@cache
def is_optional(name: str, family: FamilyNames) -> bool:
    return _Table((path, path) for path in family.optional).find(name) is not None


@cache
def on_text_side(name: str) -> str:
    """Return what an underscored name belongs to if it is loaded with the text encoder; "" otherwise."""
    return next(
        (
            family.text_side_words
            for family in FAMILIES
            if name.startswith(tuple(start.replace(".", "_") for start in family.text_side))
        ),
        "",
    )


def is_unprefixed(path: str) -> bool:
    return path.startswith(tuple(start for family in FAMILIES for start in family.unprefixed))


def alias(name: str, family: FamilyNames) -> str:
    """Return our underscored name for a name of another layout; other names are unchanged."""
    found = _tables(family).foreign.find(name)
    return name if found is None else found.replace(".", "_")


def to_alias(name: str, family: FamilyNames) -> str:
    """Return another layout's underscored name for a name of ours; other names are unchanged."""
    found = _tables(family).to_foreign.find(name)
    return name if found is None else found.replace(".", "_")


def is_stacked(name: str, family: FamilyNames) -> bool:
    """Return whether a module of ours is among those that another layout of the family stacks."""
    return any(_template(part.theirs).fullmatch(name) for part in family.joined)


def has_module(name: str, family: FamilyNames) -> bool:
    tables = _tables(family)
    return any(one.find(name) is not None for one in (tables.own, tables.foreign, tables.cut))


def is_name(name: str, dotted: bool = False) -> bool:
    """Return whether any family has a module of this underscored name, or dotted path, in any layout."""
    return not _all_paths()[not dotted].isdisjoint(one for one, _ in _templates(name))


@cache
def _all_paths() -> tuple[frozenset[str], frozenset[str]]:
    """Return the templates of all families' modules in all layouts, as paths and as underscored names."""
    paths = {path for family in FAMILIES for path in family.modules}
    for family in FAMILIES:
        paths |= {path for pair in family.aliases for path in pair}
        paths |= {path.removesuffix(".weight") for pair in family.parameters for path in pair}
        paths |= {path for part in (*family.parts, *family.joined) for path in (part.theirs, part.ours)}
    return frozenset(paths), frozenset(path.replace(".", "_") for path in paths)


def count_parts(path: str) -> set[int]:
    """Return how many parts a fused layer has in layouts that split it; `path` may have prefixes."""
    names = [path.replace(".", "_")]
    names += [names[0][place + 1 :] for place, letter in enumerate(names[0]) if letter == "_"]
    return {len(found) for family in FAMILIES for name in names if len(found := parts_of(name, family)) > 1}


@dataclass(frozen=True)
class Relative:
    """A module whose weight is some or all rows of another module's weight, or contains it."""

    name: str  # underscored
    part: WeightPart
    is_part: bool  # True: part of the module asked for; False: contains it


@cache
def relatives(name: str, family: FamilyNames | None = None) -> tuple[Relative, ...]:
    """Return the modules of other layouts that are part of this one or contain it, in one family or in all.

    A name may be ours in one family and another layout's in another family: both give relatives.
    """
    found: dict[tuple[str, int | None, bool], Relative] = {}  # families share names and parts
    for part in itertools.chain.from_iterable(map(_all_parts, FAMILIES if family is None else [family])):
        for own, other, is_part in ((part.ours, part.theirs, True), (part.theirs, part.ours, False)):
            match = _template(own).fullmatch(name)
            if match is not None:
                path = other.replace("{n}", match["n"]).replace(".", "_")
                if path == name and part.index is None:
                    continue  # the same in both layouts
                found.setdefault((path, part.index, is_part), Relative(path, part, is_part))
    return tuple(found.values())


@cache
def parts_of(name: str, family: FamilyNames) -> list[tuple[str, WeightPart]]:
    """Return the parts of a module in the family's other layout, (path, part), in the order of their rows.

    Of a module that the other layout stacks, they are ours.
    """
    found = [
        (part.theirs.replace("{n}", match["n"]), part)
        for part in (*family.parts, *family.joined)
        if (match := _template(part.ours).fullmatch(name)) is not None
    ]
    order = {REST: 101, BEFORE_REST: 100}
    return sorted(found, key=lambda pair: order.get(pair[1].index or 0, pair[1].index or 0))


def part_path(name: str, family: FamilyNames) -> str | None:
    """Return the path of a module that is part of one of ours: `transformer_blocks.0.attn.to_q`."""
    found = (
        (part, _template(part.theirs).fullmatch(name)) for part in family.parts if part.index is not None
    )
    return next((part.theirs.replace("{n}", match["n"]) for part, match in found if match is not None), None)


@cache
def _all_parts(family: FamilyNames) -> tuple[WeightPart, ...]:
    others = {path.replace(".", "_") for other in FAMILIES if other is not family for path in other.modules}
    cuts = family.parts or family.joined
    aliases = [pair for pair in family.aliases if cuts and pair[0].replace(".", "_") in others]
    return (*family.parts, *family.joined, *(WeightPart(theirs, ours) for theirs, ours in aliases))


@cache
def _template(path: str) -> re.Pattern[str]:
    before, _, after = path.replace(".", "_").partition("{n}")
    return re.compile(re.escape(before) + (r"(?P<n>\d+)" if "{n}" in path else "(?P<n>)") + re.escape(after))


class _Table:
    """Finds templates by underscored names: `blocks_0_ffn_0` fits `blocks.{n}.ffn.0`.

    A dictionary rather than a pattern, because the families have thousands of templates together.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        """pairs: (template, its meaning, with the same number); the first of equal ones counts."""
        self._places: dict[str, tuple[int, str]] = {}
        for place, (template, target) in enumerate(pairs):
            self._places.setdefault(template.replace(".", "_"), (place, target))

    def find(self, name: str) -> str | None:
        found = self.place(name)
        return None if found is None else found[0].replace("{n}", found[1])

    def place(self, name: str) -> tuple[str, str] | None:
        """Return (meaning, number) of a name; the number is "" if there is none. None for unknown names."""
        best: tuple[int, str] | None = None
        number = ""
        for template, digits in _templates(name):
            found = self._places.get(template)
            if found is not None and (best is None or found[0] < best[0]):
                best, number = found, digits
        return None if best is None else (best[1], number)


@lru_cache(1 << 14)
def _templates(name: str) -> tuple[tuple[str, str], ...]:
    """Return (template, number) for a name: itself, and with each of its numbers replaced by `{n}`."""
    places = _DIGITS.finditer(name)
    return (name, ""), *((f"{name[: one.start()]}{{n}}{name[one.end() :]}", one[0]) for one in places)


class _Tables(NamedTuple):
    """A family's modules by names in several layouts."""

    own: _Table  # under our names
    foreign: _Table  # under aliases -> ours
    to_foreign: _Table
    renamed: _Table  # whole modules of another layout -> ours; joined ones -> themselves
    cut: _Table  # parts with some rows of a module -> ours


@cache
def _tables(family: FamilyNames) -> _Tables:
    # a parameter of ours may be the weight of a module there
    parameters = [(theirs.removesuffix(".weight"), ours) for theirs, ours in family.parameters]
    aliases = [*family.aliases, *parameters]
    whole = [(part.theirs, part.ours) for part in family.parts if part.index in (None, SWAPPED)]
    return _Tables(
        _Table((path, path) for path in (*family.modules, *(ours for _, ours in parameters))),
        _Table(aliases),
        _Table((ours, theirs) for theirs, ours in aliases),
        _Table([*whole, *((part.ours, part.ours) for part in family.joined)]),
        _Table((one.theirs, one.ours) for one in family.parts if one.index not in (None, SWAPPED)),
    )


def _place(name: str, family: FamilyNames) -> tuple[str, str, bool] | None:
    """Return (our template, number, whether it has only some rows of ours) for an underscored name in any
    layout; None if the family has no such name.
    """
    own, foreign, _, renamed, cut = _tables(family)
    found = own.place(name) or foreign.place(name) or renamed.place(name)
    if found is not None:
        return *found, False
    return None if (part := cut.place(name)) is None else (*part, True)


def diffusers_path(name: str, family: FamilyNames) -> str | None:
    """Return `blocks.0.attn1.to_q` for `blocks_0_self_attn_q`; None if the family lacks the module.

    For families whose weights are cut in the same way in both layouts.
    """
    path = module_path(name, family)
    if path is None or family.is_as_in_diffusers:
        return path
    return _tables(family).to_foreign.find(name) or path


@cache
def _places(family: FamilyNames | None) -> _Table:
    """Return the places of modules, "list.number of the block.place in it", by underscored names.

    Those of a transformer begin with `lora_unet_`.
    """
    of_dit = ((f"lora_unet_{start}", endings) for start, endings in (family.numbered if family else ()))
    return _Table(
        (start + ending, f"{index}.{'{n}' if '{n}' in start else 0}.{place}")
        for index, (start, endings) in enumerate((*TEXTS_NUMBERED, *of_dit))
        for place, ending in enumerate(endings.split())
    )


def number_modules(names: Iterable[str], family: FamilyNames | None) -> list[str] | None:
    """Sort names of modules with our prefixes as known trainers do; None if their order is unknown."""
    table, places = _places(family), dict[str, tuple[int, ...]]()
    for name in names:
        found = table.find(name)
        if found is None:
            return None
        places[name] = tuple(map(int, found.split(".")))
    return sorted(places, key=lambda name: places[name])
