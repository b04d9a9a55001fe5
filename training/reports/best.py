"""Tell which saved file of a run is the best by validation loss: for its page and its last box."""

import re
from pathlib import Path

from training.reports.history import History

MARK = re.compile("-ema")


def lowest_validation(history: History) -> tuple[int, float] | None:
    """Return step and loss of the validation with the lowest loss, the first one of equals."""
    return min(history.validations.items(), key=lambda found: (found[1], found[0]), default=None)


def nearest_validation(history: History, step: int) -> tuple[int, float] | None:
    """Return step and loss of the validation nearest to a step, the earlier one of two."""
    return min(history.validations.items(), key=lambda found: (abs(found[0] - step), found[0]), default=None)


def best_file(history: History, folder: Path) -> str | None:
    """Return the saved file with the lowest validation loss of those that are still there."""
    found = [
        (validated[1], -step, name)
        for name, step in history.saved.items()
        if not is_average(history, name)
        and (validated := nearest_validation(history, step)) is not None
        and (folder / name).is_file()
    ]
    return min(found)[2] if found else None


def is_average(history: History, name: str) -> bool:
    """Return whether a saved file is the average (EMA) beside another one; no loss of it was measured."""
    # behind the mark may stand which transformer a file is for
    return any(f"{name[: mark.start()]}{name[mark.end() :]}" in history.saved for mark in MARK.finditer(name))
