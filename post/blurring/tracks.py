"""Follow boxes from picture to picture, and estimate where they are in pictures without a detection.

The estimates rather cover too much: a face that the detector misses in a few frames must not be seen.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from post.faces.boxes import Numbers, overlaps

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

LEAST_OVERLAP = 0.3  # of a box with where it was, or should be by now: it is the same thing
REACH = 1.5  # times its longer side: the farthest that a box may be away and still match
MOTION = 5  # sightings that tell how something moves
MOST_MOVED = 3.0  # times its longer side: the farthest that a box is extrapolated
GROWTH, MOST_GROWN = 0.02, 0.3  # of a box on each side, for each picture from where it was seen


@dataclass(eq=False)
class Track:
    """The sightings of one thing in successive pictures."""

    sightings: deque[tuple[int, Box]]  # number of the picture, box; in order
    is_new: bool  # False: the first sighting is also the last one of another track
    is_open: bool = True  # it may be found again

    @property
    def last(self) -> tuple[int, Box]:
        return self.sightings[-1]

    def expected(self, index: int) -> Box:
        number, box = self.last
        return _moved(box, _motion(list(self.sightings)[-MOTION:]), index - number)

    def covered(self, index: int, hold: int, lookback: int) -> Box | None:
        """Return the box to cover in a picture; None if it is too long before or after the sightings."""
        first, last = self.sightings[0][0], self.last[0]
        if index < first:
            away = first - index
            if not self.is_new or away > lookback:
                return None
            box, motion = self.sightings[0][1], _motion(list(self.sightings)[:MOTION])
            return _grown(_hull(box, _moved(box, motion, -away)), away)
        if index > last:
            away = index - last
            return _grown(_hull(self.last[1], self.expected(index)), away) if away <= hold else None
        before = [sighting for sighting in self.sightings if sighting[0] <= index]
        if before[-1][0] == index:
            return before[-1][1]
        after = [sighting for sighting in self.sightings if sighting[0] > index]
        return _between(before[-MOTION:], after[:MOTION], index)


@dataclass
class Tracks:
    """All tracks of a stream of pictures.

    Add the boxes of each picture, in order, and ask for a picture after `hold` and `lookback` further ones.
    """

    hold: int  # pictures for which something stays covered after it was last found
    lookback: int  # pictures that are covered before something is first found
    started: int = 0  # things that were found, as far as they could be told apart
    longest_gap: int = 0  # pictures in which something was missed between two sightings
    _tracks: list[Track] = field(default_factory=list)

    def see(self, index: int, boxes: Sequence[Box]) -> None:
        """Note the boxes found in a picture."""
        waiting = [
            track for track in self._tracks if track.is_open and index - track.last[0] <= self.hold + 1
        ]
        left = list(boxes)
        for track, box in _take_pairs(waiting, left, _closeness, index):
            self._note_gap(track, index)
            track.sightings.append((index, box))
        for track, box in _take_pairs(waiting, left, _nearness, index):
            # perhaps another one: where it was stays covered, and so is the way from there
            self._note_gap(track, index)
            track.is_open = False
            self._tracks.append(Track(deque([track.last, (index, box)]), is_new=False))
        self._tracks += [Track(deque([(index, box)]), is_new=True) for box in left]
        self.started += len(left)

    def boxes(self, index: int) -> list[Box]:
        boxes_of_tracks = (track.covered(index, self.hold, self.lookback) for track in self._tracks)
        return [box for box in boxes_of_tracks if box is not None]

    def forget(self, index: int) -> None:
        self._tracks = [track for track in self._tracks if track.last[0] + self.hold > index]
        for track in self._tracks:
            while len(track.sightings) > MOTION and track.sightings[1][0] <= index:
                track.sightings.popleft()

    def _note_gap(self, track: Track, index: int) -> None:
        self.longest_gap = max(self.longest_gap, index - track.last[0] - 1)


def _take_pairs(
    tracks: list[Track], boxes: list[Box], score: Callable[[Track, Numbers, int], Numbers], index: int
) -> list[tuple[Track, Box]]:
    """Match tracks with boxes, best pairs first, and remove both from their lists.

    score: function of a track, the boxes (N 4) and the picture's number; above 0 if they may match.
    """
    if not tracks or not boxes:
        return []
    places = np.array(boxes, np.float32)
    scores = np.stack([score(track, places, index) for track in tracks])
    pairs = []
    while scores.max() > 0:
        row, column = np.unravel_index(scores.argmax(), scores.shape)  # of equal ones the first
        pairs.append((tracks[row], boxes[column]))
        scores[row], scores[:, column] = 0, 0
    for track, box in pairs:
        tracks.remove(track)
        boxes.remove(box)
    return pairs


def _closeness(track: Track, boxes: Numbers, index: int) -> Numbers:
    places = np.array([track.last[1], track.expected(index)], np.float32)
    best = np.maximum(overlaps(places[0], boxes), overlaps(places[1], boxes))
    return np.where(best >= LEAST_OVERLAP, best, 0)


def _nearness(track: Track, boxes: Numbers, index: int) -> Numbers:
    """Return how near boxes are to a track's last or expected place, 0..1; 0 if they are too far."""
    reach = REACH * np.maximum(_longer(track.last[1]), (boxes[:, 2:] - boxes[:, :2]).max(axis=1))
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    places = np.array([_centre(track.last[1]), _centre(track.expected(index))], np.float32)
    away = np.minimum(*(np.hypot(*(centres - place).T) for place in places))
    return np.maximum(0, 1 - away / np.maximum(reach, 1e-6))


def _between(before: Sequence[tuple[int, Box]], after: Sequence[tuple[int, Box]], index: int) -> Box:
    """Return a box to cover between two sightings, around the interpolated box and the extrapolated one.

    Something that changes its speed in between is near one of the two.
    """
    (first, begin), (last, end) = before[-1], after[0]
    part = (index - first) / (last - first)
    left, top, right, bottom = ((1 - part) * a + part * b for a, b in zip(begin, end, strict=True))
    box = (left, top, right, bottom)
    if index - first <= last - index:
        expected, away = _moved(begin, _motion(before), index - first), index - first
    else:
        expected, away = _moved(end, _motion(after), index - last), last - index
    return _grown(_hull(box, expected), away)


def _motion(sightings: Sequence[tuple[int, Box]]) -> tuple[float, float]:
    """Return the mean motion from picture to picture, in pixels to the right and down."""
    (first, begin), (last, end) = sightings[0], sightings[-1]
    if first == last:
        return 0.0, 0.0
    (x0, y0), (x1, y1) = _centre(begin), _centre(end)
    return (x1 - x0) / (last - first), (y1 - y0) / (last - first)


def _moved(box: Box, motion: tuple[float, float], pictures: int) -> Box:
    """Return a box moved by `pictures` pictures of motion; negative numbers move it back."""
    most = MOST_MOVED * _longer(box)
    x, y = (max(-most, min(most, step * pictures)) for step in motion)
    return box[0] + x, box[1] + y, box[2] + x, box[3] + y


def _grown(box: Box, away: int) -> Box:
    part = min(GROWTH * away, MOST_GROWN)
    across, down = part * (box[2] - box[0]), part * (box[3] - box[1])
    return box[0] - across, box[1] - down, box[2] + across, box[3] + down


def _hull(first: Box, second: Box) -> Box:
    return (
        min(first[0], second[0]),
        min(first[1], second[1]),
        max(first[2], second[2]),
        max(first[3], second[3]),
    )


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _longer(box: Box) -> float:
    return max(box[2] - box[0], box[3] - box[1])
