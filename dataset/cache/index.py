"""The index of a cache folder, which saves training from listing sources to compare them with caches.

`index.jsonl` has a part for the latents and one for the text caches of each family that uses the folder. A
part has a line about its table and a line for each cache file: its source, its bucket, the checksum of its
record, and size and time of the files that it was made from. A part is used only while nothing has changed:
neither the settings of the table, nor the names in its folders, nor the names of the cache files. Otherwise,
and without an index, training lists the caches and compares them with their sources.

A cache file counts as compared only if its record still has the checksum in the index. Therefore an index
that was copied, or left behind by a killed run, is never trusted alone.

Which fields of a table make a part stale is said where they are declared: see `dataset.config_keys.Indexed`.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dataset import cache_files
from dataset.cache.latent_files import LatentFile, list_latent_files
from dataset.cache.records import CHECK_KEY, latent_record, size_and_mtime, source_folders, text_records
from dataset.cache.store import SingleFiles
from dataset.config_keys import IGNORE, Indexed
from dataset.sources.media_source import FileIdentity
from dataset.table import CLIP, MEDIA, DatasetTable, list_fields
from modules.atomic_write import write_text
from modules.errors import CacheError, MediaError, OutputError
from modules.file_locks import only_one
from modules.limits import MAX_INDEX_BYTES
from modules.text_files import parse_json, read_text
from protocols.data import AudioSpec, LatentSpec

NAME = "index.jsonl"
VERSION = 1
LATENTS, TEXTS = "latents", "texts"
# fields of a table in the order of their lines in fingerprints of this version; other fields follow
FIELD_ORDER = (
    *("kind", "directory", "jsonl_file", "resolution", "caption_extension"),
    *("trigger_word", "caption_prefix", "caption_suffix", "class_tokens", "multi_caption", "batch_size"),
    *("enable_bucket", "bucket_no_upscale", "cache_format", "cache_directory", "format_keys"),
    *("control_column", "caption_column", "allow_urls", "download_directory", "control_directory"),
    *("reference_directory", "control_mask_directory", "worse_directory", "mask_directory"),
    *("audio", "audio_directory", "reference_audio_directory", "alpha_mask"),
    *("keyframe_guide_directory", "keyframe_guide_extra_directories", "latent_idx_guide_directory"),
    *("frame_extraction", "frame_stride", "frame_sample", "max_frames", "target_fps"),
    *("fp_latent_window_size", "fp_1f_clean_indices", "fp_1f_target_index", "fp_1f_no_post"),
    *("no_resize_control", "control_resolution", "multiple_target", "is_audio_only"),
    *("has_precomputed_latents", "excludes_animations", "audio_from_option", "has_guides"),
    *("reads_listed_controls", "group", "subset", "rule", "changes", "augmentation"),
    *("image_folder", "conditioning_directory"),
)
# names of fields in fingerprints of this version
NAMES_IN_FINGERPRINT = {"rule": "buckets", "changes": "caption_changes"}
MAX_FILES = 50_000  # files of a folder or a table; listing more is faster than reading an index of them
# errors if an index is missing, damaged, or was changed by another program
DAMAGES = (OSError, ValueError, KeyError, TypeError, AttributeError)


def has_audio_caches(table: DatasetTable, audio: AudioSpec) -> bool:
    """Return whether the audio of a table's clips is cached in separate files."""
    return not audio.is_in_latent_cache and table.kind == "video" and table.source.audio != IGNORE


def is_indexed(table: DatasetTable, audio: AudioSpec | None) -> bool:
    """Return whether a table's caches can be indexed.

    The table must be a folder or a JSONL list, cached in single files, without separate audio caches. Its
    text caches must not depend on reference images.
    """
    has_audio_files = audio is not None and has_audio_caches(table, audio)
    has_other_parts = has_audio_files or table.references.are_seen_by_texts
    return table.source.format_keys is None and table.cache_format == "files" and not has_other_parts


