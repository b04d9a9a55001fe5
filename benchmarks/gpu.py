"""Measure training, generation, caching and loading of models of real size on one GPU.

Weights are random, so nothing is downloaded: the code that loads real files loads empty files with the
released models' tensors, and draws numbers in their place. Each row runs in its own process, with the options
that a user would type. Seconds are medians; rates are compared with a bf16 matrix product measured in the
same run; the peak of the device's memory stands beside the prediction of --plan. Of a generation some steps
are measured, and the time for all of them follows. Empty files load faster than a disk delivers; the loading
rows write and read real bytes.

    python benchmarks/gpu.py --dry                              what there is, and how long it may take
    python benchmarks/gpu.py --check                            is it right? before it is measured
    python benchmarks/gpu.py --group goals --output gpu.json    again: continue with the rows that are missing
    python benchmarks/gpu.py --profile wan14b-bf16-compiled     where a step's time goes
    python benchmarks/gpu.py --tables gpu.json                  write the tables into the documents
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.child_process import run_child_process  # noqa: E402
from benchmarks.gpu_rows import (  # noqa: E402
    BY_NAME,
    CACHING,
    GENERATION,
    GROUPS,
    LOADING,
    TRAINING,
    Results,
    Row,
    choose,
    columns_of,
    continue_results,
    correction,
    expect,
    goals_of,
    head_line,
    line_of,
    missing,
    read_results,
    table,
    write_tables,
)

DOCUMENTS = (ROOT / "benchmarks" / "RESULTS.md",)
PATIENCE = 4.0  # times the expected seconds, after which a row is ended
Child = Callable[[Row, Path, float], Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the options ask for: measure, check, profile, or write tables."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--check" in words:
        words.remove("--check")
        from benchmarks import gpu_checks

        raise SystemExit(gpu_checks.main(words))
    args = make_parser().parse_args(words)
    if args.child is not None:
        print(json.dumps(measure_here(BY_NAME[args.child], args.folder, args.device, args.profiled)))
        return
    if args.tables:
        write_tables([read_results(path) for path in args.tables], args.documents or DOCUMENTS)
        return
    if args.profile is not None:
        profile(choose([args.profile], ())[0], args.folder, args.device)
        return
    rows = choose(args.rows, args.group)
    if args.dry:
        print_plan(rows)
        return
    results = continue_results(args.output, head_of(args.device))
    print(f"{head_line(results.head)}\n")
    job = Job(args.folder, args.device, args.profiled)
    chosen = missing(rows, results, args.again)
    if args.one_process:
        measure_all(chosen, results, args.seconds, job.run_here)
    else:
        measure_all(chosen, results, args.seconds, job.run)
    print("\nGoals:", *goals_of(results), sep="\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="rows by name or number")
    parser.add_argument("--group", nargs="+", default=[], choices=GROUPS, help="groups of rows; default: all")
    parser.add_argument("--seconds", type=float, default=1200, help="start no row that would end later; 1200")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="keep all numbers, or go on with them"
    )
    parser.add_argument("--again", action="store_true", help="measure rows of --output again that failed")
    parser.add_argument("--dry", action="store_true", help="print the rows and how long they may take")
    parser.add_argument("--profile", metavar="ROW", help="profile two steps of a row by kinds of kernels")
    parser.add_argument(
        "--profiled", action="store_true", help="profile a call of each row too; it is kept in --output"
    )
    parser.add_argument(
        "--one_process",
        action="store_true",
        help="measure all rows in this process: quicker, but a crash ends it, and no row has a limit",
    )
    parser.add_argument("--check", action="store_true", help="compare results on the GPU with the CPU's")
    parser.add_argument(
        "--tables", type=Path, nargs="+", metavar="FILE.json", help="write the documents' tables"
    )
    parser.add_argument("--documents", type=Path, nargs="+", help="in place of benchmarks/RESULTS.md")
    parser.add_argument(
        "--folder", type=Path, help="where models' files go and stay; default: temporary folders"
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def head_of(device: str) -> dict[str, Any]:
    """Return the device and its peaks. Raises SystemExit without a GPU."""
    import torch

    from benchmarks.ceilings import copy_peak, matmul_peak, upload_peak
    from modules.devices import select_device

    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device; --dry shows the rows without one")
    select_device(device)
    found = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "date": str(date.today()),
        "matmul": matmul_peak(),
        "copy": copy_peak(),
        "upload": upload_peak(),
    }
    torch.cuda.empty_cache()  # rows run in other processes
    return found


@dataclass(frozen=True)
class Job:
    """How a row is run."""

    folder: Path | None  # with the models' files; None: temporary ones
    device: str
    profiled: bool = False  # profile a call of each row too

    def run_here(self, row: Row, limit: float) -> dict[str, Any]:
        """Return the figures of a row that is measured in this process, or why it failed."""
        from benchmarks.gpu_steps import forget_row
        from modules.devices import select_device

        try:
            return measure_here(row, self.folder, self.device, self.profiled)
        except Exception as error:  # the next row may work
            traceback.print_exc()
            return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        finally:
            forget_row(select_device(self.device))

    def run(self, row: Row, limit: float) -> dict[str, Any]:
        """Return the figures of a row in a process of its own, or why it failed, within `limit` seconds."""
        from benchmarks.gpu_steps import folder_for

        command = [sys.executable, __file__, "--child", row.name, "--device", self.device]
        command += ["--profiled"] if self.profiled else []
        # the files are removed here: a row that is ended could not
        with folder_for(row, self.folder) as models, tempfile.TemporaryDirectory() as kept:
            said, errors = Path(kept) / "said.txt", Path(kept) / "errors.txt"
            with said.open("wb") as output, errors.open("wb") as complaints:
                code = run_child_process(
                    [*command, "--folder", str(models)],
                    limit,
                    output,
                    complaints,
                    environment={**os.environ, "PYTHONUTF8": "1"},
                )
            printed, complained = (
                each.read_text(encoding="utf-8", errors="replace").splitlines() for each in (said, errors)
            )
        if code is None:
            return {"failed": f"not done after {limit:.0f} s"}
        if code:
            print(*complained, sep="\n", file=sys.stderr)
            return {
                "failed": next((line for line in reversed(complained) if line.strip()), f"exit code {code}")
            }
        found: dict[str, Any] = json.loads(printed[-1])
        return found


def measure_all(
    rows: Sequence[Row],
    results: Results,
    seconds: float,
    run: Callable[[Row, float], dict[str, Any]],
    expected: Callable[[Row], float] | None = None,
) -> None:
    """Measure rows one after another; print and store each as soon as it is done.

    Args:
        rows: The rows.
        results: Results to add to.
        seconds: Time for all; a row that would end later is skipped.
        run: Returns the figures of a row within a limit in seconds.
        expected: Returns the expected seconds of a row; None to derive them from its operations.
    """
    begun, kinds = time.monotonic(), set[str]()
    expected = expected or ExpectedSeconds()
    for row in rows:
        guess = expected(row) * correction(results)
        if time.monotonic() - begun + guess > seconds:
            print(f"left out: {row.name}, which takes about {guess:.0f} s", flush=True)
            continue
        start = time.monotonic()
        found = run(row, 60 + PATIENCE * guess)
        figures = {
            **{"kind": row.kind, "model": row.model.name, "size": str(row.size) if row.size.width else "-"},
            **{"about": row.about, "options": list(row.options), **found},
            **{"took": time.monotonic() - start, "expected": expected(row)},
            **{"matmul": results.peak, "date": results.head["date"]},
        }
        results.note(row.name, figures)
        columns = columns_of(row.kind)
        new = row.kind not in kinds
        kinds.add(row.kind)
        print(
            table({row.name: figures}, columns, results.peak)
            if new
            else line_of(figures, columns, results.peak),
            flush=True,
        )


class ExpectedSeconds:
    """Estimates how long rows take; the headers of their files show how large they are."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}

    def of(self, row: Row) -> Any:
        """Return what is expected of a row. Files without content are written to a temporary folder."""
        if row.name not in self.known:
            self.known[row.name] = expected_of(row)
        return self.known[row.name]

    def __call__(self, row: Row) -> float:
        """Return the expected seconds of a row."""
        return float(self.of(row).seconds)


