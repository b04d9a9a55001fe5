"""The index of a cache folder, which saves training from listing sources to compare them with caches.

`index.jsonl` has a part for the latents and one for the text caches of each family that uses the folder. A
part has a line about its table and a line for each cache file: its source, its bucket, the checksum of its
record, and size and time of the files that it was made from. A part is used only while nothing has changed:
neither the settings of the table, nor the names in its folders, nor the names of the cache files. Otherwise,
and without an index, training lists the caches and compares them with their sources.

A cache file counts as compared only if its record still has the checksum in the index. Therefore an index
that was copied, or left behind by a killed run, is never trusted alone.
"""

import dataclasses
import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dataset import cache_files
from dataset.cache.latent_files import LatentFile
from dataset.cache.records import size_and_mtime
from dataset.config_keys import IGNORE
from dataset.table import DatasetTable
from modules.errors import MediaError
from modules.limits import MAX_INDEX_BYTES
from modules.text_files import parse_json, read_text
from protocols.data import AudioSpec, LatentSpec

NAME = "index.jsonl"
VERSION = 1
LATENTS, TEXTS = "latents", "texts"
MAX_FILES = 50_000  # files of a folder or a table; listing more is faster than reading an index of them
# errors if an index is missing, damaged, or was changed by another program
DAMAGES = (OSError, ValueError, KeyError, TypeError, AttributeError)
# table keys that do not affect caches, because they say how items are learned
_NOT_COMPARED = frozenset(
    {
        *("config_path", "index", "attributes", "num_repeats", "validation", "validation_split"),
        *("validation_seed", "is_reg", "caption_dropout_rate", "uses_empty_prompt", "prior_loss_weight"),
        *("network_multiplier", "min_timestep", "max_timestep", "discrete_flow_shift"),
        *("spatial_crop_region", "audio_cond_mask_directory", "has_conditioned_parts"),
        *("keyframe_guide_frame_idx", "keyframe_guide_extra_frame_idxs", "latent_idx_guide_frame_idx"),
        *("keyframe_guide_strength", "keyframe_guide_extra_strengths", "latent_idx_guide_strength"),
    }
)
# fields that `for_family` sets: they differ between a family's scripts, and text caches do not depend on them
_SET_BY_FAMILY = (
    *("finds_audio_by_name", "reads_row_references", "source_fps", "target_frames"),
    *("references", "clip_references", "reference_dropout_rate"),
)
# folders that are not listed: they have no sources, or their files are named in a list
_NOT_LISTED = frozenset({"cache_directory", "download_directory", "image_folder", "conditioning_directory"})


def has_audio_caches(table: DatasetTable, audio: AudioSpec) -> bool:
    """Return whether the audio of a table's clips is cached in separate files."""
    return not audio.is_in_latent_cache and table.kind == "video" and table.audio != IGNORE


def is_indexed(table: DatasetTable, audio: AudioSpec | None) -> bool:
    """Return whether a table's caches can be indexed.

    The table must be a folder or a JSONL list, cached in single files, without separate audio caches. Its
    text caches must not depend on reference images.
    """
    has_audio_files = audio is not None and has_audio_caches(table, audio)
    has_other_parts = has_audio_files or table.texts_see_references
    return table.format_keys is None and table.cache_format == "files" and not has_other_parts


def fingerprint_table(table: DatasetTable) -> str | None:
    """Return a hash of a table's settings and of the file names in the folders that it reads.

    Returns None if a folder cannot be listed or has more than `MAX_FILES` entries.
    """
    lines: list[str] = []
    try:
        for field in dataclasses.fields(table):
            value = getattr(table, field.name)
            # fields that are not set by __init__ follow from the other fields
            if field.name in _NOT_COMPARED or field.name in _SET_BY_FAMILY or not field.init:
                continue
            lines.append(f"{field.name} {value!r}")
            if isinstance(value, Path) and field.name not in _NOT_LISTED:
                lines += _list_path(value, only_files=field.name == "directory")
    except (OSError, ValueError):
        return None
    return _hash("\n".join(lines))


def fingerprint_latents(table: DatasetTable, latent: LatentSpec) -> str:
    """Return a hash of the latent space and of the table keys that the family fills in."""
    set_by_family = [getattr(table, name) for name in _SET_BY_FAMILY]
    # without `npz`, which contains sets, whose order in a text varies
    return _hash(repr((dataclasses.replace(latent, npz=None), set_by_family)))


def _hash(text: str) -> str:
    """Return a short hash of a text, which may contain file names that are not UTF-8."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def _list_path(path: Path, only_files: bool) -> list[str]:
    """Return a folder's sorted file names, except cache files; for a single file, its size and time."""
    if not path.is_dir():
        return [repr(size_and_mtime(path))]
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries if not only_files or entry.is_file()]
    if len(names) > MAX_FILES:
        raise ValueError(f"{len(names)} entries")
    listed = []
    for name in names:  # sources and caches may be in the same folder
        is_hidden = name.startswith(".")
        is_cache = cache_files.is_cache_name(name.removesuffix(cache_files.PART))
        if not is_hidden and not is_cache and name != NAME:
            listed.append(name)
    return sorted(listed)


