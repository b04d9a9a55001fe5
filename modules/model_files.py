"""Model files as options name them: that each is there, and that it is what its option says."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from modules.checkpoint import Checkpoint, open_checkpoint
from modules.errors import CheckpointError
from modules.options import require


def existing(path: Path | None, option: str, why: str) -> Path:
    """The path. Raises OptionError where none was given, CheckpointError where nothing is there; both name the option."""
    given = require(path, option, why)
    if not given.exists():
        raise CheckpointError(f"{option} {given}: no such file or folder", given)
    return given


@lru_cache(maxsize=8)  # asked for with every prompt of a long list
def check_file(path: Path, read: Callable[[Checkpoint], object]) -> None:
    """Raise CheckpointError where the file is another kind of network. read: as `read_vae`, raising it."""
    with open_checkpoint(path) as checkpoint:
        read(checkpoint)
