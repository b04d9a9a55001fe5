"""Check a run of another trainer's values as `run` does, before its files are written."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modules.atomic_write import write_text
from modules.run_limits import temporary_folder
from modules.text_files import parse_toml
from project.foreign.project import ForeignProject
from project.options import RUN_FILE
from project.script_facts import check_options

MAX_REJECTIONS = 12  # maximum number of rejected values
# message about a file that `run --download` or `new` will still create
MISSING_FILE_MESSAGE = re.compile(r"no such file|there is no|not found|is missing", re.IGNORECASE)


def check_run(
    project: ForeignProject,
    script: str,
    folder: Path,
    make_run_files: Callable[[Mapping[str, Any]], Mapping[str, str]],
) -> None:
    """Drop the options that the training script rejects, one by one, with its message as the reason.

    Args:
        project: The project to check.
        script: Options of the training script.
        folder: The dataset folder.
        make_run_files: Returns the run's files (name -> text) with the given training options.
    """
    # a script reports one bad option at a time
    for _ in range(MAX_REJECTIONS):
        message = _find_rejection_message(script, folder, make_run_files(project.training_options))
        # accepted, or it lacks a file that `run --download` or `new` will still create
        if message is None or MISSING_FILE_MESSAGE.search(message):
            return
        # the first option in the message that comes from the other trainer's file
        names = re.findall(r"(?:--|\b)([a-z][a-z0-9_]+)", message)
        rejected_option = next((name for name in names if name in project.training_options), None)
        if rejected_option is None:
            # the message is not about any of the project's options
            project.omission_lines.append(f"this run would not begin: {message}")
            return
        project.remove_option(rejected_option, message)


def _find_rejection_message(script: str, folder: Path, texts: Mapping[str, str]) -> str | None:
    """Return the error with which a training script rejects a run's options; None if it accepts them."""
    # `texts` maps file names of the run to their contents. The files are not in the folder yet, so temporary
    # copies are checked.
    with temporary_folder() as copies:
        for name, text in texts.items():
            write_text(copies / name, text)
        argv = ["--config_file", str(copies / RUN_FILE)]
        for option, value in parse_toml(texts[RUN_FILE])["training"].items():
            # the option names another of the run's files
            if isinstance(value, str) and value in texts:
                argv += [f"--{option}", str(copies / value)]
        message = check_options(script, argv, folder)
        if message is None:
            return None
        # paths of the temporary copies mean nothing to the user
        message = message.replace(f"{copies / RUN_FILE}: ", "").replace(f"{copies}{os.sep}", "")
        return " ".join(message.split())
