"""Remember which jobs of a queue this user has typed or started here, outside of the queue's folder.

The files of a queue prove nothing of that: they may have come with the folder, or have been written while no
page of this user was open.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from project.known import recall_info, remember_info

KIND = "queues"


@dataclass(frozen=True)
class KnownQueue:
    """Remembered facts of a queue."""

    is_open: bool  # the user has started it, and not paused it since
    jobs: Counter[str]  # digests of the waiting jobs that the user knows


def remember_queue(folder: Path, is_open: bool, jobs: Iterable[str]) -> None:
    """Remember a queue. folder: of its files; jobs: see `KnownQueue`.

    Without a place to keep it, a queue that was started stays paused after a restart.
    """
    info = {"open": is_open, "jobs": sorted(jobs)}
    remember_info(KIND, folder, info)


def recall_queue(folder: Path) -> KnownQueue | None:
    """Return the remembered facts of a queue; None if another queue is in its place, or none are known."""
    try:
        info = recall_info(KIND, folder)
        return KnownQueue(info["open"] is True, Counter(map(str, info["jobs"])))
    except (OSError, ValueError, TypeError, LookupError):
        return None
