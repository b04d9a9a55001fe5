"""The tables of benchmarks/gpu.py: Markdown on the screen, and between two marks in the documents."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_results import GIB, Results, goals_of, per_unit, plan_error, rate
from benchmarks.gpu_rows import BY_NAME, GENERATION, LATENTS, LOADING, ROWS, TEXTS, TRAINING
from modules.atomic_write import write_text

Figures = Mapping[str, Any]
Cell = Callable[[Figures, float], str]  # figures of a row, the device's peak -> what stands in the column
BEGIN, END = "<!-- gpu.py: tables -->", "<!-- gpu.py: end -->"
UNKNOWN = "-"


def gib(size: float | None) -> str:
    """Return bytes as GiB; a placeholder if they are not known."""
    return f"{size / GIB:.1f}" if size else UNKNOWN


def _share(which: str) -> Cell:
    """Return a column of the rate and its fraction of the peak."""

    def cell(row: Figures, peak: float) -> str:
        found = rate(row, which)
        return f"{found / 1e12:.0f} ({found / peak:.0%})" if found else UNKNOWN

    return cell


def _plan(row: Figures, peak: float) -> str:
    error = plan_error(row)
    return gib(row.get("planned")) + ("" if error is None else f" ({error:+.1%})")


def _loading(row: Figures, peak: float) -> str:
    return f"{row['loading']:.0f} ({row['loading'] / (row['loaded'] / 1e9):.2f} a GB)"


def _video(row: Figures, peak: float) -> str:
    return f"{per_unit(row) * row['whole']:.0f} for {row['whole']:.0f} steps ({row['per']:.0f} measured)"


def _spread(row: Figures, peak: float) -> str:
    return f"{row['spread']:.1%} of {row['calls']}"


def _forgotten(row: Figures, peak: float) -> str:
    return UNKNOWN if row["forgotten"] is None else f"{row['forgotten'] / row['per']:.2f}"


MEMORY: dict[str, Cell] = {
    "device GiB": lambda row, peak: gib(row["device"]),
    "planned": _plan,
    "host GiB": lambda row, peak: gib(row["host"]),
}
TIMES: dict[str, Cell] = {
    "spread": _spread,
    "first call s": lambda row, peak: f"{row['warm_up']:.0f}",
}
COLUMNS: dict[tuple[str, ...], dict[str, Cell]] = {
    (TRAINING,): {
        "seconds a step": lambda row, peak: f"{row['seconds']:.2f}",
        "TFLOP/s, recomputation counted": _share("operations"),
        "without": _share("model_operations"),
        **MEMORY,
        "loading s": _loading,
        **TIMES,
    },
    (GENERATION,): {
        "seconds": _video,
        "seconds a step": lambda row, peak: f"{per_unit(row):.2f}",
        "TFLOP/s": _share("operations"),
        **MEMORY,
        "loading s": _loading,
        **TIMES,
    },
    (LATENTS, TEXTS): {
        "a second": lambda row, peak: f"{1 / per_unit(row):.2f}",
        "unit": lambda row, peak: "clips" if row["kind"] == LATENTS else "texts",
        "device GiB": MEMORY["device GiB"],
        "host GiB": MEMORY["host GiB"],
        "loading s": _loading,
        **TIMES,
    },
    (LOADING,): {
        "seconds a GB, file in the system's cache": lambda row, peak: f"{per_unit(row):.2f}",
        "after asking it to forget the file": _forgotten,
        "file GB": lambda row, peak: f"{row['loaded'] / 1e9:.1f}",
        "device GiB": MEMORY["device GiB"],
        "host GiB": MEMORY["host GiB"],
        **TIMES,
    },
}
TITLES = {
    (TRAINING,): "Training steps of a LoRA of rank 32, batch 1",
    (GENERATION,): "Denoising, with the guidance that is usual; text encoders and VAE are not in the time",
    (LATENTS, TEXTS): "Caching: the networks alone, without decoding videos and writing files",
    (LOADING,): "Loading a transformer from a file of real bytes",
}


def tables(results: Results) -> str:
    """Return all tables of a result file, with the device and the goals."""
    parts = [head_line(results.head)]
    for kinds, columns in COLUMNS.items():
        rows = {name: row for name, row in ordered(results.rows).items() if row["kind"] in kinds}
        if rows:
            parts.append(f"{TITLES[kinds]}:\n\n{table(rows, columns, results.peak)}")
    parts.append("\n".join(["Goals:", "", *(f"- {goal}" for goal in goals_of(results))]))
    return "\n\n".join(parts) + "\n"


def head_line(head: Figures) -> str:
    """Return the device, with the peaks of the same run."""
    peaks = f"bf16 matrix product {head['matmul'] / 1e12:.0f} TFLOP/s, "
    if head.get("copy"):
        peaks += f"copy on the device {head['copy'] / 1e12:.1f} TB/s read and written, "
    peaks += f"pinned upload {head['upload'] / 1e9:.0f} GB/s"
    return f"{head['date']}, {head['device']}, torch {head['torch']}. Measured in the same run: {peaks}."


def ordered(rows: Mapping[str, Figures]) -> dict[str, Figures]:
    """Return the rows in the order of their list; unknown rows come last."""
    known = [row.name for row in ROWS if row.name in rows]
    return {name: rows[name] for name in [*known, *(name for name in rows if name not in BY_NAME)]}


def table(rows: Mapping[str, Figures], columns: Mapping[str, Cell], peak: float) -> str:
    """Return a Markdown table."""
    lines = [f"| model | size | options | {' | '.join(columns)} |", "|---|---|---|" + "---|" * len(columns)]
    return "\n".join([*lines, *(line_of(row, columns, peak) for row in rows.values())])


def line_of(row: Figures, columns: Mapping[str, Cell], peak: float) -> str:
    """Return a row of a table; for a failed row the reason. `peak` is used unless the row has its own."""
    start = [row["model"], row["size"], row["about"]]
    if "failed" in row:
        reason = row["failed"].replace("|", "/")
        return f"| {' | '.join(start)} | failed: {reason[:160]} |" + " |" * (len(columns) - 1)
    own = row.get("matmul", peak)
    return f"| {' | '.join([*start, *(cell(row, own) for cell in columns.values())])} |"


def columns_of(kind: str) -> Mapping[str, Cell]:
    """Return the columns of the table for a kind of row."""
    return next(columns for kinds, columns in COLUMNS.items() if kind in kinds)


def write_tables(files: Sequence[Results], documents: Sequence[Path]) -> None:
    """Put the tables of all result files between the marks of each document.

    Raises SystemExit if a document does not have the marks once, in their order; then none is changed.
    """
    text = "\n".join(tables(results) for results in files)
    changed = {}
    for document in documents:
        old = document.read_text(encoding="utf-8")
        if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
            raise SystemExit(f"{document} must have the lines {BEGIN} and {END} once each, in this order")
        before, rest = old.split(BEGIN)
        _, after = rest.split(END)
        changed[document] = f"{before}{BEGIN}\n\n{text}\n{END}{after}"
    for document, new in changed.items():
        write_text(document, new)
