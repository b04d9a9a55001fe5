"""Find the sources of a dataset table, whatever its source is, and check what holds for all of them."""

import logging
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from dataset.config import DatasetConfig, DatasetTable
from dataset.sources.captions import explain_captions, read_caption
from dataset.sources.cogvideox import list_cogvideox
from dataset.sources.folders import describe_entries, list_table_folder, unsearched_folders
from dataset.sources.media_source import (
    LISTED,
    Fault,
    MediaSource,
    list_faults,
    pause_collection,
    raise_faults,
)
from dataset.sources.tables import list_metadata, list_rows
from dataset.sources.tars import list_tars
from modules.errors import DatasetError
from modules.paths import path_exists

logger = logging.getLogger(__name__)

MOST_READ = 20_000  # captions, only to warn
MOST_OF_STEM = 190  # bytes; a cache adds span, size and family, and while it is written a temporary ending


def find_sources(
    table: DatasetTable, captions: bool = True, faults: list[Fault] | None = None
) -> list[MediaSource]:
    """Return all sources of a table, sorted by path.

    captions=False reads no caption files: latents do not need them. A missing caption is None. It is not
    checked whether files named by a JSONL list exist. Raises DatasetError if a folder or list is missing or
    empty, and with all faults if captions cannot be read, lines are malformed, control media are missing or
    misnamed, or two sources have the same stem and would share a cache file. faults: a list that takes the
    faults instead; then all usable sources are returned.
    """
    found: list[Fault] = []
    with pause_collection():
        if table.directory is not None:
            sources = list_table_folder(table, captions, found)
        elif table.tars is not None:
            sources = list_tars(table, found)
        elif table.metadata_file is not None:
            sources = list_metadata(table, found)
        elif table.cogvideox_root is not None:
            sources = list_cogvideox(table, found)
        else:
            sources = list_rows(table, found)
    if not sources and not found:
        holds = describe_entries(table) if table.directory is not None else "has no lines"
        holds = f"holds no {table.kind}s" if table.tars is not None else holds
        raise DatasetError(f"{table.name}: {table.source} {holds}. Add some, or correct the path.")
    if table.directory is None:  # those of a folder are sorted
        sources.sort(key=lambda source: str(source.path))
    found += _bad_stems(table, sources)
    if faults is None:
        raise_faults(found)
        warn_skipped(found)
    else:
        faults += found
    return sources


def warn_skipped(faults: Sequence[Fault]) -> None:
    """Warn about unreadable parts that are left out, such as the end of a tar that is cut short."""
    lines = list_faults([fault for fault in faults if not fault.ends_run], LISTED)
    if lines:
        logger.warning("%s", "\n".join(lines))


def find_all_sources(
    config: DatasetConfig, captions: bool = True, skipped: list[tuple[DatasetTable, Fault]] | None = None
) -> list[MediaSource]:
    """Return the sources of all tables, in order. Raises DatasetError with the faults of all tables.

    skipped: takes unreadable parts that are left out, with their table; without it there is a warning.
    """
    sources: list[MediaSource] = []
    problems = []
    for table in config.datasets:
        faults: list[Fault] = []
        try:
            sources += find_sources(table, captions, faults)
            raise_faults(faults)
        except DatasetError as error:
            problems.append(str(error))
        if skipped is None:
            warn_skipped(faults)
        else:
            skipped += [(table, fault) for fault in faults if not fault.ends_run]
    if problems:
        raise DatasetError("\n".join(problems))
    for line in unsearched_folders(config):
        logger.warning("%s", line)
    return sources


def missing_captions(sources: Iterable[MediaSource]) -> list[str]:
    """Return one line per source without a caption: the file, and where its caption was searched."""
    return [f"{source.path}: {_where_caption(source)}" for source in sources if source.caption is None]


def require_captions(sources: Sequence[MediaSource]) -> None:
    """Raise DatasetError listing the sources without a caption."""
    kind = f"of {len(sources)} captions are missing; write them, then run again"
    raise_faults([Fault(kind, line) for line in missing_captions(sources)])


def warn_captions(sources: Sequence[MediaSource]) -> None:
    """Warn about captions that are missing or cannot be used, which text caching will refuse, before hours of
    encoding clips. At most MOST_READ are read.
    """
    folders = {source.table.directory for source in sources}
    names: dict[Path | None, Collection[str]] = {
        folder: frozenset(os.listdir(folder)) for folder in folders if folder is not None and folder.is_dir()
    }
    missing = []
    for source in sources:
        table, path = source.table, source.caption_path
        if source.caption is None and table.class_tokens is None:
            is_listed = f"{source.stem}{table.caption_extension}" in names.get(table.directory, ())
            if path is None or not (is_listed or path_exists(path)):
                missing.append(source)
    if missing:
        logger.warning(
            "%d of %d have no caption, and text caching needs one for each. The first: %s",
            len(missing),
            len(sources),
            missing_captions(missing[:1])[0],
        )
    bad: dict[Path, str] = {}
    paths = [source.caption_path for source in sources if source.caption is None and source.caption_path]
    for path in paths[:MOST_READ]:
        try:
            read_caption(path)
        except DatasetError as error:
            bad[path] = str(error)
    if bad:
        lines = "\n  ".join(explain_captions(list(bad), list(bad.values()))[:LISTED])
        logger.warning("%d captions cannot be used, which text caching refuses:\n  %s", len(bad), lines)


def _where_caption(source: MediaSource) -> str:
    if source.caption_path is not None:
        hint = ", and no class_tokens in its table" if source.table.group is not None else ""
        return f"no {source.caption_path.name} beside it{hint}"
    if source.table.metadata_file:
        return 'neither "caption" nor "tags" in its entry'
    if source.table.jsonl_file:
        return 'no "caption" in its line'
    if source.table.table_file:
        return f'no "{source.table.caption_column or "caption"}" in its row'
    if source.table.tars:
        return "no text file and no caption in a .json of the same name in the tar"
    return "no caption_extension in its table, such as .txt"


def _bad_stems(table: DatasetTable, sources: Sequence[MediaSource]) -> list[Fault]:
    """Return the faults of stems that are equal, or too long for the names of caches."""
    first: dict[str, MediaSource] = {}
    same = f"pairs of {table.name} would share a cache file; rename one of each, or use two tables"
    long = f"names of {table.name} are too long for the names of their caches; rename the files"
    faults = []
    for source in sources:
        other = first.setdefault(os.path.normcase(source.stem), source)
        if other is not source:
            faults.append(Fault(same, f"{other.path} and {source.path}", source.stem))
        # no character takes more than four bytes
        if len(source.stem) * 4 > MOST_OF_STEM and (size := len(os.fsencode(source.stem))) > MOST_OF_STEM:
            text = f"{source.path}: {size} bytes, at most {MOST_OF_STEM} leave room"
            faults.append(Fault(long, text, source.stem))
    return faults
