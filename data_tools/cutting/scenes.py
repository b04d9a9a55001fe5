"""Find where scenes end and begin, frame by frame, with a bounded number of frames in memory."""

from collections import deque
from typing import NamedTuple

import numpy as np

from modules.media.encoding import Pixels
from modules.media.measures import FLAT_SCENE, Thumbnail, scene_distance, thumbnail
from modules.options import Options, not_needed, option

# (first, end): frames first to end - 1 belong to no scene; at a hard cut, both are the first frame of the
# new scene
SceneChange = tuple[int, int]
MAX_FLASH_SECONDS = 0.15  # a shorter interruption of a scene is a flash, or a damaged frame
MIN_PLAIN_SECONDS = 0.1  # single-color frames that last this long end a scene
# about the time from the middle of a dissolve to its ends; longer ones are found by their steepest part
DISSOLVE_SECONDS = (0.2, 0.4, 0.8)
# (position in a dissolve, 0..1, which equals the weight of the second scene there; maximum variance there,
# as a fraction of the mean variance of both scenes, in theory 1/2 and 5/8). With these numbers, 51 of 52
# dissolves between filmed scenes that move are found, and none within scenes
VARIANCE_LIMITS = ((0.5, 0.75), (0.25, 0.9), (0.75, 0.9))
MAX_WEIGHT_ERROR = 0.2  # how far the weight of the second scene may deviate from an even rise
MIN_MIXED_WEIGHT = 0.08  # minimum weight of the other scene in a frame of a dissolve


class SceneOptions(Options, title="scenes"):
    """Options for detecting scene changes."""

    scene_threshold: float = option(
        "how much has to change at a cut; a lower one finds more", default=0.25, above=0, maximum=1
    )
    detector = not_needed(
        "scenes are always found by this tool's own measure, which also finds dissolves.",
        "what finds scenes",
        values=("own",),
        default="own",
        choices=("own", "pyscenedetect", "pyscenedetect-adaptive"),
    )


class _Jump(NamedTuple):
    """A frame that differs strongly from the frame before it: a cut, or the start of a flash."""

    frame_index: int
    frame_before: Thumbnail


class SceneDetector:
    """Find hard cuts, dissolves, and single-color frames between scenes.

    A hard cut lies between neighboring frames whose `scene_distance` reaches the threshold, unless the
    earlier scene returns within MAX_FLASH_SECONDS. Single-color frames between a fade-out and a fade-in are a
    separate scene. `_Dissolves` finds dissolves. Wipes, dissolves of more than 2 seconds, and cuts
    between frames of the same structure or the same colors are not found.
    """

    def __init__(self, threshold: float, rate: float) -> None:
        """Start before the first frame; `rate` is the number of frames per second."""
        self._threshold = threshold
        self._flash_frames = max(1, round(rate * MAX_FLASH_SECONDS))
        self._plain_frames = max(2, round(rate * MIN_PLAIN_SECONDS))
        self._num_frames = 0
        self._previous_frame: Thumbnail | None = None
        self._pending_jump: _Jump | None = None  # may still turn out to be a flash
        self._last_structured: Thumbnail | None = None  # the last frame that was not plain
        self._plain_start: int | None = None
        self._changes: list[SceneChange] = []
        self._dissolves = _Dissolves(threshold, rate)

    def add_frame(self, pixels: Pixels) -> None:
        """Examine the next frame, H W 3, for a cut, a flash or a dissolve."""
        current = thumbnail(pixels)
        index = self._num_frames
        self._num_frames += 1
        has_one_color = self._track_plain_frames(current, index)
        has_jumped = self._track_jumps(current, index)
        self._previous_frame = current
        self._dissolves.add_frame(current, index, is_break=has_one_color or has_jumped)

    def _track_jumps(self, current: Thumbnail, index: int) -> bool:
        """Record jumps that prove to be cuts."""
        # Return whether this frame differs strongly from the last one.
        # A jump is pending at first. It becomes a cut unless the scene before it returns within the length of
        # a flash.
        if self._pending_jump is not None and index - self._pending_jump.frame_index > self._flash_frames:
            self._confirm_cut()  # too long for a flash
        previous = self._previous_frame
        if previous is None or not self._belong_to_different_scenes(previous, current):
            return False
        pending = self._pending_jump
        if pending is not None and not self._belong_to_different_scenes(pending.frame_before, current):
            self._pending_jump = None  # a flash: the scene continues
        else:
            self._confirm_cut()
            self._pending_jump = _Jump(index, previous)
        return True

    def _belong_to_different_scenes(self, first: Thumbnail, second: Thumbnail) -> bool:
        """Return whether two frames differ enough to belong to different scenes."""
        return scene_distance(first, second, self._threshold) >= self._threshold

    def changes(self) -> list[SceneChange]:
        """Return all scene changes in order, after the last frame."""
        self._confirm_cut()
        if self._plain_start is not None:
            self._end_plain_frames(self._num_frames, starts_scene=True)
        merged: list[SceneChange] = []
        for begin, end in sorted({*self._changes, *self._dissolves.changes}):
            if merged and begin < merged[-1][1]:  # they overlap
                begin, previous_end = merged.pop()
                end = max(previous_end, end)
            merged.append((begin, end))
        return [(begin, end) for begin, end in merged if end > 0 and begin < self._num_frames]

    def _confirm_cut(self) -> None:
        """Record the pending jump, if there is one, as a cut, since it was not a flash."""
        if self._pending_jump is not None:
            index = self._pending_jump.frame_index
            self._changes.append((index, index))
        self._pending_jump = None

    def _track_plain_frames(self, current: Thumbnail, index: int) -> bool:
        """Track runs of single-color frames; return whether this frame has a single color."""
        pixels = current.gray[~current.is_white]
        # a frame of one color besides white has no structure that `scene_distance` could compare
        if not pixels.size or float(pixels.std()) < FLAT_SCENE:
            if self._plain_start is None:
                self._plain_start = index
            return True
        if self._plain_start is not None:
            earlier = self._last_structured
            starts_scene = earlier is None or self._belong_to_different_scenes(earlier, current)
            self._end_plain_frames(index, starts_scene)
        self._last_structured = current
        return False

    def _end_plain_frames(self, end: int, starts_scene: bool) -> None:
        """End a run of single-color frames before frame `end`."""
        # `starts_scene` says whether another scene follows.
        begin, self._plain_start = self._plain_start, None
        assert begin is not None
        if starts_scene or end - begin >= self._plain_frames:
            # the run becomes a scene of its own, which is later left out as too short or black
            self._changes += [(begin, begin), (end, end)]


