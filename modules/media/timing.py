"""Give the packets of an encoder, which counts pictures, the times of those pictures."""

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, Protocol

from modules.media.depth import Pixels

USUAL_TICKS = 90_000  # a second, of broadcasts: milliseconds are whole in it, too
MOST_TICKS = 1_000_000
LEAST_TICKS = 10_000


class Shown(Protocol):
    """A picture, and when and how long it is shown, in seconds: `ShownFrame`, or anything like it."""

    @property
    def pixels(self) -> Pixels:
        """H W 3."""

    @property
    def start(self) -> Fraction:
        """Second at which it appears."""

    @property
    def seconds(self) -> Fraction:
        """How long it stays."""


def ticks_per_second(rate: Fraction) -> int:
    """Return a unit of time, by how many go into a second, in which all n / rate are whole numbers."""
    ticks = math.lcm(rate.numerator, USUAL_TICKS)
    return ticks if ticks <= MOST_TICKS else rate.numerator * math.ceil(LEAST_TICKS / rate.numerator)


class Timing:
    """The times of the pictures that an encoder holds."""

    def __init__(self, rate: Fraction) -> None:
        """rate: pictures a second, which the encoder counts with."""
        self.count = 0  # pictures so far
        self._rate = rate
        self._ticks = ticks_per_second(rate)
        self._begin = Fraction(0)
        self._end = Fraction(0)
        self._first: int | None = None  # when the first packet is stored, in ticks
        self._ahead: int | None = None  # ticks between those that are stored before the first is shown
        self._held: dict[int, tuple[int, int]] = {}  # number of a picture -> its start and length in ticks

    @property
    def seconds(self) -> Fraction:
        """From the first picture to the end of the last one."""
        return self._end - self._begin

    def note(self, frames: Iterable[Shown]) -> Iterator[Pixels]:
        """Yield the pixels of pictures, and remember their times. Raises ValueError if those do not rise."""
        last: Fraction | None = None
        tick = -(2**62)
        for frame in frames:
            if last is None:
                self._begin = frame.start
            elif frame.start <= last:
                raise ValueError(
                    f"picture {self.count + 1} is shown at {frame.start} s, the one before at {last}"
                )
            last, self._end = frame.start, frame.start + frame.seconds
            tick = max(round(frame.start * self._ticks), tick + 1)
            self._held[self.count] = tick, max(round(frame.seconds * self._ticks), 1)
            self.count += 1
            yield frame.pixels

    def timed(self, packets: Iterable[Any]) -> Iterator[Any]:
        """Yield the packets of an encoder with times in place of the numbers of pictures, in storage order.

        The last one waits until it is known to be the last.
        """
        held = None
        for packet in packets:
            self._apply(packet)
            if held is not None:
                yield held
            held = packet
        if held is not None:
            self._end_with(held)
            yield held

    def _end_with(self, packet: Any) -> None:
        """Store the last packet so late that all together last as long as the pictures are shown.

        MP4 counts from one packet to the next one stored: of a picture that is held near the end it would
        lose what the encoder is ahead.
        """
        assert self._first is not None
        end = self._first + round(self.seconds * self._ticks)
        packet.dts = max(packet.dts, min(packet.pts, end - packet.duration))
        # and, if another picture is shown after it, as long as is missing, but not beyond the end of all
        last = round(self._end * self._ticks)
        packet.duration = max(packet.duration, min(end - packet.dts, last - packet.pts))

    def _apply(self, packet: Any) -> None:
        shown, stored = (round(number * packet.time_base * self._rate) for number in (packet.pts, packet.dts))
        packet.time_base = Fraction(1, self._ticks)
        packet.pts, packet.duration = self._held[shown]
        packet.dts = self._stored_at(stored)
        self._first = packet.dts if self._first is None else self._first
        for number in [number for number in self._held if number < stored]:
            del self._held[number]  # no later packet is stored or shown before this one

    def _stored_at(self, number: int) -> int:
        """Return when a picture is stored; those before the first are counted backwards."""
        if number >= 0:
            return self._held[number][0]
        if self._ahead is None:
            # the shortest of the first: with a mean, pictures held long would begin the file seconds early
            self._ahead = min(length for _, length in self._held.values())
        return round(self._begin * self._ticks) + number * self._ahead
