"""Write the events of a run to its history and request its page. No failure here ends a training."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from modules.control_codes import shorten_lines
from modules.media.reading import Frame
from training.reports.drawing import PageProcess
from training.reports.history import METRICS, History, PageCommand, RunHistory, Start, history_name
from training.reports.logs import Recorder, StepReport
from training.reports.sections import SAMPLES, page_path, scores_path

logger = logging.getLogger(__name__)

PAGE_SECONDS = 120.0  # minimum seconds between two pages without new samples
MAX_FLUSH_FRACTION = 0.003  # maximum fraction of the time for writing the history to disk
FLUSH_SECONDS = 3.0  # seconds between two writes of the history; more if a write is slow, see SHARE
ACTIVITY_SECONDS = 10.0  # minimum seconds between two lines on the work in a pause
MAX_MESSAGES, MAX_CHARACTERS = 1000, 2000


@dataclass
class RunReporter:
    """Context manager that records one run in its history and page; leaving it draws the final page.

    Only the main process writes the history.
    """

    history: History  # if it is not written, there is no page either
    start: Start
    step: int  # the last finished one
    commands: Callable[[Path | None, bool], Sequence[PageCommand]]  # of the file to use; finished or not
    memory: Callable[[], Sequence[tuple[str, str]]]
    now: Callable[[], float] = time.monotonic
    start_page: Callable[[Path], PageProcess] = PageProcess  # given the history
    page: PageProcess | None = field(default=None, init=False)  # None: no page, or its process did not start
    folder: Path = field(init=False)  # --output_dir
    name: str = field(init=False)  # --output_name
    path: Path = field(init=False)  # of the page
    is_done: bool = field(default=False, init=False)  # a feature has ended the run before its last step
    _messages: "_Messages" = field(init=False)
    _page_requested_at: float = field(init=False)  # time of the last request for the page
    _flushed_at: float = 0.0  # time of the last write to disk after a step
    _flush_seconds: float = 0.0  # duration of this write
    _last_recorded: dict[str, Any] = field(default_factory=dict)  # last recorded lines of memory and commands
    _has_warned: bool = False
    _activity_recorded_at: float = -math.inf  # when work between steps was last recorded

    def __post_init__(self) -> None:
        self.folder = self.history.path.parent
        self.name = history_name(self.history.path)
        self.path = page_path(self.folder, self.name)
        self._page_requested_at = self.now()
        self._messages = _Messages(lambda level, text: self._record(self.step, level=level, message=text))

    def __enter__(self) -> "RunReporter":
        self._record(self.step, started=asdict(self.start))
        logging.getLogger().addHandler(self._messages)
        if self.history.is_written:
            with self._errors_as_warning():
                self.page = self.start_page(self.history.path)
        self._request_page()  # the box at the start names the page
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        logging.getLogger().removeHandler(self._messages)
        if error is None or isinstance(error, Exception):  # other errors end the run at once
            # Record how the run has ended, and the commands that the page shows from then on
            sentence = f"stopped after step {self.step:,}"
            css_class = ""
            if error is not None:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                sentence = f"ended by an error after step {self.step:,}: {reason}"
                css_class = "bad"
            elif self.is_finished:
                sentence, css_class = "finished", "good"
            self._record(self.step, ended=sentence, kind=css_class)
            if self.history.is_written:
                with self._errors_as_warning():
                    self._record_memory_and_commands(is_finished=css_class == "good")
                    self.history.flush()
        if self.page is not None:
            with self._errors_as_warning():
                self.page.close()

    def rewind(self, step: int) -> None:
        """Forget what was recorded of steps after `step`, to which the run went back."""
        self.step = step
        self._last_recorded.clear()
        with self._errors_as_warning():
            self.history.rewind(step)

    @property
    def is_finished(self) -> bool:
        """Whether the run has taken its last step, or a feature has ended it before; False after a stop."""
        return self.is_done or self.step >= self.start.total_steps

    def log_activity(self, text: str) -> None:
        """Record work between steps, such as `sample 1 of 2, step 140 of 300`, once in ACTIVITY_SECONDS."""
        if self.now() - self._activity_recorded_at >= ACTIVITY_SECONDS:
            self._activity_recorded_at = self.now()
            self._record(self.step, doing=text)
            with self._errors_as_warning():
                self.history.flush()

    def log_pause(self, text: str) -> None:
        """Record at once what the run does between two steps, such as `saving`, which may take minutes."""
        self._activity_recorded_at = -math.inf
        self.log_activity(text)
        self._activity_recorded_at = -math.inf

    def log_step(self, report: StepReport, left: float | None = None) -> None:
        """Write a step into the history.

        Args:
            report: Metrics of the step.
            left: Seconds to the end of the run, including pauses; None if unknown.
        """
        self.step = report.step
        if self.history.is_written:
            # keys without a value are left out of the line
            experts = {"experts": dict(report.component_losses)} if report.component_losses else {}
            skipped = {"skipped": report.skipped} if report.skipped else {}
            metrics = {METRICS: dict(report.metrics)} if report.metrics else {}
            rates = dict(report.rates)
            self._record(
                report.step,
                loss=report.loss,
                average=report.average,
                rates=rates,
                seconds=report.seconds,
                left=left,
                **experts,
                **skipped,
                **metrics,
            )
            started = self.now()
            # a slow disk is written to less often: flushing takes at most MAX_FLUSH_FRACTION of the time
            if started - self._flushed_at >= max(FLUSH_SECONDS, self._flush_seconds / MAX_FLUSH_FRACTION):
                with self._errors_as_warning():
                    self.history.flush()
                self._flushed_at = self.now()
                self._flush_seconds = self._flushed_at - started

    def log_note(self, text: str, step: int) -> None:
        """Show a note of a feature in the console, on the page and in the box at the end; once for a step."""
        notes = self.history.run_history.notes
        if (step, text) not in notes and len(notes) < MAX_MESSAGES:
            logger.info("Step %d: %s", step, text)
            self._record(step, note=shorten_lines(text, MAX_CHARACTERS))

    @property
    def validations(self) -> Mapping[int, float]:
        """Validation losses by step, from the history."""
        return self.history.run_history.validations

    def log_validation(self, step: int, losses: Mapping[str, float]) -> None:
        """Write the losses of a validation into the history."""
        self._record(step, validation=dict(losses))

    def log_samples(
        self,
        step: int,
        step_label: str,
        prompts: Sequence[str] = (),
        recorders: Sequence[Recorder] = (),
        strengths: Mapping[int, float] = MappingProxyType({}),
    ) -> None:
        """Record the samples of all processes, write a contact sheet of them, and request the page.

        Args:
            step: Number of the optimizer step.
            step_label: Step or epoch as the file names contain it, such as e000001.
            prompts: Prompts of all samples.
            recorders: Recorders that also receive the samples.
            strengths: Strengths of the LoRA other than 1, by the index of the prompt.
        """
        if not (self.history.is_written or recorders):
            return
        from training.reports import sample_files  # only with samples

        folder = self.folder / SAMPLES
        files: dict[int, Path] = {}
        with self._errors_as_warning():
            files = sample_files.find_samples(folder, self.name, step_label)
        all_prompts = dict(enumerate(prompts))
        file_prompts = {index: all_prompts.get(index, "") for index in files}
        titles = {
            index: sample_files.add_strength(prompt, strengths.get(index, 1.0))
            for index, prompt in file_prompts.items()
        }
        # A downscaled preview of each sample that can be read: frames of a clip side by side
        from training.reports import sample_files  # only with samples

        strips: dict[int, Frame] = {}
        for index, path in files.items():
            with self._errors_as_warning():
                strips[index] = sample_files.join_strip(sample_files.read_downscaled(path))
        for recorder in recorders:
            with self._errors_as_warning():
                recorder.log_samples(step, files, strips, titles)
        if not self.history.is_written:
            return
        of_files = {str(index): strength for index, strength in strengths.items() if index in files}
        self._record(
            step,
            samples=step_label,
            files={str(index): path.name for index, path in files.items()},
            prompts={str(index): prompt for index, prompt in file_prompts.items()},
            **({"strengths": of_files} if of_files else {}),
        )
        with self._errors_as_warning():
            # this name sorts after the names of the samples
            sheet = folder / f"{self.name}_{step_label}_sheet.png"
            sample_files.write_sheet(sheet, f"{self.name}, step {step:,}", strips, titles)
        self._request_page()

    def log_saved(self, paths: Sequence[Path], step: int) -> None:
        """Record all files of a save, and request the page unless it was drawn a short time ago.

        After the last step no page is requested, because the end of the run does so.
        """
        for path in paths:
            self._record(step, saved=path.name)
        with self._errors_as_warning():
            self.history.flush()
        if step < self.start.total_steps:
            if self.now() - self._page_requested_at >= PAGE_SECONDS:
                self._request_page()
            else:
                self.log_files()

    def log_files(self) -> None:
        """Record the suggested commands again if saving or removing files has changed names in them.

        Does nothing before the run has started.
        """
        if self.history.is_written and self._last_recorded:
            with self._errors_as_warning():
                self._record_memory_and_commands(is_finished=False)
                self.history.flush()

    def _record(self, step: int, **what: Any) -> None:
        with self._errors_as_warning():
            self.history.add(step, **what)

    def _request_page(self) -> None:
        """Write the history to disk, and ask the page process to redraw the page."""
        if not self.history.is_written:
            return
        self._page_requested_at = self.now()
        with self._errors_as_warning():
            self._record_memory_and_commands(is_finished=False)
            self.history.flush()
            if self.page is not None:
                self.page.draw()

    def _record_memory_and_commands(self, is_finished: bool) -> None:
        """Write memory use and the suggested next commands to the history if they have changed."""
        file = find_usable_file(self.history.run_history, self.folder, self.name)
        commands = self.commands(file, is_finished)
        lines = {"memory": self.memory(), "commands": [*map(astuple, commands)]}
        for name, line in lines.items():
            if self._last_recorded.get(name) != line:
                self._last_recorded[name] = line
                self._record(self.step, **{name: line})

    @contextmanager
    def _errors_as_warning(self) -> Iterator[None]:
        """Suppress errors raised in the block; log only the first one, as a warning."""
        try:
            yield
        except Exception as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "%s is not complete, the training continues: %s",
                    self.path if self.history.is_written else "What the trackers get of samples",
                    error or type(error).__name__,
                )


def name_best_file(folder: Path, name: str, run_history: RunHistory) -> str | None:
    """Return the name of the best saved file by scores, else by validation losses; None without either."""
    if not scores_path(folder, name).is_file():
        return run_history.best_file(folder) if run_history.validations else None
    from training.reports.scores import find_best_file  # slow to import; few runs are scored

    best = find_best_file(folder, name, run_history)
    return None if best is None else best.name


def find_usable_file(run_history: RunHistory, folder: Path, name: str) -> Path | None:
    """Return a saved file to generate with: the best one, else the newest; None if there is none."""
    file = run_history.usable_file(folder, name_best_file(folder, name, run_history))
    return None if file is None else folder / file


class _Messages(logging.Handler):
    """Pass the first MAX_MESSAGES log messages to the history.

    Messages of other threads are left out, because only the main thread may write the history.
    """

    def __init__(self, note: Callable[[str, str], None]) -> None:
        super().__init__(logging.INFO)
        self._record, self._count = note, 0

    def emit(self, record: logging.LogRecord) -> None:
        if self._count < MAX_MESSAGES and threading.current_thread() is threading.main_thread():
            self._count += 1
            self._record(record.levelname.lower(), shorten_lines(record.getMessage(), MAX_CHARACTERS))
