"""PyAV, which brings FFmpeg, imported when something of it is first used.

Rooms that read pictures, caches or latents import those of videos too; none of them needs FFmpeg for that.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from modules.errors import InstallationError

if TYPE_CHECKING:
    import av as av
else:

    class _WhenUsed:
        """Stands for a module until one of its names is asked for."""

        def __getattr__(self, name: str) -> Any:
            try:
                return getattr(import_module("av"), name)
            except ModuleNotFoundError as error:
                raise InstallationError(
                    f"videos are read and written with the package av, which cannot be imported ({error}). "
                    f"Install it: {sys.executable} -m pip install av"
                ) from None

    av = _WhenUsed()


def ffmpeg_errors() -> tuple[type[Exception], ...]:
    """Return the class of what FFmpeg raises; nothing if it was not used so far, and cannot have raised."""
    error = getattr(sys.modules.get("av"), "FFmpegError", None)
    return () if error is None else (error,)
