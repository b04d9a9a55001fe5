"""Find cached items for training by their file names."""

import itertools
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from dataset.batches.items import ItemFacts, ItemKind, Items, LiveTable, Stems
from dataset.cache.converting import list_unsound
from dataset.cache.files import (
    PART,
    SUFFIX,
    LatentName,
    empty_text_name,
    latent_names,
    parse_more_text_name,
    part_name,
    text_file_name,
)
from dataset.cache.npz import NpzNames
from dataset.cache.records import section_frames
from dataset.cache.store import CacheStore, Stores, open_store
from dataset.config import DatasetConfig, DatasetTable
from dataset.sources.decoding import bucket_of
from dataset.sources.listing import find_sources
from modules.console import count_of
from modules.contract.data import LatentSpec
from modules.errors import CacheError, DatasetError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachingCommands:
    """The two caching commands of a configuration, as a user types them."""

    latents: str = "the latent caching script"
    text: str = "the text caching script"


NO_COMMANDS = CachingCommands()
CACHED = LiveTable({}, texts=False)  # a table of which nothing is encoded while training

_LATENTS_OF_ANY = re.compile(r"_[0-9]+x[0-9]+_[a-z0-9]+\.safetensors$")  # names of latent caches, whoever's


@dataclass(frozen=True)
class FoundItems:
    """Result of listing the cache folders."""

    items: Items  # sorted by table and file name
    missing_text: tuple[Path, ...]  # text files that are not there; their items are left out
    empty_tables: tuple[DatasetTable, ...]  # tables without any latent cache
    unfinished_text: tuple[Path, ...] = ()  # text files that some of the text encoders have yet to add to
    missing_empty: tuple[Path, ...] = ()  # of tables with caption_dropout_rate: files of the empty prompt
    unsound: tuple[tuple[DatasetTable, str], ...] = ()  # why caches of a table may be missing
    removed: tuple[Path, ...] = ()  # sources that have caches but no table has any more; without suffix


def find_items(
    config: DatasetConfig,
    cache_tag: str,
    latent: LatentSpec,
    text_keys: frozenset[str] = frozenset(),
    stores: Stores | None = None,
    live: Mapping[int, LiveTable] = MappingProxyType({}),
) -> FoundItems:
    """Find all items by the names of their files, without opening them. Where sources are listed (tables
    encoded while training, npz files beside pictures), caches of others are left out.

    text_keys: the keys of a whole text cache. stores: of the run, if caches are elsewhere than the tables
    say. live: tables encoded while training, by index.
    """
    stores = stores or Stores(NpzNames(cache_tag, latent, text_keys))
    found: list[_Column] = []
    missing: dict[Path, None] = {}
    unfinished: dict[Path, None] = {}
    empty: list[DatasetTable] = []
    missing_empty: list[Path] = []
    incomplete: list[tuple[DatasetTable, str]] = []
    listed: dict[Path, set[str]] = {}  # by folder, which several tables may share: names of sources
    unlisted: dict[tuple[Path, str], None] = {}  # names of other sources that have caches there
    for table in config.datasets:
        store, one = stores.of(table), live.get(table.index, CACHED)
        names = store.names()
        if table.index not in stores.given:
            incomplete += [(table, line) for line in list_unsound(names, table, cache_tag)]
        kind = ItemKind(cache_tag, text_keys, not one.media, not one.texts)
        latent_files = one.latent_names(cache_tag) if one.media else names
        column = _table_items(table, latent_files, kind, latent)
        stems = _listed_stems(table, store, one, column)
        if stems is not None:
            listed.setdefault(table.picture_folder, set()).update(stems)
            folder = table.picture_folder
            unlisted |= dict.fromkeys((folder, stem) for stem in column.stems if stem not in stems)
            column.keep([stem in stems for stem in column.stems])
        if not column.stems:
            empty.append(table)
        if one.texts:
            column.set("captions", map(one.num_captions, column.stems))
            found.append(column)
            continue
        if table.multi_caption:
            column.count_captions(names)
        if table.drops_captions and column.stems and empty_text_name(cache_tag) not in names:
            missing_empty.append(table.cache_directory / empty_text_name(cache_tag))
        _keep_with_text(table, column, names, cache_tag, missing, unfinished)
        found.append(column)
    facts = [one for column in found for one in column.facts]
    all_stems = Stems([stem for column in found for stem in column.stems])
    starts = itertools.accumulate((len(column.facts) for column in found), initial=0)
    which = [np.array(column.which, np.int32) + start for column, start in zip(found, starts, strict=False)]
    return FoundItems(
        Items(facts, all_stems, np.concatenate([np.zeros(0, np.int32), *which]).astype(np.int32)),
        tuple(missing),
        tuple(empty),
        tuple(path.with_name(part_name(path.name)) for path in unfinished),
        tuple(missing_empty),
        tuple(incomplete),
        tuple(folder / stem for folder, stem in unlisted if stem not in listed[folder]),
    )


