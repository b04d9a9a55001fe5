"""Look up modules by their names in LoRA files, in our layout and others (`networks.names`)."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Generic, NamedTuple, TypeVar

from modules.installation import import_own
from networks.names.layouts import BEFORE_REST, REST, SWAPPED, TRAINED_ON, FamilyNames, WeightPart
from networks.names.texts import TEXTS_NUMBERED
from protocols.families import FAMILIES as ENTRIES
from protocols.families import FOLDERS

_DIGITS = re.compile(r"\d+")


class _Families:
    """Iterable of the `FamilyNames` of all model families, which imports one family's module at a time."""

    def __iter__(self) -> Iterator[FamilyNames]:
        for folder in FOLDERS.values():
            yield from import_own(f"{folder}.names").LORA


FAMILIES: Iterable[FamilyNames] = _Families()


def family_named(name: str) -> FamilyNames:
    """Return the model family with this name."""
    return next(family for family in FAMILIES if family.name == name)


def select_family(names: Iterable[str], hint: str | None = None) -> FamilyNames | None:
    """Return the family of a model with these underscored module names; None if no family has any of them.

    Of several families, the one named `hint` is chosen, else the one in which the fewest names are aliases
    (names in another layout), else the first (only SD 1 and 2 have equal names). For LoRAs, which have only
    some of a model's modules, use `likely_families`.
    """
    names = list(names)
    families = _families_knowing(names, hint)
    if len(families) < 2:
        return families[0] if families else None
    counts: list[int] = []  # for each family, how many names are in our layout, not aliases
    for family in families:
        modules = _tables(family).ours
        counts.append(sum(modules.first(name) is not None for name in names))
    return families[counts.index(max(counts))]


def _families_knowing(names: Sequence[str], hint: str | None) -> list[FamilyNames]:
    """Return the families that have the most of these module names."""
    # If the family named `hint` is one of them, only this family is returned.
    if not names:
        return []
    hinted = next((family for family in FAMILIES if family.name == hint), None) if hint else None
    if hinted is not None and all(_find_module(name, hinted) for name in names):
        return [hinted]  # avoids building the tables of other families
    # fast path: `all` stops at the first unknown name
    families = [family for family in FAMILIES if all(_find_module(name, family) for name in names)]
    if not families:
        # The families that have the largest number of these module names; [] if none has any
        counts: dict[FamilyNames, int] = {}
        for family in FAMILIES:
            counts[family] = sum(_find_module(name, family) is not None for name in names)
        maximum = max(counts.values())
        families = [family for family, count in counts.items() if maximum > 0 and count == maximum]
    return [hinted] if hinted in families else families


def list_accepted_families(name: str) -> tuple[FamilyNames, ...]:
    """Return the families whose LoRAs a family's scripts accept.

    A variant in a subfolder (FLUX.1 Kontext, Stable Diffusion XL) has no names of its own. It accepts the
    family with its name in the parent folder, or all families there if none has that name.

    Args:
        name: Name of a family that has scripts.
    """
    folder = FOLDERS[name]
    families: tuple[FamilyNames, ...] = import_own(f"{folder}.names").LORA
    if families:
        return families
    parent_folder = folder.rpartition(".")[0]
    parent_families: tuple[FamilyNames, ...] = import_own(f"{parent_folder}.names").LORA
    own_names = {name, *ENTRIES[name].further_models}
    return tuple(family for family in parent_families if family.name in own_names) or parent_families


GetSize = Callable[[str], tuple[int, int] | None]
# a complete list of blocks identifies a model only from this length: the user may have chosen fewer blocks
_LONG = 16


