"""A command of this program that runs in a separate process, started from Python."""

import atexit
import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from modules.error_output import extract_error_message
from modules.errors import UserError
from modules.installation import program_environment, program_words
from package.reelsmith.events import (
    Event,
    HistoryEvents,
    LineEvent,
    PrintedLines,
    SampleEvent,
    SavedEvent,
    StepEvent,
)

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # seconds between two looks for events
WARNING = "WARNING: "  # beginning of a line with a warning of the command
MAX_OUTPUT_CHARACTERS = (
    2000  # characters of the output in the message of an error that the user did not cause
)


class CommandRun:
    """A running command. Iterate over its events or call `wait`; leaving a `with` block stops it.

    Attributes:
        script: File of the command's script.
        options: Keyword arguments of the command.
        losses: Loss of each step so far, by step.
        samples: Samples that the training run has generated so far.
        saved: Files with trained weights that the training run has saved so far.
        lines: Lines that the command has printed so far.
    """

    def __init__(
        self, script: Path, argv: Sequence[str], options: Mapping[str, Any], history: HistoryEvents | None
    ) -> None:
        """Start a command whose options were checked. Events are read from a file with its output.

        Args:
            script: Path of the script in the checkout or the package.
            argv: Arguments of the script.
            options: Keyword arguments from which `argv` was made.
            history: Reader of the training run's history; None for other commands.
        """
        self.script, self.options = script, dict(options)
        self.losses: dict[int, float | None] = {}
        self.samples: list[Path] = []
        self.saved: list[Path] = []
        self.lines: list[str] = []
        self._history = history
        self._was_stopped = False
        self._total_steps = 0
        self._pending: deque[Event] = deque()  # events that were read, but not yielded
        self._num_recorded = 0  # number of its first events that the attributes already include
        self._folder = tempfile.TemporaryDirectory(prefix="reelsmith-", ignore_cleanup_errors=True)
        output = Path(self._folder.name) / "output.txt"
        # with its own process group, Ctrl-C reaches it only once, through `stop`
        with output.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, *program_words(script), *argv],
                env=program_environment(PYTHONUNBUFFERED="1"),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        self._printed = PrintedLines(output)
        atexit.register(self.stop)

    @property
    def is_running(self) -> bool:
        """Whether the command has not ended."""
        return self._process.poll() is None

    def __iter__(self) -> Iterator[Event]:
        """Yield each event once, until the command has ended. Ctrl-C stops the command.

        Raises:
            UserError: If the command ends with a message for the user, which is the error's message.
            RuntimeError: If it ends with any other error.
        """
        try:
            while True:
                is_over = not self.is_running  # first: events that it writes before its end are then read
                self._pending.extend(self._read_events(is_over))
                while self._pending:
                    # Remove and return the first pending event, and record it unless `stop` has already done
                    # so
                    event = self._pending.popleft()
                    if self._num_recorded:
                        self._num_recorded -= 1
                    else:
                        self._record(event)
                    yield event
                if is_over:
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(POLL_SECONDS)
        except KeyboardInterrupt:
            self.stop()
            raise
        atexit.unregister(self.stop)
        self._raise_error()

    def wait(self, callback: Callable[[Event], None] | None = None) -> "CommandRun":
        """Wait until the command has ended, and return it. An error in the callback stops the command.

        Args:
            callback: Called with each event.

        Raises:
            UserError: If the command ends with a message for the user, which is the error's message.
            RuntimeError: If it ends with any other error.
        """
        try:
            for event in self:
                if callback is not None:
                    callback(event)
        except BaseException:  # of the callback, or Ctrl-C while it works
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Interrupt the command as Ctrl-C does, and wait for its end. A training run saves its state first.

        Events that the caller has not iterated over are recorded in the attributes, too.
        """
        if self.is_running:
            self._was_stopped = True
            self._end_process()
        self._record_pending()

    def __repr__(self) -> str:
        """Return what a notebook shows: the name of the run, whether it runs, its last step and file."""
        self._record_pending()
        name = self.options.get("output_name") or self.script.stem
        code = self._process.poll()
        ending = "finished" if code == 0 else f"failed with code {code}"
        if self._was_stopped:
            ending = "stopped"
        parts = ["running" if code is None else ending]
        if self.losses:
            step = max(self.losses)
            loss = self.losses[step]
            parts.append(f"step {step} of {self._total_steps}")
            parts.append("loss not finite" if loss is None else f"loss {loss:.3g}")
        parts += [str(path) for path in self.saved[-1:]]
        return f"{name}: {', '.join(parts)}"

    def _record_pending(self) -> None:
        """Read the new events and record those that nobody has iterated over."""
        self._pending.extend(self._read_events(is_over=not self.is_running))
        for event in [*self._pending][self._num_recorded :]:
            self._record(event)
        self._num_recorded = len(self._pending)

    def _end_process(self) -> None:
        """Interrupt the command, so that it saves its state, and wait; a second Ctrl-C kills it."""
        try:
            with contextlib.suppress(OSError):  # it has just ended
                if sys.platform == "win32":
                    self._process.send_signal(signal.CTRL_BREAK_EVENT)
                elif signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
                    # a shell script started this program with `&`: it and the command ignore SIGINT
                    os.kill(self._process.pid, signal.SIGTERM)
                else:
                    os.killpg(self._process.pid, signal.SIGINT)
            self._process.wait()
        except KeyboardInterrupt:
            self._process.kill()
            raise

    def __enter__(self) -> "CommandRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _read_events(self, is_over: bool) -> Iterator[Event]:
        yield from self._printed.read(is_over)
        if self._history is not None:
            yield from self._history.read()

    def _record(self, event: Event) -> None:
        """Record an event's loss, file or line in the attributes of the command."""
        match event:
            case LineEvent():
                self.lines.append(event.text)
                if event.text.startswith(WARNING):
                    logger.warning("%s: %s", self.script.stem, event.text.removeprefix(WARNING))
            case StepEvent():
                self.losses[event.step] = event.loss
                self._total_steps = event.total_steps
            case SampleEvent():
                self.samples.append(event.path)
            case SavedEvent():
                self.saved.append(event.path)

    def _raise_error(self) -> None:
        code = self._process.returncode
        if code == 0 or self._was_stopped:
            return
        output = "\n".join(self.lines)
        if code in (1, 2, 3) and "Traceback (most recent call last)" not in output:
            raise UserError(extract_error_message(output))
        raise RuntimeError(f"{self.script.name} ended with code {code}:\n{output[-MAX_OUTPUT_CHARACTERS:]}")