def _keep_with_text(
    table: DatasetTable,
    column: "_Column",
    names: Collection[str],
    cache_tag: str,
    missing: dict[Path, None],
    unfinished: dict[Path, None],
) -> None:
    """Drop the items without a text file; add those files to `missing`, unfinished ones to `unfinished`."""
    end = text_file_name("", cache_tag)
    texts = {name for name in names if name.endswith(end)}
    parts = [name.removesuffix(PART) for name in names if name.endswith(PART)]
    for name in parts:  # of further captions and of the empty prompt, if the table uses these
        is_further = table.multi_caption and parse_more_text_name(name, cache_tag) is not None
        if is_further or (table.drops_captions and name == empty_text_name(cache_tag)):
            unfinished[table.cache_directory / name] = None
    has_text = [stem + end in texts for stem in column.stems]
    if parts or not all(has_text):
        without = set(parts)
        for stem, is_there in zip(column.stems, has_text, strict=True):
            if not is_there or stem + end in without:
                kept = unfinished if stem + end in without else missing
                kept[table.cache_directory / (stem + end)] = None
        column.keep(has_text)


def _listed_stems(
    table: DatasetTable, store: CacheStore, live: LiveTable, column: "_Column"
) -> Collection[str] | None:
    """Return the names of the sources that a table has now; None if its caches alone decide the items.

    Latents of ours are removed with their source by the caching script; npz files never are.
    """
    if live.sources:
        return live.sources.keys()
    if (table.directory or table.metadata_file) is None or not column.stems:
        return None
    if not store.is_shared(column.stems[0] + column.facts[column.which[0]].tail + SUFFIX):
        return None
    try:
        return {source.stem for source in find_sources(table, captions=False, faults=[])}
    except DatasetError:  # none at all: the caches were copied without the pictures
        return None


@dataclass
class _Column:
    """The items of one table, sorted by the names of their files: source and number of its facts."""

    facts: list[ItemFacts]
    stems: list[str]
    which: list[int]

    def keep(self, is_kept: Sequence[bool]) -> None:
        """Drop the other items."""
        self.stems = list(itertools.compress(self.stems, is_kept))
        self.which = list(itertools.compress(self.which, is_kept))

    def set(self, field: str, values: Iterable[int]) -> None:
        """Set a field of each item's facts."""
        numbers: dict[tuple[int, int], int] = {}
        pairs = zip(self.which, values, strict=True)
        self.which = [numbers.setdefault(pair, len(numbers)) for pair in pairs]
        changes = ((self.facts[number], {field: value}) for number, value in numbers)
        self.facts = [replace(facts, **change) for facts, change in changes]  # type: ignore[arg-type]

    def count_captions(self, names: Iterable[str]) -> None:
        """Count the text files of each source: the first, and further ones up to a gap in their numbers."""
        if not self.facts:
            return
        tag, further = self.facts[0].kind.tag, dict[str, set[int]]()
        for name in names:
            found = parse_more_text_name(name, tag) if ".caption" in name else None
            if found is not None:
                further.setdefault(found[0], set()).add(found[1])
        counts = {
            stem: next(number for number in range(1, len(numbers) + 2) if number not in numbers)
            for stem, numbers in further.items()
        }
        self.set("captions", (counts.get(stem, 1) for stem in self.stems))

    def count_parts(self, clips: Sequence[LatentName]) -> None:
        """Count the files of each clip: all that differ in their section alone. clips: for each of `facts`,
        the meaning of its tail.
        """
        whole = [replace(clip, section=None) for clip in clips]
        numbers = {clip: number for number, clip in enumerate(dict.fromkeys(whole))}
        of_facts = [numbers[clip] for clip in whole]
        keys = [(stem, of_facts[number]) for stem, number in zip(self.stems, self.which, strict=True)]
        parts = Counter(keys)
        self.set("parts", (parts[key] for key in keys))


