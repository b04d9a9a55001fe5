"""Write the index of a cache folder: see `dataset.cache.index`."""

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dataset import cache_files
from dataset.cache.index import (
    DAMAGES,
    LATENTS,
    MAX_FILES,
    NAME,
    VERSION,
    IndexPart,
    fingerprint_latents,
    read_parts,
    split_names,
)
from dataset.cache.latent_files import list_latent_files
from dataset.cache.records import CHECK_KEY, latent_record, size_and_mtime, source_folders, text_records
from dataset.cache.store import SingleFiles
from dataset.sources.media_source import FileIdentity
from dataset.table import CLIP, MEDIA, DatasetTable
from modules.atomic_write import write_text
from modules.errors import CacheError, OutputError
from modules.file_locks import only_one
from protocols.data import LatentSpec


class _IndexedFile(NamedTuple):
    """Facts about a cache file from the previous index, so that the file need not be opened again."""

    stamp: list[int]  # size and time of the cache file
    record: str  # checksum of its record
    sources: dict[str, list[int]]  # size and time of the files that it was made from, by path


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
    latent_files, text_files = split_names(store.names(), tag)
    is_small = len(latent_files) + len(text_files) <= MAX_FILES
    if table_fingerprint is None or not is_small or not store.folder.is_dir():
        return
    with contextlib.suppress(OSError, OutputError), only_one(store.folder / f".{NAME}.lock"):
        parts, known_origins = _read_previous(store.folder, tag, part)
        if part == LATENTS:
            lines = _list_latents(table, latent_files, tag, latent=latent, store=store)
            latent_fingerprint = fingerprint_latents(table, latent)
        else:
            lines = list(_list_texts(text_files, tag))
            latent_fingerprint = ""
        cached_stems = {line["source"] for line in lines}
        uncached_paths = sorted(left_out[stem] for stem in left_out.keys() - cached_stems)
        parts[tag, part] = IndexPart(table_fingerprint, latent_fingerprint, left_out=uncached_paths, lines={})
        for line in lines:
            name = line["file"]
            line["stamp"] = list(size_and_mtime(store.folder / name))
            origin = known_origins.get(name)
            if name not in valid:  # for example, the cache of a deleted source: its origin is unknown
                line |= {"record": None, "sources": {}}
            elif origin is not None and origin.stamp == line["stamp"]:  # the cache file has not changed
                line |= {"record": origin.record, "sources": origin.sources}
            else:
                line |= _describe_origin(table, store, name, part)
            parts[tag, part].lines[name] = line
        write_text(store.folder / NAME, "".join(_as_lines(parts)))


def _read_previous(
    folder: Path, tag: str, part: str
) -> tuple[dict[tuple[str, str], IndexPart], dict[str, _IndexedFile]]:
    """Return the parts of the previous index, and the known origins in one of them by cache file."""
    # Both are empty if there is no index or it is damaged; then the origin of each file is read again.
    parts: dict[tuple[str, str], IndexPart] = {}
    known_origins: dict[str, _IndexedFile] = {}
    with contextlib.suppress(*DAMAGES):
        parts = read_parts(folder)
        for name, line in parts[tag, part].lines.items():
            if line["record"] is not None:
                known_origins[name] = _IndexedFile(line["stamp"], line["record"], line["sources"])
    return parts, known_origins


def _list_latents(
    table: DatasetTable, names: Sequence[str], tag: str, latent: LatentSpec, store: SingleFiles
) -> list[dict[str, Any]]:
    """Return an index line for each latent cache file; the files' origins are added later."""
    files = list_latent_files(table, names, tag=tag, latent=latent, store=store)
    return [
        {
            "file": file.file,
            "source": file.stem,
            "bucket": file.bucket,
            "parts": file.num_parts,
            "references": file.references,
        }
        for file in files
    ]


def _list_texts(files: Sequence[str], tag: str) -> Iterator[dict[str, Any]]:
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
                    source_files.append((table.directory, text_record.file))
    except CacheError:
        return unknown_origin
    sources = {}
    for folder, identity in source_files:
        if folder is not None:
            sources[str(folder / identity.name)] = [identity.size_bytes, identity.mtime_ns]
    return {"record": entry.metadata.get(CHECK_KEY), "sources": sources}


def _as_lines(parts: Mapping[tuple[str, str], IndexPart]) -> Iterator[str]:
    """Yield the lines of an index file; `parts` are keyed by cache_tag and LATENTS or TEXTS."""
    for (tag, name), part in sorted(parts.items(), key=lambda pair: pair[0]):
        head = {
            "version": VERSION,
            "tag": tag,
            "part": name,
            "table": part.table_fingerprint,
            "space": part.latent_fingerprint,
            "left_out": part.left_out,
        }
        for line in (head, *part.lines.values()):
            yield json.dumps(line) + "\n"