def likely_families(
    names: Iterable[str], get_change_size: GetSize, hint: str | None = None
) -> list[FamilyNames]:
    """Return the families that a LoRA may be for; several if nothing distinguishes them.

    Args:
        names: Underscored names of the LoRA's modules.
        get_change_size: Maps a name to the rows and columns of its change, or to None if they are unknown.
        hint: Family named by the metadata or the user.

    Returns:
        The families, or [] if no family has modules with these names.
    """
    names = list(names)
    families = _families_knowing(names, hint)
    if len(families) < 2:
        return families
    # modules of all blocks have the same sizes, so one name per template is enough; reversed: keep the first
    name_by_template = {_DIGITS.sub("n", name): name for name in reversed(names)}
    sizes = _known_sizes(name_by_template.values(), get_change_size)
    levels = {family: _rate_agreement(family, names, sizes) for family in families}
    best_level = max(levels.values())
    best_families = [family for family in families if levels[family] == best_level]
    if len(best_families) == 1:
        return best_families
    # if block indices do not single out one, families with other released sizes are possible too
    return [family for family in families if levels[family] >= min(best_level, _AS_RELEASED)]


def _known_sizes(names: Iterable[str], get_change_size: GetSize) -> dict[str, tuple[int, int]]:
    """Return the rows and columns of each module's change, leaving out modules of unknown size."""
    sizes: dict[str, tuple[int, int]] = {}
    for name in names:
        size = get_change_size(name)
        if size is not None:
            sizes[name] = size
    return sizes


def sizes_fit(family: FamilyNames, names: Iterable[str], get_change_size: GetSize) -> bool:
    """Return whether the family may have modules of these names with the sizes of the LoRA's changes."""
    return _rate_agreement(family, [], _known_sizes(names, get_change_size)) != _CONTRADICTS


def have_same_names(families: Sequence[FamilyNames]) -> bool:
    """Return whether all families share the same module names, as Stable Diffusion 1 and 2 do."""
    layouts = {(family.aliases, family.parts, family.joined, family.more_modules) for family in families}
    return len(layouts) == 1


# how well a file agrees with a family's released models, from worst to best: sizes that no model can have,
# sizes of an unreleased width, sizes of a released model, and also all of its blocks
_CONTRADICTS, _IN_PROPORTION, _AS_RELEASED, _COMPLETE = range(4)


def _rate_agreement(family: FamilyNames, names: Sequence[str], sizes: Mapping[str, tuple[int, int]]) -> int:
    """Rate how well a file's sizes and block indices fit a family, from `_CONTRADICTS` to `_COMPLETE`."""
    expected_sizes = list(_expected_sizes(family, sizes))
    # The block indices in module names, by the attribute name of the block list
    numbers: dict[str, set[int]] = {}
    for name in names:
        found = _find_module(name, family)
        if found is not None and "{n}" in found.path and found.number:
            numbers.setdefault(found.path.partition(".")[0], set()).add(int(found.number))
    block_numbers = numbers
    level = _CONTRADICTS
    if not family.released_sizes:  # no known widths or depths to contradict
        level = _rate_block_numbers(block_numbers, {})
    for width, depths in family.released_sizes:  # a width of 0 fits any size
        if not width or all(_agrees(expected, width) for expected in expected_sizes):
            level = max(level, _rate_block_numbers(block_numbers, dict(depths)))
    if level == _CONTRADICTS and expected_sizes and _are_in_proportion(expected_sizes):
        return _IN_PROPORTION
    return level


def _are_in_proportion(sizes: Sequence["_ExpectedSize"]) -> bool:
    """Return whether a model of some width, perhaps unreleased, can have all of these sizes."""
    rows, columns = sizes[0].size
    if sizes[0].columns_per_width:
        width = columns / sizes[0].columns_per_width
    else:
        width = rows / sizes[0].rows_per_width
    return all(_agrees(size, width) for size in sizes)


def _rate_block_numbers(numbers: Mapping[str, set[int]], depths: Mapping[str, int]) -> int:
    """Score how well block indices match a released model; `depths` is its block count per block list."""
    for name, blocks in numbers.items():
        if name in depths and max(blocks) >= depths[name]:
            return _CONTRADICTS
    common = [name for name in depths if name in numbers]
    is_long = any(depths[name] >= _LONG for name in common)
    if is_long and all(len(numbers[name]) == depths[name] for name in common):
        return _COMPLETE
    return _AS_RELEASED


