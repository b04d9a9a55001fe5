"""Pictures with red dots, and where they are found."""

import numpy as np

from post.faces.boxes import FoundFace


def dotted(height: int, width: int, *centres: tuple[int, int], red: int = 255) -> np.ndarray:
    """A grey picture with red dots of 8 x 8 pixels around x, y."""
    pixels = np.full((height, width, 3), 60, np.uint8)
    for x, y in centres:
        pixels[y - 4 : y + 4, x - 4 : x + 4] = (red, 0, 0)
    return pixels


def surrounds(found: FoundFace, left: float, top: float, right: float, bottom: float) -> bool:
    """Whether a box holds all of another one."""
    box = found.box
    return box[0] <= left and box[1] <= top and box[2] >= right and box[3] >= bottom
