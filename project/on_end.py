"""Start the command of --on_end when a `run` of a described folder is over, and say how it has ended."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from modules.text_files import real_path
from project.options import ON_END
from training.reports.drawing import wait_for_page
from training.reports.history import RunHistory, history_path, read_history, read_session
from training.run_end import EndedRun, start_command

logger = logging.getLogger(__name__)


class EndCommand:
    """Context manager that starts the --on_end command at its end, if `arm` was called in the block.

    An error raised in the block is passed on.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        """Store the command's arguments; with no arguments, nothing is started."""
        self._argv = argv
        self._describe_ended_run: Callable[[], EndedRun] | None = None  # None: the run has not begun

    def arm(self, describe_ended_run: Callable[[], EndedRun]) -> None:
        """Start the command when the `with` block ends; call this when the run begins.

        `describe_ended_run` is called at the end of the block, and its result is passed to the command.
        """
        self._describe_ended_run = describe_ended_run

    def __enter__(self) -> "EndCommand":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._argv and self._describe_ended_run is not None:
            start_command(ON_END, self._argv, self._describe_ended_run(), error, has_begun=True)


def describe_run(output: Path, name: str, steps: int | None, began: float) -> EndedRun:
    """Return how a run ended, for the --on_end command, from the files that its training has written.

    Args:
        output: Output folder of the training run.
        name: Name of the trained files.
        steps: Total number of steps; None if unknown.
        began: When the run began, in seconds since 1970. Older files belong to an earlier run.
    """
    run_history = _read_run_history(output, name, began)
    page = wait_for_page(history_path(output, name))
    error = ""
    # without a history, the trained file shows that the run has finished
    is_finished = _is_new(output / f"{name}.safetensors", began)
    if run_history.ending is not None:
        reason, outcome = run_history.ending  # outcome: good, bad, or neither for a run that was stopped
        is_finished = outcome == "good"
        error = reason if outcome == "bad" else ""
    # a length in epochs becomes a number of steps only when training starts
    if steps is None and run_history.start is not None:
        steps = run_history.start.total_steps
    return EndedRun(
        folder=real_path(output),
        name=name,
        step=max(run_history.loss, default=0),
        steps=steps,
        is_finished=is_finished,
        page=None if page is None else real_path(page),
        error=error,
    )


def _read_run_history(output: Path, name: str, began: float) -> RunHistory:
    """Read the history of a training run; it is empty if none was written since `began`."""
    path = history_path(output, name)
    session = read_session(path)
    if session is None or not _is_new(path, began):
        return RunHistory()
    try:
        return read_history(path, session)
    except OSError as error:
        logger.debug("%s cannot be read: %s", path, error)
        return RunHistory()


def _is_new(path: Path, began: float) -> bool:
    """Return whether a file was modified after the run began."""
    try:
        return path.stat().st_mtime >= began
    except OSError:
        return False
