"""Modules by the names that LoRA files give them, in ours and in other layouts (`networks.names`)."""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from networks.names.image import FLUX, FLUX_2, HUNYUAN_IMAGE, LUMINA, QWEN_IMAGE, Z_IMAGE
from networks.names.layouts import BEFORE_REST, REST, TRAINED_ON, FamilyNames, WeightPart
from networks.names.numbering import NUMBERED, TEXTS_NUMBERED
from networks.names.stable_diffusion import SD1, SD2, SDXL
from networks.names.video import FRAMEPACK, HUNYUAN_VIDEO, LTX_2, WAN

# of several with equal names the first is chosen, if nothing else tells
FAMILIES = (
    *(WAN, HUNYUAN_VIDEO, FRAMEPACK, LTX_2, FLUX, FLUX_2, HUNYUAN_IMAGE, LUMINA, QWEN_IMAGE, Z_IMAGE),
    *(SD1, SDXL, SD2),
)
_DIGITS = re.compile(r"\d+")


def replace_dots(path: str) -> str:
    """`blocks.0.self_attn.q` -> `blocks_0_self_attn_q`."""
    return path.replace(".", "_")


def choose_family(names: Iterable[str], hint: str | None = None) -> FamilyNames | None:
    """Return the family whose lists hold most of these underscored names; None if no list holds any.

    Ties go to the family named `hint`, then to a family with modules of these names, not only aliases.
    """
    best: FamilyNames | None = None
    names, most = list(names), (0, False, 0)
    for family in FAMILIES:
        tables = _tables(family)
        is_own = [tables.own.find(name) is not None for name in names]
        known = sum(
            mine or tables.foreign.find(name) is not None or tables.cut.find(name) is not None
            for mine, name in zip(is_own, names, strict=True)
        )
        score = known, family.name == hint, sum(is_own)
        if known and score > most:
            best, most = family, score
    return best


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

    A parameter that is no module's weight counts as a module: `blocks.0.modulation`.
    """
    return _tables(family).own.find(name)


@cache
def is_optional(name: str, family: FamilyNames) -> bool:
    """Tell whether an underscored name is of a module that only some models of the family have."""
    return _Table((path, path) for path in family.optional).find(name) is not None


@cache
def on_text_side(name: str) -> str:
    """Return what an underscored name belongs to if that is loaded with the text encoder; "" for all else."""
    return next(
        (
            family.text_side_words
            for family in FAMILIES
            if name.startswith(tuple(replace_dots(start) for start in family.text_side))
        ),
        "",
    )


def is_unprefixed(path: str) -> bool:
    """Tell whether files write a path without the prefix of the transformer."""
    return path.startswith(tuple(start for family in FAMILIES for start in family.unprefixed))


def alias(name: str, family: FamilyNames) -> str:
    """Return our underscored name for one of another layout; return any other name unchanged."""
    found = _tables(family).foreign.find(name)
    return name if found is None else replace_dots(found)


def to_alias(name: str, family: FamilyNames) -> str:
    """Return another layout's underscored name for one of ours; return any other name unchanged."""
    found = _tables(family).to_foreign.find(name)
    return name if found is None else replace_dots(found)


def joined_path(name: str, family: FamilyNames) -> str | None:
    """Return the path of a module in the layout that stacks some of ours; None if it is stacked there.

    name: underscored, ours, or that layout's for stacked modules.
    """
    tables = _tables(family)
    if tables.own.find(name) is None:
        return tables.cut.find(name)
    is_stacked = any(_template(part.theirs).fullmatch(name) for part in family.joined)
    return None if is_stacked else tables.to_foreign.find(name) or tables.own.find(name)


def has_module(name: str, family: FamilyNames) -> bool:
    """Tell whether an underscored name is of a module of the family, in any layout."""
    tables = _tables(family)
    return any(one.find(name) is not None for one in (tables.own, tables.foreign, tables.cut))


def is_path(path: str) -> bool:
    """Tell whether a family has a module of this path, `blocks.0.self_attn.q`, in any layout."""
    return not _all_paths()[0].isdisjoint(_templates(path))


def is_name(name: str) -> bool:
    """Tell whether a family has a module of this underscored name, in any layout."""
    return not _all_paths()[1].isdisjoint(_templates(name))


@cache
def _all_paths() -> tuple[frozenset[str], frozenset[str]]:
    """Return the templates of all families' modules in all layouts, as paths and as underscored names."""
    paths = {path for family in FAMILIES for path in family.modules}
    for family in FAMILIES:
        paths |= {path for pair in family.aliases for path in pair}
        paths |= {path.removesuffix(".weight") for pair in family.parameters for path in pair}
        paths |= {path for part in (*family.parts, *family.joined) for path in (part.theirs, part.ours)}
    return frozenset(paths), frozenset(map(replace_dots, paths))


def _templates(path: str) -> list[str]:
    """Return the templates that a path or name may be of: any one of its numbers may be the block's."""
    return [path, *(f"{path[: n.start()]}{{n}}{path[n.end() :]}" for n in _DIGITS.finditer(path))]