class _ExpectedSize(NamedTuple):
    """Size of a module's weight change, and its expected size as multiples of the block width (0: any)."""

    size: tuple[int, int]  # rows and columns
    rows_per_width: float
    columns_per_width: float


def _expected_sizes(family: FamilyNames, sizes: Mapping[str, tuple[int, int]]) -> Iterator[_ExpectedSize]:
    """Yield the expected size of each module whose path matches an item of the family's `relative_sizes`."""
    for name, size in sizes.items():
        found = _find_module(name, family)
        path = "" if found is None else found.path
        is_cut = found is not None and found.is_cut
        for end, rows, columns in family.relative_sizes:
            if f".{path}".endswith(end) and (columns or not is_cut):
                yield _ExpectedSize(size, 0 if is_cut else rows, columns)
                break


def _agrees(expected: _ExpectedSize, width: float) -> bool:
    """Return whether the size of a module's change fits a model with this block width."""
    rows, columns = expected.size
    fits_rows = not expected.rows_per_width or abs(rows - expected.rows_per_width * width) < 1
    fits_columns = not expected.columns_per_width or abs(columns - expected.columns_per_width * width) < 1
    return fits_rows and fits_columns


def read_family(metadata: Mapping[str, str]) -> FamilyNames | None:
    """Return the family named in a LoRA file's metadata; None if no known family is named."""
    version = metadata.get(TRAINED_ON, "")
    architecture = metadata.get("modelspec.architecture", "").removesuffix("/lora")
    for family in FAMILIES:
        if version == family.name or architecture == family.architecture:
            return family
    return _find_family_by_prefix(version.lower(), architecture.lower())


def _find_family_by_prefix(version: str, architecture: str) -> FamilyNames | None:
    """Return the family with the longest prefix of the version or architecture; None if there is none."""
    # The longest prefix wins because "flux_2_dev" also begins with FLUX.1's "flux".
    longest = 0
    best_family: FamilyNames | None = None
    for family in FAMILIES:
        for prefix in family.version_prefixes:
            has_prefix = version.startswith(prefix) or architecture.startswith(prefix)
            if has_prefix and len(prefix) > longest:
                longest = len(prefix)
                best_family = family
    return best_family


def module_path(name: str, family: FamilyNames) -> str | None:
    """Return `blocks.0.self_attn.q` for `blocks_0_self_attn_q`; None if the family lacks the module.

    A parameter that is not a module's weight counts as a module: `blocks.0.modulation`. If a module is part
    of a stacked module in another layout, its path in that layout is returned.
    """
    tables = _tables(family)
    return _find(tables.ours, name) or _find(tables.fused, name)


def is_optional(name: str, family: FamilyNames) -> bool:
    """Return whether only some models of the family have a module of this name."""
    return _tables(family).optional.first(name) is not None


@cache
def describe_text_module(name: str, family: FamilyNames | None = None) -> str:
    """Describe a module that loads together with the text encoder; return "" for all other modules.

    Args:
        name: Underscored name of a module.
        family: Family of the module; None if unknown.
    """
    for each in FAMILIES if family is None else (family,):
        starts = tuple(start.replace(".", "_") for start in each.text_module_prefixes)
        if name.startswith(starts):
            return each.text_module_description
    return ""


def is_unprefixed(path: str) -> bool:
    """Return whether a family's LoRA files have this path without a prefix such as `diffusion_model.`."""
    return path.startswith(tuple(start for family in FAMILIES for start in family.unprefixed_paths))


def from_alias(name: str, family: FamilyNames) -> str:
    """Translate another layout's underscored module name to ours; return unknown names unchanged."""
    path = _find(_tables(family).by_alias, name)
    return name if path is None else path.replace(".", "_")


def to_alias(name: str, family: FamilyNames) -> str:
    """Translate our underscored module name to another layout's; return unknown names unchanged."""
    path = _find(_tables(family).alias_by_name, name)
    return name if path is None else path.replace(".", "_")


