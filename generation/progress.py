"""Console output while a video is generated."""

import logging
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from blissful_tuner.video_to_video import steps_to_make
from generation.denoise import StepDone
from modules.contract.generation import Request, Section

logger = logging.getLogger(__name__)


def describe(label: str, request: Request) -> None:
    """Log one line about the video that is generated next."""
    logger.info(
        "%s: %s x %s (width x height), %s, %s steps, seed %d",
        label,
        request.width,
        request.height,
        "1 frame" if request.frames == 1 else f"{request.frames} frames",
        steps_to_make(request),
        request.seed,
    )


@dataclass
class Bars:
    """Progress bar over the steps of each section; use it as a context manager."""

    request: Request
    _bar: Any = field(default=None, init=False)

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self, section: Section) -> None:
        """Start the bar of a section."""
        self._bar = tqdm(total=steps_to_make(self.request), desc=section.label or "denoising", unit="step")

    def advance(self, _: StepDone) -> None:
        """Advance the bar by one step."""
        self._bar.update()

    def end(self) -> None:
        """Close the bar, so that other output can follow."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
