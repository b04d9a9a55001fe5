"""Errors a user can cause and mend: what is wrong, where, and what to do. They end the program without a
traceback.
"""

from pathlib import Path


class UserError(Exception):
    """Something the user can mend. `exit_code` is what the program ends with."""

    exit_code = 1


class OptionError(UserError):
    """An option, or a combination of options, that cannot be used."""

    exit_code = 2


class DatasetError(UserError):
    """A dataset configuration or a file it names that cannot be used."""


class MediaError(UserError):
    """An image or a video that cannot be read or written."""


class CacheError(UserError):
    """A cache file that is missing, damaged, or made from something else."""


class CheckpointError(UserError):
    """A model, LoRA or state file that is missing, damaged, or of another kind.

    `path` lets the caller say what the file is.
    """

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class OutputError(UserError):
    """A file that cannot be written: a full disk, a missing right, a folder in its place."""


class MemoryPlanError(UserError):
    """A run that cannot fit the device."""
