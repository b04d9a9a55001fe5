"""Find the sources of a dataset table, whatever its source is, and check what holds for all of them."""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from dataset.config import DatasetConfig, DatasetTable
from dataset.sources.captions import explain_captions, read_caption
from dataset.sources.cogvideox import list_cogvideox
from dataset.sources.faults import LISTED, Fault, list_faults, raise_faults
from dataset.sources.folders import describe_entries, find_folders_of_media, list_table_folder, media_suffixes
from dataset.sources.media_source import MediaSource, pause_collection
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
        sources = _list(table, captions, found)
    if not sources and not found:
        holds = describe_entries(table) if table.directory is not None else "has no lines"
        holds = f"holds no {table.kind}s" if table.tars is not None else holds
        raise DatasetError(f"{table.name}: {table.source} {holds}. Add some, or correct the path.")
    if table.directory is None:  # those of a folder are sorted
        sources.sort(key=lambda source: str(source.path))
    found += _same_stems(table, sources)
    found += _long_stems(table, sources)
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


def _list(table: DatasetTable, captions: bool, faults: list[Fault]) -> list[MediaSource]:
    if table.directory is not None:
        return list_table_folder(table, captions, faults)
    if table.jsonl_file is not None or table.table_file is not None:
        return list_rows(table, faults)
    if table.tars is not None:
        return list_tars(table, faults)
    if table.metadata_file is not None:
        return list_metadata(table, faults)
    return list_cogvideox(table, faults)


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


def unsearched_folders(config: DatasetConfig) -> list[str]:
    """Return a line for each folder inside a table's folder that holds its kind of media and is not read."""
    keys = ("directory", "cache_directory", "control_directory", "mask_directory", "download_directory")
    others = [getattr(table, key) for table in config.datasets for key in keys if getattr(table, key)]
    return [
        f"{folder}: its {table.kind}s are not used: folders inside a folder are not searched. Give it a table"
        for table in config.datasets
        for folder in find_folders_of_media(table, media_suffixes(table.kind), others)
    ]


def missing_captions(sources: Iterable[MediaSource]) -> list[str]:
    """Return one line per source without a caption: the file, and where its caption was searched."""
    return [f"{source.path}: {_where_caption(source)}" for source in sources if source.caption is None]


def require_captions(sources: Sequence[MediaSource]) -> None:
    """Raise DatasetError listing the sources without a caption."""
    kind = f"of {len(sources)} captions are missing; write them, then run again"
    raise_faults([Fault(kind, line) for line in missing_captions(sources)])


def warn_missing_captions(sources: Sequence[MediaSource]) -> None:
    """Warn about sources without a caption file: text caching will refuse them. No caption is read."""
    folders: dict[Path, frozenset[str]] = {}

    def has_file(source: MediaSource) -> bool:
        folder = source.table.directory
        if source.table.class_tokens is not None:
            return True
        if source.caption_path is None:
            return False
        if folder is not None and folder not in folders:
            folders[folder] = frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()
        if folder is not None and f"{source.stem}{source.table.caption_extension}" in folders[folder]:
            return True
        return path_exists(source.caption_path)

    missing = [source for source in sources if source.caption is None and not has_file(source)]
    if missing:
        logger.warning(
            "%d of %d have no caption, and text caching needs one for each. The first: %s",
            len(missing),
            len(sources),
            missing_captions(missing[:1])[0],
        )


def warn_unreadable_captions(sources: Sequence[MediaSource]) -> None:
    """Warn about caption files that text caching will refuse, before hours of encoding clips.

    At most MOST_READ are read.
    """
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


def _same_stems(table: DatasetTable, sources: Sequence[MediaSource]) -> list[Fault]:
    first: dict[str, MediaSource] = {}
    kind = f"pairs of {table.name} would share a cache file; rename one of each, or use two tables"
    clashes = []
    for source in sources:
        other = first.setdefault(os.path.normcase(source.stem), source)
        if other is not source:
            clashes.append(Fault(kind, f"{other.path} and {source.path}", source.stem))
    return clashes


def _long_stems(table: DatasetTable, sources: Sequence[MediaSource]) -> list[Fault]:
    kind = f"names of {table.name} are too long for the names of their caches; rename the files"
    return [
        Fault(kind, f"{source.path}: {size} bytes, at most {MOST_OF_STEM} leave room", source.stem)
        for source in sources
        if len(source.stem) * 4 > MOST_OF_STEM  # no character takes more bytes
        and (size := len(os.fsencode(source.stem))) > MOST_OF_STEM
    ]
