"""Random masks for inpainting: clouds, polygons and shapes. True is to be repainted.

Shares and sizes are those of sd-scripts, so that models learn the same masks.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

BoolMask = NDArray[np.bool_]  # H W

CLOUD, POLYGON, SHAPE = 0.40, 0.35, 0.25  # probability of each kind
UNITED = 0.33  # fraction of clouds with a polygon or a shape in addition
OCTAVES = 4
CELLS = 16  # cells of the first octave along each side
CLOUD_AREA = (0.1, 0.3)  # fraction of the image
AREA = (0.1, 0.6)  # area of a polygon's circle, and of a shape, as fraction of the image
CORNERS = 6
MIN_RADIUS = 0.6  # minimum distance of a corner, as fraction of the maximum


def draw_mask(height: int, width: int, rng: random.Random) -> BoolMask:
    """Return a random mask, H W, that is neither empty nor full."""
    kind = rng.random()
    if kind < CLOUD:
        mask = draw_cloud(height, width, rng)
        if rng.random() < UNITED:
            add = draw_polygons if rng.random() < 0.5 else draw_shape
            mask |= add(height, width, rng)
        return mask
    if kind < CLOUD + POLYGON:
        return draw_polygons(height, width, rng)
    return draw_shape(height, width, rng)


def draw_cloud(height: int, width: int, rng: random.Random) -> BoolMask:
    """Return a random mask of clouds, H W: True where fractal noise is highest."""
    cloud_rng = np.random.default_rng(rng.getrandbits(64))
    noise = np.zeros((height, width), np.float32)
    for octave in range(OCTAVES):
        cells = CELLS * 2**octave
        grid = cloud_rng.random((cells, cells), np.float32)
        noise += 0.5**octave * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    highest = np.quantile(noise, 1 - rng.uniform(*CLOUD_AREA))
    mask: BoolMask = noise > highest
    return mask


def draw_polygons(height: int, width: int, rng: random.Random) -> BoolMask:
    """Draw one or two polygons, H W, with corners at equal angles and random distances from the center.

    A circle through the farthest possible corners would cover a random fraction of the image, within AREA.
    """
    mask = np.zeros((height, width), np.uint8)
    area = height * width
    for _ in range(rng.randint(1, 2)):
        radius = rng.uniform(*(math.sqrt(fraction * area / math.pi) for fraction in AREA))
        margin = 0.2 * radius
        x = rng.uniform(margin, width - margin)
        y = rng.uniform(margin, height - margin)
        corners = []
        for corner in range(CORNERS):
            angle = 2 * math.pi * corner / CORNERS
            distance = radius * rng.uniform(MIN_RADIUS, 1)
            corners.append((x + distance * math.cos(angle), y + distance * math.sin(angle)))
        _fill(mask, corners)
    return mask.astype(bool)


def draw_shape(height: int, width: int, rng: random.Random) -> BoolMask:
    """Draw a rectangle or an ellipse, H W, at a random place and of a random size within AREA."""
    low, high = (math.sqrt(fraction) for fraction in AREA)
    rows = max(1, round(height * rng.uniform(low, high)))
    columns = max(1, round(width * rng.uniform(low, high)))
    top = rng.randint(0, height - rows)
    left = rng.randint(0, width - columns)
    mask = np.zeros((height, width), bool)
    box = mask[top : top + rows, left : left + columns]
    if rng.random() < 0.5:
        box[:] = True
        return mask
    y, x = np.ogrid[:rows, :columns]
    down = (y + 0.5) / rows * 2 - 1
    across = (x + 0.5) / columns * 2 - 1
    box[:] = down**2 + across**2 <= 1
    return mask


def _fill(mask: NDArray[np.uint8], corners: Sequence[tuple[float, float]]) -> None:
    points: Any = np.rint(np.array([corners])).astype(np.int32)
    cv2.fillPoly(mask, points, 1)
