"""Recognise and find a lost process of a run."""

import contextlib
import re
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch.distributed import distributed_c10d

from modules.errors import UserError

PATIENCE = 3.0  # seconds within which those that live have noticed it too
SIGNS = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset)|[Bb]roken pipe|[Ss]ocket")
CONSEQUENCE = "The run cannot go on without it; what was saved is untouched."


class LostProcessError(UserError):
    """Another process of the run was lost. One of the living processes reports it."""

    def __init__(self, message: str, is_told_here: bool) -> None:
        super().__init__(message)
        self.is_told_here = is_told_here


def is_of_processes(error: BaseException) -> bool:
    """Return whether an error is of the connection between processes."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and SIGNS.search(str(error)) is not None


def find_lost(rank: int, count: int) -> list[int] | None:
    """Return the processes that do not answer; None if the first, which knows them, does not.

    Each process that noticed the loss calls it. rank: of this process.
    """
    with _impatient() as store:
        if store is None:
            return None
        with contextlib.suppress(RuntimeError):
            store.set(_key(rank), "here")
            time.sleep(PATIENCE)
            return [other for other in range(count) if not store.check([_key(other)])]
    return None


def describe_loss(lost: list[int] | None) -> str:
    """Return the message on the processes that `find_lost` found."""
    if not lost:
        return f"another process of this run was lost: it was killed, or ended by an error. {CONSEQUENCE}"
    which = f"process {lost[0]}" if len(lost) == 1 else f"processes {', '.join(map(str, lost))}"
    verb, what = ("was", "it was") if len(lost) == 1 else ("were", "they were")
    return (
        f"{which} (counted from 0) {verb} lost: {what} killed, for example because memory was full, or ended "
        f"by an error. {CONSEQUENCE}"
    )


def _key(rank: int) -> str:
    return f"reelsmith/lived/{rank}"


@contextlib.contextmanager
def _impatient() -> Iterator[distributed_c10d.Store | None]:
    """Yield the processes' common store, which waits for seconds instead of a day; None without it."""
    try:
        store = distributed_c10d._get_default_store()
    except (RuntimeError, ValueError):
        yield None
        return
    store.set_timeout(timedelta(seconds=PATIENCE))
    yield store