def fingerprint_table(table: DatasetTable) -> str | None:
    """Return a hash of a table's settings and of the file names in the folders that it reads.

    Returns None if a folder cannot be listed or has more than `MAX_FILES` entries.
    """
    lines: list[str] = []
    try:
        for field in sorted(list_fields(), key=_find_position):
            indexed = field.metadata.get("indexed", Indexed.LATENTS_AND_TEXTS)
            if indexed in (Indexed.LATENTS_ONLY, Indexed.NEITHER):
                continue
            value = table.value_of(field.name)
            lines.append(f"{NAMES_IN_FINGERPRINT.get(field.name, field.name)} {value!r}")
            if isinstance(value, Path) and indexed is not Indexed.PATH_ONLY:
                lines += _list_path(value, only_files=field.name == "directory")
    except (OSError, ValueError):
        return None
    return _hash("\n".join(lines))


def _find_position(field: dataclasses.Field[Any]) -> int:
    """Return the position of a field's line in a fingerprint."""
    return FIELD_ORDER.index(field.name) if field.name in FIELD_ORDER else len(FIELD_ORDER)


def _fingerprint_latents(table: DatasetTable, latent: LatentSpec) -> str:
    """Return a hash of the latent space and of the table keys that the family fills in."""
    # without `npz`, which contains sets, whose order in a text varies
    return _hash(repr((dataclasses.replace(latent, npz=None), table.family_settings)))


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
    latent_files, text_files = _split_names(names, tag)
    try:
        parts = _read_parts(table.cache_directory)
        latents, texts = parts[tag, LATENTS], parts[tag, TEXTS]
        if [*latents.lines] != latent_files or [*texts.lines] != text_files:  # files were added or removed
            return None
        if latents.latent_fingerprint != _fingerprint_latents(table, latent):
            return None
        if latents.table_fingerprint != texts.table_fingerprint:  # the table changed between the two commands
            return None
        if latents.table_fingerprint != fingerprint_table(table):  # last, because it lists folders
            return None
        if table.captions.caches_empty_prompt and cache_files.empty_text_name(tag) not in names:
            return None
        items = _list_items(table, latents, texts)
        if not items:
            return None
        lines = [*latents.lines.values(), *texts.lines.values()]
        return Index(items, _find_unchanged(lines), [str(path) for path in latents.left_out])
    except DAMAGES:
        return None


def _split_names(names: Collection[str], tag: str) -> tuple[list[str], list[str]]:
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
        while table.captions.multi_caption and num_captions in numbers:
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


def _read_parts(folder: Path) -> dict[tuple[str, str], IndexPart]:
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


def _write_parts(folder: Path, parts: Mapping[tuple[str, str], IndexPart]) -> None:
    """Write an index file of these parts, as `_read_parts` reads it."""
    lines = []
    for (tag, name), part in sorted(parts.items(), key=lambda pair: pair[0]):
        head = {
            "version": VERSION,
            "tag": tag,
            "part": name,
            "table": part.table_fingerprint,
            "space": part.latent_fingerprint,
            "left_out": part.left_out,
        }
        lines += [json.dumps(line) + "\n" for line in (head, *part.lines.values())]
    write_text(folder / NAME, "".join(lines))


