"""Faults of a dataset's files, collected so that one run reports all of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from modules.errors import DatasetError

LISTED = 20  # how many faults of one kind a message shows


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong. A text that is a whole sentence ends with a full stop."""

    kind: str  # "captions cannot be read": follows a count
    text: str  # one line: where, and what
    stem: str | None = None  # of the source that it concerns
    ends_run: bool = True  # False: what it concerns is skipped, and counted at the end


def raise_faults(faults: Sequence[Fault]) -> None:
    """Raise DatasetError with all faults by kind, if there are any that end a run."""
    faults = [fault for fault in faults if fault.ends_run]
    if len(faults) == 1 and faults[0].text.endswith("."):
        raise DatasetError(faults[0].text)
    if faults:
        raise DatasetError("\n".join(list_faults(faults, LISTED)))


def list_faults(faults: Iterable[Fault], most: int) -> list[str]:
    """Return lines: each kind with its count, then its first `most` faults."""
    by_kind: dict[str, list[str]] = {}
    for fault in faults:
        by_kind.setdefault(fault.kind, []).append(fault.text)
    lines = []
    for kind, texts in by_kind.items():
        lines += [f"{len(texts)} {kind}:", *(f"  {text}" for text in texts[:most])]
        lines += [f"  ... and {len(texts) - most} more"] if len(texts) > most else []
    return lines
