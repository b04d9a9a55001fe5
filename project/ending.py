"""Say how a `run` of a described folder has ended, for the command of --on_end."""

import logging
from pathlib import Path

from modules.text_files import real_path
from training.end_command import RunFacts
from training.reports.history import History, Story, history_path, read_session
from training.reports.page import page_path

logger = logging.getLogger(__name__)


def describe_run(output: Path, name: str, steps: int | None, began: float) -> RunFacts:
    """Return the known facts of a run, from the files that its training has written.

    output, name: of the training. steps: in total; None: not known. began: when the run began, in seconds
    since 1970. Older files are of an earlier run.
    """
    story = _read_story(output, name, began)
    page = page_path(output, name)
    error = ""
    is_finished = _is_new(output / f"{name}.safetensors", began)
    if story.ending is not None:
        text, kind = story.ending
        is_finished = kind == "good"
        error = text if kind == "bad" else ""
    if steps is None and story.start is not None:
        steps = story.start.total_steps
    return RunFacts(
        folder=real_path(output),
        name=name,
        step=max(story.loss, default=0),
        steps=steps,
        is_finished=is_finished,
        page=real_path(page) if page.is_file() else None,
        error=error,
    )


def _read_story(output: Path, name: str, began: float) -> Story:
    """Return the history of a training; an empty one if it has written none."""
    path = history_path(output, name)
    session = read_session(path)
    if session is None or not _is_new(path, began):
        return Story()
    try:
        return History(path, session, is_written=False).read()
    except OSError as error:
        logger.debug("%s cannot be read: %s", path, error)
        return Story()


def _is_new(path: Path, began: float) -> bool:
    """Return whether a file was written after the run began."""
    try:
        return path.stat().st_mtime >= began
    except OSError:
        return False
