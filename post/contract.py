"""The stream of pictures through the tools for finished videos, and the contract of a tool."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8] | NDArray[np.uint16]  # H W 3, RGB; 16 bits use their whole range


@dataclass(frozen=True)
class Picture:
    """One picture of a stream and when it is shown, in seconds: exact, so that no rounding adds up."""

    pixels: Pixels
    start: Fraction
    seconds: Fraction


@dataclass(frozen=True)
class Clip:
    """A stream of pictures, as far as it is known before the first one is read."""

    path: Path  # of the video, for messages
    width: int
    height: int
    rate: Fraction | None  # pictures a second on average; None: a single picture
    frames: int | None  # as its file says, for progress; None: not known
    is_deep: bool  # what stages compute is wanted with 16 bits a channel, else with 8


class Stage(Protocol):
    """One tool at work. It is loaded once and may be given several clips, one after the other."""

    @property
    def name(self) -> str:
        """The tool's name, for messages: upscaler."""

    def result(self, clip: Clip) -> Clip:
        """Return the stage's result for a clip.

        Raises MediaError or OptionError if it can do nothing with one, such as too small a picture.
        """

    def run(self, pictures: Iterator[Picture], clip: Clip) -> Iterator[Picture]:
        """Yield the results in playing order, with a bounded number of pictures in memory.

        Pictures that a stage leaves as they are keep their pixels, whatever their dtype. Its summary of the
        clip is logged when the last picture has gone through. Raises UserError if the result must not be
        kept; nothing is written then.
        """
