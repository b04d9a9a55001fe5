"""The result file of benchmarks/gpu.py, how long rows will take, and the goals."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_rows import GENERATION, TRAINING, Row
from modules.atomic_write import write_text

Figures = dict[str, Any]
GIB = 1 << 30
PEAK_SHARE, FP8_SPEED, SWAP_COST, PLAN_ERROR, LOSS_ERROR = 0.65, 1.2, 0.05, 0.07, 0.01
# assumed for a prediction of how long a row takes, on a card of 790 TFLOP/s; all are guesses
SPEED = 450e12  # operations per second
COMPILING, STARTING, READING = 50.0, 25.0, 2e9  # seconds, seconds, bytes per second


@dataclass
class Results:
    """Figures measured on one device. `head` has the device, torch, the date and the device's peaks."""

    head: Figures
    rows: dict[str, Figures] = field(default_factory=dict)
    path: Path | None = None  # rewritten after each row

    def note(self, name: str, figures: Figures) -> None:
        """Store a row's figures, also in the file, so that an interruption loses at most one row."""
        self.rows[name] = figures
        if self.path is not None:
            text = json.dumps({"head": self.head, "rows": self.rows}, indent=1)
            write_text(self.path, text + "\n")

    @property
    def peak(self) -> float:
        """Operations per second of a bf16 matrix product."""
        return float(self.head["matmul"])


