"""Draw clips: plain shapes that move over plain grounds, and what a caption says about them.

A scene depends on a random generator only, so a seed names a clip. Nothing here is learned or read from
files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Colour = tuple[int, int, int]
Clip = NDArray[np.uint8]  # F H W 3

SIZE = 64  # width and height in pixels
FRAMES = 17
FPS = 16
FINE = 4  # draw this many times larger, then average: smooth edges

COLOURS: dict[str, Colour] = {
    "red": (214, 48, 44),
    "green": (52, 170, 70),
    "blue": (48, 92, 224),
    "yellow": (236, 208, 56),
    "white": (240, 240, 238),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
GROUNDS: dict[str, Colour] = {
    "black": (14, 14, 16),
    "grey": (84, 84, 88),
    "brown": (78, 54, 38),
    "navy": (24, 30, 62),
    "purple": (70, 48, 84),
}
WIDTHS: dict[str, tuple[float, float]] = {"small": (12, 15), "": (15, 21), "large": (21, 26)}  # pixels
# pixels per frame
SPEEDS: dict[str, tuple[float, float]] = {"slowly": (0.7, 1.0), "": (1.2, 1.9), "fast": (2.1, 2.7)}
FORMS = (*SHAPES, "diamond", "ring", "cross", "star", "bar")  # all that can be drawn; captions use SHAPES


@dataclass(frozen=True)
class Thing:
    """One moving shape. Positions are those of its center, in pixels from the upper left corner."""

    colour: str
    shape: str
    direction: str
    speed: str  # a key of SPEEDS
    width: str  # a key of WIDTHS
    rgb: Colour
    pixels: float  # width and height
    start: tuple[float, float]
    velocity: tuple[float, float]  # pixels per frame

    def center(self, frame: int) -> tuple[float, float]:
        """Return the position of the center in a frame, x and y in pixels."""
        return self.start[0] + frame * self.velocity[0], self.start[1] + frame * self.velocity[1]


@dataclass(frozen=True)
class Scene:
    """The content of a clip."""

    things: tuple[Thing, ...]
    ground: str
    ground_rgb: Colour


def draw_thing(
    random: np.random.Generator,
    colour: str | None = None,
    shape: str | None = None,
    direction: str | None = None,
    width: str | None = None,
    rgb: Colour | None = None,
) -> Thing:
    """Draw a thing at random except for what is given. It is fully visible for most of the clip."""
    colour = colour or pick(random, tuple(COLOURS))
    shape = shape or pick(random, SHAPES)
    direction = direction or pick(random, tuple(DIRECTIONS))
    width = pick(random, tuple(WIDTHS)) if width is None else width
    speed = pick(random, tuple(SPEEDS))
    pixels, pace = random.uniform(*WIDTHS[width]), random.uniform(*SPEEDS[speed])
    step = DIRECTIONS[direction]
    travel = pace * (FRAMES - 1)
    along = SIZE / 2 + random.uniform(-1, 1) * max(0.0, (SIZE - pixels - travel) / 2)  # the middle of its way
    across = random.uniform(pixels / 2 + 1, SIZE - 1 - pixels / 2)
    middle = (along, across) if step[0] else (across, along)
    velocity = (pace * step[0], pace * step[1])
    start = (middle[0] - velocity[0] * (FRAMES - 1) / 2, middle[1] - velocity[1] * (FRAMES - 1) / 2)
    painted = near(random, rgb or COLOURS[colour], 8)
    return Thing(colour, shape, direction, speed, width, painted, pixels, start, velocity)


def scene(random: np.random.Generator, two: float = 0.0) -> Scene:
    """Draw a scene of one thing, or with probability `two` of two things that never touch."""
    ground = pick(random, tuple(GROUNDS))
    rgb = near(random, GROUNDS[ground], 6)
    if random.uniform() >= two:
        return Scene((draw_thing(random),), ground, rgb)
    first = draw_thing(random, width="small")
    while True:
        second = draw_thing(random, width="small")
        if (second.colour, second.shape) != (first.colour, first.shape) and _apart(first, second):
            return Scene((first, second), ground, rgb)


def draw(scene: Scene, first: int = 0, count: int = FRAMES) -> Clip:
    """Draw the clip of a scene, or `count` frames of it from `first` on: F H W 3."""
    frames = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for index in range(count):
        fine = np.empty((SIZE * FINE, SIZE * FINE, 3), np.uint8)
        fine[:] = scene.ground_rgb
        for each in scene.things:
            paint(fine, each.shape, each.center(first + index), each.pixels, each.rgb)
        frames[index] = cv2.resize(fine, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return frames


def paint(
    fine: NDArray[np.uint8], form: str, center: tuple[float, float], pixels: float, rgb: Colour
) -> None:
    """Fill a form into an image that is FINE times larger than the clip.

    `center` and `pixels` are in pixels of the clip.
    """
    fraction = 16  # cv2 takes whole numbers: sixteenths of a fine pixel
    contours = [
        np.round((np.array(center) + pixels * points) * FINE * fraction).astype(np.int32)
        for points in outline(form)
    ]
    cv2.fillPoly(fine, contours, rgb, lineType=cv2.LINE_8, shift=4)


def outline(form: str) -> Sequence[NDArray[np.float64]]:
    """Return the contours of a form one unit wide around (0, 0). Overlapping contours make a hole.

    Raises:
        KeyError: For an unknown form.
    """
    match form:
        case "circle":
            return [_around(48, 0.5)]
        case "square":
            return [np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])]
        case "triangle":
            return [np.array([(0, -0.5), (0.5, 0.5), (-0.5, 0.5)])]
        case "diamond":
            return [_around(4, 0.5)]
        case "ring":
            return [_around(48, 0.5), _around(48, 0.26)]
        case "star":
            return [_around(10, np.where(np.arange(10) % 2, 0.24, 0.54), turn=-0.25)]
        case "bar":
            return [np.array([(-0.5, -0.17), (0.5, -0.17), (0.5, 0.17), (-0.5, 0.17)])]
        case "cross":
            a, b = 0.17, 0.5
            return [
                np.array(
                    [
                        (-a, -b),
                        (a, -b),
                        (a, -a),
                        (b, -a),
                        (b, a),
                        (a, a),
                        (a, b),
                        (-a, b),
                        (-a, a),
                        (-b, a),
                        (-b, -a),
                        (-a, -a),
                    ]
                )
            ]
    raise KeyError(form)


def near(random: np.random.Generator, rgb: Colour, spread: int) -> Colour:
    """Return a color close to `rgb`: each value differs by at most `spread`."""
    red, green, blue = np.clip(np.array(rgb) + random.integers(-spread, spread + 1, 3), 0, 255).tolist()
    return red, green, blue


def pick(random: np.random.Generator, values: Sequence[str]) -> str:
    """Return one of `values` at random."""
    return values[int(random.integers(len(values)))]


def _around(points: int, radius: float | NDArray[np.float64], turn: float = 0.0) -> NDArray[np.float64]:
    """Return points on a circle.

    `turn` is the place of the first one, in whole turns from the right.
    """
    angles = 2 * np.pi * (np.arange(points) / points + turn)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _apart(first: Thing, second: Thing) -> bool:
    """Return whether the bounding boxes stay two pixels apart in every frame."""
    minimum = (first.pixels + second.pixels) / 2 + 2
    ways = [np.array([each.center(index) for index in range(FRAMES)]) for each in (first, second)]
    return bool((np.abs(ways[0] - ways[1]).max(axis=1) > minimum).all())
