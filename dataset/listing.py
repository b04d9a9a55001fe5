"""Find the sources of a dataset table of any data form, and check what all forms have in common.

The modules that read a form other than folders are imported when the first table needs them.
"""

import functools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dataset.forms.composing import get_source_format
from dataset.sources.captions import NOT_UTF8, describe_encoding, explain_captions, read_caption_file
from dataset.sources.folders import list_table_folder, log_lone_controls
from dataset.sources.layers import find_layer_errors
from dataset.sources.left_out import TableFolders, describe_entries
from dataset.sources.media_source import (
    LISTED,
    NO_REFERENCE,
    Fault,
    MediaSource,
    list_errors,
    pause_garbage_collection,
    raise_if_fatal,
)
from dataset.sources.missing import find_relative_path_hint
from dataset.sources.references import lack_references, limit_references
from dataset.table import DatasetConfig, DatasetTable
from modules.console import quiet
from modules.control_codes import escape_control_codes
from modules.errors import DatasetError
from protocols.rules import ReferenceMedium

logger = logging.getLogger(__name__)

MAX_READ = 20_000  # caption files that are read only for a warning
# bytes of a stem; the name of a cache adds span, size and family, and a temporary ending while it is written
MAX_STEM_BYTES = 190


def find_sources(
    table: DatasetTable, captions: bool = True, faults: list[Fault] | None = None
) -> list[MediaSource]:
    """Return all media files of a table, sorted by path.

    The caption of a file without a caption is None. Whether files that a JSONL list names exist is not
    checked.

    Args:
        table: Table of the dataset file.
        captions: Whether caption files are read; latents do not need them.
        faults: List to which faults are added instead of raising an error; then all usable files are
            returned.

    Raises:
        DatasetError: If a folder or list is missing or empty. Otherwise with all faults: unreadable captions,
            malformed lines, missing or misnamed control media, and files with equal stems, which would
            share a cache file.
    """
    table_faults: list[Fault] = []
    with pause_garbage_collection():
        sources = _list_sources(table, captions, table_faults)
    if not sources and not table_faults:
        raise DatasetError(_explain_empty(table))
    if table.source.directory is None:  # sources of a folder are sorted already
        sources.sort(key=lambda source: str(source.path))
    if table.references.rules is not None:
        sources = limit_references(table, sources)
    _check_stems(table, sources, table_faults)
    if table.source.multiple_target:
        table_faults += find_layer_errors(table, sources)
    if faults is not None:
        faults += table_faults
    elif table_faults:
        raise_if_fatal(table_faults)
        warn_skipped(table_faults)  # no error is fatal: each only skips a file
    return sources


def _explain_empty(table: DatasetTable) -> str:
    """Return the error for a table without any images or clips: what its folder or list has instead."""
    contents = get_source_format(table).empty.format(kind=table.kind)
    hint = ""
    if table.source.directory is not None:
        contents = describe_entries(table)
        hint = find_relative_path_hint(table.source.directory, table.config_path)
    return f"{table.name}: {table.source.path} {contents}. Add some, or correct the path.{hint}"


def _list_sources(table: DatasetTable, captions: bool, faults: list[Fault]) -> list[MediaSource]:
    """List the items of a table, with their companion files from other folders."""
    if table.source.directory is None:
        return get_source_format(table).list_sources(table, faults)
    sources = list_table_folder(table, captions, faults)
    if table.source.worse_directory is not None:
        from dataset.sources.pairs import add_rejected  # few tables have pairs

        sources = add_rejected(table, sources, faults)
    if table.references.has_guides:
        from dataset.sources.guides import add_guides  # few tables have guides

        sources = add_guides(table, sources, faults)
    if table.references.reference_audio_directory is not None:
        from dataset.sources.reference_audio import add_reference_audio  # few tables have them

        sources = add_reference_audio(table, sources, faults)
    if table.references.reference_directory is None and table.references.control_mask_directory is None:
        return sources
    from dataset.sources.companions import add_companions  # few tables have companions

    return add_companions(table, sources, faults)


