"""Limit what a run of a described folder may do, if somebody else wrote it. Standard library only.

`run_project.py` sets the limits for itself and for the commands that it starts, in variables of the
environment, and so does the browser for commands that its buttons start for a folder. Everything that is
written goes below the folder or below those that its command line names; what leaves this machine is typed
there. Other commands have no limits.
"""

import contextlib
import functools
import os
import shlex
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from modules.errors import OptionError, OutputError
from modules.text_files import real_path

FOLDERS_VARIABLE = "REELSMITH_RUN_FOLDERS"  # JSON list of folders; the first one is the run's
COMMAND_VARIABLE = "REELSMITH_RUN_COMMAND"  # command line of the run; "" for other commands
TYPED_VARIABLE = "REELSMITH_RUN_TYPED"  # options that the user typed for the run, separated by spaces
# option of a command -> the option of `run` that allows its folder to be elsewhere
ALLOWED_BY = {"output_dir": "output_dir", "logging_dir": "logging_dir", "to": "models"}
OTHER_FOLDERS_OPTION = "may_write"  # option of `run` that allows any other folder
# folder of the browser's queue, below a root: its files contain the commands to start
QUEUE_FOLDER = "reelsmith-queue"


def limit_variables(
    folders: Iterable[Path], typed: Collection[str] = (), command: str = ""
) -> dict[str, str]:
    """Return the environment variables that let a process and its children write only below these folders.

    Args:
        folders: At least one folder; the first one is the run's.
        typed: Names of the options that the user typed; only these may send data (`reject_sending`).
        command: Command line of a run, for messages; "" for commands that have no option to allow more.
    """
    import json  # here: all options import this file

    return {
        FOLDERS_VARIABLE: json.dumps([str(real_path(folder)) for folder in folders]),
        TYPED_VARIABLE: " ".join(sorted(typed)),
        COMMAND_VARIABLE: command,
    }


@contextlib.contextmanager
def limit_run(folders: Sequence[Path], typed: Collection[str] = (), command: str = "run") -> Iterator[None]:
    """Let this process and its child processes write only below `folders` until the block ends."""
    variables = limit_variables(folders, typed, command)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a temporary folder outside the run's folders, to which even a limited run may write."""
    import json  # both imported here: all options import this file
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not is_limited():
            yield folder
            return
        allowed = str(real_path(folder))
        os.environ[FOLDERS_VARIABLE] = json.dumps([*json.loads(os.environ[FOLDERS_VARIABLE]), allowed])
        try:
            yield folder
        finally:
            others = [other for other in json.loads(os.environ[FOLDERS_VARIABLE]) if other != allowed]
            os.environ[FOLDERS_VARIABLE] = json.dumps(others)


def is_limited() -> bool:
    """Return whether this process runs somebody else's folder, so that its options are limited."""
    return bool(os.environ.get(FOLDERS_VARIABLE))


def describe_outside(path: Path, option: str = "") -> str | None:
    """Return why a run may not write below a path, with advice; None if it may."""
    text = os.environ.get(FOLDERS_VARIABLE)
    if not text:
        return None
    allowed_folders = _read_folders(text)
    resolved = _resolve(os.path.abspath(path))  # noqa: PTH100
    relative = [resolved.relative_to(folder) for folder in allowed_folders if resolved.is_relative_to(folder)]
    if relative:
        if not all(map(is_in_queue, relative)):
            return None
        return (
            f"{resolved} is in the folder of the browser's queue, whose files say what is started. Choose "
            "another folder"
        )
    restriction = f"{resolved} is outside of {allowed_folders[0]}, the only place where"
    if not os.environ.get(COMMAND_VARIABLE):
        return (
            f"{restriction} a button of the page for that folder writes. Fix it; or, if you want it there, "
            "start the command in a terminal"
        )
    command = _run_command(f"--{ALLOWED_BY.get(option, OTHER_FOLDERS_OPTION)}", str(resolved))
    return f"{restriction} `run` writes unasked.\n  Fix it; or, if you want it there, type it: {command}"


def is_in_queue(path: Path) -> bool:
    """Return whether a relative path leads into a folder of a queue; ignores case, as some disks do."""
    return any(part.casefold().rstrip(" .") == QUEUE_FOLDER for part in path.parts)


def reject_outside(option: str, path: Path) -> None:
    """Raise OptionError if an option's path is outside the folders that the run may write to."""
    error = describe_outside(path, option)
    if error is not None:
        raise OptionError(f"--{option} {path}: {error}")


def reject_writing(path: Path) -> None:
    """Raise OutputError if a run may not write this file or folder, such as a link that leads elsewhere."""
    if not is_limited():
        return
    # a link of this name is replaced or followed by the caller, a folder of the queue's name is not made
    error = describe_outside(path if is_in_queue(Path(path.name)) else path.parent)
    if error is not None:
        raise OutputError(f"{path}: {error}")


def reject_sending(option: str, value: object, run_has_option: bool = False) -> None:
    """Raise OptionError if an option that sends data from this machine comes from a file and was not typed.

    Only processes whose folders are limited (`limit_run`) are checked. With `run_has_option`, the message
    names the option of the command `run` that allows it.
    """
    if not is_limited() or option in os.environ.get(TYPED_VARIABLE, "").split():
        return
    if not os.environ.get(COMMAND_VARIABLE):  # a button of the page has started this
        remedy = "start the command in a terminal"
    elif run_has_option:
        remedy = f"type it: {_run_command(f'--{option}', str(value))}"
    else:
        remedy = f"start the training itself, with the last command of {_run_command('--dry_run')}"
    raise OptionError(
        f"--{option}: what a folder describes does not leave this machine unasked. Omit it; or, "
        f"if you want it, {remedy}"
    )


def _run_command(*words: str) -> str:
    """Return this run's command with additional arguments, as a user would type it."""
    return f"{os.environ[COMMAND_VARIABLE]} {shlex.join(words)}"


@functools.lru_cache(maxsize=4096)  # called for each file that is written
def _resolve(path: str) -> Path:
    return Path(os.path.normcase(os.path.realpath(path)))


@functools.lru_cache(maxsize=8)
def _read_folders(text: str) -> tuple[Path, ...]:
    import json  # likewise

    return tuple(Path(os.path.normcase(folder)) for folder in json.loads(text))
