"""Measure what reporting costs a training.

    python benchmarks/reports.py

Trains a small Wan transformer with a LoRA on a terminal of its own, with the progress bar, TensorBoard, the
history of the page, and a box. The time inside the reports is summed and compared with the time of all steps
of the same run: two separate runs would differ by more than the reports cost.
"""

import argparse
import contextlib
import os
import pty
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from modules.parser import add_options  # noqa: E402  # found from here on

AIM = 1.005


def main() -> None:
    """Print the time inside reports, and its ratio to the steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="steps that are timed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, terminal() as read:
        full, inside = measure(Path(folder), args.steps)
    print(
        f"{args.steps} steps in {full:.2f} s, {1000 * inside:.1f} ms of it in reports; {read()} bytes shown"
    )
    ratio = full / (full - inside)
    print(f"ratio {ratio:.4f} against the same steps without reports, aim at most {AIM}")
    raise SystemExit(ratio > AIM)


@contextlib.contextmanager
def terminal() -> Iterator[Any]:
    """Make standard error a terminal for a block; yield a function that counts the bytes written to it."""
    master, slave = pty.openpty()
    count = [0]

    def drain() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(master, 65536):
                count[0] += len(data)

    threading.Thread(target=drain, daemon=True).start()
    before, sys.stderr = sys.stderr, open(slave, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    try:
        yield lambda: count[0]
    finally:
        sys.stderr = before


def measure(folder: Path, steps: int) -> tuple[float, float]:
    """Return the seconds of all steps and of what is inside the reports."""
    from benchmarks.train_step import _write_project
    from modules.command import start_logging
    from modules.console import show_box
    from modules.options import read_options
    from training.loop import advance
    from training.options import TrainingOptions, read_arguments, training_parser
    from training.run import prepare_run
    from wan.family import family_for_training
    from wan.options import WanTrainingOptions

    start_logging()
    parser = training_parser("")
    add_options(parser, WanTrainingOptions)
    shape = argparse.Namespace(dim=384, layers=3, size=128, precision="no")
    given = read_arguments(parser, _write_project(folder, shape), {})
    family = family_for_training(read_options(WanTrainingOptions, given))
    inside = 0.0
    with (
        prepare_run(family, read_options(TrainingOptions, given)) as run,
        contextlib.closing(run.feed.start(0, 0)) as micro_batches,
    ):

        def timed(report: Callable[[Any], None]) -> Callable[[Any], None]:
            def call(one: Any) -> None:
                nonlocal inside
                begin = time.perf_counter()
                report(one)
                inside += time.perf_counter() - begin

            return call

        run.logs.log_step = timed(run.logs.log_step)  # type: ignore[method-assign]
        run.reporter.log_step = timed(run.reporter.log_step)  # type: ignore[method-assign]
        groups = run.steps.batches_by_step(0)
        for _ in range(4):  # warm up
            advance(run, next(groups), micro_batches)
        inside, start = 0.0, time.perf_counter()
        for _ in range(steps):
            advance(run, next(groups), micro_batches)
        full = time.perf_counter() - start
        begin = time.perf_counter()
        show_box("Training is finished", [(f"row {index}", "a text") for index in range(8)])
        inside += time.perf_counter() - begin
    return full + time.perf_counter() - begin, inside


if __name__ == "__main__":
    main()
