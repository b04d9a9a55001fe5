"""The schema of `state.json`: every field is checked when it is read, so that no later step meets a value of
another kind.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.errors import CheckpointError

LARGEST_COUNT = 1 << 53  # whole numbers up to here are exact in float64 too
LATEST_TIME = 1 << 40  # unix seconds
REMEDY = (
    "Resume from another state folder, or start a new run from what was trained: --network_weights FILE or "
    "--dit FILE"
)


@dataclass(frozen=True)
class FieldKind:
    """What a field holds: in words, and as a test of a JSON value."""

    words: str
    holds: Callable[[Any], bool]


def is_count(value: Any, lowest: int = 0, below: int = LARGEST_COUNT) -> bool:
    """Whether a JSON value is a whole number from `lowest` up to `below`, which is no longer allowed."""
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value < below


def is_finite_number(value: Any) -> bool:
    """Whether a JSON value is a number that fits float64 and is neither NaN nor infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _is_mark(value: Any) -> bool:
    return isinstance(value, str) and (not value or re.fullmatch(r"e?[0-9]{6,16}", value) is not None)


def _is_part_name(value: Any) -> bool:
    # it becomes a file name
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_]+", value) is not None


COUNT = FieldKind("a whole number from 0", is_count)
MAPPING = FieldKind("an object {...}", lambda value: isinstance(value, dict))
PROGRESS: Mapping[str, FieldKind] = {
    "seed": FieldKind("a whole number from 0, below 2^64", lambda value: is_count(value, below=1 << 64)),
    "session_id": FieldKind(
        "a whole number from 0, below 2^64", lambda value: is_count(value, below=1 << 64)
    ),
    "started_at": FieldKind(
        "a time in seconds since 1970", lambda value: is_finite_number(value) and 0 <= value < LATEST_TIME
    ),
    "step": COUNT,
    "epoch": COUNT,
    "position": COUNT,
    "sample_pending": FieldKind('"", or the mark of samples such as "e000001" or "000020"', _is_mark),
    "sampled_step": FieldKind("a whole number from -1", lambda value: is_count(value, lowest=-1)),
    "losses": FieldKind(
        "a list of finite numbers",
        lambda value: isinstance(value, list) and all(is_finite_number(one) for one in value),
    ),
}
# fields younger than the format: states of before do not have them
YOUNGER: Mapping[str, FieldKind] = {
    "plan_epoch": COUNT,
    "plan_position": COUNT,
    "plan_step": COUNT,
    "changes": FieldKind(
        "a list of texts",
        lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    ),
}
RECORD: Mapping[str, FieldKind] = {
    "progress": MAPPING,
    "identity": MAPPING,
    "habits": MAPPING,
    "described": MAPPING,
    "parts": MAPPING,
}
PART: Mapping[str, FieldKind] = {
    "bytes": COUNT,
    "crc32": FieldKind("a whole number from 0, below 2^32", lambda value: is_count(value, below=1 << 32)),
}


def check_record(record: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError naming the first field of a state's record that is missing or of another kind.

    path: of the record.
    """
    _check_fields(record, RECORD, "", path)
    younger = {name: kind for name, kind in YOUNGER.items() if name in record["progress"]}
    _check_fields(record["progress"], {**PROGRESS, **younger}, "progress.", path)
    if unknown := sorted(record["progress"].keys() - PROGRESS.keys() - YOUNGER.keys()):
        raise refuse(path, f"progress.{unknown[0]}", "it is not known here")
    for part, file in record["parts"].items():
        if not _is_part_name(part):
            raise refuse(path, f"parts.{part!r}", "a part is named with letters, digits and _ only")
        if not isinstance(file, dict):
            raise refuse(path, f"parts.{part}", wrong(file, MAPPING))
        _check_fields(file, PART, f"parts.{part}.", path)


def wrong(value: Any, kind: FieldKind) -> str:
    """Say what a field holds, and what it has to hold."""
    text = repr(value)
    return f"it is {text if len(text) <= 60 else text[:57] + '...'}, and has to be {kind.words}"


def refuse(path: Path, name: str, reason: str) -> CheckpointError:
    """Return the error for a field that cannot be used: the file, the field, the reason, and what to do."""
    return CheckpointError(f"{path}: the field {name} cannot be used: {reason}.\n  {REMEDY}", path=path)


def _check_fields(values: Mapping[str, Any], kinds: Mapping[str, FieldKind], before: str, path: Path) -> None:
    for name, kind in kinds.items():
        if name not in values:
            raise refuse(path, before + name, f"it is missing, and has to be {kind.words}")
        if not kind.holds(values[name]):
            raise refuse(path, before + name, wrong(values[name], kind))
