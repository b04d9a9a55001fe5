"""Find the files of a dataset table: images or clips, captions and control media, by folder or JSONL list."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dataset.config import DatasetConfig, DatasetTable
from dataset.sources.animations import animation_suffixes, find_animations
from dataset.sources.captions import (
    captions_in,
    explain_captions,
    not_utf8,
    read_caption,
)
from dataset.sources.cogvideox import list_cogvideox
from dataset.sources.control import ControlFolder, list_entries
from dataset.sources.faults import LISTED, Fault, list_faults, raise_faults
from dataset.sources.left_out import explain_entries, find_folders_of_media, leave_out_results
from dataset.sources.masks import find_masks
from dataset.sources.media_source import MediaSource, pause_collection
from dataset.sources.metadata_files import list_metadata
from dataset.sources.rows import RowReader, first_and_more
from dataset.sources.tables import list_table
from dataset.sources.tars import list_tars
from modules.errors import DatasetError
from modules.media.animations import ANIMATION_SUFFIXES
from modules.media.reading import VIDEO_SUFFIXES, image_suffixes
from modules.paths import path_exists
from modules.text_files import bad_character, parse_json, read_lines

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
        holds = _describe_entries(table) if table.directory is not None else "has no lines"
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
        return _from_folder(table, captions, faults)
    if table.jsonl_file is not None:
        return _from_list(table, faults)
    if table.table_file is not None:
        return list_table(table, faults)
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
        for folder in find_folders_of_media(table, _suffixes(table), others)
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


def _suffixes(table: DatasetTable) -> frozenset[str]:
    """Return the suffixes of a folder's files. For those of `find_animations` the content counts too."""
    return _suffixes_of(table.kind)


def _suffixes_of(kind: str) -> frozenset[str]:
    return image_suffixes() if kind == "image" else VIDEO_SUFFIXES


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


# --- folders
# ------------------------------------------------------------------------------------------------------------


def _from_folder(table: DatasetTable, captions: bool, faults: list[Fault]) -> list[MediaSource]:
    assert table.directory is not None
    there = leave_out_results(table, _media_in(table, faults))
    bad_names = {path for path in there if not path.name.isascii() and bad_character(path.name)}
    paths = [path for path in there if path not in bad_names] if bad_names else there
    kind = f"names of {table.name} are not UTF-8, so that no cache can name them; rename the files"
    faults += [Fault(kind, ascii(str(path))) for path in there if path in bad_names]
    controls = _folder_controls(table, paths, faults)
    masks = _folder_masks(table, paths, faults)
    sources = []
    bad: dict[Path, tuple[str, str]] = {}  # caption file -> stem and message
    for path, control in zip(paths, controls, strict=True):
        stem = path.stem
        text_path = table.directory / (stem + table.caption_extension) if table.caption_extension else None
        first: str | None = None
        more: tuple[str, ...] = ()
        if captions and text_path is not None:
            try:
                text = read_caption(text_path)
                text = table.class_tokens if text is None else text
                first, more = first_and_more(None if text is None else captions_in(text, table), text_path)
            except DatasetError as error:
                bad[text_path] = stem, str(error)
        mask = masks.get(path) if masks else None
        sources.append(MediaSource(path, stem, first, text_path, control, table, more, mask))
    messages = explain_captions(list(bad), [message for _, message in bad.values()])
    kind = "have a caption that cannot be used"
    faults += [Fault(kind, text, stem) for text, (stem, _) in zip(messages, bad.values(), strict=True)]
    return sources


def _media_in(table: DatasetTable, faults: list[Fault]) -> list[Path]:
    """Return a table folder's images or clips, sorted; add those that are no regular file."""
    assert table.directory is not None
    suffixes, animated = _suffixes(table), animation_suffixes(table)
    key = f"{table.kind}_directory" if table.group is None else "image_dir"
    entries = list_entries(table.directory, f"{table.name}: {key}")
    ends = [_suffix_of(entry.name) for entry in entries]
    there: list[Path] = []
    no_files: list[Path] = []
    for entry, end in zip(entries, ends, strict=True):
        if end in suffixes:
            (there if is_file(entry) else no_files).append(table.directory / entry.name)
    faults += explain_entries(table, no_files)
    if ANIMATION_SUFFIXES.isdisjoint(ends):
        return there
    others = [
        table.directory / entry.name for entry, end in zip(entries, ends, strict=True) if end in animated
    ]
    return sorted([*there, *find_animations(table, others, there)], key=str)


