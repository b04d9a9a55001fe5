"""Training items as the loops see them, found by the names of cache files; what is encoded while training."""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from dataset.cache.converting import list_unsound
from dataset.cache.files import (
    EMPTY,
    PART,
    SUFFIX,
    LatentName,
    empty_text_name,
    is_empty_text_name,
    latent_names,
    parse_more_text_name,
    sound_file_name,
    sound_tag,
    text_file_name,
)
from dataset.cache.npz import NpzNames
from dataset.cache.records import section_frames
from dataset.cache.store import CacheStore, Stores, open_store
from dataset.config import DatasetConfig, DatasetTable
from dataset.config_keys import IGNORE, REQUIRED
from dataset.sources.decoding import bucket_of
from dataset.sources.listing import find_sources
from dataset.sources.media_source import MediaSource, pause_collection
from modules.console import count_of
from modules.contract.data import FPS, LatentSpec, SoundSpec
from modules.errors import CacheError, DatasetError
from modules.media.buckets import Size


@dataclass(frozen=True)
class ItemKind:
    """Facts that all items of a table share."""

    tag: str  # the family's cache_tag
    text_keys: frozenset[str] = frozenset()  # what a text file has to hold
    has_latents: bool = True  # False: pictures are encoded while training
    has_text: bool = True  # False: captions are


@dataclass(frozen=True, slots=True)
class TrainingItem:
    """A pair of cache files. There may be millions."""

    file_name: str  # of the latents; whole, as the listing has it: a copy of each would be a lot
    stem_length: int  # of `file_name`, how much is the name of the source
    table: DatasetTable
    # width, height in pixels; for videos also frames: of a section, those that it decodes to
    bucket: tuple[int, ...]
    kind: ItemKind
    parts: int = 1  # how many files of the same clip are there
    captions: int = 1  # how many text files of the source are there, besides the empty prompt's
    # width and height of each latents of a reference picture, if those of a batch have to be equal
    references: tuple[int, ...] = ()
    has_sound: bool = False  # in a cache of its own
    # C T M of its sound, silent or not, if those of a batch have to be equal
    sound: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """The name of the latent file without suffix."""
        return self.file_name.removesuffix(SUFFIX)

    @property
    def source_stem(self) -> str:
        """The name of the source without suffix."""
        return self.file_name[: self.stem_length]

    @property
    def group(self) -> tuple[int, ...]:
        """The common key of a batch's items: table, or its group, bucket, references, size of the sound."""
        return (self.table.batch_group, *self.bucket, *self.references, *self.sound)

    @property
    def latent_path(self) -> Path:
        return self.table.cache_directory / f"{self.key}{SUFFIX}"

    @property
    def sound_path(self) -> Path:
        """The file of its sound, if it has any."""
        return self.table.cache_directory / sound_file_name(self.file_name, self.kind.tag)

    @property
    def text_path(self) -> Path:
        """The file of the first caption."""
        return self.caption_path(0)

    def caption_path(self, number: int) -> Path:
        """Return the text file of a caption, or of the empty prompt if `number` is EMPTY."""
        tag = self.kind.tag
        if number == EMPTY and not self.table.texts_see_references:
            return self.table.cache_directory / empty_text_name(tag)
        name = text_file_name(self.source_stem, tag, number)
        return self.table.cache_directory / name


def tables_of(items: Iterable[TrainingItem]) -> list[DatasetTable]:
    """Return the tables of items, by index."""
    return [table for _, table in sorted({item.table.index: item.table for item in items}.items())]


