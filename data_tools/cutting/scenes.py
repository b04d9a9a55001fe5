"""Find where scenes end and begin, picture by picture, with a bounded number of pictures in memory."""

from collections import deque
from typing import NamedTuple

import numpy as np

from modules.media.encoding import Pixels
from modules.media.measures import FLAT_SCENE, Thumbnail, scene_distance, thumbnail

# (first, end): the frames from first to before end belong to no scene; at a hard cut both are the first
# frame of the new scene
SceneChange = tuple[int, int]
FLASH_SECONDS = 0.15  # a shorter interruption of a scene is a flash, or a damaged frame
PLAIN_SECONDS = 0.1  # frames of one color for that long are the end of a scene
# about the time from the middle of a dissolve to its ends; longer ones are found by their steepest part
DISSOLVE_SECONDS = (0.2, 0.4, 0.8)
# (position in a dissolve, which equals the share of the second scene there; greatest variance that may remain
# there, as a part of the mean of both scenes, in theory 1/2 and 5/8). With these numbers, 51 of 52 dissolves
# between filmed scenes that move are found, and none within scenes
DIPS = ((0.5, 0.75), (0.25, 0.9), (0.75, 0.9))
SHARE_OFF = 0.2  # how far the share of the second scene may be from an even rise
BEGUN = 0.08  # share of the other scene from which a frame belongs to a dissolve


class _Jump(NamedTuple):
    """A frame that differs strongly from the frame before it: a cut, or the start of a flash."""

    number: int
    before: Thumbnail


class SceneDetector:
    """Find hard cuts, dissolves, and single-color frames between scenes.

    A hard cut lies between neighboring frames whose `scene_distance` reaches the threshold, unless the
    earlier scene returns within FLASH_SECONDS. Single-color frames between a fade-out and a fade-in are a
    separate scene. `_Dissolves` finds dissolves. Not found are wipes, dissolves of more than 2 seconds, and
    cuts between frames of the same structure or the same colors.
    """

    def __init__(self, threshold: float, rate: float) -> None:
        """Start before the first frame; `rate` is the number of frames per second."""
        self._threshold = threshold
        self._flash_frames = max(1, round(rate * FLASH_SECONDS))
        self._plain_frames = max(2, round(rate * PLAIN_SECONDS))
        self._num_seen = 0
        self._before: Thumbnail | None = None
        self._jump: _Jump | None = None  # the last one, which may still turn out to be a flash
        self._structured: Thumbnail | None = None  # the last frame that was not plain
        self._plain_since: int | None = None
        self._changes: list[SceneChange] = []
        self._dissolves = _Dissolves(threshold, rate)

    def see(self, pixels: Pixels) -> None:
        """Examine the next frame, H W 3, for a cut, a flash or a dissolve."""
        current = thumbnail(pixels)
        number = self._num_seen
        self._num_seen += 1
        is_break = self._see_plain(current, number)  # a frame of one color
        previous = self._before
        jump = self._jump
        if previous is not None and self._differ(previous, current):
            is_break = True
            # a short jump whose end looks like the frame before it
            is_flash = (
                jump is not None
                and number - jump.number <= self._flash_frames
                and not self._differ(jump.before, current)
            )
            if is_flash:
                self._jump = None  # the scene continues
            else:
                self._confirm()
                self._jump = _Jump(number, previous)
        # too late for the end of a flash: the jump was a cut
        elif jump is not None and number - jump.number > self._flash_frames:
            self._confirm()
        self._before = current
        self._dissolves.see(current, number, is_break)

    def _differ(self, first: Thumbnail, second: Thumbnail) -> bool:
        """Return whether two frames differ enough to belong to different scenes."""
        return scene_distance(first, second, self._threshold) >= self._threshold

    def changes(self) -> list[SceneChange]:
        """Return all scene changes in order, after the last frame."""
        self._confirm()
        if self._plain_since is not None:
            self._end_plain(self._num_seen, is_other=True)
        joined: list[SceneChange] = []
        for begin, end in sorted({*self._changes, *self._dissolves.changes}):
            if joined and begin < joined[-1][1]:  # they overlap
                begin, last = joined.pop()
                end = max(last, end)
            joined.append((begin, end))
        return [(begin, end) for begin, end in joined if end > 0 and begin < self._num_seen]

    def _confirm(self) -> None:
        """Record the pending jump as a cut, since it was not a flash."""
        if self._jump is not None:
            self._changes.append((self._jump.number, self._jump.number))
        self._jump = None

    def _see_plain(self, now: Thumbnail, number: int) -> bool:
        """Track runs of single-color frames; return whether this frame is one."""
        pixels = now.gray[~now.is_white]
        # a frame of one color besides white has no structure that `scene_distance` could compare
        if not pixels.size or float(pixels.std()) < FLAT_SCENE:
            if self._plain_since is None:
                self._plain_since = number
            return True
        if self._plain_since is not None:
            earlier = self._structured
            distance = 1.0 if earlier is None else scene_distance(earlier, now, self._threshold)
            self._end_plain(number, is_other=distance >= self._threshold)
        self._structured = now
        return False

    def _end_plain(self, end: int, is_other: bool) -> None:
        """End a run of single-color frames before frame `end`.

        `is_other` says whether another scene follows.
        """
        begin, self._plain_since = self._plain_since, None
        assert begin is not None
        if is_other or end - begin >= self._plain_frames:
            # the run becomes a scene of its own, which is later left out as too short or black
            self._changes += [(begin, begin), (end, end)]


