"""Options of log lines: how many, and where they go."""

import logging
from pathlib import Path

from modules.errors import OptionError
from modules.options import Options, option

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class ConsoleOptions(Options, title="log lines"):
    """Which log lines are shown, and where."""

    console_log_level: str | None = option("least important lines shown; usually INFO", choices=LEVELS)
    console_log_file: Path | None = option("write them to this file instead of the console", place="new file")
    console_log_simple: bool = option("plain lines: no colours, no boxes")

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