def _check_stems(table: DatasetTable, sources: Sequence[MediaSource], faults: list[Fault]) -> None:
    """Add a fault for each duplicate stem, and for each stem that is too long for a cache file's name."""
    first_by_stem: dict[str, MediaSource] = {}
    shared_cache = f"pairs of {table.name} would share a cache file; rename one of each, or use two tables"
    repeated_row = f"rows of {table.name} repeat another one and would share a cache file; take them out"
    too_long = f"names of {table.name} are too long for the names of their caches; rename the files"
    for source in sources:
        first_source = first_by_stem.setdefault(os.path.normcase(source.stem), source)
        if first_source is not source and first_source.path == source.path:
            faults.append(Fault(repeated_row, str(source.path), source.stem))
        elif first_source is not source:
            faults.append(Fault(shared_cache, f"{first_source.path} and {source.path}", source.stem))
        # fast path: no character takes more than four bytes, so that the name need not be encoded
        if len(source.stem) * 4 <= MAX_STEM_BYTES:
            continue
        size_bytes = len(os.fsencode(source.stem))
        if size_bytes > MAX_STEM_BYTES:
            text = f"{source.path}: {size_bytes} bytes, at most {MAX_STEM_BYTES} leave room"
            faults.append(Fault(too_long, text, source.stem))


class CompanionCounts(NamedTuple):
    """Companion files of an image or clip: how many there are, besides the caption."""

    num_controls: int
    num_references: int
    has_mask: bool
    has_reference_audio: bool
    reference_media: tuple[ReferenceMedium, ...]  # reference media that its row names
    further_text: str | None  # `FURTHER_TEXT` of its row


@functools.lru_cache(maxsize=64)
def companions_now(table: DatasetTable) -> Mapping[str, CompanionCounts]:
    """List a table again, and return how many companion files each of its media files has, by stem.

    The mapping is empty if the media cannot be listed, because training needs only the caches. Results are
    cached, because every item of a table asks for them.
    """
    try:
        with quiet():  # warnings about the dataset were shown when it was cached
            sources = find_sources(table, captions=False, faults=[])
    except DatasetError:
        return {}
    return {
        source.stem: CompanionCounts(
            num_controls=len(source.control),
            num_references=len(source.references),
            has_mask=source.mask is not None,
            has_reference_audio=source.reference_audio is not None,
            reference_media=source.row_references,
            further_text=source.further_text,
        )
        for source in sources
    }


def warn_skipped(faults: Sequence[Fault]) -> None:
    """Log a warning about the faults that do not stop the run; the first LISTED ones are shown in full."""
    lines = list_errors([error for error in faults if not error.is_fatal], LISTED)
    if lines:
        logger.warning("%s", "\n".join(lines))


def find_all_sources(
    config: DatasetConfig,
    captions: bool = True,
    skipped: list[tuple[DatasetTable, Fault]] | None = None,
    folders: TableFolders | None = None,
) -> list[MediaSource]:
    """Return the media files of all tables, in order, and log warnings about them.

    1. List each table; collect faults that end the run, and skip files with other faults.
    2. Raise an error with all faults that end the run.
    3. Warn about captions in old encodings, control images without an image, and files that are not read.

    Args:
        config: The dataset file.
        captions: Whether caption files are read.
        skipped: List to which unreadable parts are added, each with its table; None logs them as a warning.
        folders: Folders of the complete configuration, if `config` has only some of its tables. Files that
            other tables read are not reported as left out.

    Raises:
        DatasetError: With the faults of all tables.
    """
    sources: list[MediaSource] = []
    table_errors = []
    for table in config.datasets:
        faults: list[Fault] = []  # fatal faults end the run; a file with another fault is only skipped
        try:
            sources += find_sources(table, captions, faults)
            if faults:
                raise_if_fatal(faults)
        except DatasetError as error:
            table_errors.append(str(error))
        if skipped is None:
            warn_skipped(faults)
        else:
            skipped += [(table, fault) for fault in faults if not fault.is_fatal]
    if table_errors:
        raise DatasetError("\n".join(table_errors))
    if any(source.caption_encoding is not None for source in sources):
        encoding_warnings = list_errors(find_encodings(sources), LISTED)
        logger.warning("%s", escape_control_codes("\n".join(encoding_warnings)))
    if any(table.references.control_directory is not None for table in config.datasets):
        log_lone_controls(sources)
    folders = folders or TableFolders(config)
    warnings = [folders.left_out_files(table) for table in config.datasets]
    warnings += folders.left_out_folders(config.datasets)
    for warning in filter(None, warnings):
        logger.warning("%s", escape_control_codes(warning))
    return sources


