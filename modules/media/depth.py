"""Pixels of 8 and of 16 bits a channel. FFmpeg's own conversions are off by up to 3 of 255, or add noise."""

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8] | NDArray[np.uint16]  # H W 3, RGB; 16 bits use their whole range


def in_eight_bits(pixels: Pixels) -> NDArray[np.uint8]:
    """Return pixels with 8 bits, rounded to the nearest."""
    if pixels.dtype == np.uint8:
        return np.asarray(pixels, dtype=np.uint8)
    return np.asarray(cv2.convertScaleAbs(pixels, alpha=1 / 257), dtype=np.uint8)


def in_sixteen_bits(pixels: Pixels) -> NDArray[np.uint16]:
    """Return pixels with 16 bits."""
    if pixels.dtype == np.uint16:
        return np.asarray(pixels, dtype=np.uint16)
    return pixels.astype(np.uint16) * np.uint16(257)
