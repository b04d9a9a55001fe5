"""Start the command of --on_end when a run is over, and wait a little for it."""

import logging
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from modules.command import INTERRUPTED, LAUNCHED
from modules.console import count_of
from modules.control_codes import escape_control_codes, shorten
from modules.errors import OptionError, UserError
from training.end_options import ON_END

logger = logging.getLogger(__name__)

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
PATIENCE = 60.0  # seconds that the command is waited for
MOST_OF_ERROR = 1000  # characters
# what a launcher of several processes sets: a training that the command starts is not one of them
OF_LAUNCHERS = ("ACCELERATE_", "TORCHELASTIC_", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class RunFacts:
    """Hold what the command can read about the run."""

    folder: Path  # --output_dir
    name: str  # --output_name
    step: int  # the last finished one
    steps: int | None  # in total; None: not known
    is_finished: bool
    page: Path | None  # None: there is none
    error: str = ""  # of a program that the run has started


class EndCommand:
    """Start a command when the block ends, once, if `describe` was called in it.

    An error of the block is passed on, and nothing that the command does changes how this program ends.
    """

    def __init__(self, words: Sequence[str], patience: float = PATIENCE) -> None:
        """words: of the command; none: nothing is started. patience: seconds to wait for its end."""
        self._words = words
        self._patience = patience
        self._facts: Callable[[], RunFacts] | None = None
        self._has_begun = False

    def describe(self, facts: Callable[[], RunFacts]) -> None:
        """Have the command started in the end, by this process. facts: of the run, as they are then."""
        self._facts = facts

    def note_beginning(self) -> None:
        """Note that the run has begun: from here on a wrong option is an error of the run."""
        self._has_begun = True

    def __enter__(self) -> "EndCommand":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.start(error)

    def start(self, error: BaseException | None) -> None:
        """Start the command, and wait for it, unless it was started before. error: that ended the run."""
        describe_run = self._facts
        self._facts = None
        if not self._words or describe_run is None:
            return
        code = exit_code_of(error)
        if code == OptionError.exit_code and not self._has_begun:
            return  # wrong options: somebody has just typed them
        variables = _variables(describe_run(), code, error)
        _start_program(self._words, variables, self._patience)


def exit_code_of(error: BaseException | None) -> int:
    """Return the exit code of a program of ours that this error ends."""
    if error is None:
        return 0
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return error.code or 0
    return 1


def _variables(facts: RunFacts, code: int, error: BaseException | None) -> dict[str, str]:
    """Return the variables that say how a run has ended. code: the exit code of this program."""
    state = FAILED
    if code == INTERRUPTED:
        state = STOPPED
    elif code == 0:
        state = FINISHED if facts.is_finished else STOPPED
    message = ""
    if state == FAILED and error is not None:
        text = f"exit code {code}" if isinstance(error, SystemExit) else str(error) or type(error).__name__
        first_line = (facts.error or text).strip().partition("\n")[0]
        message = shorten(escape_control_codes(first_line), MOST_OF_ERROR)
    return {
        "REELSMITH_STATE": state,
        "REELSMITH_EXIT_CODE": str(code),
        "REELSMITH_OUTPUT_DIR": str(facts.folder),
        "REELSMITH_OUTPUT_NAME": facts.name,
        "REELSMITH_STEP": str(facts.step),
        "REELSMITH_STEPS": "" if facts.steps is None else str(facts.steps),
        "REELSMITH_PAGE": "" if facts.page is None else str(facts.page),
        "REELSMITH_ERROR": message,
    }


def _start_program(words: Sequence[str], variables: dict[str, str], patience: float) -> None:
    """Start a program without a shell, and wait for it for some seconds. Warns if it fails."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHED and not name.startswith(OF_LAUNCHERS)
    }
    program = words[0]  # the words behind it may hold a key
    logger.info("--%s: starting %s.", ON_END, program)
    try:
        process = subprocess.Popen(words, env={**inherited, **variables}, stdin=subprocess.DEVNULL)
    except OSError as error:
        logger.warning("--%s: %s cannot be started: %s", ON_END, program, error.strerror or error)
        return
    try:
        code = process.wait(patience)
    except subprocess.TimeoutExpired:
        seconds = count_of(round(patience), "second")
        logger.warning("--%s: %s still runs after %s. It is left alone.", ON_END, program, seconds)
    except KeyboardInterrupt:
        logger.warning("--%s: %s is not waited for any longer.", ON_END, program)
    else:
        if code:
            logger.warning(
                "--%s: %s has failed with exit code %d. The run itself is not affected.",
                ON_END,
                program,
                code,
            )