def group_items(items: Iterable[TrainingItem]) -> dict[tuple[int, ...], list[TrainingItem]]:
    """Return the items that can share a batch."""
    groups: dict[tuple[int, ...], list[TrainingItem]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    return groups


@dataclass(frozen=True)
class LiveTable:
    """Parts that training reads from a table's sources."""

    sources: Mapping[str, MediaSource]  # by stem
    texts: bool  # captions are not cached
    sizes: Mapping[str, Size] | None = None  # of pictures, by stem; None: their latents are cached

    @property
    def media(self) -> bool:
        """Return whether pictures are not cached."""
        return self.sizes is not None

    def latent_names(self, tag: str) -> list[str]:
        """Return the names that latent caches of its pictures would have. tag: the family's cache_tag."""
        return [LatentName(stem, size).file_name(tag) for stem, size in (self.sizes or {}).items()]

    def num_captions(self, stem: str) -> int:
        """Return how many captions a source has."""
        return 1 + len(self.sources[stem].more_captions)

    def caption(self, stem: str, number: int) -> str:
        """Return a caption of a source as its file has it. number: EMPTY for the empty one."""
        if number == EMPTY:
            return ""
        source = self.sources[stem]
        return (source.caption or "", *source.more_captions)[number]


@dataclass(frozen=True)
class LiveParts:
    """Parts of a batch that do not come from caches."""

    tables: Mapping[int, LiveTable] = field(default_factory=dict)  # by index
    # what was encoded for items of the batch, by their places: tensors without batch dimension
    encoded: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)


NO_LIVE_PARTS = LiveParts()


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

    items: tuple[TrainingItem, ...]  # sorted by table and file name
    missing_text: tuple[Path, ...]  # text files that are not there; their items are left out
    empty_tables: tuple[DatasetTable, ...]  # tables without any latent cache
    unfinished_text: tuple[Path, ...] = ()  # text files that some of the text encoders have yet to add to
    missing_empty: tuple[Path, ...] = ()  # of tables with caption_dropout_rate: files of the empty prompt
    unsound: tuple[tuple[DatasetTable, str], ...] = ()  # why caches of a table may be missing
    missing_sound: tuple[Path, ...] = ()  # of tables with audio = "required"
    silent: SoundSpec | None = None  # of a run with sound, if no item has any
    removed: tuple[Path, ...] = ()  # sources that have caches but no table has any more; without suffix


