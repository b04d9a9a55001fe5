"""Model files as options name them: that each is there, and that it is what its option says."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from modules.checkpoints.opening import Checkpoint, open_checkpoint
from modules.errors import CheckpointError
from modules.options import require

Found = TypeVar("Found")


def existing(path: Path | None, option: str, why: str) -> Path:
    """The path.

    Raises OptionError where none was given, CheckpointError where nothing is there; both name the option.
    """
    given = require(path, option, why)
    if not given.exists():
        raise CheckpointError(f"{option} {given}: no such file or folder", given)
    return given


def inside(path: Path, folder: str) -> Path:
    """`path`, or that folder in it where it is a whole release."""
    return path / folder if (path / folder).is_dir() else path


def read_once(path: Path, read: Callable[[Checkpoint], Found]) -> Found:
    """What `read` says of the open file, such as its dimensions; a file is opened once for as long as it
    stays the same.

    read: a function of a module, as `read_vae`. Raises CheckpointError as it does, where the file is another
    kind of network.
    """
    stat = path.stat()
    found: Found = _read_once(path, path.absolute(), (stat.st_mtime_ns, stat.st_size), read)
    return found


@lru_cache(maxsize=16)  # asked for with every prompt of a long list and with every batch
def _read_once(path: Path, where: Path, stamp: tuple[int, int], read: Callable[[Checkpoint], Any]) -> Any:
    """where, stamp: which file that is, beside `path`, as which a message names it."""
    with open_checkpoint(path) as checkpoint:
        return read(checkpoint)
