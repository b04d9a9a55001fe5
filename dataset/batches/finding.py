"""Find training items by the names of cache files, and say what is missing."""

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dataset.batches.items import (
    NO_COMMANDS,
    CachingCommands,
    ItemKind,
    LiveTables,
    TrainingItem,
    tables_of,
)
from dataset.cache import files as cache_files
from dataset.cache.records import section_frames
from dataset.cache.store import CacheStore, Stores, may_be_mixed, open_store
from dataset.config import DatasetConfig, DatasetTable
from dataset.config_keys import IGNORE, REQUIRED
from dataset.sources.frames import bucket_of
from dataset.sources.media_source import pause_collection
from modules.console import count_of, count_words
from modules.contract.data import CONTROL, FPS, IMAGE_LATENTS, REFERENCE_LATENTS, LatentSpec, SoundSpec
from modules.errors import CacheError, DatasetError
from modules.paths import explain_missing

logger = logging.getLogger(__name__)

LOOKED_AT = 1000  # items whose headers are read to know whether any has a reference
_LATENTS_OF_ANY = re.compile(r"_[0-9]+x[0-9]+_[a-z0-9]+\.safetensors$")  # names of latent caches, whoever's


@dataclass
class FoundItems:
    """Result of listing the cache folders; paths are in the order in which they were found."""

    items: list[TrainingItem] = field(default_factory=list)  # sorted by table and file name
    # text files that are not there; their items are left out
    missing_text: dict[Path, None] = field(default_factory=dict)
    empty_tables: list[DatasetTable] = field(default_factory=list)  # tables without any latent cache
    # text files that some of the text encoders have yet to add to
    unfinished_text: dict[Path, None] = field(default_factory=dict)
    # of tables with caption_dropout_rate: files of the empty prompt
    missing_empty: list[Path] = field(default_factory=list)
    unsound: list[tuple[DatasetTable, str]] = field(default_factory=list)  # why caches may be missing
    missing_sound: list[Path] = field(default_factory=list)  # of tables with audio = "required", or of all
    needs_sound: str = 'audio = "required"'  # why that is a fault
    silent: SoundSpec | None = None  # of a run with sound, if no item has any
    # by folder, which several tables may share: names of sources; and others that have caches there
    listed: dict[Path, set[str]] = field(default_factory=dict)
    unlisted: dict[tuple[Path, str], None] = field(default_factory=dict)


def find_items(
    config: DatasetConfig,
    cache_tag: str,
    latent: LatentSpec,
    text_keys: frozenset[str] = frozenset(),
    stores: Stores | None = None,
    live: LiveTables | None = None,
    sound: SoundSpec | None = None,
) -> FoundItems:
    """Find all items by the names of their files, reading headers at most. If a table's sources are listed
    (encoded while training, or npz files beside pictures), caches of other sources are left out.

    text_keys: the keys of a complete text cache. stores: of the run, if caches are elsewhere than the tables
    say. live: tables encoded while training, by index. sound: spec of a family that is trained with sound.
    """
    stores = stores or Stores((cache_tag, latent, text_keys))
    found, usual = FoundItems(), ItemKind(cache_tag)
    for table in config.datasets:
        kind = replace((live or {}).get(table.index, usual), text_keys=text_keys)
        _add_table(found, table, kind, latent, stores, sound)
    if sound is not None and sound.is_alone:
        found.needs_sound = "sound alone is learned"
    if found.items and not live and not any(item.has_sound for item in found.items):
        found.silent = sound
    return found


