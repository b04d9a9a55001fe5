"""Track boxes from image to image, and estimate their positions in images without a detection.

Estimates err on the side of covering too much: a face that the detector misses in a few frames must stay
hidden.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from postprocessing.faces.boxes import Numbers, overlaps

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

MIN_OVERLAP = 0.3  # overlap with an object's last or expected box above which a box is the same object
MAX_MATCH_DISTANCE = 1.5  # maximum distance of a matching box, in units of its longer side
MOTION_SIGHTINGS = 5  # number of sightings from which the motion is estimated
MAX_MOVED = 3.0  # maximum distance of an extrapolated box, in units of its longer side
GROWTH, MAX_GROWN = 0.02, 0.3  # growth of a box on each side, per image since its sighting, and its limit


class Sighting(NamedTuple):
    """Box of an object that was detected in one image."""

    frame_index: int
    box: Box


@dataclass(eq=False)
class Track:
    """Detections of one object in consecutive images."""

    sightings: deque[Sighting]  # in order
    is_new_object: bool  # False: the first sighting is also the last one of another track
    is_open: bool = True  # whether the object may be found again

    @property
    def last(self) -> Sighting:
        """The latest detection of the object."""
        return self.sightings[-1]

    def expected(self, index: int) -> Box:
        """Return where the object is expected in image `index`, extrapolated from its recent motion."""
        motion = _measure_motion(list(self.sightings)[-MOTION_SIGHTINGS:])
        return _move_box(self.last.box, motion, index - self.last.frame_index)

    def box_to_cover(self, index: int, max_images_after: int, max_images_before: int) -> Box | None:
        """Return the box to cover in an image; None if no detection is close enough in time.

        Args:
            index: Index of the image.
            max_images_after: Number of images after the last sighting that are covered too.
            max_images_before: Number of images before the first sighting that are covered too.
        """
        first = self.sightings[0]
        last = self.last
        # the box grows with each image away from a sighting, because the position is less certain
        if index < first.frame_index:
            num_images = first.frame_index - index
            # a track that continues another one needs no box before its start: the other one covers it
            if not self.is_new_object or num_images > max_images_before:
                return None
            motion = _measure_motion(list(self.sightings)[:MOTION_SIGHTINGS])  # of the first few sightings
            earlier_box = _move_box(first.box, motion, -num_images)
            return _grow_box(_join_boxes(first.box, earlier_box), num_images)
        if index > last.frame_index:
            num_images = index - last.frame_index
            if num_images > max_images_after:
                return None
            return _grow_box(_join_boxes(last.box, self.expected(index)), num_images)
        # the image lies between two detections
        before = [sighting for sighting in self.sightings if sighting.frame_index <= index]
        if before[-1].frame_index == index:
            return before[-1].box
        after = [sighting for sighting in self.sightings if sighting.frame_index > index]
        return _interpolate(before[-MOTION_SIGHTINGS:], after[:MOTION_SIGHTINGS], index)


@dataclass
class Tracks:
    """Track detected objects through a stream of images.

    Call `add_detections` for each image in order. Call `boxes` for an image once the detections of the next
    max(hold, lookback) images have been added, because later sightings change what is covered in it.
    """

    hold: int  # number of images in which an object stays covered after its last sighting
    lookback: int  # number of images in which it is covered before its first sighting
    num_objects: int = 0  # number of distinct objects so far
    longest_gap: int = 0  # largest number of images between two sightings of an object
    _tracks: list[Track] = field(default_factory=list)

    def add_detections(self, index: int, boxes: Sequence[Box]) -> None:
        """Assign the boxes found in image `index` to the tracks of objects.

        1. A box that overlaps an object's last or expected box continues its track.
        2. A box that is only near one starts a track from the object's last box.
        3. Each box that is left starts the track of a new object.
        """
        # an object may be missing in at most `hold` images between two sightings
        open_tracks = [
            track
            for track in self._tracks
            if track.is_open and index - track.last.frame_index <= self.hold + 1
        ]
        continued = _match(open_tracks, boxes, _score_by_overlap, index)
        for track, box in continued.items():
            self._update_longest_gap(track, index)
            track.sightings.append(Sighting(index, box))
        other_tracks = [track for track in open_tracks if track not in continued]
        other_boxes = _without(boxes, continued.values())
        near = _match(other_tracks, other_boxes, _score_by_distance, index)
        for track, box in near.items():
            # it may be another object, so the old position and the path to the new one are covered too
            self._update_longest_gap(track, index)
            track.is_open = False
            self._tracks.append(Track(deque([track.last, Sighting(index, box)]), is_new_object=False))
        new_boxes = _without(other_boxes, near.values())
        self._tracks += [Track(deque([Sighting(index, box)]), is_new_object=True) for box in new_boxes]
        self.num_objects += len(new_boxes)

    def boxes(self, index: int) -> list[Box]:
        """Return the boxes to cover in an image, including objects that were not detected in it."""
        track_boxes = (track.box_to_cover(index, self.hold, self.lookback) for track in self._tracks)
        return [box for box in track_boxes if box is not None]

    def forget(self, index: int) -> None:
        """Delete tracks and detections that no image after `index` needs."""
        self._tracks = [track for track in self._tracks if track.last.frame_index + self.hold > index]
        for track in self._tracks:
            # keep enough sightings to estimate the motion, and the last one up to `index`
            while len(track.sightings) > MOTION_SIGHTINGS and track.sightings[1].frame_index <= index:
                track.sightings.popleft()

    def _update_longest_gap(self, track: Track, index: int) -> None:
        self.longest_gap = max(self.longest_gap, index - track.last.frame_index - 1)


def _match(
    tracks: Sequence[Track], boxes: Sequence[Box], score: Callable[[Track, Numbers, int], Numbers], index: int
) -> dict[Track, Box]:
    """Match tracks with boxes of image `index`, best pairs first; return the box of each matched track."""
    # score: Returns the score of a track and boxes (N 4) in an image; above 0 if they may match.
    if not tracks or not boxes:
        return {}
    box_array = np.array(boxes, np.float32)
    scores = np.stack([score(track, box_array, index) for track in tracks])  # tracks x boxes
    matches = {}
    while scores.max() > 0:
        row, column = np.unravel_index(scores.argmax(), scores.shape)  # the first of equal scores
        matches[tracks[int(row)]] = boxes[int(column)]
        # each track and each box is matched at most once
        scores[row] = 0
        scores[:, column] = 0
    return matches


def _without(boxes: Sequence[Box], matched: Iterable[Box]) -> list[Box]:
    """Return the boxes that are not matched; of equal boxes, one is removed for each match."""
    remaining = list(boxes)
    for box in matched:
        remaining.remove(box)
    return remaining


def _score_by_overlap(track: Track, boxes: Numbers, index: int) -> Numbers:
    """Score boxes by their overlap with a track's last or predicted box; 0 below MIN_OVERLAP."""
    last, expected = np.array([track.last.box, track.expected(index)], np.float32)
    best = np.maximum(overlaps(last, boxes), overlaps(expected, boxes))
    return np.where(best >= MIN_OVERLAP, best, 0)