class _Dissolves:
    """Find dissolves, where one scene is mixed into another.

    Mixing unrelated images lowers the contrast: their variances are added with the squares of their weights,
    so that half of the mean variance is left in the middle. Also, the middle frame is the mean of both ends.
    Motion does neither. A new scene begins only if the frames at both ends differ by the threshold.
    """

    def __init__(self, threshold: float, rate: float) -> None:
        self._threshold = threshold
        steps = (max(2, round(rate * seconds / 2) * 2) for seconds in DISSOLVE_SECONDS)
        self._reaches = tuple(dict.fromkeys(steps))  # frames from the middle to the ends, even
        maximum = 2 * max(self._reaches) + 1
        self._images: deque[Thumbnail] = deque(maxlen=maximum)
        self._variances: deque[float] = deque(maxlen=maximum)
        self._last_break = -1
        self.changes: list[SceneChange] = []  # those of one dissolve overlap

    def see(self, now: Thumbnail, number: int, is_break: bool) -> None:
        """Examine the next frame, whose index is `number`, for a dissolve.

        `is_break` says that the frame follows a cut or has a single color.
        """
        self._images.append(now)
        self._variances.append(float(now.gray.var()))
        if is_break:
            self._last_break = number
        for reach in self._reaches:
            first = number - 2 * reach
            if first >= 0 and self._last_break <= first:
                self._look(first, reach)

    def _look(self, first: int, reach: int) -> None:
        """Check whether the last 2 * reach + 1 frames, starting at `first`, are a dissolve."""
        offset = len(self._images) - 2 * reach - 1
        if not self._loses_contrast(offset, reach):
            return
        shares = self._count_second_shares(offset, reach)
        for part, _ in DIPS:
            if not abs(shares[round(2 * reach * part)] - part) <= SHARE_OFF:
                return
        distance = scene_distance(self._images[offset], self._images[-1], self._threshold)
        if distance < self._threshold:
            return
        mixed = [position for position, share in enumerate(shares) if BEGUN < share < 1 - BEGUN]
        self.changes.append((first + mixed[0], first + mixed[-1] + 1))

    def _loses_contrast(self, offset: int, reach: int) -> bool:
        """Return whether the variance falls between the ends of a span of frames, as in a dissolve."""
        begin = self._variances[offset]
        end = self._variances[-1]
        for part, maximum in DIPS:
            mean = (1 - part) * begin + part * end
            if self._variances[offset + round(2 * reach * part)] > maximum * mean:
                return False
        return True

    def _count_second_shares(self, offset: int, reach: int) -> list[float]:
        """Return how much of the second scene each frame from `offset` on shows, 0..1.

        The frame at `offset` counts as 0, the last frame as 1; others by their position between the two.
        """
        begin = self._images[offset].gray
        direction = self._images[-1].gray - begin
        length = max(float(np.square(direction).sum()), 1e-12)
        shares = []
        for position in range(2 * reach + 1):
            progress = ((self._images[offset + position].gray - begin) * direction).sum()
            shares.append(float(progress) / length)
        return shares
