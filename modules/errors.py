"""Errors that a user can correct, with their location and the remedy.

They end the program without a traceback.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

INTERRUPTED = 130  # the shell's code for a program ended by Ctrl-C


class UserError(Exception):
    """An error that the user can correct. The program exits with `exit_code`."""

    exit_code = 1


class InstallationError(UserError):
    """Raised if a package is not installed in this Python."""


class OptionError(UserError):
    """Raised for an unusable option or combination of options."""

    exit_code = 2


class CaptionError(OptionError):
    """Raised for a caption or prompt that a text encoder cannot read; the run continues without it."""


class DatasetError(UserError):
    """Raised for an unusable dataset configuration or a file named in it."""


class MediaError(UserError):
    """Raised if an image, video or audio file cannot be read or written."""


class CacheError(UserError):
    """Raised for a cache file that is missing, damaged, or made from other sources."""


class CheckpointError(UserError):
    """Raised for a model, LoRA or state file that is missing, damaged, or of a different kind.

    The caller may add to the message what kind of file `path` is.
    """

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class OutputError(UserError):
    """Raised if a file cannot be written, for example because the disk is full."""


class MemoryPlanError(UserError):
    """Raised if a run does not fit into device memory."""


class DownloadError(UserError):
    """Raised if a download fails: no connection, no access rights, damaged data."""


class NothingFoundError(UserError):
    """Raised if nothing was found in a video, and therefore no file was written."""

    exit_code = 3


@contextlib.contextmanager
def catch_panics() -> Iterator[None]:
    """Convert a panic of a Rust library (tokenizers), which is not an `Exception`, to a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the class cannot be imported
            raise
        raise ValueError(f"its library fails: {error}") from error


# modules of compiler errors, compared by name so that torch is not imported
_COMPILERS = ("torch._dynamo", "torch._inductor", "triton.")


def is_compiler_error(error: BaseException) -> bool:
    """Return whether an error comes from torch's compiler or Triton, so that further calls fail too."""
    return any(cls.__module__.startswith(_COMPILERS) for cls in type(error).__mro__)
