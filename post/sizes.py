"""The size of pictures that are enlarged."""

from dataclasses import replace

from modules.errors import OptionError
from post.contract import Clip

LARGEST = 65535  # pixels of a side; no codec and few picture files take more


def enlarged_size(width: int, height: int, factor: float) -> tuple[int, int]:
    """Return width and height, in pixels, of a picture that is enlarged that many times."""
    return int(width * factor), int(height * factor)


def enlarged_clip(clip: Clip, factor: float, option: str) -> Clip:
    """Return the clip in its new size.

    Raises OptionError, naming `option`, for a size that no file can have.
    """
    width, height = enlarged_size(clip.width, clip.height, factor)
    if min(width, height) < 1 or max(width, height) > LARGEST:
        raise OptionError(
            f"{option} {factor:g} makes {width} x {height} pixels of the {clip.width} x {clip.height} of "
            f"{clip.path}. Give another {option}"
        )
    return replace(clip, width=width, height=height)