def expected_of(row: Row) -> Any:
    """Return what is expected of a row, from the header of a file without content."""
    if row.kind in (*CACHING, LOADING):
        return expect(row, 0, 0)
    from benchmarks.gpu_steps import call_operations, folder_for, generation_family, lay_out, training_family

    with folder_for(row, None) as folder:
        path, high = lay_out(row, folder)
        full = with_vae(row, folder)
        if row.kind == TRAINING:
            options, family = training_family(full, path)
        else:
            options, family = generation_family(full, path, high)
        operations, _ = call_operations(row, options, family)
        files = 2 if high is not None else 1
        return expect(row, operations, files * path.stat().st_size)


def print_plan(rows: Sequence[Row]) -> None:
    """Print the rows and how long they may take; no GPU is needed."""
    total = 0.0
    print("| row | group | model | size | options | PFLOP a call | file GB | expected s |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        found = expected_of(row)
        total += found.seconds
        group = "goals, " * row.is_goal + row.group
        size = row.size if row.size.width else "-"
        counts = f"{found.operations / 1e15:.2f} | {found.size / 1e9:.1f}" if found.operations else "- | -"
        cells = [row.name, group, row.model.name, size, row.about, counts, f"{found.seconds:.0f}"]
        print(f"| {' | '.join(map(str, cells))} |")
    print(f"\n{len(rows)} rows, about {total / 60:.0f} minutes: a guess for a GPU of 790 TFLOP/s in bf16")


def measure_here(row: Row, folder: Path | None, device: str, profiled: bool) -> dict[str, Any]:
    """Return the figures of a row, in the process that loads its model."""
    from benchmarks.gpu_steps import folder_for, lay_out, measure_row
    from modules.devices import select_device

    with folder_for(row, folder) as where:
        path, high = lay_out(row, where)
        full = with_vae(row, where)
        return measure_row(full, path, high, select_device(device), profiled=profiled)


def with_vae(row: Row, folder: Path) -> Row:
    """Return a row with the option that names its VAE, if the family reads sizes from it."""
    from benchmarks.gpu_steps import vae_of

    return replace(row, options=(*row.options, *vae_of(row, folder)))


def profile(row: Row, folder: Path | None, device: str) -> None:
    """Print where the time of two steps goes, or of the measured steps of a generation."""
    from benchmarks.gpu_steps import folder_for, lay_out, prepare_row, profile_calls, report
    from modules.devices import select_device

    if row.kind == LOADING:
        raise SystemExit(f"--profile {row.name}: loading has no steps. Pass a row of another group")
    with folder_for(row, folder) as where:
        chosen = select_device(device)  # as a script does, which also sets how float32 is computed
        path, high = lay_out(row, where)
        bench = prepare_row(with_vae(row, where), path, high, chosen)
        bench.warm_up()
        calls = 2 if row.kind != GENERATION else 1
        print(f"{row.name}: {row.model.name}, {row.about}\n")
        print(report(profile_calls(bench.call, calls, chosen), calls * max(round(bench.per), 1)))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
