"""Locks on files, which end with the process that holds them, however it ends."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def only_one(path: Path, waits: bool = True) -> Iterator[None]:
    """Let one process at a time do the block: others wait until it has ended, or is killed.

    path: a file that is there meanwhile. waits: if not, raises BlockingIOError at once. On a volume without
    locks nobody waits. Raises OSError if the file cannot be made.
    """
    from filelock import FileLock, Timeout  # it imports asyncio

    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if waits else 0)
    except Timeout:
        raise BlockingIOError(errno.EWOULDBLOCK, "another process holds the lock") from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file: there it stays
            path.unlink()
        lock.release()
