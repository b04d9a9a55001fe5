"""What a clip shows, read off its pixels with OpenCV: shape, color and direction of the one thing in it. No
learned parts.

The ground is the median color; what stands out from it in a frame is cut out, laid over each form and
compared.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from pocket.drawing import COLOURS, DIRECTIONS, outline

Image = NDArray[np.float32]
Mask = NDArray[np.uint8]

PALETTE = {**COLOURS, "orange": (240, 130, 30), "cyan": (40, 200, 210), "magenta": (210, 60, 200)}
FINE = 4  # frames are enlarged so many times: edges between pixels
CONTRAST = 30.0  # of 255: how far a thing's color at least is from the ground's
SMALLEST, LARGEST = 50, 1100  # pixels of a thing
BLURS = (0.8, 1.5)  # pixels: how soft edges may be
LIKENESS = 0.8  # overlap with a form over the area of both
TEMPLATE = 48  # pixels a side
TRAVEL = 4.0  # pixels from first to last: less is standing still
STEADY = 0.6  # share of the frames in which the thing has to be found


@dataclass(frozen=True)
class Sighting:
    """The thing in one frame."""

    center: tuple[float, float]  # x, y in pixels
    shape: str | None  # None: like no form, or partly outside
    colour: str


@dataclass(frozen=True)
class Verdict:
    """What a clip shows; None where it cannot be told."""

    shape: str | None
    colour: str | None
    direction: str | None
    colors: tuple[str, ...] = ()  # of every frame in which the thing was found

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing there."""
        return not self.colors

    @property
    def keeps_color(self) -> bool:
        """Whether every frame shows the same color."""
        return len(set(self.colors)) == 1


NOTHING = Verdict(None, None, None)


def look(clip: NDArray[np.uint8], shapes: Sequence[str] = ("circle", "square", "triangle")) -> Verdict:
    """The verdict on a clip F H W 3, RGB. shapes: forms of pocket.drawing that are told apart."""
    smooth = [cv2.GaussianBlur(frame, (0, 0), 0.8).astype(np.float32) for frame in clip]
    ground = np.median(np.stack(smooth).reshape(-1, 3), axis=0)
    sightings = [
        (index, seen)
        for index, frame in enumerate(smooth)
        if (seen := sight(frame, ground, shapes)) is not None
    ]
    if len(sightings) < max(1, STEADY * len(clip)):
        return NOTHING
    colors = tuple(seen.colour for _, seen in sightings)
    forms = Counter(seen.shape for _, seen in sightings if seen.shape is not None)
    shape = None
    if forms.total() >= 0.4 * len(sightings):
        shape, votes = forms.most_common(1)[0]
        shape = shape if votes > 0.6 * forms.total() else None
    return Verdict(shape, Counter(colors).most_common(1)[0][0], direction_of(sightings), colors)


def sight(frame: Image, ground: NDArray[np.floating], shapes: Sequence[str]) -> Sighting | None:
    """The one thing that stands out from the ground, if there is one."""
    away = np.linalg.norm(frame - ground.astype(np.float32), axis=2)
    level = float(np.quantile(away, 0.985))  # the smallest thing covers more than this leaves out
    if level < CONTRAST:
        return None
    fine = cv2.resize(away, None, fx=FINE, fy=FINE, interpolation=cv2.INTER_CUBIC)
    count, labels, stats, centers = cv2.connectedComponentsWithStats((fine > level / 2).astype(np.uint8))
    if count < 2:
        return None
    areas = stats[1:, cv2.CC_STAT_AREA]
    largest = 1 + int(np.argmax(areas))
    area = areas[largest - 1] / FINE**2
    if not SMALLEST <= area <= LARGEST or areas.sum() > 1.35 * areas[largest - 1]:
        return None
    mask = (labels == largest).astype(np.uint8)
    left, top, width, height = stats[largest, :4]
    edges = mask[0], mask[-1], mask[:, 0], mask[:, -1]
    cut = max(int(edge.sum()) for edge in edges) > 0.3 * max(width, height)
    shape = None if cut else shape_of(mask[top : top + height, left : left + width], shapes)
    x, y = centers[largest] / FINE - 0.5 + 0.5 / FINE
    return Sighting((float(x), float(y)), shape, color_of(frame, mask))


def shape_of(mask: Mask, shapes: Sequence[str]) -> str | None:
    """The form that covers most of a mask cut out at its edges; None where none does, or where it is
    stretched.
    """
    height, width = mask.shape
    if not 0.72 < width / height < 1.39:
        return None
    seen, pixels = fitted(mask), round(max(width, height) / FINE)
    likeness = {shape: max(overlap(seen, form(shape, pixels, blur)) for blur in BLURS) for shape in shapes}
    best = max(likeness, key=lambda shape: likeness[shape])
    return best if likeness[best] >= LIKENESS else None


def overlap(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """What both cover over what either does."""
    return float(np.sum(first & second) / np.sum(first | second))


@cache
def form(shape: str, pixels: int, blur: float) -> NDArray[np.bool_]:
    """A form as `sight` would cut it out of a frame where it is so many pixels wide and the edges are that
    soft.
    """
    side = (2 * pixels + 8) * FINE
    image = np.zeros((side, side), np.float32)
    cv2.fillPoly(
        image,
        [np.round(side / 2 + points * pixels * FINE).astype(np.int32) for points in outline(shape)],
        1.0,
    )
    mask = (cv2.GaussianBlur(image, (0, 0), blur * FINE) > 0.5).astype(np.uint8)
    left, top, width, height = cv2.boundingRect(mask)
    return fitted(mask[top : top + height, left : left + width])


def fitted(mask: Mask) -> NDArray[np.bool_]:
    """A mask that reaches its edges, as a square of TEMPLATE pixels."""
    return cv2.resize(mask * 255, (TEMPLATE, TEMPLATE), interpolation=cv2.INTER_AREA) > 127


def color_of(frame: Image, mask: Mask) -> str:
    """The name of the color in the middle of the thing; its edges are mixed with the ground."""
    inner = cv2.erode(mask, np.ones((2 * FINE + 1, 2 * FINE + 1), np.uint8))
    small = cv2.resize(inner if inner.any() else mask, frame.shape[1::-1], interpolation=cv2.INTER_AREA) > 0
    middle = np.median(frame[small], axis=0)
    names = list(PALETTE)
    samples = np.array([middle, *PALETTE.values()], dtype=np.float32)[None] / 255
    lab = cv2.cvtColor(samples, cv2.COLOR_RGB2LAB)[0] * (0.5, 1, 1)  # brightness counts half
    return names[int(np.argmin(np.linalg.norm(lab[1:] - lab[0], axis=1)))]


def direction_of(sightings: Sequence[tuple[int, Sighting]]) -> str | None:
    """Where a straight line through the centers leads; None where it stands still or goes slantwise."""
    times = np.array([index for index, _ in sightings], dtype=float)
    slopes = [float(np.polyfit(times, [seen.center[axis] for _, seen in sightings], 1)[0]) for axis in (0, 1)]
    travel = np.array(slopes) * np.ptp(times)
    axis = int(np.argmax(np.abs(travel)))
    if abs(travel[axis]) < TRAVEL or abs(travel[axis]) < 2 * abs(travel[1 - axis]):
        return None
    sign = int(np.sign(travel[axis]))
    return next(name for name, step in DIRECTIONS.items() if step[axis] == sign)
