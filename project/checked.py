"""Remember that a check of a folder found no errors, so that the following run does not repeat it.

A fingerprint of everything that the checks read is stored: the three files, names, sizes and times of
the media, and the files of the model. If anything differs, the checks are repeated.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from modules.atomic_write import write_text
from modules.errors import OutputError
from modules.text_files import parse_json, parse_toml, read_text
from modules.version import VERSION
from project.options import WRITTEN

CHECK_RECORD = Path("cache", "checked.json")  # in the described folder
WRITTEN_BY_RUNS = {"cache", "output", "check.html"}  # what runs and checks write themselves
MAX_FILES = 100_000  # larger folders are always checked again
MAX_BYTES = 1000  # maximum size of the file


def remember_checked(folder: Path, commands: Sequence[Sequence[str]], model_files: Sequence[str]) -> None:
    """Record that the checks of a folder found no errors; do nothing if the folder is read-only.

    Args:
        folder: The project folder.
        commands: Commands of the folder's run, with the options on the command line.
        model_files: Paths of the model's files.
    """
    fingerprint = _hash_checked_files(folder, commands, model_files)
    if fingerprint is None:
        return
    try:
        (folder / CHECK_RECORD).parent.mkdir(exist_ok=True)
        write_text(folder / CHECK_RECORD, json.dumps({"checked": fingerprint}))
    except (OSError, OutputError):
        return


def was_checked(folder: Path, commands: Sequence[Sequence[str]], model_files: Sequence[str]) -> bool:
    """Return whether an earlier check found no errors, and none of the files it read has changed since.

    `folder` is the project folder, `commands` are its run's commands, `model_files` the model's paths.
    """
    try:
        content = parse_json(read_text(folder / CHECK_RECORD, MAX_BYTES))
        fingerprint = content["checked"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return bool(fingerprint) and fingerprint == _hash_checked_files(folder, commands, model_files)


def _hash_checked_files(
    folder: Path, commands: Sequence[Sequence[str]], model_files: Sequence[str]
) -> str | None:
    """Return a hash of all files that the checks read; None if some are outside the folder, or too many."""
    try:
        texts = [read_text(folder / name) for name in WRITTEN]
        if _reads_elsewhere(parse_toml(texts[0])):
            return None
        hashed_texts = [*texts, VERSION, *(" ".join(words) for words in commands)]
        hashed_texts += sorted(_describe_file(Path(path)) for path in _walk(folder))
        hashed_texts += [_describe_file(folder / path) for path in model_files]
    except (OSError, ValueError):
        return None
    if len(hashed_texts) > MAX_FILES:
        return None
    return hashlib.sha256("\n".join(hashed_texts).encode("utf-8", "surrogatepass")).hexdigest()


def _reads_elsewhere(value: object) -> bool:
    """Return whether a dataset file's content refers to a folder or list outside its own folder."""
    if isinstance(value, dict):
        return any(_is_outside(key, inner) or _reads_elsewhere(inner) for key, inner in value.items())
    return isinstance(value, list) and any(map(_reads_elsewhere, value))


def _is_outside(key: str, value: object) -> bool:
    is_path = key.endswith(("_directory", "_dir", "_file", "_files"))
    if not is_path or not isinstance(value, str):  # a list of paths, for example, is treated as outside
        return is_path and value is not None and not isinstance(value, bool)
    return Path(value).is_absolute() or ".." in Path(value).parts


def _walk(folder: Path) -> Iterator[str]:
    """Yield a line for each file in a folder, except hidden files and output of runs."""
    for folder_text, folders, names in os.walk(folder):
        is_top = Path(folder_text) == folder
        folders[:] = [name for name in folders if name[0] != "." and not (is_top and name in WRITTEN_BY_RUNS)]
        for name in names:
            if name[0] != "." and not (is_top and name in WRITTEN_BY_RUNS):
                yield f"{folder_text}{os.sep}{name}"


def _describe_file(path: Path) -> str:
    """Return the path, size and modification time of a file as one string, to detect changes."""
    status = path.stat()
    return f"{path} {status.st_size} {status.st_mtime_ns}"
