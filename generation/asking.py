"""Ask for lines at the console, with editing and history where the machine has them."""

import importlib.util
import logging
import sys
from collections.abc import Callable

logger = logging.getLogger(__name__)


def line_reader(sign: str) -> Callable[[], str]:
    """Return a function that asks for one line; it raises EOFError and KeyboardInterrupt as `input` does.

    With the package prompt_toolkit lines are edited and recalled by it, also on Windows; else by readline.
    """
    if sys.stdin.isatty() and importlib.util.find_spec("prompt_toolkit") is not None:
        from prompt_toolkit import PromptSession  # optional: pip install prompt_toolkit

        session: PromptSession[str] = PromptSession(sign)
        return session.prompt
    try:
        import readline  # noqa: F401 (line editing and history for input(); not there on Windows)
    except ImportError:
        logger.info("For line editing and history: pip install prompt_toolkit")
    return lambda: input(sign)
