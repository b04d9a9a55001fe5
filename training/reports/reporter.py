"""Pass what a run does to its history and its page. Nothing that goes wrong here ends a training."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from modules.media.reading import Frame
from training.reports.history import History, SampleRow
from training.reports.logs import Logs, StepReport
from training.reports.page import ClipStore, PageFacts, Standing, describe_clip, write_training_page
from training.reports.sample_files import find_samples, join_strip, read_reduced
from training.reports.sample_logs import log_samples
from training.reports.sheets import sheet_path, write_sheet

logger = logging.getLogger(__name__)

SHARE = 0.003  # of the time, that pages without new samples may take
PAUSE = 120.0  # seconds between two of these at least


@dataclass
class RunReporter:
    """Report one run, in its main process. Use it as a context manager: leaving it writes the last page."""

    path: Path | None  # of the page; None: nothing is written, and only the trackers get the samples
    facts: PageFacts
    history: History
    prompts: Mapping[int, str]  # of the samples
    step: int  # the last one that is done
    now: Callable[[], float] = time.monotonic
    clips: ClipStore = field(init=False)
    logs: Logs | None = None  # whose trackers get the samples
    _written: float = field(init=False)  # when the last page was
    _cost: float = 0.0  # seconds that it took
    _has_warned: bool = False

    def __post_init__(self) -> None:
        self.clips, self._written = ClipStore(self.facts.folder / "sample"), self.now()

    def __enter__(self) -> "RunReporter":
        self.history.note_start(self.step)
        if self.path is not None:
            self._write(self._running)  # the first box names it
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self.path is None or (error is not None and not isinstance(error, Exception)):
            return  # the latter: asked to end at once
        is_finished = self.step >= self.facts.total_steps
        if error is not None:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            text = f"ended by an error after step {self.step:,}: {reason}"
            standing = Standing(self.step, text, "bad")
        elif is_finished:
            standing = Standing(self.step, "finished", "good", True)
        else:
            standing = Standing(self.step, f"stopped after step {self.step:,}")
        self._write(standing)

    def note_step(self, report: StepReport) -> None:
        """Add a step."""
        self.step = report.step
        if self.path is None:
            return
        self.history.note_step(report.step, report.loss, report.rates, report.seconds, report.by_expert)
        if self.history.is_long:
            with self._guarded():
                self.history.flush()

    def note_validation(self, step: int, losses: Mapping[str, float]) -> None:
        """Add the losses of a validation."""
        self.history.note_validation(step, losses)

    def note_samples(self, step: int, mark: str) -> None:
        """Pass on the samples that all processes have made, and write a sheet of them and the page."""
        if self.path is None and (self.logs is None or not self.logs.accelerator.trackers):
            return
        files: dict[int, Path] = {}
        strips: dict[int, Frame] = {}
        with self._guarded():
            files = find_samples(self.clips.folder, self.facts.name, mark)
        prompts = {index: self.prompts.get(index, "") for index in files}
        for index, path in files.items():
            with self._guarded():
                strips[index] = self._take_sample(path, describe_clip(prompts[index], step))
        if self.logs is not None:
            with self._guarded():
                log_samples(self.logs, step, files, strips, prompts)
        if self.path is None:
            return
        names = {index: path.name for index, path in files.items()}
        self.history.note_samples(SampleRow(step, mark, names, prompts))
        with self._guarded():
            title = f"{self.facts.name}, step {step:,}"
            write_sheet(sheet_path(self.clips.folder, self.facts.name, mark), title, strips, prompts)
        self._write(self._running)

    def _take_sample(self, path: Path, text: str) -> Frame:
        """Read a sample once for all: encode its clip for the page, return its strip."""
        clip = read_reduced(path)
        if self.path is not None:
            self.clips.add(path.name, text, clip)
        return join_strip(clip)

    def note_saved(self, path: Path, step: int) -> None:
        """Add a saved file, and write the page unless that would take too much of the time."""
        self.history.note_saved(step, path.name)
        if self.path is None:
            return
        with self._guarded():
            self.history.flush()
        if self.now() - self._written >= max(PAUSE, self._cost / SHARE):
            self._write(self._running)

    @property
    def _running(self) -> Standing:
        return Standing(self.step, "running")

    def _write(self, standing: Standing) -> None:
        assert self.path is not None
        started = self.now()
        with self._guarded():
            self.history.flush()
            write_training_page(self.path, self.facts, self.history, standing, self.clips, datetime.now())
        self._written = self.now()
        self._cost = self._written - started

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turn what goes wrong into one warning."""
        try:
            yield
        except Exception as error:
            if self.history.is_long:
                self.history.drop_waiting()
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "%s is not complete, the training goes on: %s",
                    self.path or "What the trackers get of samples",
                    error or type(error).__name__,
                )
