"""Cached items for training: found by their names, put in order by a seed, read and checked when their turn comes."""

import contextlib
import functools
import hashlib
import logging
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dataset.cache_files import Entry, LatentName, parse_latent_name, part_path, read_entry, text_file_name
from dataset.cache_records import (
    FileIdentity,
    LatentRecord,
    TextRecord,
    is_unchanged,
    latent_record,
    text_records,
    verify_tensors,
)
from dataset.captions import read_caption
from dataset.config import DatasetConfig, DatasetTable
from dataset.config_keys import SECTION_DEFAULTS
from dataset.items import bucket_of
from dataset.planning import options_difference, section_frames
from modules.errors import CacheError
from modules.family import LatentSpec
from modules.records import LATENTS_MADE, Batch, MadeBy
from modules.seeds import derive_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachingCommands:
    """The two commands that make the caches of a configuration, as a user types them."""

    latents: str = "the latent caching script"
    text: str = "the text caching script"


NO_COMMANDS = CachingCommands()
_LATENTS_OF_ANY = re.compile(r"_[0-9]+x[0-9]+_[a-z0-9]+\.safetensors$")  # names of latent caches, whoever's


@dataclass(frozen=True)
class TrainingItem:
    """A pair of cache files."""

    key: str  # name of the latent file without suffix
    latent_path: Path
    text_path: Path
    table: DatasetTable
    bucket: tuple[int, ...]  # width, height in pixels; videos: and frames, of a section those that it decodes to
    source_stem: str
    parts: int = 1  # how many files of the same clip are there
    text_keys: frozenset[str] = frozenset()  # what the text file has to hold


@dataclass(frozen=True)
class FoundItems:
    """What one listing of the cache folders shows."""

    items: tuple[TrainingItem, ...]  # sorted by table and file name
    missing_text: tuple[Path, ...]  # text files that are not there; their items are left out
    empty_tables: tuple[DatasetTable, ...]  # tables without any latent cache
    unfinished_text: tuple[Path, ...] = ()  # text files that some of the text encoders have yet to add to


def find_items(config: DatasetConfig, cache_tag: str, latent: LatentSpec, text_keys: frozenset[str] = frozenset()) -> FoundItems:
    """All items by the names of their files; none is opened. text_keys: what a whole text cache holds."""
    items: list[TrainingItem] = []
    missing: dict[Path, None] = {}
    unfinished: dict[Path, None] = {}
    empty: list[DatasetTable] = []
    for table in config.datasets:
        folder = table.cache_directory
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        parsed = [(name, parse_latent_name(name, cache_tag, table.kind)) for name in sorted(names)]
        parts = Counter(_clip_of(what) for _, what in parsed if what is not None)
        found = [
            replace(_training_item(table, name, what, cache_tag, latent, text_keys), parts=parts[_clip_of(what)])
            for name, what in parsed
            if what is not None
        ]
        if not found:
            empty.append(table)
        items += [item for item in found if item.text_path.name in names]
        unfinished |= {part_path(item.text_path): None for item in found if part_path(item.text_path).name in names}
        missing |= {
            item.text_path: None
            for item in found
            if item.text_path.name not in names and part_path(item.text_path) not in unfinished
        }
    return FoundItems(tuple(items), tuple(missing), tuple(empty), tuple(unfinished))


def require_items(found: FoundItems, commands: CachingCommands = NO_COMMANDS) -> tuple[TrainingItem, ...]:
    """The items to train on. Items without a text cache are left out with a warning.

    Raises CacheError with the caching commands where a table has no usable cache at all, or text caching has not come to its end.
    """
    if found.unfinished_text:
        raise CacheError(
            f"{len(found.unfinished_text)} text caches are unfinished, such as {found.unfinished_text[0]}: text caching was "
            f"stopped before all text encoders had written.\n  Finish it with: {commands.text}"
        )
    usable = {item.table.index for item in found.items}
    untexted = sorted({path.parent for path in found.missing_text})
    faults = [f"{table.name}: no latent cache in {table.cache_directory}{_others_in(table)}" for table in found.empty_tables]
    if not faults and not found.items:
        faults = [f"no text cache in {folder}" for folder in untexted]
    if faults:
        raise CacheError("\n  ".join([*faults, "Make the caches first:", commands.latents, commands.text]))
    if found.missing_text:
        logger.warning(
            "%d of the sources have latents but no text cache (the first: %s); they are left out. Run: %s",
            len(found.missing_text),
            found.missing_text[0],
            commands.text,
        )
    logger.info("%d items of %d dataset tables are cached", len(found.items), len(usable))
    return found.items


def split_validation(items: Sequence[TrainingItem], fraction: float) -> tuple[tuple[TrainingItem, ...], tuple[TrainingItem, ...]]:
    """Split into (training, validation): tables marked `validation` go to validation, and this fraction of the others' sources.

    By source name: all crops of a clip, in all tables, fall on one side; the choice depends on nothing but the names.
    A fraction above 0 takes at least one source and leaves at least one.
    """
    stems = sorted({item.source_stem for item in items if not item.table.validation}, key=_stem_hash)
    count = round(fraction * len(stems))
    if fraction > 0:
        count = min(max(count, 1), len(stems) - 1)
    held_back = set(stems[: max(count, 0)])
    training: list[TrainingItem] = []
    validation: list[TrainingItem] = []
    for item in items:
        (validation if item.table.validation or item.source_stem in held_back else training).append(item)
    return tuple(training), tuple(validation)