def find_fused_path(name: str, family: FamilyNames) -> str | None:
    """Return a module's path in the layout that fuses some of our modules; None if it is not there."""
    return _find(_tables(family).alias_by_name, name) or module_path(name, family)


def is_fused_elsewhere(name: str, family: FamilyNames) -> bool:
    """Return whether another layout of the family fuses this module with other modules."""
    return _tables(family).fused_elsewhere.first(name) is not None


def has_module(name: str, family: FamilyNames) -> bool:
    """Return whether the family has a module of this name, in our layout or in another program's."""
    tables = _tables(family)
    return any(table.first(name) is not None for table in (tables.ours, tables.by_alias, tables.by_part))


def is_known_module(name: str, dotted: bool = False) -> bool:
    """Return whether any family has a module of this name in any layout; `dotted` names contain dots."""
    paths = _all_paths() if dotted else _all_names()
    return not paths.isdisjoint(_templates(name))


@cache
def _all_paths() -> frozenset[str]:
    """Return the dotted module paths of all families in all layouts, with `{n}` for block indices."""
    paths: set[str] = set()
    for family in FAMILIES:
        paths.update(family.modules)
        for pair in family.aliases:
            paths.update(pair)
        for pair in family.parameters:
            paths.update(path.removesuffix(".weight") for path in pair)
        for part in (*family.parts, *family.joined):
            paths.update((part.part_path, part.fused_path))
    return frozenset(paths)


@cache
def _all_names() -> frozenset[str]:
    """Return the underscored module names of all families in all layouts, with `{n}` for block indices."""
    return frozenset(path.replace(".", "_") for path in _all_paths())


def count_parts(path: str) -> set[int]:
    """Return the possible numbers of layers into which other layouts split the layer at `path`.

    The numbers differ between families. `path` may have prefixes.
    """
    name = path.replace(".", "_")
    # the path without each possible prefix
    names = [name, *(name[index + 1 :] for index, character in enumerate(name) if character == "_")]
    counts = {len(find_parts(name, family)) for family in FAMILIES for name in names}
    return {count for count in counts if count > 1}


@dataclass(frozen=True)
class RelatedModule:
    """A module of another layout whose weight is part of a given module's weight, or contains it."""

    name: str  # underscored
    part: WeightPart
    is_part: bool  # True: its weight is part of the given module's weight; False: it contains it


@cache
def related_modules(name: str, family: FamilyNames | None = None) -> tuple[RelatedModule, ...]:
    """Return the modules of other layouts that are part of this module or contain it.

    Without a family, all families are searched. A name may belong to our layout in one family and to another
    layout in a second family; both count.
    """
    distinct: dict[tuple[str, int | None, bool], RelatedModule] = {}  # families share names and parts
    for template, number in _find_relations(family).all(name):
        relative = replace(template, name=template.name.replace("{n}", number).replace(".", "_"))
        if relative.name == name and relative.part.index is None:
            continue  # the module itself: both layouts have the same name for it
        distinct.setdefault((relative.name, relative.part.index, relative.is_part), relative)
    return tuple(distinct.values())


def _list_parts_and_renamed(family: FamilyNames) -> list[WeightPart]:
    """Return the parts of fused weights in a family's layouts, and modules that are only renamed."""
    # A renamed module is included if a module of another family has its other name.
    parts = [*family.parts, *family.joined]
    if not parts:  # the family's layouts do not differ in how weights are fused
        return []
    other_family_names: set[str] = set()
    for other in FAMILIES:
        if other is not family:
            other_family_names.update(path.replace(".", "_") for path in other.modules)
    for theirs, ours in family.aliases:
        if theirs.replace(".", "_") in other_family_names:
            parts.append(WeightPart(theirs, ours))
    return parts


@cache
def _find_relations(family: FamilyNames | None) -> "_Table[RelatedModule]":
    """Return a table from module names in all layouts of a family (or of all) to parts and fused modules."""
    # Names have `{n}` for the block index.
    pairs: list[tuple[str, RelatedModule]] = []
    for each_family in FAMILIES if family is None else (family,):
        for part in _list_parts_and_renamed(each_family):
            pairs.append((part.fused_path, RelatedModule(part.part_path, part, is_part=True)))
            pairs.append((part.part_path, RelatedModule(part.fused_path, part, is_part=False)))
    return _Table(pairs)


