"""Read command lines that somebody typed as jobs of the queue, after checking all of them."""

import time
from collections.abc import Sequence
from pathlib import Path

from browser.jobs.earlier_jobs import EarlierJob
from browser.jobs.jobs import ENTRY, QUEUE
from browser.jobs.launch import (
    check_options,
    command_part,
    find_earlier_job,
    find_program,
    split_arguments,
    split_folder,
)
from browser.runs.comparable_runs import group_options, working_folder
from browser.runs.runs import RunSummary
from modules.command import quote_command
from modules.pages.language import refusal

EXAMPLE = ["reelsmith run my_clips", "cd my_clips && " + quote_command(["python", "wan_train_network.py"])]
MAX_ADDED = 40  # maximum number of jobs added at once
CHECK_SECONDS = 30.0  # time limit for checking the options of all added jobs


def read_jobs(
    text: str, run: RunSummary | None, earlier: Sequence[EarlierJob] = ()
) -> list[tuple[list[str], Path]]:
    """Return the (arguments, folder) of each command in a text, after checking all of them.

    Args:
        text: The commands, one per line.
        run: Run from which the commands come; None if they were typed.
        earlier: Jobs that are already in the queue. Like earlier commands in the text, they may create files
            that a command reads.

    Raises:
        UserError: If a command is not valid.
    """
    entries = map(str.strip, ENTRY.findall(text.replace("\r\n", "\n")))
    lines = [line for line in entries if line and not line.startswith("#")]
    if not lines:
        raise refusal("Type a command first, such as: %(example)s", example=EXAMPLE[0])
    if len(lines) > MAX_ADDED:
        raise refusal(
            "%(n)s jobs are too many: each is checked by its script, so at most %(most_added)s "
            "can be added at a time. Add them in parts, or write them into %(queue)s",
            n=f"{len(lines):,}",
            most_added=MAX_ADDED,
            queue=QUEUE,
        )
    jobs = [_parse_job(line, run) for line in lines]
    for argv, folder in jobs:  # find all programs first: checking takes about a second per script
        find_program(argv, folder)
    deadline = time.monotonic() + CHECK_SECONDS
    earlier_jobs = [*earlier]
    for argv, folder in jobs:
        seconds_left = deadline - time.monotonic()
        if seconds_left <= 0:  # the other jobs are checked when they start
            break
        check_options(argv, folder, earlier_jobs, seconds=seconds_left)
        earlier_job = find_earlier_job(argv, folder)
        if earlier_job:
            earlier_jobs.append(earlier_job)
    return jobs


def _parse_job(line: str, run: RunSummary | None) -> tuple[list[str], Path]:
    """Return a command's arguments, and its folder: from a `cd` in the line, or where it was typed."""
    # `run` is the run from which the command comes; None if it was typed into the page.
    argv = split_arguments(command_part(line))
    typed_in = Path.cwd()
    if run is not None:
        typed_in = working_folder(run, group_options(argv))
    _, folder = split_folder(line, typed_in)
    return argv, folder
