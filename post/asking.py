"""Ask at the console what to do about files that exist."""

import sys
from collections.abc import Callable
from typing import Literal

Answer = Literal["overwrite", "leave", "free"]


def ask_at_console(
    question: str,
    read: Callable[[str], str] = input,
    is_terminal: Callable[[], bool] = lambda: sys.stdin is not None and sys.stdin.isatty(),
) -> Answer | None:
    """Ask whether to overwrite; returns None without a terminal. No answer leaves files as they are."""
    if not is_terminal():
        return None
    try:
        answer = read(f"{question}? y: yes, N: no, f: find a free name [y/N/f] ").strip().lower()
    except EOFError:
        answer = ""
    if answer in {"y", "yes"}:
        return "overwrite"
    return "free" if answer in {"f", "free"} else "leave"