class _Dissolves:
    """Find dissolves, where one scene is mixed into another.

    Mixing unrelated images lowers the contrast: the variance of each counts by its squared weight, so that
    half of the mean variance is left in the middle. Also, the middle frame is the mean of both ends.
    Motion does neither. A new scene begins only if the frames at both ends differ by the threshold.
    """

    def __init__(self, threshold: float, rate: float) -> None:
        self._threshold = threshold
        steps = (max(2, round(rate * seconds / 2) * 2) for seconds in DISSOLVE_SECONDS)
        self._half_lengths = tuple(dict.fromkeys(steps))  # frames from the middle to the ends, even
        maximum = 2 * max(self._half_lengths) + 1
        self._frames: deque[Thumbnail] = deque(maxlen=maximum)
        self._variances: deque[float] = deque(maxlen=maximum)
        self._last_break = -1
        self.changes: list[SceneChange] = []  # changes that belong to one dissolve overlap

    def add_frame(self, current: Thumbnail, index: int, is_break: bool) -> None:
        """Examine the next frame for a dissolve; with `is_break` it follows a cut or has a single color."""
        self._frames.append(current)
        self._variances.append(float(current.gray.var()))
        if is_break:
            self._last_break = index
        for half_length in self._half_lengths:
            first = index - 2 * half_length
            if first >= 0 and self._last_break <= first:
                self._check_span(first, half_length)

    def _check_span(self, first: int, half_length: int) -> None:
        """Add a scene change if the last 2 * half_length + 1 frames, starting at `first`, are a dissolve."""
        # 1. The variance falls in the middle, because mixing lowers the contrast.
        # 2. The weight of the second scene rises about evenly.
        # 3. The frames at both ends belong to different scenes.
        offset = len(self._frames) - 2 * half_length - 1
        if not self._loses_contrast(offset, half_length):
            return
        # The share of the second scene in each frame from `offset` on, about 0..1.
        # It is the frame's position on the line from the frame at `offset` (0) to the last frame (1).
        begin = self._frames[offset].gray
        direction = self._frames[-1].gray - begin
        squared_length = max(float(np.square(direction).sum()), 1e-12)
        weights = []
        for step in range(2 * half_length + 1):
            projection = ((self._frames[offset + step].gray - begin) * direction).sum()
            weights.append(float(projection) / squared_length)
        for position, _ in VARIANCE_LIMITS:
            if abs(weights[round(2 * half_length * position)] - position) > MAX_WEIGHT_ERROR:
                return
        distance = scene_distance(self._frames[offset], self._frames[-1], self._threshold)
        if distance < self._threshold:
            return
        mixed = [
            frame
            for frame, weight in enumerate(weights, first)
            if MIN_MIXED_WEIGHT < weight < 1 - MIN_MIXED_WEIGHT
        ]
        self.changes.append((mixed[0], mixed[-1] + 1))

    def _loses_contrast(self, offset: int, half_length: int) -> bool:
        """Return whether the variance drops between the ends of a span of frames, as in a dissolve."""
        begin = self._variances[offset]
        end = self._variances[-1]
        for position, max_fraction in VARIANCE_LIMITS:
            unmixed_variance = (1 - position) * begin + position * end
            if self._variances[offset + round(2 * half_length * position)] > max_fraction * unmixed_variance:
                return False
        return True
