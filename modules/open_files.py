"""Replace files that other programs may have open, which Windows refuses meanwhile."""

import os
import time
from pathlib import Path

# Windows' numbers: access denied, as for a target that is open; sharing violation; lock violation
OPEN_ELSEWHERE = (5, 32, 33)
WAIT_SECONDS = 3.0  # enough for a page or a virus scanner that reads the file; a player keeps it open longer
PAUSE = 0.02  # seconds


def replace_file(file: Path, path: Path) -> None:
    """Rename a file like `os.replace`, but wait a little while another program has either file open.

    Raises:
        PermissionError: If a program has one of them open for longer; the error says what to do.
        OSError: If it fails for another reason.
    """
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            os.replace(file, path)
            return
        except PermissionError as error:
            if getattr(error, "winerror", None) not in OPEN_ELSEWHERE:
                raise
            if time.monotonic() > end:
                message = f"{error.strerror} Close the programs that have it open"
                raise PermissionError(error.errno, message) from error
        time.sleep(PAUSE)
