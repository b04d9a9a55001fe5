"""Locks on open files, which end with the process that holds them, however it ends."""

import errno
import os
import sys
from typing import BinaryIO

FAR = 1 << 62  # Windows keeps others from reading what is locked: a byte that no file reaches
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO) -> None:
        place = file.tell()
        try:
            file.seek(FAR)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        finally:
            file.seek(place)

else:
    import fcntl

    def _lock(file: BinaryIO) -> None:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def try_lock(file: BinaryIO) -> bool | None:
    """Lock a file until it is closed, for this process alone, without waiting.

    file: opened for writing. Returns False if somebody else holds the lock, None if the volume has no locks.
    """
    try:
        _lock(file)
    except OSError as error:
        if error.errno in _UNSUPPORTED and os.name != "nt":
            return None
        return False
    return True
