"""Show a picture in the system's viewer, for --interactive."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def viewer_command(platform: str = sys.platform, environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the program that opens a file as a click would; None if there is none, or no screen."""
    if platform == "win32":
        return "explorer"
    if platform == "darwin":
        return shutil.which("open")
    has_screen = environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY")
    return shutil.which("xdg-open") if has_screen else None


def show_picture(program: str, path: Path) -> None:
    """Open a picture. Does not wait for the viewer; a viewer that fails is the system's matter."""
    subprocess.Popen(
        [program, str(path.resolve())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