def find_encodings(sources: Iterable[MediaSource]) -> list[Fault]:
    """Return a warning for each caption file in an encoding other than UTF-8."""
    warnings = []
    for source in sources:
        if source.caption_encoding is not None:
            path = source.caption_path or source.path
            text = describe_encoding(path, source.caption or "", source.caption_encoding)
            warnings.append(Fault(NOT_UTF8, text, source.stem))
    return warnings


def warn_unused(config: DatasetConfig, sources: Sequence[MediaSource]) -> None:
    """Log warnings about unread columns, and about an image-edit model without any reference images."""
    unread: list[Fault] = []
    for table in config.datasets:
        if get_source_format(table).has_columns:
            from dataset.forms.unread import find_unused  # only with lists or tables

            unread += find_unused(table)
    if unread:
        logger.warning("%s", escape_control_codes("\n".join(list_errors(unread, LISTED))))
    if any(table.references.rules for table in config.datasets) and lack_references(config.datasets, sources):
        logger.warning("%s", NO_REFERENCE)


def missing_captions(sources: Iterable[MediaSource]) -> list[str]:
    """Return a line for each media file without a caption, with the place where it was looked for."""
    return [
        f"{source.path}: {_describe_missing_caption(source)}" for source in sources if source.caption is None
    ]


def _describe_missing_caption(source: MediaSource) -> str:
    """Return a line that says where a media file's caption was looked for."""
    table = source.table
    if source.caption_path is not None:
        hint = ", and no class_tokens in its table" if table.group is not None else ""
        return f"no {source.caption_path.name} next to it{hint}"
    return get_source_format(table).describe_caption_place(table)


def require_captions(sources: Sequence[MediaSource]) -> None:
    """Raise a DatasetError that lists the media files without a caption; call this only if there are any."""
    kind = f"of {len(sources)} captions are missing; write them, then run again"
    raise_if_fatal([Fault(kind, line) for line in missing_captions(sources)])


def warn_captions(sources: Sequence[MediaSource]) -> None:
    """Warn about captions that are missing or cannot be used, before hours of encoding clips.

    Text caching will reject them later. At most MAX_READ files are read.
    """
    missing: list[MediaSource] = []
    unreadable: dict[Path, str] = {}  # why each caption file cannot be used
    without_caption = [source for source in sources if source.caption is None]
    for source in without_caption[:MAX_READ]:
        path = source.caption_path
        try:
            file = None if path is None else read_caption_file(path)
        except DatasetError as error:
            assert path is not None
            unreadable[path] = str(error)
            continue
        if file is None and source.table.captions.class_tokens is None:
            missing.append(source)
    if missing:
        num_sources = len(sources)
        logger.warning(
            "%s%d of %d have no caption, and text caching needs one for each. The first: %s",
            "at least " if num_sources > MAX_READ else "",
            len(missing),
            num_sources,
            missing_captions(missing[:1])[0],
        )
    if unreadable:
        explanations = explain_captions(list(unreadable), list(unreadable.values()))
        lines = "\n  ".join(explanations[:LISTED])
        logger.warning(
            "%d captions cannot be used, which text caching rejects:\n  %s", len(unreadable), lines
        )
