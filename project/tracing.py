"""Keep a trace of `run` for the browser: what it does before its training has a page, and where it ended."""

import logging
import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from downloads.listing import gigabytes
from modules.command import quote_for_powershell, typed_words
from modules.control_codes import shorten_lines
from modules.errors import OutputError, UserError
from modules.installation import FRONT_SCRIPT
from modules.progress import NotedProgress, read_progress
from modules.text_files import real_path
from project.kinds.composing import kinds_by_script
from training.reports.history import BEFORE_TRAINING, History, Start, describe_process, history_path

logger = logging.getLogger(__name__)

TRAINING = "training"
BYTES = "B"  # unit of progress in bytes
SHOWN_EVERY = 2.0  # seconds between two progress lines
# suffix of a script's name -> activity, and activity if the command only checks
STEPS = {
    "download": ("downloading the model",) * 2,
    "_latents": ("caching latents", "checking the files"),
    "_text_encoder_outputs": ("caching captions", "checking the captions"),
}


def describe_step(argv: Sequence[str]) -> str:
    """Return what a command of a run does, such as `caching latents`."""
    name = "".join(argv[1:2])
    if name in kinds_by_script():
        return TRAINING
    script = Path(name).stem
    for end, (doing, checking) in STEPS.items():
        if script.endswith(end):
            return checking if "--check" in argv else doing
    return script


def describe_progress(progress: NotedProgress) -> str:
    """Return the progress as text, such as `11.2 GB of 34.8 GB` or `40 of 120`."""
    show = gigabytes if progress.unit == BYTES else "{:,}".format
    done = show(int(progress.done))
    return done if progress.total is None else f"{done} of {show(int(progress.total))}"


class RunTrace:
    """Log of one `run` command, which the browser page shows until the training script writes its own.

    The run continues even if the log cannot be written.
    """

    def __init__(self) -> None:
        self._history: History | None = None
        self._training_history_path = Path()  # history of the training script
        self._step = ""  # what the current command does
        self._step_start_time = 0.0  # start time of the current command

    def begin(self, repeat_argv: Sequence[str], output: Path, name: str, steps: int | None) -> None:
        """Start the log of a run, with the command that repeats it.

        Args:
            repeat_argv: Words after `reelsmith` that repeat the run.
            output: Output folder of the training run.
            name: Name of the trained files.
            steps: Number of training steps.
        """
        argv = typed_words(["python", FRONT_SCRIPT, *repeat_argv])
        note = "It continues where it ended."
        command = ["Run it again", shlex.join(argv), quote_for_powershell(argv), note]
        start = Start(
            model="",
            total_steps=steps or 0,
            process=describe_process(),
            written_in=str(real_path(output)),
            working_folder=str(Path.cwd()),
        )
        self._training_history_path = history_path(output, name)
        # a separate history, which ends where the training script's history begins
        self._history = History(history_path(output, f"{name}{BEFORE_TRAINING}"), session=1)
        with self._ignore_write_errors():
            output.mkdir(parents=True, exist_ok=True)
            self._history.add(0, started=asdict(start))
            self._history.add(0, commands=[command])

    def note(self, argv: Sequence[str]) -> None:
        """Log the start of a command."""
        self._step, self._step_start_time = describe_step(argv), time.time()
        if self._history is not None:
            with self._ignore_write_errors():
                self._history.add(0, message=self._step, level="info")
                self._history.add(0, doing=self._step)
                self._history.flush()

    @contextmanager
    def follow(self, argv: Sequence[str]) -> Iterator[Path | None]:
        """Yield the file to which a command writes its progress, and add the progress to the log.

        Yields None for the training command, which writes a log of its own.
        """
        step = describe_step(argv)
        if self._history is None or step == TRAINING:
            yield None
            return
        # a thread reads this file until the command has ended
        path = self._history.path.with_name(f".{self._history.path.stem}-progress.json")
        is_over = threading.Event()
        watcher = threading.Thread(target=self._show_progress, args=(path, step, is_over), daemon=True)
        watcher.start()
        try:
            yield real_path(path)
        finally:
            is_over.set()
            watcher.join()
            with self._ignore_write_errors():
                path.unlink(missing_ok=True)

    def _show_progress(self, path: Path, step: str, is_over: threading.Event) -> None:
        """Log the progress stored in a file every few seconds if it has changed, until `is_over` is set."""
        shown = ""
        while not is_over.wait(SHOWN_EVERY):
            progress = read_progress(path)
            argv = "" if progress is None else f"{step}: {describe_progress(progress)}"
            if self._history is not None and argv not in ("", shown):
                shown = argv
                with self._ignore_write_errors():
                    self._history.add(0, doing=argv)
                    self._history.flush()

    def end(self, reason: str, kind: str) -> None:
        """Record in the log how the run ended, unless its training script records that itself.

        `reason` is "" if it ended well. `kind` is "good", "bad", or "" for a run that was stopped.
        """
        has_begun = self._history is not None and bool(self._step)
        if not has_begun:
            return
        assert self._history is not None
        ended_well = not reason
        with self._ignore_write_errors():
            if ended_well or self._has_training():
                # a run that ended well, or whose training writes a history, needs no entry here
                self._history.path.unlink(missing_ok=True)
                return
            ended = f"ended while {self._step}: {reason}"
            self._history.add(0, message=shorten_lines(reason, 1000), level="error")
            self._history.add(0, ended=ended.splitlines()[0], kind=kind)
            self._history.flush()

    def _has_training(self) -> bool:
        """Return whether the training script has started to write its own history file."""
        try:
            return (
                self._step == TRAINING
                and self._training_history_path.stat().st_mtime >= self._step_start_time
            )
        except OSError:
            return False

    @contextmanager
    def _ignore_write_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, OutputError) as error:
            logger.debug("no record of this run is kept: %s", error)
            self._history = None


@contextmanager
def trace_run() -> Iterator[RunTrace]:
    """Yield the log of a run, and record in it how the block ends."""
    trace = RunTrace()
    try:
        yield trace
    except KeyboardInterrupt:
        trace.end("it was stopped", "")
        raise
    except SystemExit as error:
        trace.end(f"exit code {error.code}", "bad")
        raise
    except UserError as error:
        trace.end(str(error), "bad")
        raise
    trace.end("", "good")
