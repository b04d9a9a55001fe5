"""Import PyAV, which brings FFmpeg, at its first use: reading pictures or caches does not need it."""

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
    """Return the classes of FFmpeg's errors; none if FFmpeg has not been used yet."""
    error = getattr(sys.modules.get("av"), "FFmpegError", None)
    return () if error is None else (error,)
