"""Store small files for the user of this machine, outside of the user's working folders.

Only that user can read them. Standard library only.
"""

import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from modules.open_files import replace_file
from modules.text_files import read_text

FOLDER = "reelsmith"
MAX_BYTES = 1 << 16


def user_folder(environment: Mapping[str, str] = os.environ, system: str = sys.platform) -> Path:
    """Return the folder in which this program keeps its files for the current user; it may not exist.

    It is in the system's folder for application state: $XDG_STATE_HOME, %LOCALAPPDATA%, or Application
    Support.

    Raises:
        OSError: If the user has no home folder.
    """
    try:
        home = Path.home()
    except RuntimeError as error:
        raise OSError(str(error)) from None
    if system == "win32":
        default, name = home / "AppData" / "Local", "LOCALAPPDATA"
    elif system == "darwin":
        default, name = home / "Library" / "Application Support", ""  # macOS has no variable for it
    else:
        default, name = home / ".local" / "state", "XDG_STATE_HOME"
    from_environment = environment.get(name, "")
    # a relative or empty value counts as unset
    return (Path(from_environment) if os.path.isabs(from_environment) else default) / FOLDER  # noqa: PTH117


def write_user_file(name: str, text: str) -> Path:
    """Write a file that only this user can read, and return its path; `name` may have folders (with /).

    Raises OSError if the file cannot be written.
    """
    path = user_folder() / name
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")  # for this user alone
    try:
        with open(handle, "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(text)
        replace_file(Path(temporary), path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
    return path


def read_user_file(name: str) -> str | None:
    """Return the text of a file in the user's folder; None if missing, unreadable, or open to other users."""
    try:
        path = user_folder() / name
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or not _is_own(status):
            return None
        return read_text(path, MAX_BYTES)
    except (OSError, ValueError):
        return None


def _is_own(status: os.stat_result) -> bool:
    """Return whether only this user can access a file; on Windows, its folder ensures that."""
    if sys.platform == "win32":
        return True
    return status.st_uid == os.getuid() and not status.st_mode & 0o077