def find_items(
    config: DatasetConfig,
    cache_tag: str,
    latent: LatentSpec,
    text_keys: frozenset[str] = frozenset(),
    stores: Stores | None = None,
    live: Mapping[int, LiveTable] = MappingProxyType({}),
    sound: SoundSpec | None = None,
) -> FoundItems:
    """Find all items by the names of their files; no more than headers are opened. Where sources are listed
    (tables encoded while training, npz files beside pictures), caches of others are left out.

    text_keys: the keys of a whole text cache. stores: of the run, if caches are elsewhere than the tables
    say. live: tables encoded while training, by index. sound: of a family that hears.
    """
    stores = stores or Stores(NpzNames(cache_tag, latent, text_keys))
    items: list[TrainingItem] = []
    missing: dict[Path, None] = {}
    unfinished: dict[Path, None] = {}
    empty: list[DatasetTable] = []
    missing_empty: list[Path] = []
    missing_sound: list[Path] = []
    incomplete: list[tuple[DatasetTable, str]] = []
    listed: dict[Path, set[str]] = {}  # by folder, which several tables may share: names of sources
    unlisted: dict[tuple[Path, str], None] = {}  # names of other sources that have caches there
    for table in config.datasets:
        store, texts_store = stores.of(table), stores.of_texts(table)
        one, names = live.get(table.index, CACHED), store.names()
        text_names = names if texts_store is store else texts_store.names()
        if table.index not in stores.given:
            incomplete += [(table, line) for line in list_unsound(names, table, cache_tag)]
        kind = ItemKind(cache_tag, text_keys, not one.media, not one.texts)
        latent_files = one.latent_names(cache_tag) if one.media else names
        empty_text, end = empty_text_name(cache_tag), f"_{cache_tag}{SUFFIX}"
        wanted = sorted([name for name in latent_files if name.endswith(end)])
        stems = _listed_stems(table, store, one, wanted, cache_tag)
        if stems is not None:
            listed.setdefault(table.picture_folder, set()).update(stems)
        texts = _TextNames(table, [] if one.texts else text_names, cache_tag)
        unfinished |= dict.fromkeys(table.cache_directory / name for name in texts.unfinished)
        clips = latent_names(wanted, cache_tag, table.kind) if table.kind == "video" else ()
        # how many files each clip in sections has: all that differ in their section alone
        parts = Counter(
            (stem, replace(what, section=None)) for _, stem, what in clips if what.section is not None
        )
        buckets: dict[int, tuple[int, ...]] = {}  # by the meaning of the end of a name, by identity
        # each once, of tables whose batches depend on them
        references: dict[tuple[int, ...], tuple[int, ...]] = {}
        sounds: dict[tuple[int, ...], tuple[int, ...]] = {}
        hears = sound is not None and table.kind == "video" and table.audio != IGNORE
        end_of_sound = f"_{sound_tag(cache_tag)}{SUFFIX}"
        with_sound = {name for name in names if name.endswith(end_of_sound)} if hears else set()
        has_references = table.references is not None and table.batch_size > 1 and not one.media
        has_empty_text, is_empty = empty_text in text_names, True
        # one for each source if an encoder sees its references, and the first of those that are not there
        own_empty: set[str] | None = None
        if table.drops_captions and table.texts_see_references and not one.texts:
            own_empty = {name for name in text_names if is_empty_text_name(name, cache_tag)}
            has_empty_text = True
        del names, text_names, latent_files  # a million names: what is needed of them is held elsewhere
        with pause_collection():
            for name, stem, what in latent_names(wanted, cache_tag, table.kind):
                if stems is not None and stem not in stems:
                    unlisted[table.picture_folder, stem] = None
                    continue
                is_empty = False
                text = stem + texts.end
                if not one.texts and (text in texts.unfinished_first or text not in texts.first):
                    kept = unfinished if text in texts.unfinished_first else missing
                    kept[table.cache_directory / text] = None
                    if text not in texts.first:
                        continue
                empty_of_source = text_file_name(stem, cache_tag, EMPTY) if own_empty is not None else ""
                if own_empty is not None and empty_of_source not in own_empty:
                    missing_empty.append(table.cache_directory / empty_of_source)
                    own_empty = None
                if id(what) not in buckets:
                    buckets[id(what)] = _bucket(table, what, latent, table.cache_directory / name)
                files = (parts[stem, replace(what, section=None)] or 1) if parts else 1
                captions = one.num_captions(stem) if one.texts else texts.captions.get(stem, 1)
                bucket = buckets[id(what)]
                sizes = _reference_sizes(store, name) if has_references else ()
                sizes = references.setdefault(sizes, sizes)
                item = TrainingItem(name, len(stem), table, bucket, kind, files, captions, sizes)
                if sound is not None and hears:
                    has_sound = sound_file_name(name, cache_tag) in with_sound
                    shape = _sound_shape(store, item, sound) if table.batch_size > 1 else ()
                    item = replace(item, has_sound=has_sound, sound=sounds.setdefault(shape, shape))
                    if not has_sound and table.audio == REQUIRED:
                        missing_sound.append(item.sound_path)
                items.append(item)
        if is_empty:
            empty.append(table)
        elif table.drops_captions and not one.texts and not has_empty_text:
            missing_empty.append(table.cache_directory / empty_text)
    return FoundItems(
        tuple(items),
        tuple(missing),
        tuple(empty),
        tuple(path.with_name(path.name + PART) for path in unfinished),
        tuple(missing_empty),
        tuple(incomplete),
        tuple(missing_sound),
        sound if items and not live and not any(item.has_sound for item in items) else None,
        tuple(folder / stem for folder, stem in unlisted if stem not in listed[folder]),
    )


def with_reference_sizes(items: Iterable[TrainingItem], stores: Stores) -> list[TrainingItem]:
    """Return items with the sizes of their references, also those whose batches do not depend on them.

    Reads their headers.
    """
    return [
        replace(item, references=_reference_sizes(stores.of(item.table), item.file_name))
        if item.table.references is not None and item.table.batch_size == 1 and item.kind.has_latents
        else item
        for item in items
    ]