def _score_by_distance(track: Track, boxes: Numbers, index: int) -> Numbers:
    """Score, from 0 to 1, how close each box is to a track's last or predicted position; 0 if too far."""
    longer_sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    max_distance = MAX_MATCH_DISTANCE * np.maximum(_find_longer_side(track.last.box), longer_sides)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    track_centers = np.array([_find_center(track.last.box), _find_center(track.expected(index))], np.float32)
    from_last, from_expected = (np.hypot(*(centers - center).T) for center in track_centers)
    away = np.minimum(from_last, from_expected)
    return np.maximum(0, 1 - away / np.maximum(max_distance, 1e-6))


def _interpolate(before: Sequence[Sighting], after: Sequence[Sighting], index: int) -> Box:
    """Return a box that covers an object in an image between two detections."""
    # It encloses the interpolated and the extrapolated box: an object that changes its speed is near one of
    # them.
    sighting_before = before[-1]
    sighting_after = after[0]
    fraction = (index - sighting_before.frame_index) / (
        sighting_after.frame_index - sighting_before.frame_index
    )
    left, top, right, bottom = (
        (1 - fraction) * a + fraction * b
        for a, b in zip(sighting_before.box, sighting_after.box, strict=True)
    )
    interpolated = (left, top, right, bottom)
    # extrapolate from the nearer sighting
    if index - sighting_before.frame_index <= sighting_after.frame_index - index:
        num_images = index - sighting_before.frame_index
        extrapolated = _move_box(sighting_before.box, _measure_motion(before), num_images)
    else:
        num_images = sighting_after.frame_index - index
        extrapolated = _move_box(sighting_after.box, _measure_motion(after), -num_images)
    # the position is less certain the farther the image is from a detection
    return _grow_box(_join_boxes(interpolated, extrapolated), num_images)


def _measure_motion(sightings: Sequence[Sighting]) -> tuple[float, float]:
    """Return the mean motion per image of a tracked object in pixels: (right, down)."""
    first = sightings[0]
    last = sightings[-1]
    images = last.frame_index - first.frame_index
    if not images:
        return 0.0, 0.0
    x0, y0 = _find_center(first.box)
    x1, y1 = _find_center(last.box)
    return (x1 - x0) / images, (y1 - y0) / images


def _move_box(box: Box, motion: tuple[float, float], pictures: int) -> Box:
    """Return a box moved by the motion of several images; a negative number moves it back in time."""
    maximum = MAX_MOVED * _find_longer_side(box)
    x, y = (max(-maximum, min(maximum, step * pictures)) for step in motion)
    return box[0] + x, box[1] + y, box[2] + x, box[3] + y


def _grow_box(box: Box, away: int) -> Box:
    return widened(box, min(GROWTH * away, MAX_GROWN))


def widened(box: Box, margin: float) -> Box:
    """Return a box enlarged on each side by a fraction of its width and height."""
    left, top, right, bottom = box
    across = margin * (right - left)
    down = margin * (bottom - top)
    return left - across, top - down, right + across, bottom + down


def _join_boxes(first: Box, second: Box) -> Box:
    return (
        min(first[0], second[0]),
        min(first[1], second[1]),
        max(first[2], second[2]),
        max(first[3], second[3]),
    )


def _find_center(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _find_longer_side(box: Box) -> float:
    return max(box[2] - box[0], box[3] - box[1])