class PartPath(NamedTuple):
    """A module's path in another layout, such as diffusers', and how its rows map to our module."""

    path: str
    part: WeightPart


@cache
def find_parts(name: str, family: FamilyNames) -> list[PartPath]:
    """Return the modules of the family's other layout that are parts of this module, ordered by rows.

    If the other layout fuses several of our modules into this one, these modules are returned.
    """
    entries = _tables(family).parts.all(name)
    parts = [PartPath(part.part_path.replace("{n}", number), part) for part, number in entries]
    from_end = {REST: 101, BEFORE_REST: 100}  # sort the last parts after all numbered parts (far below 100)

    def position(path_and_part: PartPath) -> int:
        index = path_and_part.part.index or 0
        return from_end.get(index, index)

    return sorted(parts, key=position)


def part_path(name: str, family: FamilyNames) -> str | None:
    """Return the dotted path of another layout's module from its underscored name; None if it is unknown."""
    return _find(_tables(family).part_paths_elsewhere, name)


Entry = TypeVar("Entry")


class _Found(NamedTuple, Generic[Entry]):
    """The value of a matching template in a `_Table`, and the block index in the module name."""

    entry: Entry
    number: str  # "" if its template has none


class _Table(Generic[Entry]):
    """Looks up values by underscored module name and template: `blocks_0_ffn_0` matches `blocks.{n}.ffn.0`.

    It uses a dictionary instead of one regular expression, because there are thousands of templates.
    """

    def __init__(self, pairs: Iterable[tuple[str, Entry]]) -> None:
        """Index (template, entry) pairs by underscored template; earlier pairs take precedence.

        A template is a module name with `{n}` in place of the block index.
        """
        self._entries: dict[str, list[tuple[int, Entry]]] = {}
        for position, (template, entry) in enumerate(pairs):
            self._entries.setdefault(template.replace(".", "_"), []).append((position, entry))

    def all(self, name: str) -> list[_Found[Entry]]:
        """Return all entries whose template matches a name, in the table's order."""
        matches: list[tuple[int, _Found[Entry]]] = []
        for template, number in _templates(name).items():
            for position, entry in self._entries.get(template, ()):
                matches.append((position, _Found(entry, number)))
        matches.sort(key=lambda pair: pair[0])
        return [found for _, found in matches]

    def first(self, name: str) -> _Found[Entry] | None:
        return next(iter(self.all(name)), None)


def _find(table: _Table[str], name: str) -> str | None:
    """Return the path for a module name, with the block index filled in; None if the name is unknown."""
    found = table.first(name)
    return None if found is None else found.entry.replace("{n}", found.number)


@lru_cache(1 << 14)
def _templates(name: str) -> Mapping[str, str]:
    """Return the templates that match a name: the name itself, and versions with one number as `{n}`."""
    # Each template is mapped to the number that it replaces; "" for the name itself.
    templates = {name: ""}
    for match in _DIGITS.finditer(name):
        templates[f"{name[: match.start()]}{{n}}{name[match.end() :]}"] = match[0]
    return templates


class _Tables(NamedTuple):
    """Lookup tables from a family's module names, in our layout and in the other one, to paths.

    In the other layout, a module with all rows of ours is only renamed; a part has some of our rows.
    """

    ours: _Table[str]  # our name -> our path
    by_alias: _Table[str]  # alias in the other layout -> our path
    alias_by_name: _Table[str]  # our name -> alias
    renamed: _Table[str]  # renamed module of the other layout -> our path
    fused: _Table[str]  # module of the other layout that fuses several of ours -> its own path
    by_part: _Table[str]  # part of our module -> our path
    part_paths_elsewhere: _Table[str]  # part of the other layout, not merely renamed -> its own path
    fused_elsewhere: _Table[str]  # our module that the other layout fuses -> path of the fused module
    parts: _Table[WeightPart]  # module that the other layout splits, fuses or renames -> each of its parts
    optional: _Table[str]  # our module that only some models have -> our path


