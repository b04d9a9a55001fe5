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
    mark_space,
    names_of,
    read_parts,
)
from dataset.cache.latent_files import depends_on_references, list_latent_files
from dataset.cache.records import CHECK_KEY, latent_record, source_folders, stamp_of, text_records
from dataset.cache.store import SingleFiles
from dataset.sources.media_source import FileIdentity
from dataset.table import CLIP, MEDIA, DatasetTable
from modules.atomic_write import write_text
from modules.errors import CacheError, OutputError
from modules.file_locks import only_one
from protocols.data import LatentSpec


class _Known(NamedTuple):
    """Facts about a cache file from the previous index, so that the file need not be opened again."""

    stamp: list[int]  # size and time of the cache file
    record: str
    sources: dict[str, list[int]]


def write_index(
    table: DatasetTable,
    part: str,
    tag: str,
    latent: LatentSpec,
    mark: str | None,
    right: Collection[str],
    left_out: Mapping[str, str],
) -> None:
    """Write one part of a table's index, replacing the previous part.

    If the process is killed, the earlier index remains. Another process that writes at the same time waits.
    If the disk is full, there will be no index, and training lists the caches instead.

    Args:
        table: Table of the dataset.
        part: LATENTS or TEXTS.
        tag: The family's cache_tag.
        latent: The family's latent space.
        mark: Fingerprint of the table, taken before its sources were listed.
        right: Names of the cache files that this run made, or compared with their sources.
        left_out: Paths of the sources that could not be cached, by stem.
    """
    store = SingleFiles(table.cache_directory)
    path = store.folder / NAME
    latent_files, text_files = names_of(store.names(), tag)
    if mark is None or len(latent_files) + len(text_files) > MAX_FILES or not store.folder.is_dir():
        return
    with contextlib.suppress(OSError, OutputError), only_one(store.folder / f".{NAME}.lock"):
        parts: dict[tuple[str, str], IndexPart] = {}
        before: dict[str, _Known] = {}
        with contextlib.suppress(*DAMAGES):
            parts = read_parts(store.folder)
            for name, line in parts[tag, part].lines.items():
                if line["record"] is not None:
                    before[name] = _Known(line["stamp"], line["record"], line["sources"])
        if part == LATENTS:
            files = list_latent_files(
                table,
                latent_files,
                tag=tag,
                latent=latent,
                store=store,
                reads_references=depends_on_references(table),
            )
            lines: list[dict[str, Any]] = [
                {
                    "file": file.file,
                    "source": file.stem,
                    "bucket": file.bucket,
                    "parts": file.parts,
                    "references": file.references,
                }
                for file in files
            ]
            space = mark_space(table, latent)
        else:
            lines = [*_list_texts(text_files, tag)]
            space = ""
        cached = {line["source"] for line in lines}
        paths = [left_out[stem] for stem in left_out.keys() - cached]
        parts[tag, part] = IndexPart(mark, space, left_out=sorted(paths), lines={})
        for line in lines:
            name = line["file"]
            line["stamp"] = list(stamp_of(store.folder / name))
            known = before.get(name)
            if name not in right:  # such as a cache of a source that is gone: nothing is known of its origin
                line |= {"record": None, "sources": {}}
            elif (
                known is not None and known.stamp == line["stamp"]
            ):  # unchanged: its record is not read again
                line |= {"record": known.record, "sources": known.sources}
            else:
                line |= _describe_origin(table, store, name, part)
            parts[tag, part].lines[name] = line
        write_text(path, "".join(_as_lines(parts)))


def _list_texts(files: Sequence[str], tag: str) -> Iterator[dict[str, Any]]:
    """Yield a record for each text cache of a model: its file, its source, and the number of its caption."""
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
    """Return the checksum of a cache's record, and size and time of the files that it was made from."""
    nothing: dict[str, Any] = {"record": None, "sources": {}}
    made_from: list[tuple[Path | None, FileIdentity]] = []
    try:
        entry = store.read(file, is_full=False)
        if part == LATENTS:
            record = latent_record(entry)
            if record is not None:
                made_from += zip(source_folders(table, record), record.files, strict=False)
        else:
            for text in text_records(entry).values():
                if text.references or {CLIP, MEDIA} & text.settings.keys():
                    return nothing  # its encoder saw more than the caption
                if text.file is not None:
                    made_from.append((table.directory, text.file))
    except CacheError:
        return nothing
    sources = {}
    for folder, identity in made_from:
        if folder is not None:
            sources[str(folder / identity.name)] = [identity.size_bytes, identity.mtime_ns]
    return {"record": entry.metadata.get(CHECK_KEY), "sources": sources}


def _as_lines(parts: Mapping[tuple[str, str], IndexPart]) -> Iterator[str]:
    for (tag, name), part in sorted(parts.items(), key=lambda pair: pair[0]):
        head = {
            "version": VERSION,
            "tag": tag,
            "part": name,
            "table": part.mark,
            "space": part.space,
            "left_out": part.left_out,
        }
        for line in (head, *part.lines.values()):
            yield json.dumps(line) + "\n"
