"""Ask at the console what to do about files that exist."""

from collections.abc import Callable
from typing import Literal

from modules.output_files import ask_on_terminal, has_terminal

Answer = Literal["overwrite", "leave", "free"]


def ask_at_console(
    question: str,
    read: Callable[[str], str] = ask_on_terminal,
    is_terminal: Callable[[], bool] = has_terminal,
) -> Answer | None:
    """Ask whether to overwrite; returns None without a terminal. No answer leaves files as they are."""
    if not is_terminal():
        return None
    answer = read(f"{question}? y: yes, N: no, f: find a free name [y/N/f] ").strip().lower()
    if answer in {"y", "yes"}:
        return "overwrite"
    return "free" if answer in {"f", "free"} else "leave"
