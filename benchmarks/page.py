"""Measure what the page of a training costs.

    python benchmarks/page.py

Two costs are compared with the time of steps in the same run: recording a step, which happens for each; and
the work after each sampling (reading the samples, sheet, curves, a page of 100,000 steps), against the
seconds between two samplings, --every.
"""

import argparse
import contextlib
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from modules.parser import add_options  # noqa: E402  # found from here on

AIM = 1.005
OLD_STEPS = 100_000


def main() -> None:
    """Print the two costs and their ratio to the training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="steps of the loop to time")
    parser.add_argument("--prompts", type=int, default=3, help="clips of 81 frames, 832x480, a time")
    parser.add_argument("--every", type=float, default=600.0, help="seconds between two times of samples")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        step = _measure_step(Path(folder), args.steps)
        note, pages = _measure_pages(Path(folder) / "pages", args.prompts)
    work = statistics.median(pages)
    ratio = 1 + note / step + work / args.every
    print(f"a step of the loop {step:.4f} s, noting it {1e6 * note:.1f} us")
    print(f"a page with {args.prompts} new clips after {OLD_STEPS} steps: {work:.2f} s")
    print(f"ratio {ratio:.4f} with samples every {args.every:.0f} s, aim at most {AIM}")
    raise SystemExit(ratio > AIM)


def _measure_step(folder: Path, steps: int) -> float:
    """Return the median seconds of a step of the loop, without a page."""
    from benchmarks.train_step import _time, _write_project
    from modules.options import read_options
    from training.loop import advance
    from training.options import TrainingOptions, read_arguments, training_parser
    from training.run import prepare_run
    from wan.family import family_for_training
    from wan.options import WanTrainingOptions

    parser = training_parser("")
    add_options(parser, WanTrainingOptions)
    sizes = argparse.Namespace(dim=384, layers=3, size=128, precision="no")
    given = read_arguments(parser, [*_write_project(folder, sizes), "--no_page"], {})
    family = family_for_training(read_options(WanTrainingOptions, given))
    with (
        prepare_run(family, read_options(TrainingOptions, given)) as run,
        contextlib.closing(run.feed.start(0, 0)) as micro_batches,
    ):
        groups = run.steps.batches_by_step(0)

        def step() -> None:
            advance(run, next(groups), micro_batches)

        _time(2, step)  # warm up
        return statistics.median(_time(1, step) for _ in range(steps))


def _measure_pages(folder: Path, prompts: int) -> tuple[float, list[float]]:
    """Return the seconds of recording a step, and of the work after each sampling."""
    import numpy as np

    from modules.media.writing import write_video
    from training.reports.history import History, Start
    from training.reports.logs import StepReport
    from training.reports.reporter import RunReporter

    folder.mkdir()
    history = History(folder / "x-history.jsonl", 1)
    generator = np.random.default_rng(1)
    texts = [f"a prompt {index}" for index in range(prompts)]
    start = Start("wan", OLD_STEPS)
    reporter = RunReporter(history, start, 0, lambda best, done: [], lambda: [])
    started = time.perf_counter()
    for step, loss in enumerate(generator.random(OLD_STEPS) + 0.1, 1):
        reporter.log_step(StepReport(step, {"lr/unet": 1e-4}, seconds=0.5, loss=float(loss), average=0.5))
    note = (time.perf_counter() - started) / OLD_STEPS
    for step in range(0, OLD_STEPS, 1000):
        reporter.log_validation(step, {"validation/loss": 0.2, "validation/loss_100": 0.3})
    coarse = generator.integers(0, 255, (2 * prompts, 81, 15, 26, 3), np.uint8)
    seconds = []
    with reporter:
        for turn in range(6):
            mark = f"{OLD_STEPS - 6 + turn:06d}"
            for index in range(prompts):
                clip = [frame.repeat(32, 0).repeat(32, 1) for frame in coarse[index + turn % prompts]]
                path = folder / "sample" / f"x_{mark}_{index:02d}_20300101000000.mp4"
                write_video(path, clip, 16.0, crf=20, preset="veryfast")
            started = time.perf_counter()
            reporter.log_samples(int(mark), mark, texts)
            seconds.append(time.perf_counter() - started)
    return note, seconds[1:]


if __name__ == "__main__":
    main()
