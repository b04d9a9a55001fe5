"""The scene cuts that interpolation leaves alone, for its log."""

import logging
from fractions import Fraction

from modules.media.scenes import clock_time

logger = logging.getLogger(__name__)

SHOWN = 5  # times of cuts in the log


class Cuts:
    """The cuts of a clip, for the log: the first few with their times, and how many there are."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, time: Fraction) -> None:
        """Note one. time: the beginning of the new scene, in seconds."""
        self.count += 1
        if self.count <= SHOWN:
            logger.info("A new scene begins at %s: the picture before it is repeated.", clock_time(time))

    def report(self) -> None:
        """Log how many there were, if not all have been."""
        if self.count > SHOWN:
            logger.info("%d scenes began; at their beginnings the picture before is repeated.", self.count)
