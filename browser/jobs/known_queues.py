"""Remember which jobs of a queue this user has typed or started, in a file outside the queue's folder.

The files of a queue cannot prove this: they may have come with the folder, or were written while no page of
this user was open.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from project.known_folders import recall_info, remember_info

KIND = "queues"


@dataclass(frozen=True)
class KnownQueue:
    """The stored record of a queue: whether it was started, and the waiting jobs known to the user."""

    is_open: bool  # the user has started it, and not paused it since
    jobs: Counter[str]  # digests of the waiting jobs that the user knows


def remember_queue(folder: Path, is_open: bool, jobs: Iterable[str]) -> None:
    """Store which waiting jobs the user has seen, so that a restarted server may run them.

    If the record cannot be written, a running queue is paused after a restart of the server.

    Args:
        is_open: Whether the user has started the queue.
        jobs: Digests of the waiting jobs that the user knows.
    """
    info = {"open": is_open, "jobs": sorted(jobs)}
    remember_info(KIND, folder, info)


def recall_queue(folder: Path) -> KnownQueue | None:
    """Return the stored record of a queue.

    Returns None if there is no valid record, or if the folder now contains another queue.
    """
    try:
        info = recall_info(KIND, folder)
        return KnownQueue(info["open"] is True, Counter(map(str, info["jobs"])))
    except (OSError, ValueError, TypeError, LookupError):
        return None