@cache
def _tables(family: FamilyNames) -> _Tables:
    """Return the lookup tables between a family's module names in our layout and in the other layout."""
    # one of our bare parameters may be the weight of a module in the other layout
    parameters = [(theirs.removesuffix(".weight"), ours) for theirs, ours in family.parameters]
    aliases = [*family.aliases, *parameters]
    paths = [*family.modules, *(ours for _, ours in parameters)]
    renamed: list[tuple[str, str]] = []
    by_part: list[tuple[str, str]] = []
    for part in family.parts:
        has_all_rows = part.index in (None, SWAPPED)
        pairs = renamed if has_all_rows else by_part
        pairs.append((part.part_path, part.fused_path))
    aliases_to_read = list(aliases)
    if family.joined:  # then the layout of `parts` is a third one, of which only renamed modules are read
        aliases_to_read += renamed
    return _Tables(
        ours=_Table((path, path) for path in paths),
        by_alias=_Table(aliases_to_read),
        alias_by_name=_Table((ours, theirs) for theirs, ours in aliases),
        renamed=_Table(renamed),
        fused=_Table((part.fused_path, part.fused_path) for part in family.joined),
        by_part=_Table(by_part),
        part_paths_elsewhere=_Table(
            (part.part_path, part.part_path) for part in family.parts if part.index is not None
        ),
        fused_elsewhere=_Table((part.part_path, part.fused_path) for part in family.joined),
        parts=_Table((part.fused_path, part) for part in (*family.parts, *family.joined)),
        optional=_Table((path, path) for path in family.optional_paths),
    )


class _ModuleMatch(NamedTuple):
    """Our module that a name in any layout refers to."""

    path: str  # our path, with `{n}` for the block number
    number: str  # block number; "" if there is none
    is_cut: bool  # whether the name refers to only some rows of the module


def _find_module(name: str, family: FamilyNames) -> _ModuleMatch | None:
    """Find a module by its underscored name in any layout of a family; return None if none matches."""
    tables = _tables(family)
    for table in (tables.ours, tables.by_alias, tables.renamed, tables.fused, tables.by_part):
        found = table.first(name)
        if found is not None:
            return _ModuleMatch(found.entry, found.number, is_cut=table is tables.by_part)
    return None


def diffusers_path(name: str, family: FamilyNames) -> str | None:
    """Return `blocks.0.attn1.to_q` for `blocks_0_self_attn_q`; None if the family lacks the module.

    Use it only for families whose weights are split into the same modules in both layouts.
    """
    path = module_path(name, family)
    if path is None or family.is_as_in_diffusers:
        return path
    return _find(_tables(family).alias_by_name, name) or path


@cache
def _numbering(family: FamilyNames | None) -> _Table[tuple[int, int]]:
    """Return a table from module names to positions: (index of the block list, index in a block)."""
    # Names of a transformer's modules begin with `lora_unet_`.
    numbered = list(TEXTS_NUMBERED)
    if family is not None:
        numbered += [(f"lora_unet_{start}", endings) for start, endings in family.optimizer_numbering]
    pairs: list[tuple[str, tuple[int, int]]] = []
    for index, (start, endings) in enumerate(numbered):
        pairs += [(start + ending, (index, place)) for place, ending in enumerate(endings.split())]
    return _Table(pairs)


def number_modules(names: Iterable[str], family: FamilyNames | None) -> list[str] | None:
    """Sort prefixed module names in the order of other trainers; return None if a name has no known place."""
    table = _numbering(family)
    places: dict[str, tuple[int, int, int]] = {}
    for name in names:
        found = table.first(name)
        if found is None:
            return None
        index, place = found.entry
        places[name] = (index, int(found.number or 0), place)
    return sorted(places, key=lambda name: places[name])
