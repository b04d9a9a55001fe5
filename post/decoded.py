"""The tools of --post: decoded frames of a generation go through them on their way into the file."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from modules.errors import OptionError
from post.chain_options import AskedTools, ToolOptions
from post.contract import Clip, Picture
from post.pixels import to_bytes
from post.stages import NamedStage, check_tools, lead_through, make_stages, results

Frame = NDArray[np.uint8]  # H W 3, RGB
LoadStages = Callable[[Sequence[ToolOptions], Sequence[str], torch.device], list[NamedStage]]


@dataclass
class PostTools:
    """The tools of a run: loaded for the first video that is decoded, and kept to the end."""

    asked: AskedTools
    device: torch.device
    load: LoadStages = make_stages
    _stages: list[NamedStage] | None = field(default=None, init=False)

    @property
    def labels(self) -> list[str]:
        """Return how messages name the tools."""
        return self.asked.labels

    @property
    def hides(self) -> bool:
        """Return whether a tool hides something, so that no frame may be shown as it was decoded."""
        return self.asked.hiding is not None

    def check(self) -> None:
        """Read the headers of the tools' model files. Raises UserError if they do not fit."""
        check_tools(self.asked.tools, self.labels, self.device)

    def check_length(self, frames: int, label: str) -> None:
        """Raise OptionError if there is a single frame, and a tool works between frames.

        label: whose frames they are, for the message.
        """
        for (tool, _), name in zip(self.asked.tools, self.labels, strict=True):
            if frames == 1 and tool.needs_video:
                raise OptionError(
                    f"{name} works between the frames of a video, and {label} gives a single one. Leave "
                    f"{name} out, or make a video."
                )

    def lead(self, frames: Iterator[Frame], fps: float, is_single: bool) -> tuple[Iterator[Frame], float]:
        """Return the tools' result for frames, and its frames a second.

        is_single: there is only one frame. The networks are loaded now, if they are not yet there.
        Raises UserError.
        """
        first = next(frames)
        height, width = first.shape[:2]
        self.check_length(1 if is_single else 2, "the video")
        if self._stages is None:
            self._stages = self.load(self.asked.tools, self.labels, self.device)
        rate = Fraction(fps).limit_denominator(1001)
        clip = Clip(
            Path("the video"), width, height, None if is_single else rate, 1 if is_single else None, False
        )
        clips = results(self._stages, clip)
        pictures = _as_pictures(chain([first], frames), 1 / rate)
        made = (to_bytes(picture.pixels) for picture in lead_through(self._stages, pictures, clips))
        return made, float(clips[-1].rate or fps)


def _as_pictures(frames: Iterator[Frame], seconds: Fraction) -> Iterator[Picture]:
    for index, frame in enumerate(frames):
        yield Picture(frame, index * seconds, seconds)
