"""Draw the page of a training in a separate process, which the training starts and never waits for.

The process ends when its training ends or is killed, because its standard input is closed then. Before it
ends, it draws the page a last time.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from modules.atomic_write import give_name, temporary_name
from modules.errors import OutputError
from modules.installation import PREFIX, ROOT, program_environment
from training.reports.history import RunHistory, Start, history_name, read_history, read_session
from training.reports.sections import SAMPLES, page_path

REQUEST, END = b"\n", b"."  # requests to the process: draw the page; draw it for the last time
MAX_REQUESTS = 65_536  # maximum read at once: several waiting requests are handled as one
LOWER_PRIORITY = 5  # how much to lower the priority below that of the training
PAGE_SECONDS = 20.0  # how long to wait for the page of a finished run
PAUSE = 0.05  # seconds between two checks


class PageProcess:
    """A process that draws the HTML page of one run, on request and at the end of the run."""

    def __init__(self, history: Path) -> None:
        """Start the process that draws the page of a run.

        Args:
            history: The history of the run, from which the page is drawn.

        Raises:
            OutputError: If no process can be started.
        """
        # the page has commands, which begin with this script's name and have paths relative to this folder
        arguments = [str(history.absolute()), str(Path.cwd()), sys.argv[0]]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{PREFIX}training.reports.drawing", *arguments],
                cwd=ROOT,
                env=program_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,  # Ctrl-C must reach only the training
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            raise OutputError(f"no process can be started: {error.strerror or error}") from error
        # wait for the process in a thread, so that no zombie process remains when it ends
        threading.Thread(target=self._process.wait, daemon=True).start()

    def draw(self) -> None:
        """Ask the process to draw the page from the current history on disk.

        Raises:
            OutputError: If drawing an earlier page failed and ended the drawing process.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(REQUEST)
        except OSError:
            raise OutputError(self._read_reason()) from None

    def close(self) -> None:
        """Ask for the final page. Raises OutputError if an earlier page could not be drawn."""
        assert self._process.stdin is not None
        try:
            # closing the pipe alone is not enough: data loader workers may keep it open for some time
            self._process.stdin.write(END)
            self._process.stdin.close()
        except OSError:
            raise OutputError(self._read_reason()) from None

    def _read_reason(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.read().decode("utf-8", "replace").strip() or "its process has ended"


def wait_for_page(history: Path, seconds: float = PAGE_SECONDS) -> Path | None:
    """Wait until the page of a run that has ended shows its whole history.

    Args:
        history: The history of the run.
        seconds: Maximum number of seconds to wait; then the page is returned as it is.

    Returns:
        The path of the page; None if there is no page.
    """
    page = page_path(history.parent, history_name(history))
    end = time.monotonic() + seconds
    while not is_page_current(history) and time.monotonic() < end:
        time.sleep(PAUSE)
    return page if page.is_file() else None


def is_page_current(history: Path) -> bool:
    """Return whether the page of a run was drawn after its history changed last; True without a history."""
    page = page_path(history.parent, history_name(history))
    try:
        written = history.stat().st_mtime_ns
    except OSError:
        return True  # there is nothing to draw
    with contextlib.suppress(OSError):
        return page.stat().st_mtime_ns >= written
    return False


def draw_page(history: Path, draw: Callable[[Path, RunHistory], None], *, is_over: bool) -> None:
    """Draw the page of a run from its history, if there is one.

    A newer page is kept: the process of a killed run may still draw after the resumed run has drawn its page.

    Args:
        history: The history of the run.
        draw: Writes the page of a run history to a path.
        is_over: Whether the run has ended; if its history does not record the end, the page says that the
            run was killed.
    """
    session = read_session(history)
    if session is None:
        return
    history_time = history.stat().st_mtime_ns  # before reading, so that later lines are newer than the page
    run_history = read_history(history, session)
    if is_over and run_history.ending is None:
        step = max(run_history.loss, default=0)
        run_history.ending = f"died after step {step:,} without a message", "bad"
    page = page_path(history.parent, history_name(history))
    new_page = temporary_name(page)
    draw(new_page, run_history)
    os.utime(new_page, ns=(history_time, history_time))  # tells which version of the history it shows
    if page.is_file() and page.stat().st_mtime_ns > history_time:
        new_page.unlink()
    else:
        give_name(new_page, page)


def main(argv: Sequence[str]) -> None:
    """Draw the page of a run whenever standard input has a request, and when it ends.

    Args:
        argv: Path of the history, working folder of the training process, and its script as typed.
    """
    history_file, working_folder, script = argv
    history = Path(history_file)
    sys.argv[0] = script  # the page's commands name the script of the training, not this one
    # if the folder was removed, only the commands on the page are affected
    with contextlib.suppress(OSError):
        os.chdir(working_folder)
    if hasattr(os, "nice"):
        os.nice(LOWER_PRIORITY)
    from training.reports.page import Standing, write_training_page  # slow, and needed only in this process
    from training.reports.sample_files import ClipStore

    clips = ClipStore(history.parent / SAMPLES)

    def draw(path: Path, run_history: RunHistory) -> None:
        start = run_history.start or Start("", 0)
        text, kind = run_history.ending or ("running", "")
        step = max((*run_history.loss, *run_history.starts), default=0)
        load = clips.for_page() if run_history.samples else None
        write_training_page(path, history, run_history, Standing(start, step, text, kind), load=load)

    try:
        is_over = False
        while not is_over:
            requests = os.read(sys.stdin.fileno(), MAX_REQUESTS)
            is_over = not requests or END in requests  # nothing to read: the training process is gone
            draw_page(history, draw, is_over=is_over)
    except Exception as error:  # of any type: the training process shows its message
        with contextlib.suppress(OSError):
            os.write(sys.stdout.fileno(), str(error or type(error).__name__).encode())
        raise SystemExit(1) from None


if __name__ == "__main__":
    main(sys.argv[1:])
