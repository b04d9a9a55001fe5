"""Check model files given by options: that each exists and is what its option says."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from modules.checkpoints.opening import Checkpoint, open_checkpoint
from modules.command import as_typed
from modules.errors import CheckpointError
from modules.option_values import require
from modules.paths import explain_missing

Found = TypeVar("Found")


def require_file(path: Path | None, option: str, why: str) -> Path:
    """Return the path.

    Raises OptionError if none was given, CheckpointError if it does not exist; both name the option.
    """
    given = require(
        path, option, f"{why}. {as_typed(['python', 'tools/download.py', '--list'])} shows where it is from"
    )
    if not given.exists():
        raise CheckpointError(
            f"{option} {given}: no such file or folder.{explain_missing(given)} Give the path of the model",
            given,
        )
    return given


def inside(path: Path, folder: str) -> Path:
    """Return `path`, or that folder in it if it is a whole release."""
    return path / folder if (path / folder).is_dir() else path


def read_once(path: Path, read: Callable[[Checkpoint], Found]) -> Found:
    """Return what `read` returns for the open file, such as its dimensions.

    The result is cached while the file stays the same. read: a function of a module, such as `read_vae`.
    Raises
    CheckpointError as it does, if the file holds another kind of network.
    """
    stat = path.stat()
    found: Found = _read_once(path, path.absolute(), (stat.st_mtime_ns, stat.st_size), read)
    return found


@lru_cache(maxsize=16)  # called for every prompt of a long list and for every batch
def _read_once(path: Path, where: Path, stamp: tuple[int, int], read: Callable[[Checkpoint], Any]) -> Any:
    """Read the file. where, stamp: identify it; path: as messages name it."""
    with open_checkpoint(path) as checkpoint:
        return read(checkpoint)
