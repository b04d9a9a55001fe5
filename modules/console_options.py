"""Options of log lines: how many, and where they go."""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True)
class ConsoleOptions:
    """Which log lines are shown, and where."""

    console_log_level: str | None  # None: INFO
    console_log_file: Path | None  # instead of standard error
    console_log_simple: bool  # no colours, no boxes

    def __post_init__(self) -> None:
        if self.console_log_file is not None and self.console_log_file.is_dir():
            raise OptionError(f"--console_log_file {self.console_log_file}: is a folder; name a file")

    def apply(self) -> None:
        """Change the handlers of the root logger. Raises OptionError if the file cannot be written."""
        root = logging.getLogger()
        if self.console_log_level is not None:
            root.setLevel(self.console_log_level)
        if self.console_log_file is None and not self.console_log_simple:
            return
        handler: logging.Handler
        try:
            handler = (
                logging.StreamHandler()
                if self.console_log_file is None
                else logging.FileHandler(self.console_log_file, encoding="utf-8")
            )
        except OSError as error:
            raise OptionError(f"--console_log_file {self.console_log_file}: {error.strerror}") from None
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for old in list(root.handlers):
            if type(old) is logging.StreamHandler:
                root.removeHandler(old)
        root.addHandler(handler)


def add_console_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ConsoleOptions`."""
    group = parser.add_argument_group("log lines")
    group.add_argument(
        "--console_log_level", choices=LEVELS, help="least important lines shown; usually INFO"
    )
    group.add_argument("--console_log_file", help="write them to this file instead of the console")
    group.add_argument("--console_log_simple", action="store_true", help="plain lines: no colours, no boxes")
