"""Ask for lines at the console, with editing and history if available; ring the terminal's bell."""

import contextlib
import importlib.util
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator

from modules.command import draws_boxes

logger = logging.getLogger(__name__)

SIGN = "> "
_QUIT = re.compile(r":?(?:quit|exit)(?:\(\))?|:q", re.IGNORECASE)
_HELP = re.compile(r":?help(?:\(\))?|\?|--help|-h", re.IGNORECASE)


def line_reader(options: Iterable[tuple[str, str]], help_end: str = "") -> Callable[[], str]:
    """Return a function that asks for a line; like `input`, it raises EOFError and KeyboardInterrupt.

    `quit` and `exit` end the input too; `help` shows the options of a line and asks again. Line editing and
    history come from the package prompt_toolkit, which also works on Windows, or else from readline.

    Args:
        options: Options of a line, by letters and names.
        help_end: Help text after the options.
    """
    logger.info(
        "Enter a prompt and options such as --s 20 --d 7; help lists them. Ctrl-C cancels the current "
        "prompt, quit or Ctrl-D ends.%s",
        help_end,
    )
    option_lines = [f"--{character} {name}" for character, name in options]
    ask: Callable[[], str] = lambda: input(SIGN)  # noqa: E731
    if sys.stdin.isatty() and importlib.util.find_spec("prompt_toolkit") is not None:
        from prompt_toolkit import PromptSession  # optional: pip install prompt_toolkit

        session: PromptSession[str] = PromptSession(SIGN)
        ask = session.prompt
    else:
        try:
            import readline  # noqa: F401 (gives input() line editing and history; missing on Windows)
        except ImportError:
            logger.info("For line editing and history: pip install prompt_toolkit")

    def read() -> str:
        line = ask()
        while _HELP.fullmatch(line.strip()):
            logger.info(
                "A line is a prompt, then options: a cat --w 832 --h 480\n  %s", "\n  ".join(option_lines)
            )
            line = ask()
        if _QUIT.fullmatch(line.strip()):
            raise EOFError
        return line

    return read


@contextlib.contextmanager
def ring_after(is_asked: bool) -> Iterator[None]:
    """Ring the terminal's bell after the block if `is_asked`, even after an error; never in a log file."""
    try:
        yield
    finally:
        if is_asked and draws_boxes(sys.stderr):
            sys.stderr.write("\a")
            sys.stderr.flush()