def _suffix_of(name: str) -> str:
    """Return the suffix in lower case."""
    place = name.rfind(".")
    return name[place:].lower() if 0 < place < len(name) - 1 else ""


def is_file(entry: "os.DirEntry[str]") -> bool:
    """Return whether an entry is a file, from the listing alone."""
    try:
        return entry.is_file()
    except OSError:
        return False


def _folder_masks(table: DatasetTable, paths: Sequence[Path], faults: list[Fault]) -> Mapping[Path, Path]:
    try:
        return find_masks(table, paths)
    except DatasetError as error:
        faults.append(Fault(f"problems with the masks of {table.name}", str(error)))
        return {}


def _describe_entries(table: DatasetTable) -> str:
    """Describe the content of a folder without usable files."""
    assert table.directory is not None
    suffixes = [path.suffix.lower() for path in table.directory.iterdir() if path.is_file()]
    other = "image" if table.kind == "video" else "video"
    there = sum(suffix in _suffixes_of(other) for suffix in suffixes)
    if there:
        return f"has no {table.kind}s but {there} {other}s, for which the key is {other}_directory"
    folders = [path.name for path in table.directory.iterdir() if path.is_dir()]
    found = ", ".join(
        f"{count} {suffix or 'without suffix'}" for suffix, count in Counter(suffixes).most_common(3)
    )
    what = f"it has {found}" if found else f"only folders, such as {folders[0]}" if folders else "it is empty"
    kinds = ", ".join(sorted(_suffixes(table) | animation_suffixes(table)))
    return f"has no {table.kind}s ({what}; folders inside it are not searched; the suffixes are {kinds})"


def _folder_controls(
    table: DatasetTable, paths: Sequence[Path], faults: list[Fault]
) -> list[tuple[Path, ...]]:
    if table.control_directory is None:
        return [()] * len(paths)
    folder = ControlFolder(table.control_directory, {path.stem for path in paths})
    controls: list[tuple[Path, ...]] = []
    kind = f"problems with the control media of {table.name}"
    for path in paths:
        try:
            controls.append(
                folder.for_image(path.stem, table.control_count)
                if table.kind == "image"
                else (folder.for_video(path),)
            )
        except DatasetError as error:
            controls.append(())
            faults.append(Fault(kind, str(error), path.stem))
    if table.kind == "image" and all(controls):
        _tell_unused(
            table, [unused for path in paths for unused in folder.beyond(path.stem, table.control_count)]
        )
    return controls


def _tell_unused(table: DatasetTable, unused: Sequence[Path]) -> None:
    if unused:
        logger.warning(
            "%s: %d control images are ignored, such as %s, because each image takes %d. For FramePack, "
            "fp_1f_clean_indices gives the index of each one that is used.",
            table.name,
            len(unused),
            unused[0],
            table.control_count,
        )


# --- JSONL lists
# ------------------------------------------------------------------------------------------------------------


def _from_list(table: DatasetTable, faults: list[Fault]) -> list[MediaSource]:
    path = table.jsonl_file
    assert path is not None
    rows = RowReader(table, path, f"{table.kind}_path", is_list=True)
    sources = []
    number = 0
    try:
        for number, line in enumerate(read_lines(path), 1):
            try:
                source = rows.read(
                    _parse_line(table, f"{path}, line {number}", line), f"{path}, line {number}"
                )
                sources += [] if source is None else [source]
            except DatasetError as error:
                faults.append(Fault(f"lines of {path} cannot be used", f"{str(error).rstrip('.')}."))
    except UnicodeDecodeError:
        raise not_utf8(path, number) from None
    except OSError as error:
        raise DatasetError(
            f"{table.name}: {table.kind}_jsonl_file = {path}: {error.strerror}. Correct the path."
        ) from error
    return rows.finish(sources, faults)


def _parse_line(table: DatasetTable, where: str, line: str) -> dict[str, Any]:
    name = f"{table.kind}_path"
    example = f'{{"{name}": "...", "caption": "..."}}'
    try:
        record = parse_json(line)
    except ValueError as error:
        found = "an empty line" if not line.strip() else f"invalid JSON: {error}"
        raise DatasetError(f"{where}: {found}. Each line is one object such as {example}") from None
    if not isinstance(record, dict):
        raise DatasetError(f"{where}: {name} is missing. Each line is one object such as {example}")
    return record
