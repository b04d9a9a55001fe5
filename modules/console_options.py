"""Options of log lines: their level and their destination."""

import logging
import sys
from pathlib import Path

from modules.errors import OptionError
from modules.options import APPENDS, Options, option
from modules.text_files import require_regular_file

logger = logging.getLogger(__name__)
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class ConsoleOptions(Options, title="log lines"):
    """Which log lines are shown, and where."""

    console_log_level: str | None = option("minimum level of log messages; default: INFO", choices=LEVELS)
    console_log_file: Path | None = option(
        "write them to this file instead of the console", place="new file", facts=APPENDS
    )
    console_log_simple: bool = option("plain lines: no colors, no boxes")

    def apply(self) -> None:
        """Set the level and the handler of the root logger.

        Raises:
            OptionError: If the file cannot be written.
        """
        root = logging.getLogger()
        if self.console_log_level is not None:
            root.setLevel(self.console_log_level)
        if self.console_log_file is None and not self.console_log_simple:
            return  # the handlers stay as they are
        handler: logging.Handler = logging.StreamHandler()
        try:
            if self.console_log_file is not None:
                if self.console_log_file.is_fifo():
                    require_regular_file(self.console_log_file)  # opening a pipe would wait for its reader
                handler = _LogFile(self.console_log_file, encoding="utf-8")
        except OSError as error:
            raise OptionError(f"--console_log_file {self.console_log_file}: {error.strerror}") from None
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for old in list(root.handlers):
            if type(old) is logging.StreamHandler:
                root.removeHandler(old)
        root.addHandler(handler)


class _LogFile(logging.FileHandler):
    """A log file; lines that cannot be written (for example on a full disk) go to the console."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Replace this handler by one that writes to the console if the log file cannot be written."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # a mistake in the logging call, not in the file
            super().handleError(record)
            return
        console = logging.StreamHandler()
        console.setFormatter(self.formatter)
        root = logging.getLogger()
        root.addHandler(console)
        root.removeHandler(self)
        logger.warning(
            "--console_log_file %s: %s. This and all further lines are written here",
            self.baseFilename,
            error.strerror,
        )
        console.handle(record)