def count_parts(path: str) -> set[int]:
    """Return how many parts a joined layer has in layouts that cut it; anything may stand before its path."""
    names = [replace_dots(path)]
    names += [names[0][place + 1 :] for place, letter in enumerate(names[0]) if letter == "_"]
    return {len(found) for family in FAMILIES for name in names if len(found := parts_of(name, family)) > 1}


@dataclass(frozen=True)
class Relative:
    """A module whose weight has all or some rows of another module's weight, or the reverse."""

    name: str  # underscored
    part: WeightPart
    is_part: bool  # of the module that was asked for; otherwise that one is part of this


@cache
def relatives(name: str, family: FamilyNames | None = None) -> tuple[Relative, ...]:
    """Return the modules of other layouts that are part of this one or contain it, in one family or in all.

    A name that is a module's in one family and another layout's in another one has its relatives in both.
    """
    found: dict[tuple[str, int | None, bool], Relative] = {}  # families share names and parts
    for part in itertools.chain.from_iterable(map(_all_parts, FAMILIES if family is None else [family])):
        for own, other, is_part in ((part.ours, part.theirs, True), (part.theirs, part.ours, False)):
            match = _template(own).fullmatch(name)
            if match is not None:
                path = replace_dots(other.replace("{n}", match["n"]))
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


@cache
def _all_parts(family: FamilyNames) -> tuple[WeightPart, ...]:
    """Return a family's parts, with the aliases that are names of another family's own modules."""
    others = {replace_dots(path) for other in FAMILIES if other is not family for path in other.modules}
    cuts = family.parts or family.joined
    aliases = [pair for pair in family.aliases if cuts and replace_dots(pair[0]) in others]
    return (*family.parts, *family.joined, *(WeightPart(theirs, ours) for theirs, ours in aliases))


@cache
def _template(path: str) -> re.Pattern[str]:
    before, _, after = replace_dots(path).partition("{n}")
    return re.compile(re.escape(before) + (r"(?P<n>\d+)" if "{n}" in path else "(?P<n>)") + re.escape(after))


class _Table:
    """Finds templates by underscored names: `blocks_0_ffn_0` fits `blocks.{n}.ffn.0`.

    A dictionary rather than a pattern, because the families have thousands of templates together.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        """pairs: (template, its meaning, with the same number); the first of equal ones counts."""
        self._places: dict[str, tuple[int, str]] = {}
        for place, (template, target) in enumerate(pairs):
            self._places.setdefault(replace_dots(template), (place, target))

    def find(self, name: str) -> str | None:
        """Return the meaning of the first template that fits, its number filled in; None if none does."""
        best = self._places.get(name)
        number = ""
        for digits in _DIGITS.finditer(name):
            found = self._places.get(f"{name[: digits.start()]}{{n}}{name[digits.end() :]}")
            if found is not None and (best is None or found[0] < best[0]):
                best, number = found, digits[0]
        return None if best is None else best[1].replace("{n}", number)


class _Tables(NamedTuple):
    """A family's modules by names in several layouts."""

    own: _Table  # under our names
    foreign: _Table  # under aliases -> ours
    to_foreign: _Table
    cut: _Table  # parts and joined modules of the other layout, which stand for their own paths


@cache
def _tables(family: FamilyNames) -> _Tables:
    # a parameter of ours may be the weight of a module there
    parameters = [(theirs.removesuffix(".weight"), ours) for theirs, ours in family.parameters]
    aliases = [*family.aliases, *parameters]
    joined = dict.fromkeys(part.ours for part in family.joined)
    return _Tables(
        _Table((path, path) for path in (*family.modules, *(ours for _, ours in parameters))),
        _Table(aliases),
        _Table((ours, theirs) for theirs, ours in aliases),
        _Table((path, path) for path in (*(part.theirs for part in family.parts), *joined)),
    )


def diffusers_path(name: str, family: FamilyNames) -> str | None:
    """Return `blocks.0.attn1.to_q` for `blocks_0_self_attn_q`; None if the family lacks the module.

    For families whose weights are cut in the same way in both layouts.
    """
    path = module_path(name, family)
    if path is None or family.is_as_in_diffusers:
        return path
    return _tables(family).to_foreign.find(name) or path


@cache
def _places(family: str) -> _Table:
    """Return the places of modules, "list.number of the block.place in it", by underscored names.

    Those of a transformer begin with `lora_unet_`.
    """
    of_dit = ((f"lora_unet_{start}", endings) for start, endings in NUMBERED.get(family, ()))
    return _Table(
        (start + ending, f"{index}.{'{n}' if '{n}' in start else 0}.{place}")
        for index, (start, endings) in enumerate((*TEXTS_NUMBERED, *of_dit))
        for place, ending in enumerate(endings.split())
    )


def number_modules(names: Iterable[str], family: FamilyNames | None) -> list[str] | None:
    """Return names of modules with our prefixes in the order of known trainers; None if it is not known."""
    table, places = _places("" if family is None else family.name), dict[str, tuple[int, ...]]()
    for name in names:
        found = table.find(name)
        if found is None:
            return None
        places[name] = tuple(map(int, found.split(".")))
    return sorted(places, key=lambda name: places[name])
