"""Determine whether a user sits at a screen of this machine. Standard library only."""

import os
import sys


def has_screen() -> bool:
    """Return whether a window would be visible: no SSH session, and on Linux a display."""
    if any(os.environ.get(name) for name in ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY")):
        return False
    if sys.platform in ("win32", "darwin"):
        return True
    return has_display()


def has_display() -> bool:
    """Return whether the environment names a display of X11 or Wayland."""
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
