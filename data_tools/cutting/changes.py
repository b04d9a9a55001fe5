"""Findings of detectors: where one scene ends and another begins."""

from dataclasses import dataclass
from typing import Protocol

from modules.media.depth import Pixels

CUT, DISSOLVE, PLAIN = "cut", "dissolve", "plain"  # kinds of changes


@dataclass(frozen=True)
class SceneChange:
    """Frames from `begin` to before `end` belong to no scene.

    At a hard cut both are the number of the first frame of the new scene.
    """

    begin: int
    end: int
    kind: str


class ChangeDetector(Protocol):
    """Finds the changes of a video whose pictures it is shown in order."""

    def see(self, pixels: Pixels) -> None:
        """Look at the next picture, H W 3."""

    def changes(self) -> list[SceneChange]:
        """Return all changes, in order, after the last picture."""
