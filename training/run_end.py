"""Start a command when a run is over, describe the run in environment variables, and wait a little."""

import logging
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modules.command import LAUNCHER_VARIABLES
from modules.console import format_count
from modules.control_codes import escape_control_codes, shorten
from modules.errors import INTERRUPTED, OptionError, UserError

logger = logging.getLogger(__name__)

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
MAX_WAIT_SECONDS = 60.0  # seconds to wait for the command
MAX_ERROR_CHARACTERS = 1000  # characters of the error
# variables of a multi-process launcher, removed so that the command may train without being taken for one of
# the launcher's processes
LAUNCHER_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class EndedRun:
    """Description of an ended run, passed to the user's --on_end command."""

    folder: Path  # --output_dir
    name: str  # --output_name
    step: int  # the last finished one
    steps: int | None  # in total; None: not known
    is_finished: bool
    page: Path | None  # None: there is none
    error: str = ""  # error of a program that the run has started


def start_command(
    option: str,
    argv: Sequence[str],
    run: EndedRun,
    error: BaseException | None,
    *,
    has_begun: bool,
    max_seconds: float = MAX_WAIT_SECONDS,
) -> None:
    """Start a command such as --on_end after a run has ended, and wait for it; log a warning if it fails.

    The command does not affect the exit code of this program.

    Args:
        option: Flag of the option.
        argv: Arguments of the command.
        run: Description of the run.
        error: Error that ended the run.
        has_begun: Whether the run itself has begun. Before that, wrong options do not start the command,
            because the user has just typed them and sees the error.
        max_seconds: Seconds to wait for its end.
    """
    code = get_exit_code(error)
    if code == OptionError.exit_code and not has_begun:
        return
    _start_program(option, argv, _list_variables(run, code, error), max_seconds)


def get_exit_code(error: BaseException | None) -> int:
    """Return the exit code of a program that ends with this error; 0 without an error."""
    if error is None:
        return 0
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return error.code or 0
    return 1


def _list_variables(run: EndedRun, code: int, error: BaseException | None) -> dict[str, str]:
    """Return the environment variables that describe how a run has ended."""
    state = FAILED
    if code == 0 and run.is_finished:
        state = FINISHED
    elif code in (0, INTERRUPTED):  # 0 before the last step: a user ended the run; INTERRUPTED: by Ctrl-C
        state = STOPPED
    message = ""
    if state == FAILED and error is not None:
        # The first line of the message of the error that ended a run, shortened for a variable
        text = str(error) or type(error).__name__
        if isinstance(error, SystemExit):
            text = f"exit code {code}"
        first_line = (run.error or text).strip().partition("\n")[0]
        message = shorten(escape_control_codes(first_line), MAX_ERROR_CHARACTERS)
    return {
        "REELSMITH_STATE": state,
        "REELSMITH_EXIT_CODE": str(code),
        "REELSMITH_OUTPUT_DIR": str(run.folder),
        "REELSMITH_OUTPUT_NAME": run.name,
        "REELSMITH_STEP": str(run.step),
        "REELSMITH_STEPS": "" if run.steps is None else str(run.steps),
        "REELSMITH_PAGE": "" if run.page is None else str(run.page),
        "REELSMITH_ERROR": message,
    }


def _start_program(option: str, argv: Sequence[str], variables: dict[str, str], max_seconds: float) -> None:
    """Start a program without a shell, and wait for it for at most `max_seconds`. Warns if it fails."""
    # without the variables that mark a process of a multi-process launcher
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    program = argv[0]  # log only the program: its arguments may contain a key
    logger.info("%s: starting %s.", option, program)
    try:
        process = subprocess.Popen(argv, env={**inherited, **variables}, stdin=subprocess.DEVNULL)
    except OSError as error:
        logger.warning("%s: %s cannot be started: %s", option, program, error.strerror or error)
        return
    try:
        code = process.wait(max_seconds)
    except subprocess.TimeoutExpired:
        seconds = format_count(round(max_seconds), "second")
        logger.warning("%s: %s still runs after %s. It is left alone.", option, program, seconds)
    except KeyboardInterrupt:
        logger.warning("%s: no longer waiting for %s.", option, program)
    else:
        if code:
            logger.warning(
                "%s: %s has failed with exit code %d. The run itself is not affected.",
                option,
                program,
                code,
            )
