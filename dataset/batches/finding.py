"""Find cached items for training by their file names."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dataset.cache.files import (
    EMPTY,
    PART,
    SUFFIX,
    LatentName,
    empty_text_name,
    parse_latent_name,
    parse_more_text_name,
    part_name,
    text_file_name,
)
from dataset.cache.records import section_frames
from dataset.cache.store import open_store
from dataset.config import DatasetConfig, DatasetTable
from dataset.sources.decoding import bucket_of
from modules.contract.family import LatentSpec
from modules.errors import CacheError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachingCommands:
    """The two caching commands of a configuration, as a user types them."""

    latents: str = "the latent caching script"
    text: str = "the text caching script"


NO_COMMANDS = CachingCommands()

_LATENTS_OF_ANY = re.compile(r"_[0-9]+x[0-9]+_[a-z0-9]+\.safetensors$")  # names of latent caches, whoever's


@dataclass(frozen=True)
class ItemKind:
    """What all items of a table share beside it."""

    tag: str  # the family's cache_tag
    text_keys: frozenset[str] = frozenset()  # what a text file has to hold


@dataclass(frozen=True, slots=True)
class TrainingItem:
    """A pair of cache files.

    There may be millions: everything but `key` is shared between items or follows from it.
    """

    key: str  # name of the latent file without suffix
    stem_length: int  # of `key`, how much is the name of the source
    table: DatasetTable
    # width, height in pixels; for videos also frames: of a section, those that it decodes to
    bucket: tuple[int, ...]
    kind: ItemKind
    parts: int = 1  # how many files of the same clip are there
    captions: int = 1  # how many text files of the source are there, besides the empty prompt's

    @property
    def source_stem(self) -> str:
        """The name of the source without suffix."""
        return self.key[: self.stem_length]

    @property
    def latent_path(self) -> Path:
        return self.table.cache_directory / f"{self.key}{SUFFIX}"

    @property
    def text_path(self) -> Path:
        """The file of the first caption."""
        return self.caption_path(0)

    def caption_path(self, number: int) -> Path:
        """Return the text file of a caption, or of the empty prompt if `number` is EMPTY."""
        tag = self.kind.tag
        name = empty_text_name(tag) if number == EMPTY else text_file_name(self.source_stem, tag, number)
        return self.table.cache_directory / name


@dataclass(frozen=True)
class FoundItems:
    """Result of listing the cache folders."""

    items: tuple[TrainingItem, ...]  # sorted by table and file name
    missing_text: tuple[Path, ...]  # text files that are not there; their items are left out
    empty_tables: tuple[DatasetTable, ...]  # tables without any latent cache
    unfinished_text: tuple[Path, ...] = ()  # text files that some of the text encoders have yet to add to
    missing_empty: tuple[Path, ...] = ()  # of tables with caption_dropout_rate: files of the empty prompt


def find_items(
    config: DatasetConfig, cache_tag: str, latent: LatentSpec, text_keys: frozenset[str] = frozenset()
) -> FoundItems:
    """Find all items by the names of their files; none is opened.

    text_keys: what a whole text cache holds.
    """
    kind = ItemKind(cache_tag, text_keys)
    items: list[TrainingItem] = []
    missing: dict[Path, None] = {}
    unfinished: dict[Path, None] = {}
    empty: list[DatasetTable] = []
    missing_empty: list[Path] = []
    for table in config.datasets:
        names = frozenset(open_store(table).names())
        found = _table_items(table, names, kind, latent)
        if not found:
            empty.append(table)
        has_parts = any(name.endswith(PART) for name in names)
        if table.multi_caption:
            found = _with_captions(found, names)
        if table.caption_dropout_rate and found and empty_text_name(cache_tag) not in names:
            missing_empty.append(found[0].caption_path(EMPTY))
        unfinished |= dict.fromkeys(_unfinished_more(table, names, cache_tag)) if has_parts else {}
        for item in found:
            text = text_file_name(item.source_stem, cache_tag)
            if text in names:
                items.append(item)
            if has_parts and text + PART in names:
                unfinished[item.text_path] = None
            elif text not in names:
                missing[item.text_path] = None
    return FoundItems(
        tuple(items),
        tuple(missing),
        tuple(empty),
        tuple(path.with_name(part_name(path.name)) for path in unfinished),
        tuple(missing_empty),
    )


def _with_captions(items: Sequence[TrainingItem], names: Iterable[str]) -> list[TrainingItem]:
    """Count the text files of each source: the first, and further ones up to a gap in their numbers."""
    further: dict[str, set[int]] = {}
    for name in names:
        found = parse_more_text_name(name, items[0].kind.tag) if items else None
        if found is not None:
            further.setdefault(found[0], set()).add(found[1])
    counts = {
        stem: next(number for number in range(1, len(numbers) + 2) if number not in numbers)
        for stem, numbers in further.items()
    }
    return [replace(item, captions=counts.get(item.source_stem, 1)) for item in items]


def _unfinished_more(table: DatasetTable, names: Iterable[str], tag: str) -> list[Path]:
    """Return the unfinished files of further captions and of the empty prompt, if the table uses these."""
    finished = [name.removesuffix(PART) for name in names if name.endswith(PART)]
    return [
        table.cache_directory / name
        for name in finished
        if (table.multi_caption and parse_more_text_name(name, tag) is not None)
        or (table.caption_dropout_rate and name == empty_text_name(tag))
    ]


def _table_items(
    table: DatasetTable, names: Iterable[str], kind: ItemKind, latent: LatentSpec
) -> list[TrainingItem]:
    """The items of a table, sorted by file name. Names end alike: each end is read once."""
    end = f"_{kind.tag}{SUFFIX}"
    num_ends = 1 if table.kind == "image" else 2  # _0112x0080, _00000-017_0112x0080
    ends: dict[str, LatentName | None] = {}
    buckets: dict[str, tuple[int, ...]] = {}
    found: list[TrainingItem] = []
    has_sections = False
    for name in sorted(name for name in names if name.endswith(end) and not name.startswith(".")):
        key = name[: -len(SUFFIX)]
        stem_length = len(key) - len(kind.tag) - 1
        for _ in range(num_ends):
            stem_length = key.rfind("_", 0, max(stem_length, 0))
        if stem_length < 0:
            continue
        tail = key[stem_length:]
        if tail not in ends:
            ends[tail] = parse_latent_name(f"x{tail}{SUFFIX}", kind.tag, table.kind)
        what = ends[tail]
        if what is None:
            continue
        if tail not in buckets:
            buckets[tail] = _bucket(table, what, latent, table.cache_directory / name)
        has_sections = has_sections or what.section is not None
        found.append(TrainingItem(key, stem_length, table, buckets[tail], kind))
    return _with_parts(found, ends) if has_sections else found


def _with_parts(items: Sequence[TrainingItem], ends: Mapping[str, LatentName | None]) -> list[TrainingItem]:
    """Count the files of each clip: all that differ in their section alone."""

    def clip_of(item: TrainingItem) -> tuple[str, LatentName]:
        what = ends[item.key[item.stem_length :]]
        assert what is not None  # else it were no item
        return item.source_stem, replace(what, section=None)

    clips = [clip_of(item) for item in items]
    parts = Counter(clips)
    return [replace(item, parts=parts[clip]) for item, clip in zip(items, clips, strict=True)]


def require_items(found: FoundItems, commands: CachingCommands = NO_COMMANDS) -> tuple[TrainingItem, ...]:
    """Return the items to train on. Items without a text cache are left out with a warning.

    Raises CacheError with the caching commands if a table has no usable cache, or text caching has not
    finished.
    """
    if found.unfinished_text:
        raise CacheError(
            f"{len(found.unfinished_text)} text caches are unfinished, such as {found.unfinished_text[0]}: "
            "text caching was "
            f"stopped before all text encoders had written.\n  Finish it with: {commands.text}"
        )
    usable = {item.table.index for item in found.items}
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
    logger.info("%d items of %d dataset tables are cached", len(found.items), len(usable))
    return found.items


def split_validation(
    items: Sequence[TrainingItem], fraction: float
) -> tuple[tuple[TrainingItem, ...], tuple[TrainingItem, ...]]:
    """Split into (training, validation): tables marked `validation`, and a fraction of the others' sources.

    Sources are chosen by name only: all crops of a clip, in all tables, are on one side. A fraction above 0
    takes at least one source and leaves at least one.
    """
    if fraction == 0:
        return tuple(item for item in items if not item.table.validation), tuple(
            item for item in items if item.table.validation
        )
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


def _bucket(table: DatasetTable, name: LatentName, latent: LatentSpec, path: Path) -> tuple[int, ...]:
    if table.kind == "image":
        return bucket_of(table, name.size, latent.pixel_step, path)
    assert name.span is not None  # `parse_latent_name` has found one in a video's
    if name.section is not None:  # of clips of all lengths: what is stacked is equal
        return (*name.size, section_frames(table.fp_latent_window_size, latent))
    return (*name.size, name.span[1])  # a video's name holds the size after bucketing


def _others_in(table: DatasetTable) -> str:
    """Describe caches in a table's folder that cannot be used: for another model, or of another kind."""
    names = sorted(open_store(table).names())
    other = next((name for name in names if _LATENTS_OF_ANY.search(name)), None)
    return (
        ""
        if other is None
        else f" of {table.kind}s for this model: {other} is for another model, or of something else"
    )


def _stem_hash(stem: str) -> bytes:
    return hashlib.sha256(stem.encode("utf-8", "surrogateescape")).digest()


def _join_sides(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))
