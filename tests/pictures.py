"""Pictures that look different to a perceptual hash, as photographs do."""

import cv2
import numpy as np

from modules.media.reading import Frame

SIZE = (320, 240)


def picture(seed: int, size: tuple[int, int] = SIZE) -> Frame:
    """Blobs and edges of all sizes, as in a photograph: the power falls with the frequency."""
    generator = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for exponent in range(1, 8):
        cells = generator.normal(size=(2**exponent, 2**exponent, 3))
        total += cv2.resize(cells, size, interpolation=cv2.INTER_NEAREST) / exponent
    low, high = total.min(), total.max()
    return np.asarray((total - low) / (high - low) * 200 + 20, np.uint8)
