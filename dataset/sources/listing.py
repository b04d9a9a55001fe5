"""Find the sources of a dataset table, whatever its source is, and check what holds for all of them.

The modules that read lists, tables and tars are imported when the first table needs them.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from dataset.config import DatasetConfig, DatasetTable
from dataset.sources.captions import NOT_UTF8, describe_encoding, explain_captions, read_caption
from dataset.sources.folders import list_table_folder, tell_lone_controls
from dataset.sources.left_out import describe_entries, left_out_files, left_out_folders
from dataset.sources.media_source import (
    LISTED,
    NO_REFERENCE,
    Fault,
    MediaSource,
    list_faults,
    pause_collection,
    raise_faults,
)
from dataset.sources.references import lack_references, limit_references
from modules.console import quiet
from modules.control_codes import escape_control_codes
from modules.errors import DatasetError

logger = logging.getLogger(__name__)

MOST_READ = 20_000  # captions, only to warn
MOST_OF_STEM = 190  # bytes; a cache adds span, size and family, and while it is written a temporary ending


def _hint_of_start(table: DatasetTable) -> str:
    folder, path = table.config_path.absolute().parent, table.directory
    if path is None or path.is_absolute() or folder == Path.cwd() or not (folder / path).is_dir():
        return ""
    return f" Relative paths start in the current folder: to start beside the file, first `cd {folder}`."


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
            if not table.directory.is_dir() and (hint := _hint_of_start(table)):
                raise DatasetError(f"{table.name}: there is no such folder from here.{hint}")
            sources = list_table_folder(table, captions, found)
            if table.reference_directory is not None or table.control_mask_directory is not None:
                from dataset.sources.companions import add_companions

                sources = add_companions(table, sources, found)
        else:
            sources = _lister(table)(table, found)
    if not sources and not found:
        holds = describe_entries(table) if table.directory is not None else "has no lines"
        holds = f"holds no {table.kind}s" if table.tars is not None else holds
        hint = _hint_of_start(table)
        raise DatasetError(f"{table.name}: {table.source} {holds}. Add some, or correct the path.{hint}")
    if table.directory is None:  # those of a folder are sorted
        sources.sort(key=lambda source: str(source.path))
    sources = sources if table.references is None else limit_references(table, sources)
    first: dict[str, MediaSource] = {}  # by stem: the beginning of the names of caches
    same = f"pairs of {table.name} would share a cache file; rename one of each, or use two tables"
    twice = f"rows of {table.name} repeat another one and would share a cache file; take them out"
    long = f"names of {table.name} are too long for the names of their caches; rename the files"
    for source in sources:
        other = first.setdefault(os.path.normcase(source.stem), source)
        if other is not source and other.path == source.path:
            found.append(Fault(twice, str(source.path), source.stem))
        elif other is not source:
            found.append(Fault(same, f"{other.path} and {source.path}", source.stem))
        # no character takes more than four bytes
        if len(source.stem) * 4 > MOST_OF_STEM and (size := len(os.fsencode(source.stem))) > MOST_OF_STEM:
            text = f"{source.path}: {size} bytes, at most {MOST_OF_STEM} leave room"
            found.append(Fault(long, text, source.stem))
    if faults is None and found:
        raise_faults(found)
        warn_skipped(found)
    elif faults is not None:
        faults += found
    return sources


def _lister(table: DatasetTable) -> Callable[[DatasetTable, list[Fault]], list[MediaSource]]:
    """Return the function that lists a table whose source is not a folder."""
    if table.tars is not None:
        from dataset.sources.tars import list_tars

        return list_tars
    if table.cogvideox_root is not None:
        from dataset.sources.cogvideox import list_cogvideox

        return list_cogvideox
    from dataset.sources.tables import list_metadata, list_rows

    return list_rows if table.metadata_file is None else list_metadata


@functools.lru_cache(maxsize=64)
def companions_now(table: DatasetTable) -> Mapping[str, tuple[int, int, bool]]:
    """Return stem -> (number of control media, number of references, has a mask), for the current sources of
    a table. Empty if the sources are gone: training needs only the caches.
    """
    try:
        with quiet():  # the dataset was described when it was cached
            sources = find_sources(table, captions=False, faults=[])
    except DatasetError:
        return {}
    return {one.stem: (len(one.control), len(one.references), one.mask is not None) for one in sources}


def warn_skipped(faults: Sequence[Fault]) -> None:
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
            if faults:
                raise_faults(faults)
        except DatasetError as error:
            problems.append(str(error))
        if skipped is None:
            warn_skipped(faults)
        else:
            skipped += [(table, fault) for fault in faults if not fault.ends_run]
    if problems:
        raise DatasetError("\n".join(problems))
    if remarks := list_faults(find_encodings(sources), LISTED):
        logger.warning("%s", escape_control_codes("\n".join(remarks)))
    tell_lone_controls(sources)
    files = filter(None, (left_out_files(config, table) for table in config.datasets))
    for line in (*files, *left_out_folders(config)):
        logger.warning("%s", escape_control_codes(line))
    return sources


def find_encodings(sources: Iterable[MediaSource]) -> list[Fault]:
    """Return a remark for each caption that was read in another encoding than UTF-8."""
    return [
        Fault(
            NOT_UTF8,
            describe_encoding(one.caption_path or one.path, one.caption or "", one.caption_encoding),
            one.stem,
        )
        for one in sources
        if one.caption_encoding is not None
    ]


def warn_unused(config: DatasetConfig, sources: Sequence[MediaSource]) -> None:
    """Warn about columns that nothing reads, and if a model that edits gets no reference picture at all."""
    unread: list[Fault] = []
    if listed := [table for table in config.datasets if table.directory is None]:
        from dataset.sources.unread import find_unread

        unread = [fault for table in listed for fault in find_unread(table)]
    if unread:
        logger.warning("%s", escape_control_codes("\n".join(list_faults(unread, LISTED))))
    if any(table.references for table in config.datasets) and lack_references(config.datasets, sources):
        logger.warning("%s", NO_REFERENCE)


def missing_captions(sources: Iterable[MediaSource]) -> list[str]:
    """Return one line per source without a caption: the file, and where a caption was looked for."""
    lines = []
    for source in sources:
        table, where = source.table, "no caption_extension in its table, such as .txt"
        if source.caption is not None:
            continue
        if source.caption_path is not None:
            hint = ", and no class_tokens in its table" if table.group is not None else ""
            where = f"no {source.caption_path.name} beside it{hint}"
        elif table.metadata_file:
            where = 'neither "caption" nor "tags" in its entry'
        elif table.jsonl_file:
            where = 'no "caption" in its line'
        elif table.table_file:
            where = f'no "{table.caption_column or "caption"}" in its row'
        elif table.tars:
            where = "no text file and no caption in a .json of the same name in the tar"
        lines.append(f"{source.path}: {where}")
    return lines


def require_captions(sources: Sequence[MediaSource]) -> None:
    """Raise DatasetError listing the sources without a caption."""
    kind = f"of {len(sources)} captions are missing; write them, then run again"
    raise_faults([Fault(kind, line) for line in missing_captions(sources)])


def warn_captions(sources: Sequence[MediaSource]) -> None:
    """Warn about captions that are missing or cannot be used, which text caching will refuse, before hours of
    encoding clips. Of files at most MOST_READ are looked at.
    """
    missing: list[MediaSource] = []
    bad: dict[Path, str] = {}
    for source in [one for one in sources if one.caption is None][:MOST_READ]:
        path = source.caption_path
        try:
            if (path is None or read_caption(path) is None) and source.table.class_tokens is None:
                missing.append(source)
        except DatasetError as error:
            bad |= {} if path is None else {path: str(error)}
    if missing:
        logger.warning(
            "%s%d of %d have no caption, and text caching needs one for each. The first: %s",
            "at least " if len(sources) > MOST_READ else "",
            len(missing),
            len(sources),
            missing_captions(missing[:1])[0],
        )
    if bad:
        lines = "\n  ".join(explain_captions(list(bad), list(bad.values()))[:LISTED])
        logger.warning("%d captions cannot be used, which text caching refuses:\n  %s", len(bad), lines)