def _add_table(
    found: FoundItems,
    table: DatasetTable,
    kind: ItemKind,
    latent: LatentSpec,
    stores: Stores,
    hears: SoundSpec | None,
) -> None:
    tag, store, texts_store = kind.tag, stores.of(table), stores.of_texts(table)
    names, end = store.names(), f"_{tag}{cache_files.SUFFIX}"
    if table.index not in stores.given and may_be_mixed(table, names):
        from dataset.cache.form import list_shard_faults, other_form

        found.unsound += [(table, line) for line in (*other_form(table, tag), *list_shard_faults(table))]
    latent_files = names if kind.sizes is None else kind.latent_names()
    wanted = sorted([name for name in latent_files if name.endswith(end)])
    stems = _listed_stems(table, kind, wanted) if kind.sources or store.is_shared else None
    if stems is not None:
        found.listed.setdefault(table.picture_folder, set()).update(stems)
    text_names = names if texts_store is store else texts_store.names()
    texts = _TextNames(table, text_names, tag, found) if kind.has_text else None
    clips = cache_files.latent_names(wanted, tag, table.kind) if table.kind == "video" else ()
    # how many files each clip in sections has: all that differ in their section alone
    parts = Counter(
        (stem, replace(what, section=None)) for _, stem, what in clips if what.section is not None
    )
    sound = hears if table.kind == "video" and table.audio != IGNORE else None
    needs_sound = sound is not None and (table.audio == REQUIRED or sound.is_alone)
    sound_end = "" if sound is None else f"_{cache_files.sound_tag(tag)}{cache_files.SUFFIX}"
    with_sound = {name for name in names if sound and name.endswith(sound_end)}
    del names, text_names, latent_files  # a million names: what is needed of them is held elsewhere
    has_references = bool(table.references or table.clip_references) and table.batch_size > 1
    buckets: dict[int, tuple[int, ...]] = {}  # by the meaning of the end of a name, by identity
    sizes: dict[tuple[int, ...], tuple[int, ...]] = {}  # each once: of references, of sound
    is_empty, folder = True, table.cache_directory
    with pause_collection():
        for name, stem, what in cache_files.latent_names(wanted, tag, table.kind):
            if stems is not None and stem not in stems:
                found.unlisted[table.picture_folder, stem] = None
                continue
            is_empty = False
            if texts is not None and not texts.has(stem):
                continue
            if id(what) not in buckets:
                buckets[id(what)] = _bucket(table, what, latent, folder / name)
            files = (parts[stem, replace(what, section=None)] or 1) if parts else 1
            captions = texts.captions.get(stem, 1) if texts else 1 + len(kind.sources[stem].more_captions)
            bucket, shape = buckets[id(what)], tuple[int, ...]()
            references = _reference_sizes(store, name) if has_references and kind.sizes is None else ()
            sound_file = "" if sound is None else cache_files.sound_file_name(name, tag)
            if sound is not None and table.batch_size > 1:
                shape = _sound_shape(store, name, sound, bucket[2])
            if needs_sound and sound_file not in with_sound:
                found.missing_sound.append(folder / sound_file)
            shared = sizes.setdefault(references, references), sizes.setdefault(shape, shape)
            own = files, captions, *shared, sound_file in with_sound
            found.items.append(TrainingItem(name, len(stem), table, bucket, kind, *own))
    if is_empty:
        found.empty_tables.append(table)


def _sound_shape(store: CacheStore, latents: str, sound: SoundSpec, frames: int) -> tuple[int, ...]:
    """Return the shape of an item's latents of sound; () if the latents do not say their frame rate, which is
    an error when they are read for a batch.
    """
    rate: float | None = None
    with contextlib.suppress(CacheError, KeyError, ValueError):
        rate = float(store.read(latents, is_whole=False).metadata[FPS])
    return () if rate is None else sound.shape(frames, rate)


def with_reference_sizes(items: Iterable[TrainingItem], stores: Stores) -> list[TrainingItem]:
    """Return the items with the sizes of their references, read from headers, even if batches do not depend
    on these sizes.
    """

    def may_have(item: TrainingItem) -> bool:
        table = item.table
        shown = table.reference_directory or table.control_directory or table.directory is None
        beside = table.references or (table.clip_references and shown) or table.fp_1f_clean_indices
        return bool(beside) and not item.references and item.kind.sizes is None

    return [
        replace(item, references=_reference_sizes(stores.of(item.table), item.file_name))
        if may_have(item)
        else item
        for item in items
    ]