def read_results(path: Path) -> Results:
    """Read a result file. Raises SystemExit if it is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Results(found["head"], found["rows"], path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is not a result file of benchmarks/gpu.py: {error}") from None


def continue_results(path: Path | None, head: Figures) -> Results:
    """Return the content of a result file to be continued, or empty results.

    The peaks are those of this run; each row keeps that of the run that measured it. Raises SystemExit if the
    file is of another device or another torch.
    """
    if path is None or not path.exists():
        return Results(head, path=path)
    found = read_results(path)
    for name in ("device", "torch"):
        if found.head.get(name) != head[name]:
            raise SystemExit(
                f"{path} was measured with {found.head.get(name)}, this is {head[name]}: "
                "give another --output"
            )
    return Results(head, found.rows, path)


def missing(rows: Sequence[Row], results: Results, again: bool) -> list[Row]:
    """Return the rows to measure; with `again`, also those that failed."""
    return [
        row for row in rows if row.name not in results.rows or (again and "failed" in results.rows[row.name])
    ]


# How long


@dataclass(frozen=True)
class Expected:
    """Estimate of a row before it is measured."""

    operations: float  # of a timed call
    size: float  # bytes of its file
    seconds: float


def expect(row: Row, operations: float, size: float, speed: float = SPEED) -> Expected:
    """Estimate the seconds of a row from its operations and the bytes that it loads."""
    if not operations:
        return Expected(0.0, size, row.seconds)
    call = operations / speed
    calls = 1 + max(2, min(5, 1 + int(25 // call)))
    compiling = COMPILING if "--compile" in row.options else 0.0
    return Expected(operations, size, STARTING + size / READING + compiling + calls * call)


def correction(results: Results) -> float:
    """Return the factor for expected seconds, from the rows that are measured."""
    found = [
        row["took"] / row["expected"]
        for row in results.rows.values()
        if row.get("took") and row.get("expected") and "failed" not in row
    ]
    return min(max(statistics.median(found), 0.3), 3.0) if found else 1.0


# Rates


def rate(figures: Mapping[str, Any], which: str = "operations") -> float:
    """Return operations per second; 0 if none are counted."""
    return float(figures.get(which, 0)) / float(figures["seconds"])


def per_unit(figures: Mapping[str, Any]) -> float:
    """Return the seconds of a step, clip, text or GB."""
    return float(figures["seconds"]) / float(figures["per"])


def plan_error(figures: Mapping[str, Any]) -> float | None:
    """Return how far the plan is off, as a fraction of the peak; None if either is not known."""
    if not figures.get("planned") or not figures.get("device"):
        return None
    return float(figures["planned"]) / float(figures["device"]) - 1


def difference(figures: Mapping[str, Any], other: Mapping[str, Any], which: str = "losses") -> float | None:
    """Return the largest relative difference of losses or norms of the same steps; None without any.

    It is infinite if one of them is NaN or infinite.
    """
    pairs = list(zip(figures.get(which, ()), other.get(which, ()), strict=False))
    return max((_apart(one, two) for one, two in pairs), default=None)


def _apart(one: float, two: float) -> float:
    if one == two and math.isfinite(one):
        return 0.0
    return abs(one / two - 1) if math.isfinite(one) and math.isfinite(two) and two else math.inf


# Goals


@dataclass(frozen=True)
class Goal:
    """A goal with the measured figure; `is_met` is None if the rows that it needs are not measured."""

    text: str
    is_met: bool | None
    found: str

    def __str__(self) -> str:
        verdict = {True: "met", False: "missed", None: "not measured"}[self.is_met]
        return f"{verdict}: {self.text}" + (f" ({self.found})" if self.found else "")


PAIRS_FP8 = (
    ("wan14b-fp8-products-compiled", "wan14b-bf16-compiled"),
    ("wan14b-fp8-products", "wan14b-bf16"),
    ("wan14b-short-fp8-products-compiled", "wan14b-short-bf16-compiled"),
    ("hunyuan-fp8-products-compiled", "hunyuan-bf16-compiled"),
    ("flux-fp8-products-compiled", "flux-bf16-compiled"),
)
PAIRS_SWAP = (
    ("wan14b-bf16-swap30-compiled", "wan14b-bf16-compiled"),
    ("wan14b-bf16-swap30", "wan14b-bf16"),
    ("wan14b-short-bf16-swap30-compiled", "wan14b-short-bf16-compiled"),
    ("wan14b-fp8-products-swap30-compiled", "wan14b-fp8-products-compiled"),
    ("wan14b-fp8-weights-swap30-compiled", "wan14b-fp8-weights-compiled"),
)


def goals_of(results: Results) -> list[Goal]:
    """Compare the figures with the goals."""
    rows = {name: row for name, row in results.rows.items() if "failed" not in row}
    found = [_peak_goal(rows, results.peak)]
    for faster, plain in PAIRS_FP8:
        if faster in rows and plain in rows:
            found.append(_fp8_goal(faster, rows[faster], rows[plain]))
    for swapped, plain in PAIRS_SWAP:
        if swapped in rows and plain in rows:
            found.append(_swap_goal(swapped, rows[swapped], rows[plain]))
    return [*found, _plan_goal(rows)]


def _peak_goal(rows: Mapping[str, Figures], peak: float) -> Goal:
    """Compare the fastest row of Wan 14B in bf16."""
    text = f"{PEAK_SHARE:.0%} of the bf16 peak in LoRA training of Wan 14B in bf16, recomputation counted"
    shares = {
        name: rate(row) / row.get("matmul", peak)
        for name, row in rows.items()
        if name.startswith("wan14b-bf16")
    }
    if not shares:
        return Goal(text, None, "")
    best = max(shares, key=lambda name: shares[name])
    listed = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return Goal(text, shares[best] >= PEAK_SHARE, listed)


def _fp8_goal(name: str, faster: Figures, plain: Figures) -> Goal:
    speed, error = plain["seconds"] / faster["seconds"], difference(faster, plain)
    norms = difference(faster, plain, "norms")
    text = f"{name} at least {FP8_SPEED} times as fast as bf16, losses within {LOSS_ERROR:.0%}"
    is_met = speed >= FP8_SPEED and error is not None and error <= LOSS_ERROR
    parts = [
        f"{name} {'unknown' if each is None else f'{each:.2%} apart'}"
        for name, each in (("losses", error), ("norms of gradients", norms))
    ]
    return Goal(text, is_met, f"{speed:.2f} times, {', '.join(parts)}")


def _swap_goal(name: str, swapped: Figures, plain: Figures) -> Goal:
    cost = swapped["seconds"] / plain["seconds"] - 1
    return Goal(f"{name} at most {SWAP_COST:.0%} slower than without", cost <= SWAP_COST, f"{cost:+.1%}")


def _plan_goal(rows: Mapping[str, Figures]) -> Goal:
    text = f"the plan within {PLAN_ERROR:.0%} of the peak in all rows"
    errors = {
        name: error
        for name, row in rows.items()
        if row["kind"] in (TRAINING, GENERATION) and (error := plan_error(row)) is not None
    }
    if not errors:
        return Goal(text, None, "")
    worst = max(errors, key=lambda name: abs(errors[name]))
    return Goal(text, abs(errors[worst]) <= PLAN_ERROR, f"worst {worst}: {errors[worst]:+.1%}")
