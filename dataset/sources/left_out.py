"""Find unused things in a table's folder: special files, results of tools, folders."""

import itertools
import logging
import os
import stat
from collections.abc import Collection, Sequence
from pathlib import Path

from dataset.sources.faults import Fault
from dataset.table import DatasetTable
from modules.errors import MediaError
from modules.media.tags import TOOL_TAG, read_tags
from modules.text_files import require_regular_file

logger = logging.getLogger(__name__)

LOOKED_INTO = 1000  # names of a folder inside a folder


def explain_entries(table: DatasetTable, entries: Sequence[Path]) -> list[Fault]:
    """Return a fault for each entry with the name of a picture or clip that is no file: it is skipped."""
    kind = f"{table.kind}s of {table.name} are no files"
    return [Fault(kind, f"{path}: {_explain(path)}", path.stem, ends_run=False) for path in entries]


def _explain(path: Path) -> str:
    try:
        require_regular_file(path)
    except FileNotFoundError:
        return f"the link leads to {path.readlink() if path.is_symlink() else path}, which is not there"
    except OSError as error:
        return "it is a folder" if path.is_dir() else str(error.strerror or error)
    return "it can be read now"


def leave_out_results(table: DatasetTable, paths: Sequence[Path]) -> list[Path]:
    """Return the paths without results of our tools: clip_SWINIR.mkv beside clip.mp4.

    A warning says so. Only files whose names begin with another's are opened.
    """
    stems = {path.stem for path in paths}
    results = {path for path in paths if _has_source(path.stem, stems) and _is_result(path)}
    if results:
        logger.warning(
            "%s: %d files, such as %s, are left out: a tool made them of other files of this folder. Move "
            "the ones to train on into a folder of their own.",
            table.name,
            len(results),
            min(results),
        )
    return [path for path in paths if path not in results] if results else list(paths)


def _has_source(stem: str, stems: Collection[str]) -> bool:
    parts = stem.split("_")
    return len(parts) > 1 and any(one in stems for one in itertools.accumulate(parts[:-1], "{}_{}".format))


def _is_result(path: Path) -> bool:
    try:
        return any(TOOL_TAG.fullmatch(name) for name in read_tags(path))
    except (MediaError, OSError):
        return False  # reading it says what is wrong


def folder_id(folder: "os.PathLike[str]") -> str:
    """Return a text that is the same for all ways to write a folder's path."""
    return os.path.normcase(os.path.realpath(folder))


def find_folders_of_media(
    table: DatasetTable, suffixes: Collection[str], others: Sequence[Path]
) -> list[Path]:
    """Return the folders inside a table's folder that hold pictures or clips, which are not searched.

    others: folders that tables name.
    """
    if table.directory is None or not table.directory.is_dir():
        return []
    in_use = set(map(folder_id, others))
    with os.scandir(table.directory) as entries:
        folders = sorted(Path(entry) for entry in entries if entry.name[0] != "." and _is_folder(entry))
    return [
        folder for folder in folders if folder_id(folder) not in in_use and _holds_media(folder, suffixes)
    ]


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return stat.S_ISDIR(entry.stat().st_mode)
    except OSError:
        return False


def _holds_media(folder: Path, suffixes: Collection[str]) -> bool:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in itertools.islice(entries, LOOKED_INTO)]
    except OSError:
        return False
    return any(Path(name).suffix.lower() in suffixes for name in names)
