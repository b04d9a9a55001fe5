"""The frame around every script: logging, clean error output, exit codes. Standard library only, so `--help` answers at once."""

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from modules.errors import CheckpointError, UserError

INTERRUPTED = 130  # the shell's code for a program ended by Ctrl-C


def start_logging(level: int = logging.INFO) -> None:
    """Send log lines to standard error, UTF-8 where the stream allows; coloured on a terminal. Calling it again changes nothing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    if logging.getLogger().handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_LineFormatter(colour=sys.stderr.isatty()))
    logging.basicConfig(level=level, handlers=[handler])


def command_line(main: Callable[[], None], explain: Callable[[Path], str | None] | None = None) -> None:
    """Run `main` as a program: a UserError is printed without a traceback and ends with its exit code.

    explain: given the file of a CheckpointError, says what that file really is, or None; printed as a hint.
    """
    start_logging()
    try:
        main()
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        if isinstance(error, CheckpointError) and error.path is not None and explain is not None:
            hint = explain(error.path)
            if hint and hint not in str(error):
                print(f"  {error.path.name}: {hint}.", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def as_typed(words: Sequence[str]) -> str:
    """A command as it is typed: quoted for the shell of this system."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


class _LineFormatter(logging.Formatter):
    """`message` for information, `WARNING: message` above it."""

    _colours = {logging.WARNING: "\033[33m", logging.ERROR: "\033[31m", logging.CRITICAL: "\033[31m", logging.DEBUG: "\033[2m"}

    def __init__(self, colour: bool) -> None:
        super().__init__("%(message)s")
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if record.levelno != logging.INFO:
            line = f"{record.levelname}: {line}"
        start = self._colours.get(record.levelno) if self._colour else None
        return f"{start}{line}\033[0m" if start else line