def _reference_sizes(store: CacheStore, name: str) -> tuple[int, ...]:
    """Return the sizes of an entry's references; none if it is damaged, as reading it for a batch says."""
    try:
        return store.read(name, is_whole=False).header.reference_sizes
    except CacheError:
        return ()


def _sound_shape(store: CacheStore, item: TrainingItem, sound: SoundSpec) -> tuple[int, ...]:
    """Return C T M of an item's sound, silent or not; () if its cache does not say how long it lasts."""
    try:
        rate = float(store.read(item.file_name, is_whole=False).header.metadata[FPS])
    except (CacheError, KeyError, ValueError):  # as reading it for a batch says
        return ()
    return sound.shape(item.bucket[2], rate)


class _TextNames:
    """The text caches of a table among the names of its entries."""

    def __init__(self, table: DatasetTable, names: Collection[str], tag: str) -> None:
        self.end = text_file_name("", tag)
        self.first = {name for name in names if name.endswith(self.end)}
        parts = [name.removesuffix(PART) for name in names if name.endswith(PART)]
        self.unfinished_first = {name for name in parts if name.endswith(self.end)}
        # of further captions and of the empty prompt, if the table uses these
        self.unfinished = [
            name
            for name in parts
            if (table.multi_caption and parse_more_text_name(name, tag) is not None)
            or (table.drops_captions and is_empty_text_name(name, tag))
        ]
        further: dict[str, set[int]] = {}
        for name in names if table.multi_caption else ():
            found = parse_more_text_name(name, tag) if ".caption" in name else None
            if found is not None:
                further.setdefault(found[0], set()).add(found[1])
        # the first, and further ones up to a gap in their numbers
        self.captions = {
            stem: next(number for number in range(1, len(numbers) + 2) if number not in numbers)
            for stem, numbers in further.items()
        }


def _listed_stems(
    table: DatasetTable, store: CacheStore, live: LiveTable, latents: Sequence[str], tag: str
) -> Collection[str] | None:
    """Return the names of the sources that a table has now; None if its caches alone decide the items.

    Latents of ours are removed with their source by the caching script; npz files never are.
    """
    if live.sources:
        return live.sources.keys()
    if (table.directory or table.metadata_file) is None:
        return None
    first = next(latent_names(latents, tag, table.kind), None)
    if first is None or not store.is_shared(first[0]):
        return None
    try:
        return {source.stem for source in find_sources(table, captions=False, faults=[])}
    except DatasetError:  # none at all: the caches were copied without the pictures
        return None


def _bucket(table: DatasetTable, name: LatentName, latent: LatentSpec, path: Path) -> tuple[int, ...]:
    """Return the bucket of a cache file: for videos its name holds the size after bucketing."""
    if table.kind == "image":
        return bucket_of(table, name.size, latent.pixel_step, path)
    if name.section is not None:  # of clips of all lengths: what is stacked is equal
        return (*name.size, section_frames(table.fp_latent_window_size, latent))
    assert name.span is not None
    return (*name.size, name.span[1])


def require_items(found: FoundItems, commands: CachingCommands = NO_COMMANDS) -> tuple[TrainingItem, ...]:
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
    lacking = Counter(path.parent for path in found.missing_sound)
    faults += [
        f'audio = "required", but {count} clips have no sound in {folder}, such as '
        f"{next(path.name for path in found.missing_sound if path.parent == folder)}"
        for folder, count in lacking.items()
    ]
    if not faults and not found.items:
        faults = [f"no text cache in {folder}" for folder in untexted]
    if found.silent is not None:
        faults.append(f"no clip of the dataset has cached sound. Give some, or {found.silent.without}")
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
    counts = count_of(len(found.items), "item"), count_of(len(tables_of(found.items)), "data set")
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
