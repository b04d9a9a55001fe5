"""Turn the values of a network into a mask, keep clips steady, and combine a mask with an older one.

Source: the numbers of OneTrainer's masks, modules/module/BaseImageMaskModel.py and modules/util of
github.com/Nerogar/OneTrainer; the median over frames, the fading edge and masks that are not there are ours.
"""
# Letters: h w the network's grid, H W the image

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from data_tools.masks.places import Gray
from modules.errors import MediaError

Values = NDArray[np.float32]  # h w, 0..1


@dataclass(frozen=True)
class MaskShape:
    """How the values of a finder become a mask; each field is the option of the same name."""

    threshold: float
    smooth_pixels: int
    expand_pixels: int
    feather_pixels: int
    inverts: bool

    def find(self, values: Values, size: tuple[int, int]) -> Values:
        """Return a mask of the found regions, H W: 1 inside, fading to 0 over `feather_pixels`, 0 elsewhere.

        `values` are a finder's scores, h w, of any size; `size` is width and height of the image. The result
        is not inverted: `finish` does that.
        """
        if self.smooth_pixels:
            side = 2 * self.smooth_pixels + 1
            values = np.asarray(cv2.blur(values, (side, side), borderType=cv2.BORDER_REPLICATE), np.float32)
        if (values.shape[1], values.shape[0]) != size:
            values = np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_LINEAR), np.float32)
        is_found = (values > self.threshold).astype(np.uint8)
        if self.expand_pixels:
            side = 2 * self.expand_pixels + 1
            is_found = np.asarray(cv2.dilate(is_found, np.ones((side, side), np.uint8)), np.uint8)
        if not self.feather_pixels or not is_found.any():
            return is_found.astype(np.float32)
        # distance of each pixel to the nearest found one
        distance = cv2.distanceTransform(1 - is_found, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        return np.clip(1 - distance / (self.feather_pixels + 1), 0, 1).astype(np.float32)

    def finish(self, found: Values, old: Gray | None, mode: str, alpha: float) -> Gray:
        """Combine what `find` returned with the resized previous mask, if any; return the mask, H W."""
        new = 1 - found if self.inverts else found
        height, width = new.shape
        before = None
        if old is not None and mode not in ("fill", "replace"):
            resized = old if old.shape == new.shape else cv2.resize(old, (width, height))
            before = np.asarray(resized, np.float32) / np.float32(255)
        return to_gray(combine(new, before, mode, alpha))


def combine(new: Values, old: Values | None, mode: str, alpha: float) -> Values:
    """Combine a new mask, weighted by `alpha`, with the old one: H W, 0..1.

    If there is no old mask (None), `subtract` starts from white, because without a mask everything is
    learned; the other modes return the new mask.
    """
    scaled = np.float32(alpha) * new
    if mode == "subtract":
        return np.clip((1 if old is None else old) - scaled, 0, 1).astype(np.float32)
    if old is None or mode in ("fill", "replace"):
        return scaled
    if mode == "add":
        return np.clip(old + scaled, 0, 1).astype(np.float32)
    return ((old + scaled) / np.float32(1 + alpha)).astype(np.float32)


def to_gray(mask: Values) -> Gray:
    """Convert a mask from 0..1 to 0..255."""
    return np.rint(mask * 255).astype(np.uint8)


def steady(values: Iterable[Values], frames: int) -> Iterator[Values]:
    """Yield a median over time for each frame: of its values and those of its neighbors.

    v'[t] = median(v[t - frames], ..., v[t + frames]) for each pixel; beyond the ends, the first and the last
    frame are repeated.

    Raises:
        MediaError: If the frames change their size.
    """
    window: deque[Values] = deque(maxlen=2 * frames + 1)
    for value in _repeat_ends(values, frames):
        if window and value.shape != window[-1].shape:
            raise MediaError("its frames change their size, so that no mask of them can be steady")
        window.append(value)
        # the window is centered on the frame: `frames` values before and after it
        if len(window) == 2 * frames + 1:
            yield np.median(np.stack(window), axis=0).astype(np.float32) if frames else value


def _repeat_ends(values: Iterable[Values], times: int) -> Iterator[Values]:
    """Yield values, with the first and the last one repeated `times` more times."""
    last = None
    for value in values:
        if last is None:
            yield from [value] * times
        yield value
        last = value
    if last is not None:
        yield from [last] * times
