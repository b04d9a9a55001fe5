"""What the names of a table's latent caches say about its training items."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dataset import cache_files
from dataset.cache_files import CacheStore, LatentName
from dataset.sources.frames import find_bucket
from dataset.table import DatasetTable
from modules.errors import CacheError
from protocols.data import (
    CONTROL,
    IMAGE_LATENTS,
    KEYFRAME_LATENTS,
    LATENT_GUIDE,
    REFERENCE_LATENTS,
    LatentSpec,
)


class LatentFile(NamedTuple):
    """A latent cache file, as its name describes it; only reference sizes are read from the header."""

    file: str
    stem: str  # stem of the source
    # width, height in pixels; for videos also frames (of a section: the frames that it decodes to)
    bucket: tuple[int, ...]
    num_parts: int  # number of files of the same clip
    references: tuple[int, ...]  # see `reference_sizes`


def list_latent_files(
    table: DatasetTable,
    files: Collection[str],
    tag: str,
    latent: LatentSpec,
    store: CacheStore | None,
) -> Iterator[LatentFile]:
    """Yield the latent caches of a table's kind ("image" or "video") among these file names, in order.

    Args:
        table: Table of the dataset file.
        files: Sorted names of the files in the table's cache folder.
        tag: The family's cache_tag.
        latent: The family's latent space.
        store: Store of the table, which reads headers; None if latents are encoded during training.
    """
    num_sections: Counter[tuple[str, LatentName]] = Counter()
    if table.kind == "video":
        num_sections = _count_sections(files, tag)
    # `latent_names` yields the same object for all names with equal endings, so each bucket is found once
    buckets: dict[int, tuple[int, ...]] = {}  # by id of the parsed ending
    shared_tuples: dict[tuple[int, ...], tuple[int, ...]] = {}  # one object for equal sizes, to save memory
    for file_name, stem, ending in cache_files.latent_names(files, tag, table.kind):
        bucket = buckets.get(id(ending))
        if bucket is None:
            bucket = _find_bucket(table, ending, latent, table.cache_directory / file_name)
            buckets[id(ending)] = bucket
        num_files = 1
        if num_sections:
            item = stem, replace(ending, section=None)
            num_files = num_sections[item] or 1  # 0: the clip has no sections, and is in one file
        sizes: tuple[int, ...] = ()
        # items can share a batch only if their references have equal sizes
        if (
            store is not None
            and table.learning.batch_size > 1
            and (table.references.rules or table.references.clip_rules)
        ):
            sizes = reference_sizes(store, file_name)
            sizes = shared_tuples.setdefault(sizes, sizes)
        yield LatentFile(file_name, stem, bucket, num_parts=num_files, references=sizes)


def _count_sections(files: Collection[str], tag: str) -> Counter[tuple[str, LatentName]]:
    """Return the number of latent files (sections) per clip; their names differ only in the section."""
    num_sections: Counter[tuple[str, LatentName]] = Counter()
    for _, stem, ending in cache_files.latent_names(files, tag, "video"):
        if ending.section is not None:
            num_sections[stem, replace(ending, section=None)] += 1
    return num_sections


def _find_bucket(table: DatasetTable, name: LatentName, latent: LatentSpec, path: Path) -> tuple[int, ...]:
    """Return the bucket of a latent cache file, derived from its name."""
    # Names of images contain the original size, names of clips the size after bucketing.
    if table.kind == "image":
        return find_bucket(table, name.size, latent.pixel_step, path)
    if name.section is not None:  # sections of clips of any length share a batch: all have this length
        return (*name.size, latent.count_frames(table.buckets.fp_latent_window_size))
    assert name.span is not None
    _, num_frames = name.span
    return (*name.size, num_frames)


def reference_sizes(store: CacheStore, name: str) -> tuple[int, ...]:
    """Return width and height of each control, reference and guide latent in a cache file, as a flat tuple.

    Items whose references differ in number or size cannot share a batch. Mirrored references are omitted,
    because they have the sizes of the originals.

    Returns:
        Alternating widths and heights; () if the file is damaged, which is reported when a batch reads it.
    """
    try:
        shapes = store.read(name, is_full=False).shapes
    except CacheError:
        return ()
    sizes: list[int] = []
    for tensor, shape in sorted(shapes.items()):
        key = cache_files.tensor_key(tensor)
        if not key.startswith((CONTROL, REFERENCE_LATENTS, IMAGE_LATENTS, KEYFRAME_LATENTS, LATENT_GUIDE)):
            continue
        if key.endswith(cache_files.FLIPPED):
            continue
        # several frames of references count as one tall image: only equal sizes matter, not their values
        num_frames = 1 if key.startswith(CONTROL) else shape[-3]
        sizes += [shape[-1], shape[-2] * num_frames]
    return tuple(sizes)
