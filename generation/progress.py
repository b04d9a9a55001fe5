"""What the console says while a video is made."""

import logging
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from modules.contract.generation import Section
from modules.contract.prepared import Prepared
from modules.contract.steps import StepDone

logger = logging.getLogger(__name__)


def describe(label: str, prepared: Prepared) -> None:
    """One line about what is being made."""
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
    """A bar over the steps of each section. Used as a context."""

    num_steps: int  # of a section
    _bar: Any = field(default=None, init=False)

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def begin(self, section: Section) -> None:
        """The bar of a section that is about to be denoised."""
        self._bar = tqdm(total=self.num_steps, desc=section.label or "denoising", unit="step")

    def advance(self, _: StepDone) -> bool:
        """Show that one more step of it is done. Never says "enough"."""
        self._bar.update()
        return False

    def end(self) -> None:
        """Leave the bar as it is, for other output."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
