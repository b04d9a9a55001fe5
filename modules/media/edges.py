"""Draw the edges of an image, as input for edge ControlNets."""

import cv2
import numpy as np

from modules.media.reading import Frame


def draw_edges(image: Frame, low: int, high: int) -> Frame:
    """Return the edges of an image, H W 3, as white lines one pixel wide on black, H W 3.

    `low` and `high` are thresholds of the gradient; the image is converted to gray, but not blurred. Source:
    Canny 1986, as implemented in OpenCV.
    """
    edges = cv2.Canny(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), low, high)
    return np.repeat(np.asarray(edges, dtype=np.uint8)[..., None], 3, axis=2)
