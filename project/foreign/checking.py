"""Check a run of another trainer's values as `run` does, before its files are written."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modules.atomic_write import write_text
from modules.run_limits import temporary_folder
from project.foreign.reading import ForeignProject
from project.foreign.settling import drop
from project.options import RUN_FILE
from project.script_facts import check_options

MOST_TURNS = 12  # values that one after the other are refused; more are no mistake of a few settings
# a file of the model that `run --download` loads first, or that `new` has still to write
NOT_THERE = re.compile(r"no such file|there is no|not found|is missing", re.IGNORECASE)


def check_run(
    project: ForeignProject, script: str, folder: Path, write: Callable[[Mapping[str, Any]], str]
) -> None:
    """Take values back that the script refuses, each with its message as the reason.

    write: returns the text of run.toml with these keys of the training. folder: that is described.
    """
    for _ in range(MOST_TURNS):
        with temporary_folder() as copies:
            copy = copies / RUN_FILE
            write_text(copy, write(project.training))
            message = check_options(script, ["--config_file", str(copy)], folder)
        if message is None or NOT_THERE.search(message):
            return
        blamed = _find_blamed(project, message)
        if blamed is None:
            text = " ".join(message.replace(str(copy), RUN_FILE).split())
            project.left.append(f"this run would not begin: {text}")
            return
        drop(project, blamed, " ".join(message.replace(f"{copy}: ", "").split()))


def _find_blamed(project: ForeignProject, message: str) -> str | None:
    """Return the first option of a message that the project has set."""
    names = re.findall(r"(?:--|\b)([a-z][a-z0-9_]+)", message)
    return next((name for name in names if name in project.training), None)