def _table_items(table: DatasetTable, names: Collection[str], kind: ItemKind, latent: LatentSpec) -> _Column:
    """The items of a table, sorted by file name."""
    end = f"_{kind.tag}{SUFFIX}"
    clips: list[LatentName] = []
    column = _Column([], [], [])
    number, before = -1, None
    numbers: dict[int, int] = {}  # of `clips`, by identity
    wanted = sorted([name for name in names if name.endswith(end)])
    for name, stem, what in latent_names(wanted, kind.tag, table.kind):
        if what is not before:
            before = what
            if id(what) not in numbers:
                numbers[id(what)] = len(clips)
                if table.kind == "image":
                    path = table.cache_directory / name
                    bucket: tuple[int, ...] = bucket_of(table, what.size, latent.pixel_step, path)
                elif what.section is not None:  # of clips of all lengths: what is stacked is equal
                    bucket = (*what.size, section_frames(table.fp_latent_window_size, latent))
                else:  # a video's name holds the size after bucketing
                    assert what.span is not None
                    bucket = (*what.size, what.span[1])
                clips.append(what)
                tail = name[len(stem) : -len(SUFFIX)]
                column.facts.append(ItemFacts(tail, table, bucket, kind))
            number = numbers[id(what)]
        column.stems.append(stem)
        column.which.append(number)
    if any(clip.section is not None for clip in clips):
        column.count_parts(clips)
    return column


def require_items(found: FoundItems, commands: CachingCommands = NO_COMMANDS) -> Items:
    """Return the items to train on. Items without a text cache are left out with a warning.

    Raises CacheError with the caching commands if a table has no usable cache, or text caching has not
    finished.
    """
    if found.unsound:
        lines = [line for _, line in found.unsound]
        raise CacheError(
            "\n  ".join([*lines, "Shards are made whole by:", commands.latents, commands.text])
            if any("convert_cache" not in line for line in lines)
            else "\n".join(lines)
        )
    if found.unfinished_text:
        raise CacheError(
            f"{len(found.unfinished_text)} text caches are unfinished, such as {found.unfinished_text[0]}: "
            "text caching was "
            f"stopped before all text encoders had written.\n  Finish it with: {commands.text}"
        )
    untexted = sorted({path.parent for path in found.missing_text})
    faults = [
        f"{table.name}: no latent cache in {table.cache_directory}{_others_in(table)}"
        for table in found.empty_tables
    ]
    if not faults and not found.items:
        faults = [f"no text cache in {folder}" for folder in untexted]
    faults += [f"caption_dropout_rate needs the empty prompt's cache, {path}" for path in found.missing_empty]
    if faults:
        raise CacheError("\n  ".join([*faults, "Make the caches first:", commands.latents, commands.text]))
    if found.missing_text:
        logger.warning(
            "%d of the sources have latents but no text cache (the first: %s); they are left out. Run: %s",
            len(found.missing_text),
            found.missing_text[0],
            commands.text,
        )
    if found.removed:
        logger.warning(
            "%d sources have caches but are no longer there, or in no list (the first: %s): they are left "
            "out.",
            len(found.removed),
            found.removed[0],
        )
    counts = count_of(len(found.items), "item"), count_of(len(found.items.tables), "data set")
    logger.info("In the caches: %s of %s", *counts)
    return found.items


def _others_in(table: DatasetTable) -> str:
    """Describe caches in a table's folder that cannot be used: for another model, or of another kind."""
    names = [] if table.cache_format == "npz" else sorted(open_store(table).names())
    other = next((name for name in names if _LATENTS_OF_ANY.search(name)), None)
    return (
        ""
        if other is None
        else f" of {table.kind}s for this model: {other} is for another model, or of something else"
    )
