"""Console output while a video is generated."""

import logging
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from modules.contract.generation import Section
from modules.contract.prepared import Prepared
from modules.contract.steps import StepDone

logger = logging.getLogger(__name__)


def describe(label: str, prepared: Prepared) -> None:
    """Log one line about the video that is generated next."""
    logger.info(
        "%s: %s x %s (width x height), %s, %s steps, seed %d",
        label,
        prepared.width,
        prepared.height,
        "1 frame" if prepared.frames == 1 else f"{prepared.frames} frames",
        prepared.num_steps,
        prepared.seed,
    )


@dataclass
class Bars:
    """Progress bar over the steps of each section; use it as a context manager."""

    num_steps: int  # of a section
    _bar: Any = field(default=None, init=False)

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self, section: Section) -> None:
        """Start the bar of a section."""
        self._bar = tqdm(total=self.num_steps, desc=section.label or "denoising", unit="step")

    def advance(self, _: StepDone) -> bool:
        """Show that one more step of it is done. Never says "enough"."""
        self._bar.update()
        return False

    def end(self) -> None:
        """Close the bar, so that other output can follow."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
