"""Pages of trainings: a process of its own draws them, and may be later than the end of the training."""

from pathlib import Path

from tests.waiting import wait_for
from training.reports.drawing import is_page_current
from training.reports.history import BEFORE_TRAINING, END, history_name, history_path
from training.reports.sections import page_path


def find_run_page(output: Path, name: str = "x") -> Path:
    """Return the page of a training that has ended, once it shows all of it. output: its folder."""
    page = page_path(output, name)
    wait_for(lambda: page.is_file() and is_page_current(history_path(output, name)), lambda: f"no {page}")
    return page


def read_run_page(output: Path, name: str = "x") -> str:
    """Return the text of this page."""
    return find_run_page(output, name).read_text(encoding="utf-8")


def wait_for_run_pages(folder: Path) -> None:
    """Wait until all trainings below a folder have their pages."""
    for history in folder.rglob(f"*{END}"):
        if not history.name.endswith(f"{BEFORE_TRAINING}{END}"):  # `run` itself has no page
            find_run_page(history.parent, history_name(history))