class BatchOrder:
    """The order of batches of every epoch, a function of the items' names and the seed alone.

    Epoch e (from 0) is a fresh shuffle: within each bucket, then of the batches. A bucket is a table and a size; its items come
    `num_repeats` times; the last batch of a bucket may be short.
    """

    def __init__(self, items: Iterable[TrainingItem], seed: int) -> None:
        self._seed = seed
        self._buckets: dict[tuple[int, ...], list[TrainingItem]] = {}
        for item in sorted(items, key=lambda item: (item.table.index, item.key)):
            self._buckets.setdefault((item.table.index, *item.bucket), []).append(item)

    @property
    def num_items(self) -> int:
        """Items of an epoch, repeats included."""
        return sum(len(bucket) * bucket[0].table.num_repeats for bucket in self._buckets.values())

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        return sum(-(-len(bucket) * bucket[0].table.num_repeats // bucket[0].table.batch_size) for bucket in self._buckets.values())

    def epoch(self, number: int) -> tuple[tuple[TrainingItem, ...], ...]:
        """The batches of an epoch in order. number: from 0."""
        shuffle = random.Random(derive_seed(self._seed, "items", number)).shuffle
        batches: list[tuple[TrainingItem, ...]] = []
        for key in sorted(self._buckets):
            table = self._buckets[key][0].table
            items = self._buckets[key] * table.num_repeats
            shuffle(items)
            batches += [tuple(items[start : start + table.batch_size]) for start in range(0, len(items), table.batch_size)]
        shuffle(batches)
        return tuple(batches)


def read_batch(items: Sequence[TrainingItem], latent: LatentSpec, commands: CachingCommands = NO_COMMANDS) -> Batch:
    """Read and check the files of a batch and stack them: `latents` B C F H W; tensors of varying length stay lists.

    Raises CacheError naming the file, the reason and the command that mends it: damaged, made for other options, made from a source
    or a caption that has changed since, or not of the shape that the configuration asks for.
    """
    read = [_read_item(item, latent, commands) for item in items]
    first = read[0]
    for item, other in zip(items, read, strict=True):
        if other.tensors.keys() != first.tensors.keys():
            odd = ", ".join(sorted(other.tensors.keys() ^ first.tensors.keys()))
            in_text = other.text != first.text
            paths = (item.text_path, items[0].text_path) if in_text else (item.latent_path, items[0].latent_path)
            raise CacheError(
                f"{paths[0]} and {paths[1]} do not hold the same tensors: {odd}.\n"
                f"  Make them again with the same options: {commands.text if in_text else commands.latents}"
            )
    tensors = {name: _stacked(name, items, read, commands) for name in first.tensors}
    made_by = tuple(made for one in read for made in one.made_by)
    return Batch(tensors, tuple(one.caption for one in read), tuple(item.key for item in items), made_by)


@dataclass(frozen=True)
class _ReadItem:
    tensors: Mapping[str, Tensor]
    text: frozenset[str]  # names of those that come from the text cache
    variable: frozenset[str]
    caption: str
    made_by: tuple[MadeBy, ...]


def _training_item(
    table: DatasetTable, file_name: str, name: LatentName, tag: str, latent: LatentSpec, text_keys: frozenset[str]
) -> TrainingItem:
    bucket: tuple[int, ...] = name.size  # a video's name holds the size after bucketing
    if table.kind == "image":
        bucket = bucket_of(table, name.size, latent.pixel_step, table.cache_directory / file_name)
    elif name.section is not None:  # of clips of all lengths: what is stacked is equal
        bucket = (*name.size, section_frames(table.fp_latent_window_size, latent))
    elif name.span is not None:
        bucket = (*name.size, name.span[1])
    folder = table.cache_directory
    text_path = folder / text_file_name(name.stem, tag)
    return TrainingItem(Path(file_name).stem, folder / file_name, text_path, table, bucket, name.stem, text_keys=text_keys)


def _clip_of(name: LatentName) -> LatentName:
    """What all parts of a clip share."""
    return replace(name, section=None)


def _read_item(item: TrainingItem, latent: LatentSpec, commands: CachingCommands) -> _ReadItem:
    with _remedy(commands.latents):
        latents, media = _read_latents(item, latent)
    with _remedy(commands.text):
        text = read_entry(item.text_path)
        absent = sorted(item.text_keys - text.tensors.keys())
        if absent:
            maker = text.header.metadata.get("architecture", "")
            raise CacheError(
                f"{item.text_path}: it is only a part of a text cache, it has no {', '.join(absent)}"
                + (f" (made for {maker})" if maker else "")
            )
        texts = text_records(text.header)
        caption = _checked_caption(item, text, texts)
    tensors = {**latents.tensors, **text.tensors}
    made_by = [] if media is None else [MadeBy(item.latent_path, LATENTS_MADE, media.encoder)]
    made_by += [MadeBy(item.text_path, name, record.encoder) for name, record in texts.items()]
    return _ReadItem(tensors, frozenset(text.tensors), latents.variable | text.variable, caption, tuple(made_by))


def _read_latents(item: TrainingItem, latent: LatentSpec) -> tuple[Entry, LatentRecord | None]:
    entry = read_entry(item.latent_path)
    if "latents" not in entry.tensors:
        raise CacheError(f"{item.latent_path}: it has no latents, so it is no cache; move it out of the cache folder")
    record = latent_record(entry.header)
    if record is not None:
        verify_tensors(entry, record.crc32)
        _check_options(item, record, latent)
        folders = tuple(folder for folder in (item.table.directory, item.table.control_directory) if folder is not None)
        changed = _changed_file(folders, record.files)
        if changed is not None:
            raise CacheError(f"{item.latent_path}: {changed} has changed since it was encoded")
    width, height, frames = (*item.bucket, 1)[:3]
    expected = list(latent.shape(frames, height, width)[1:])
    found = list(entry.tensors["latents"].shape)
    if found != expected:
        raise CacheError(
            f"{item.latent_path}: its latents have the shape {_by(found)}, {item.table.name} asks for {_by(expected)}"
            f" ({frames} frames of {width}x{height})"
        )
    return entry, record


def _check_options(item: TrainingItem, record: LatentRecord, latent: LatentSpec) -> None:
    size, made_for = record.options.get("size"), record.options.get("bucket")
    if size is None or made_for is None:
        raise CacheError(f"{item.latent_path}: its record names no sizes")
    bucket = bucket_of(item.table, (size[0], size[1]), latent.pixel_step, item.latent_path)
    if tuple(made_for) != bucket:
        raise CacheError(f"{item.latent_path}: made for {_by(made_for)} pixels, {item.table.name} asks for {_by(bucket)}")
    rate = record.options.get("source_fps")
    if item.table.kind == "video" and rate != item.table.source_fps:
        raise CacheError(f"{item.latent_path}: made for source_fps = {rate}, {item.table.name} has {item.table.source_fps}")
    made_with = {key: value for key, value in record.options.items() if key in SECTION_DEFAULTS}
    changed = options_difference(made_with, item.table.section_keys, latent)
    if changed is not None:
        raise CacheError(f"{item.latent_path}: {changed} in {item.table.name}")
    if record.parts != item.parts:
        raise CacheError(f"{item.latent_path}: {record.parts} files of its clip belong together, {item.parts} are there")


def _others_in(table: DatasetTable) -> str:
    """Words about caches in a table's folder that are there and not for this: made for another model, or of another kind."""
    folder = table.cache_directory
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    other = next((name for name in names if _LATENTS_OF_ANY.search(name)), None)
    return "" if other is None else f" of {table.kind}s for this model: {other} is for another model, or of something else"


@functools.cache  # once in a process for each item: an edit during a run does not end it
def _changed_file(folders: tuple[Path, ...], files: tuple[FileIdentity, ...]) -> Path | None:
    """The first source that is still there and not what it was. Sources that are gone are no fault: training needs only caches."""
    for place, file in enumerate(files):
        path = folders[min(place, len(folders) - 1)] / file.name if folders else None
        if path is not None and path.exists() and not is_unchanged(file, path):
            return path
    return None


def _checked_caption(item: TrainingItem, text: Entry, records: Mapping[str, TextRecord]) -> str:
    for record in records.values():
        verify_tensors(text, record.crc32)
        if record.file is None or item.table.directory is None:
            continue
        now = _current_caption(item.table.directory / record.file.name)
        if now is not None and now != record.caption:
            raise CacheError(f"{item.text_path}: made from the caption {record.caption!r}, which now is {now!r}")
    stored = [record.caption for record in records.values()]
    return stored[0] if stored else text.header.metadata.get("caption1", "")


@functools.cache
def _current_caption(path: Path) -> str | None:
    return read_caption(path)


def _stacked(
    name: str, items: Sequence[TrainingItem], read: Sequence[_ReadItem], commands: CachingCommands
) -> Tensor | list[Tensor]:
    tensors = [one.tensors[name] for one in read]
    if name in read[0].variable:
        return tensors
    for item, tensor in zip(items, tensors, strict=True):
        if tensor.shape != tensors[0].shape:
            raise CacheError(
                f"{item.latent_path}: {name} has the shape {_by(tensor.shape)}, in {items[0].latent_path} it has"
                f" {_by(tensors[0].shape)}.\n  Make both again with the same options: {commands.latents}"
            )
    return torch.stack(tensors)


@contextlib.contextmanager
def _remedy(command: str) -> Iterator[None]:
    """Adds the command that mends it to every CacheError."""
    try:
        yield
    except CacheError as error:
        raise CacheError(f"{error}.\n  Make it again with: {command}") from error


def _stem_hash(stem: str) -> bytes:
    return hashlib.sha256(stem.encode("utf-8", "surrogateescape")).digest()


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))