class Index(NamedTuple):
    """Content of a table's index file; it is used if no file has changed since the caches were made."""

    items: list[tuple[LatentFile, int]]  # sorted by file name, each with the number of its captions
    compared: Mapping[str, str]  # checksum of the record, by name of a cache file
    left_out: list[str]  # paths of the sources that have no latents


def read_index(table: DatasetTable, names: Collection[str], tag: str, latent: LatentSpec) -> Index | None:
    """Return the index of a table's caches; None if there is none, or if anything has changed since.

    The cache files, the table's settings and the listed folders must be those of the index.

    Args:
        table: Table of the dataset file.
        names: Names of the files in the cache folder.
        tag: The family's cache_tag.
        latent: The family's latent space.
    """
    if NAME not in names:
        return None
    latent_files, text_files = split_names(names, tag)
    try:
        parts = read_parts(table.cache_directory)
        latents, texts = parts[tag, LATENTS], parts[tag, TEXTS]
        if [*latents.lines] != latent_files or [*texts.lines] != text_files:  # files were added or removed
            return None
        if latents.latent_fingerprint != fingerprint_latents(table, latent):
            return None
        if latents.table_fingerprint != texts.table_fingerprint:  # the table changed between the two commands
            return None
        if latents.table_fingerprint != fingerprint_table(table):  # last, because it lists folders
            return None
        if table.caches_empty_prompt and cache_files.empty_text_name(tag) not in names:
            return None
        items = _list_items(table, latents, texts)
        if not items:
            return None
        lines = [*latents.lines.values(), *texts.lines.values()]
        return Index(items, _find_unchanged(lines), [str(path) for path in latents.left_out])
    except DAMAGES:
        return None


def split_names(names: Collection[str], tag: str) -> tuple[list[str], list[str]]:
    """Return the sorted names of a family's latent caches, and of its text caches (also unfinished ones)."""
    latents = [name for name in names if name.endswith(f"_{tag}{cache_files.SUFFIX}")]
    texts = [name for name in names if f"{tag}_te." in name]
    return sorted(latents), sorted(texts)


def _list_items(
    table: DatasetTable, latents: "IndexPart", texts: "IndexPart"
) -> list[tuple[LatentFile, int]]:
    """Return each latent cache with its number of cached captions, up to the first missing one."""
    # A table without `multi_caption` uses only the first caption, number 0.
    numbers_by_source: dict[str, set[int]] = {}  # of captions
    for line in texts.lines.values():
        if line["number"] != cache_files.EMPTY:
            numbers_by_source.setdefault(line["source"], set()).add(line["number"])
    if not all(0 in numbers for numbers in numbers_by_source.values()):
        raise KeyError(0)
    items = []
    for line in latents.lines.values():
        numbers = numbers_by_source[line["source"]]  # KeyError if no caption is cached
        num_captions = 1
        while table.multi_caption and num_captions in numbers:
            num_captions += 1
        file = LatentFile(
            file=line["file"],
            stem=line["source"],
            bucket=tuple(map(int, line["bucket"])),
            num_parts=int(line["parts"]),
            references=tuple(map(int, line["references"])),
        )
        items.append((file, num_captions))
    return items


def _find_unchanged(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the cache files whose media files have not changed, each with the checksum of its record."""
    # `lines` are lines of the index, one for each cache file, with the size and time of its media files.
    current_stamps: dict[str, list[int] | None] = {}  # size and time by path; None: it cannot be read
    unchanged = {}
    for line in lines:
        if line["record"] is None:  # of unknown origin
            continue
        for path in line["sources"]:
            if path not in current_stamps:
                try:
                    current_stamps[path] = list(size_and_mtime(Path(path)))
                except (OSError, MediaError):
                    current_stamps[path] = None
        if all(current_stamps[path] == stamp for path, stamp in line["sources"].items()):
            unchanged[str(line["file"])] = str(line["record"])
    return unchanged


class IndexPart(NamedTuple):
    """One part of an index file: a family's latents or its text caches, with a line for each cache file."""

    table_fingerprint: str  # from `fingerprint_table`
    latent_fingerprint: str  # from `fingerprint_latents`; "" for texts
    left_out: list[str]  # paths of the sources that have no latents
    lines: dict[str, dict[str, Any]]  # by name of the cache file, in the order of the index


def read_parts(folder: Path) -> dict[tuple[str, str], IndexPart]:
    """Return the parts of an index file, keyed by cache_tag and LATENTS or TEXTS.

    Raises one of `DAMAGES` if the index cannot be read.
    """
    parts: dict[tuple[str, str], IndexPart] = {}
    part = IndexPart("", "", [], {})  # for lines before the first part, which are ignored
    for text in read_text(folder / NAME, MAX_INDEX_BYTES).splitlines():
        line = parse_json(text)
        if "table" in line:  # the first line of a part
            if line["version"] != VERSION:
                raise ValueError(f"version {line['version']}")
            part = IndexPart(line["table"], line["space"], line["left_out"], {})
            parts[line["tag"], line["part"]] = part
        else:
            part.lines[line["file"]] = line
    return parts
