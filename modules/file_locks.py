"""Locks on open files, which are released when the process ends, even if it is killed.

`filelock` up to 3.20 waits forever on a volume without locks, and may give one lock to two processes if its
file is removed.
"""

import contextlib
import errno
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO, waits: bool) -> None:
        file.seek(1 << 62)  # others cannot read what is locked: a byte that no file reaches
        while True:
            try:
                # the one that waits gives up after ten seconds
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if waits else msvcrt.LK_NBLCK, 1)
                return
            except OSError as error:
                if not waits or error.errno != errno.EDEADLK:
                    raise

else:
    import fcntl

    def _lock(file: BinaryIO, waits: bool) -> None:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise


_open: "weakref.WeakSet[BinaryIO]" = weakref.WeakSet()


def _close_all() -> None:
    """Close lock files inherited by a forked process, which would keep the locks if the parent is killed."""
    for file in list(_open):
        file.close()


if hasattr(os, "register_at_fork"):  # not on Windows, which forks nothing
    os.register_at_fork(after_in_child=_close_all)


def _open_own(name: str, flags: int) -> int:
    """Open a file, without following a symbolic link of that name or waiting for a pipe."""
    return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)


def _was_removed(path: Path, file: BinaryIO) -> bool:
    """Return whether the open file is no longer the one at `path`."""
    try:
        return not os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return True


@contextlib.contextmanager
def only_one(path: Path, waits: bool = True) -> Iterator[None]:
    """Let only one process at a time run the block; others wait until it ends or is killed.

    The lock file is removed at the end. A process that has waited for a removed file locks the new one.

    Args:
        path: The lock file.
        waits: If False, raise BlockingIOError instead of waiting. On a file system without locks, processes
            run the block at the same time.

    Raises:
        OSError: If the file cannot be created.
    """
    while True:
        with open(path, "ab", opener=_open_own) as file:  # noqa: PTH123
            _open.add(file)  # forked processes close it
            try:
                _lock(file, waits)
            except OSError as error:
                if not waits:
                    raise BlockingIOError(errno.EWOULDBLOCK, "another process holds the lock") from error
                if error.errno not in _UNSUPPORTED:
                    raise
            if _was_removed(path, file):  # by the process that had the lock before: lock the new file
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # Windows does not remove open files: the file stays
                    path.unlink()
            return
