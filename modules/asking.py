"""Ask the user about files that exist. Standard library only."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from modules.errors import OutputError

Answer = Literal["overwrite", "leave", "free"]


def has_terminal() -> bool:
    """Return whether somebody can be asked."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def ask_on_terminal(question: str) -> str:
    """Show a question and return the line that is typed; empty at the end of input."""
    sys.stderr.write(question)  # standard output is for results
    sys.stderr.flush()
    return sys.stdin.readline()


def ask_at_console(
    question: str,
    read: Callable[[str], str] = ask_on_terminal,
    is_terminal: Callable[[], bool] = has_terminal,
    offers_name: bool = True,
) -> Answer | None:
    """Ask whether to overwrite; return None without a terminal. No answer leaves files as they are.

    offers_name: "free" can be answered, which is to find a free name.
    """
    if not is_terminal():
        return None
    choices = "y: yes, N: no, f: find a free name [y/N/f]" if offers_name else "y: yes, N: no [y/N]"
    answer = read(f"{question}? {choices} ").strip().lower()
    if answer in {"y", "yes"}:
        return "overwrite"
    return "free" if offers_name and answer in {"f", "free"} else "leave"


def ask_yes_or_no(question: str) -> Answer | None:
    """Ask as `ask_at_console`, for results that have no other name."""
    return ask_at_console(question, offers_name=False)


def ask_to_replace(
    paths: Sequence[Path], yes: bool, ask: Callable[[str], Answer | None] = ask_yes_or_no
) -> None:
    """Ask whether files that exist may be replaced; do nothing if there are none, or `yes` is set.

    ask: as `ask_yes_or_no`. Raises OutputError if the answer is no, or if there is nobody to ask.
    """
    existing = [path for path in paths if path.exists()]
    if not existing or yes:
        return
    more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
    verb = "exist" if more else "exists"
    answer = ask(f"{existing[0]}{more} {verb} already. Overwrite")
    if answer is None:
        raise OutputError(f"{existing[0]}{more} {verb} already. Give another name, or --yes to replace.")
    if answer != "overwrite":
        raise OutputError(f"{existing[0]} is kept. Nothing was written.")