def learn_no_references(items: Sequence[TrainingItem], stores: Stores) -> bool:
    """Return whether the model takes reference pictures, and none of about LOOKED_AT items has one."""
    edited = [
        item
        for item in items
        if (item.table.references is not None and item.table.kind == "image")
        or (item.table.clip_references is not None and item.table.clip_references.edits)
    ]
    for item in edited[:: len(edited) // LOOKED_AT + 1]:
        if item.kind.sizes is not None:
            source = item.kind.sources[item.source_stem]
            found: Sequence[object] = source.control or source.references
        else:
            found = item.references or _reference_sizes(stores.of(item.table), item.file_name)
        if found:
            return False
    return bool(edited)


def _reference_sizes(store: CacheStore, name: str) -> tuple[int, ...]:
    """Return width and height of each control and reference latent of an entry, in order, without mirrored
    ones; () if the entry is damaged, which is an error when it is read. The heights of all frames are added
    up.
    """
    try:
        shapes = store.read(name, is_whole=False).shapes
    except CacheError:
        return ()
    keys = [(cache_files.tensor_key(name), shape) for name, shape in sorted(shapes.items())]
    found = [
        (shape[-1], shape[-2] * (1 if key.startswith(CONTROL) else shape[-3]))
        for key, shape in keys
        if key.startswith((CONTROL, REFERENCE_LATENTS, IMAGE_LATENTS))
        and not key.endswith(cache_files.FLIPPED)
    ]
    return tuple(side for sides in found for side in sides)


class _TextNames:
    """The text caches of a table among the names of its entries."""

    def __init__(self, table: DatasetTable, names: Collection[str], tag: str, found: FoundItems) -> None:
        """found: unfinished and missing text caches are added to it."""
        self._table, self._tag, self._found = table, tag, found
        self._end = cache_files.text_file_name("", tag)
        self._first = {name for name in names if name.endswith(self._end)}
        unfinished = [name for name in names if name.endswith(cache_files.PART)]
        self._unfinished_first = {name for name in unfinished if name.endswith(self._end + cache_files.PART)}
        for name in unfinished:  # of further captions and of the empty prompt, if the table uses these
            whole = name.removesuffix(cache_files.PART)
            is_further = table.multi_caption and cache_files.parse_more_text_name(whole, tag) is not None
            if is_further or (table.drops_captions and cache_files.is_empty_text_name(whole, tag)):
                found.unfinished_text[table.cache_directory / name] = None
        further: dict[str, set[int]] = {}
        for name in names if table.multi_caption else ():
            parsed = cache_files.parse_more_text_name(name, tag) if ".caption" in name else None
            if parsed is not None:
                further.setdefault(parsed[0], set()).add(parsed[1])
        # the first, and further ones up to a gap in their numbers
        self.captions = {
            stem: next(number for number in range(1, len(numbers) + 2) if number not in numbers)
            for stem, numbers in further.items()
        }
        # names of empty prompts' caches; None: not needed, or a missing one was found already
        self._empty: set[str] | None = None
        if table.drops_captions:
            self._empty = {name for name in names if cache_files.is_empty_text_name(name, tag)}

    def has(self, stem: str) -> bool:
        """Return whether the first text of a source is cached."""
        text, folder = stem + self._end, self._table.cache_directory
        if text + cache_files.PART in self._unfinished_first:
            self._found.unfinished_text[folder / (text + cache_files.PART)] = None
        elif text not in self._first:
            self._found.missing_text[folder / text] = None
        if text not in self._first:
            return False
        if self._empty is not None:
            name = cache_files.empty_text_name(self._tag)
            if self._table.texts_see_references:
                name = cache_files.text_file_name(stem, self._tag, cache_files.EMPTY)
            if name not in self._empty:
                self._found.missing_empty.append(folder / name)
                self._empty = None
        return True


def _listed_stems(table: DatasetTable, kind: ItemKind, latents: Sequence[str]) -> Collection[str] | None:
    """Return the stems of a table's current sources, if these are read while training or if other programs
    share its caches; None if the caches alone decide the items.

    The caching script removes our own caches when their source is gone, but never npz files.
    """
    if kind.sources:
        return kind.sources.keys()
    if not (table.directory or table.metadata_file) or not latents:
        return None
    from dataset.sources.listing import find_sources

    try:
        return {source.stem for source in find_sources(table, captions=False, faults=[])}
    except DatasetError:  # none at all: the caches were copied without the pictures
        return None


def _bucket(
    table: DatasetTable, name: cache_files.LatentName, latent: LatentSpec, path: Path
) -> tuple[int, ...]:
    """Return the bucket of a cache file: for videos its name holds the size after bucketing."""
    if table.kind == "image":
        return bucket_of(table, name.size, latent.pixel_step, path)
    if name.section is not None:  # clips of all lengths share a batch: their sections are equal
        return (*name.size, section_frames(table.fp_latent_window_size, latent))
    assert name.span is not None
    return (*name.size, name.span[1])


def require_items(found: FoundItems, commands: CachingCommands = NO_COMMANDS) -> Sequence[TrainingItem]:
    """Return the items to train on. Items without a text cache are left out with a warning.

    Raises CacheError with the caching commands if a table has no usable cache, or text caching has not
    finished.
    """
    if found.unsound:
        lines = [line for _, line in found.unsound]
        if any("convert_cache" not in line for line in lines):
            lines += ["Shards are made whole by:", commands.latents, commands.text]
        raise CacheError("\n  ".join(lines))
    if found.unfinished_text:
        raise CacheError(
            f"{count_words(len(found.unfinished_text), 'text caches are unfinished')}, such as "
            f"{next(iter(found.unfinished_text))}: text caching was stopped before all text encoders had "
            f"written.\n  Finish it with: {commands.text}"
        )
    faults = []
    for table in found.empty_tables:
        names = [] if table.cache_format == "npz" else sorted(open_store(table).names())
        other = next(filter(_LATENTS_OF_ANY.search, names), None)
        there = f" of {table.kind}s for this model: {other} is for another model, or of something else"
        lacks = f"{table.name}: no latent cache in {table.cache_directory}"
        folder = table.directory
        if folder is not None and not folder.exists() and not table.cache_directory.exists():
            where = "" if folder.is_absolute() else f" from here ({Path.cwd()})"
            lacks = f"{table.name}: {folder}: no such folder{where}.{explain_missing(folder)}"
        faults.append(lacks if other is None else lacks + there)
    for folder, count in Counter(path.parent for path in found.missing_sound).items():
        one = next(path.name for path in found.missing_sound if path.parent == folder)
        lacking = count_words(count, "clips have no sound")
        faults.append(f"{found.needs_sound}, but {lacking} in {folder}, such as {one}. Take silent ones out")
    if not faults and not found.items:
        faults = [
            f"no text cache in {folder}" for folder in sorted({one.parent for one in found.missing_text})
        ]
    if found.silent is not None:
        faults.append(f"no clip of the dataset has cached sound. Give some, or {found.silent.without}")
    faults += [f"caption_dropout_rate needs the empty prompt's cache, {path}" for path in found.missing_empty]
    if faults:
        raise CacheError("\n  ".join([*faults, "Make the caches first:", commands.latents, commands.text]))
    if found.missing_text:
        logger.warning(
            "%d of the sources have latents but no text cache (the first: %s); they are left out. Run: %s",
            *(len(found.missing_text), next(iter(found.missing_text)), commands.text),
        )
    gone = [folder / stem for folder, stem in found.unlisted if stem not in found.listed[folder]]
    if gone:
        logger.warning(
            "%d sources have caches but are gone, or in no list (the first: %s): they are left out.",
            *(len(gone), gone[0]),
        )
    counts = count_of(len(found.items), "item"), count_of(len(tables_of(found.items)), "data set")
    logger.info("In the caches: %s of %s", *counts)
    return found.items
