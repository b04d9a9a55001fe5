"""Find cached items for training by their file names."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dataset.cache.files import LatentName, parse_latent_name, part_path, text_file_name
from dataset.cache.records import section_frames
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

_LATENTS_OF_ANY = re.compile(r"_[0-9]+x[0-9]+_[a-z0-9]+\.safetensors$")  # latent caches of any family


@dataclass(frozen=True)
class TrainingItem:
    """An item to train on: a latent file and a text file."""

    key: str  # name of the latent file without suffix
    latent_path: Path
    text_path: Path
    table: DatasetTable
    # width, height in pixels; for videos also frames: of a section, those that it decodes to
    bucket: tuple[int, ...]
    source_stem: str
    parts: int = 1  # number of files of the same clip
    text_keys: frozenset[str] = frozenset()  # keys that the text file must have


@dataclass(frozen=True)
class FoundItems:
    """Result of listing the cache folders."""

    items: tuple[TrainingItem, ...]  # sorted by table and file name
    missing_text: tuple[Path, ...]  # missing text files; their items are left out
    empty_tables: tuple[DatasetTable, ...]  # tables without any latent cache
    unfinished_text: tuple[Path, ...] = ()  # text files without the output of all text encoders


def find_items(
    config: DatasetConfig, cache_tag: str, latent: LatentSpec, text_keys: frozenset[str] = frozenset()
) -> FoundItems:
    """Find all items by file names, without opening files. text_keys: keys of a complete text cache."""
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
            replace(
                _training_item(table, name, what, cache_tag, latent, text_keys), parts=parts[_clip_of(what)]
            )
            for name, what in parsed
            if what is not None
        ]
        if not found:
            empty.append(table)
        items += [item for item in found if item.text_path.name in names]
        unfinished |= {
            part_path(item.text_path): None for item in found if part_path(item.text_path).name in names
        }
        missing |= {
            item.text_path: None
            for item in found
            if item.text_path.name not in names and part_path(item.text_path) not in unfinished
        }
    return FoundItems(tuple(items), tuple(missing), tuple(empty), tuple(unfinished))


def require_items(found: FoundItems, commands: CachingCommands = NO_COMMANDS) -> tuple[TrainingItem, ...]:
    """Return the items to train on. Items without a text cache are left out with a warning.

    Raises CacheError with the caching commands if a table has no usable cache, or text caching has not
    finished.
    """
    if found.unfinished_text:
        raise CacheError(
            f"{len(found.unfinished_text)} text caches are unfinished, such as {found.unfinished_text[0]}: "
            "text caching was stopped before all text encoders had written.\n"
            f"  Finish it with: {commands.text}"
        )
    usable = {item.table.index for item in found.items}
    untexted = sorted({path.parent for path in found.missing_text})
    faults = [
        f"{table.name}: no latent cache in {table.cache_directory}{_others_in(table)}"
        for table in found.empty_tables
    ]
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


def split_validation(
    items: Sequence[TrainingItem], fraction: float
) -> tuple[tuple[TrainingItem, ...], tuple[TrainingItem, ...]]:
    """Split into (training, validation): tables marked `validation`, and a fraction of the others' sources.

    Sources are chosen by name only: all crops of a clip, in all tables, are on one side. A fraction above 0
    takes at least one source and leaves at least one.
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


def _training_item(
    table: DatasetTable,
    file_name: str,
    name: LatentName,
    tag: str,
    latent: LatentSpec,
    text_keys: frozenset[str],
) -> TrainingItem:
    bucket: tuple[int, ...] = name.size  # a video's name has the size after bucketing
    if table.kind == "image":
        bucket = bucket_of(table, name.size, latent.pixel_step, table.cache_directory / file_name)
    elif name.section is not None:  # sections have one size, whatever the clip's length
        bucket = (*name.size, section_frames(table.fp_latent_window_size, latent))
    elif name.span is not None:
        bucket = (*name.size, name.span[1])
    folder = table.cache_directory
    text_path = folder / text_file_name(name.stem, tag)
    return TrainingItem(
        Path(file_name).stem, folder / file_name, text_path, table, bucket, name.stem, text_keys=text_keys
    )


def _clip_of(name: LatentName) -> LatentName:
    """Return the part of the name that all parts of a clip share."""
    return replace(name, section=None)


def _others_in(table: DatasetTable) -> str:
    """Describe caches in a table's folder that cannot be used: for another model, or of another kind."""
    folder = table.cache_directory
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    other = next((name for name in names if _LATENTS_OF_ANY.search(name)), None)
    return (
        ""
        if other is None
        else f" of {table.kind}s for this model: {other} is for another model, or of something else"
    )


def _stem_hash(stem: str) -> bytes:
    return hashlib.sha256(stem.encode("utf-8", "surrogateescape")).digest()


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))
