"""Locks on open files, which end with the process that holds them, however it ends."""

import contextlib
import errno
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

FAR = 1 << 62  # Windows keeps others from reading what is locked: a byte that no file reaches
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO, waits: bool) -> None:
        place = file.tell()
        try:
            file.seek(FAR)
            while True:
                try:
                    # the one that waits gives up after ten seconds
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if waits else msvcrt.LK_NBLCK, 1)
                    return
                except OSError as error:
                    if not waits or error.errno != errno.EDEADLK:
                        raise
        finally:
            file.seek(place)

else:
    import fcntl

    def _lock(file: BinaryIO, waits: bool) -> None:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))


_open: "weakref.WeakSet[BinaryIO]" = weakref.WeakSet()


def _close_all() -> None:
    """Close files that a forked process inherited: they would keep the locks of a killed parent."""
    for file in list(_open):
        file.close()


if hasattr(os, "register_at_fork"):  # not on Windows, which forks nothing
    os.register_at_fork(after_in_child=_close_all)


def try_lock(file: BinaryIO) -> bool | None:
    """Lock a file until it is closed, for this process alone, without waiting.

    file: opened for writing. Returns False if somebody else holds the lock, None if the volume has no locks.
    """
    try:
        _lock(file, waits=False)
    except OSError as error:
        if error.errno in _UNSUPPORTED and os.name != "nt":
            return None
        return False
    return True


def is_file_of(path: Path, file: BinaryIO) -> bool:
    """Return whether a path still names an open file: it may have been removed or replaced."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def only_one(path: Path, waits: bool = True) -> Iterator[None]:
    """Let one process at a time do the block: others wait until it has ended, or is killed.

    path: a file that is there meanwhile. waits: if not, raises BlockingIOError at once. On a volume without
    locks nobody waits. Raises OSError if the file cannot be made.
    """
    while True:
        with path.open("ab") as file:
            if not waits and try_lock(file) is False:
                raise BlockingIOError(errno.EWOULDBLOCK, "another process holds the lock")
            _open.add(file)
            try:
                if waits:
                    _lock(file, waits)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
            if not is_file_of(path, file):  # who had the lock before has removed the file
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # Windows removes no open file: there it stays
                    path.unlink()
            return
