"""Remember which jobs of a queue this user has typed or started here, outside of the queue's folder.

The files of a queue prove nothing of that: they may have come with the folder, or have been written while no
page of this user was open.
"""

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from modules.text_files import parse_json
from modules.user_files import read_user_file, write_user_file
from project.known import identify_folder, user_file_of

logger = logging.getLogger(__name__)

KIND = "queues"


@dataclass(frozen=True)
class KnownQueue:
    """What was remembered of a queue."""

    is_open: bool  # the user has started it, and not paused it since
    jobs: Counter[str]  # digests of the waiting jobs that the user knows


def remember_queue(folder: Path, is_open: bool, jobs: Iterable[str]) -> None:
    """Remember a queue. folder: of its files; jobs: see `KnownQueue`.

    Without a place to keep it, a queue that was started stays paused after a restart.
    """
    facts = {"open": is_open, "jobs": sorted(jobs)}
    with contextlib.suppress(OSError):
        write_user_file(user_file_of(KIND, folder), json.dumps(identify_folder(folder) | facts))
        return
    logger.debug("%s is not remembered", folder)


def recall_queue(folder: Path) -> KnownQueue | None:
    """Return what was remembered of a queue; None if it is another one by now, or was never known."""
    text = read_user_file(user_file_of(KIND, folder))
    if text is None:
        return None
    try:
        facts = parse_json(text)
        if any(facts[name] != value for name, value in identify_folder(folder).items()):
            return None
        return KnownQueue(facts["open"] is True, Counter(map(str, facts["jobs"])))
    except (OSError, ValueError, TypeError, LookupError):
        return None
