"""Predict whether jobs before a command may create a file or folder that does not exist yet."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from modules.option_tables import find_table
from modules.text_files import read_text, real_path

# of settings files, which may contain output paths
SETTINGS = (
    ".toml",
    ".json",
    ".txt",
    ".yaml",
    ".yml",
)
MAX_SETTINGS_BYTES = 1 << 20  # bytes
QUOTED = re.compile(r""""((?:[^"\\\n]|\\.)*)"|'([^'\n]*)'""")


class EarlierJob(NamedTuple):
    """A command that runs before another job, and may create files that the other job reads."""

    script: Path  # in the checkout or the package
    argv: Sequence[str]
    folder: Path  # folder that its relative paths refer to


def may_be_created(path: Path, jobs: Iterable[EarlierJob]) -> bool:
    """Return whether one of the earlier jobs may create a path.

    A job may create the paths that its command line or settings name, anything inside or around these paths,
    and neighbors whose names begin with one of them, such as `clips-pack.zip` next to `clips`.
    """
    missing = real_path(path)
    return any(_is_related(real_path(written), missing) for job in jobs for written in _list_paths(job))


def _is_related(written: Path, missing: Path) -> bool:
    if missing.is_relative_to(written) or written.is_relative_to(missing):
        return True
    return missing.parent == written.parent and missing.name.startswith(written.stem)


def _list_paths(job: EarlierJob) -> Iterator[Path]:
    """Yield the paths in a job's command line, its settings and its default values."""
    if job.script.stem == "unpack":
        yield job.folder  # the name of the new folder is stored in the packed file
    values = {value for word in job.argv for value in (word, word.rpartition("=")[2])}
    # files and folders that the script uses by default, such as `models`
    table = find_table(job.script)
    sections = [] if table is None else table["sections"]
    options = [option for section in sections for option in section["options"]]
    defaults = [option.get("default") for option in options if option.get("metavar") == "PATH"]
    default_values = [default for default in defaults if isinstance(default, str)]
    for value in [*values, *default_values]:
        if value and not value.startswith("-"):
            yield job.folder / value
            with contextlib.suppress(OSError, ValueError):  # the job itself reports errors
                yield from _list_named_paths(job.folder / value, job.folder)


def _list_named_paths(path: Path, folder: Path) -> Iterator[Path]:
    """Yield the paths quoted in the settings file `path` or, if `path` is a folder, in its TOML files."""
    # Relative paths are resolved against that folder, and paths in a file also against `folder`.
    if path.is_dir():
        texts = [text for file in path.glob("*.toml") for text in _list_quoted(file)]
        yield from (path / text for text in texts)
    elif path.suffix.lower() in SETTINGS and path.is_file():
        yield from (start / text for text in _list_quoted(path) for start in (path.parent, folder))


def _list_quoted(file: Path) -> list[str]:
    quoted = QUOTED.findall(read_text(file, MAX_SETTINGS_BYTES))
    return [double.replace("\\\\", "\\") or single for double, single in quoted if double or single]