def write_index(
    table: DatasetTable,
    part: str,
    tag: str,
    latent: LatentSpec,
    table_fingerprint: str | None,
    valid: Collection[str],
    left_out: Mapping[str, str],
) -> None:
    """Write the LATENTS or TEXTS part of a table's index file, with a line for each cache file.

    If the process is killed, the previous index remains. Another process that writes at the same time waits.
    If the index cannot be written, there is none, and training lists the caches instead.

    Args:
        table: Table of the dataset file.
        part: LATENTS or TEXTS.
        tag: The family's cache_tag.
        latent: The family's latent space.
        table_fingerprint: Hash of the table, taken before its media were listed; None: write no index.
        valid: Names of the cache files that this run made, or compared with their sources.
        left_out: Paths of the media files that could not be cached, by stem.
    """
    store = SingleFiles(table.cache_directory)
    latent_files, text_files = _split_names(store.names(), tag)
    if table_fingerprint is None or len(latent_files) + len(text_files) > MAX_FILES:
        return
    if not store.folder.is_dir():
        return
    with contextlib.suppress(OSError, OutputError), only_one(store.folder / f".{NAME}.lock"):
        parts: dict[tuple[str, str], IndexPart] = {}
        with contextlib.suppress(*DAMAGES):
            parts = _read_parts(store.folder)
        previous_lines = parts[tag, part].lines if (tag, part) in parts else {}
        lines: list[dict[str, Any]]  # one for each cache file; its origin is added below
        latent_fingerprint = ""
        if part == LATENTS:
            lines = [
                {
                    "file": file.file,
                    "source": file.stem,
                    "bucket": file.bucket,
                    "parts": file.num_parts,
                    "references": file.references,
                }
                for file in list_latent_files(table, latent_files, tag=tag, latent=latent, store=store)
            ]
            latent_fingerprint = _fingerprint_latents(table, latent)
        else:
            lines = list(_describe_texts(text_files, tag))
        for line in lines:
            name = line["file"]
            line["stamp"] = list(size_and_mtime(store.folder / name))
            previous = previous_lines.get(name, {})
            is_known = previous.get("record") is not None and "sources" in previous
            if name not in valid:  # for example, the cache of a deleted source: its origin is unknown
                line |= {"record": None, "sources": {}}
            elif is_known and previous.get("stamp") == line["stamp"]:  # the cache file has not changed
                line |= {"record": previous["record"], "sources": previous["sources"]}
            else:
                line |= _describe_origin(table, store, name, part)
        cached_stems = {line["source"] for line in lines}
        parts[tag, part] = IndexPart(
            table_fingerprint,
            latent_fingerprint,
            left_out=sorted(left_out[stem] for stem in left_out.keys() - cached_stems),
            lines={line["file"]: line for line in lines},
        )
        _write_parts(store.folder, parts)


def _describe_texts(files: Sequence[str], tag: str) -> Iterator[dict[str, Any]]:
    """Yield an index line for each text cache file; the file's origin is added later."""
    for file in files:
        stem = cache_files.parse_text_name(file, tag)
        if stem is not None:
            yield {"file": file, "source": stem, "number": 0}
            continue
        further = cache_files.parse_more_text_name(file, tag)
        if further is not None:
            source, number = further
            yield {"file": file, "source": source, "number": number}
        elif cache_files.is_empty_text_name(file, tag):
            yield {"file": file, "source": "", "number": cache_files.EMPTY}


def _describe_origin(table: DatasetTable, store: SingleFiles, file: str, part: str) -> dict[str, Any]:
    """Return the fields of a cache file's index line that say what it was made from."""
    # These are the checksum of its record, and size and time of the media files. If they cannot be determined
    # here, training reads the cache to compare it with its media. `part` is LATENTS or TEXTS.
    unknown_origin: dict[str, Any] = {"record": None, "sources": {}}
    source_files: list[tuple[Path | None, FileIdentity]] = []  # folder and identity of each file
    try:
        entry = store.read(file, is_full=False)
        if part == LATENTS:
            record = latent_record(entry)
            if record is not None:
                # not strict: records of early versions have no files
                source_files += zip(source_folders(table, record), record.files, strict=False)
        else:
            for text_record in text_records(entry).values():
                saw_media = bool({CLIP, MEDIA} & text_record.settings.keys())
                if text_record.references or saw_media:  # the record does not say in which folders they are
                    return unknown_origin
                if text_record.file is not None:
                    source_files.append((table.source.directory, text_record.file))
    except CacheError:
        return unknown_origin
    sources = {}
    for folder, identity in source_files:
        if folder is not None:
            sources[str(folder / identity.name)] = [identity.size_bytes, identity.mtime_ns]
    return {"record": entry.metadata.get(CHECK_KEY), "sources": sources}
