"""Turn the values of a network into a mask, keep clips steady, and combine a mask with an older one.

Source: the numbers of OneTrainer's masks, modules/module/BaseImageMaskModel.py and modules/util of
github.com/Nerogar/OneTrainer; the median over frames, the fading edge and missing masks are additions.
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

ScoreMap = NDArray[np.float32]  # h w, 0..1


@dataclass(frozen=True)
class MaskShaping:
    """Settings that turn a finder's scores into a mask; each field is the option of the same name."""

    threshold: float
    smooth_pixels: int
    expand_pixels: int
    feather_pixels: int
    inverts: bool

    def shape(self, scores: ScoreMap, size: tuple[int, int]) -> ScoreMap:
        """Return a mask of the found regions, H W: 1 inside, fading to 0 over `feather_pixels`, 0 elsewhere.

        `scores` are a finder's scores, h w, of any size; `size` is width and height of the image. The result
        is not inverted: `combine_with_previous` does that.
        """
        if self.smooth_pixels:
            kernel_side = 2 * self.smooth_pixels + 1
            scores = np.asarray(
                cv2.blur(scores, (kernel_side, kernel_side), borderType=cv2.BORDER_REPLICATE), np.float32
            )
        if (scores.shape[1], scores.shape[0]) != size:
            scores = np.asarray(cv2.resize(scores, size, interpolation=cv2.INTER_LINEAR), np.float32)
        is_found = (scores > self.threshold).astype(np.uint8)
        if self.expand_pixels:
            kernel_side = 2 * self.expand_pixels + 1
            is_found = np.asarray(
                cv2.dilate(is_found, np.ones((kernel_side, kernel_side), np.uint8)), np.uint8
            )
        if not self.feather_pixels or not is_found.any():
            return is_found.astype(np.float32)
        # distance of each pixel to the nearest found one
        distance = cv2.distanceTransform(1 - is_found, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        return np.clip(1 - distance / (self.feather_pixels + 1), 0, 1).astype(np.float32)

    def combine_with_previous(self, found: ScoreMap, previous: Gray | None, mode: str, alpha: float) -> Gray:
        """Return the mask to write, H W: `found`, inverted if asked for, combined with the old mask."""
        new = 1 - found if self.inverts else found
        height, width = new.shape
        old: ScoreMap | None = None
        if previous is not None and mode not in ("fill", "replace"):
            resized = previous if previous.shape == new.shape else cv2.resize(previous, (width, height))
            old = np.asarray(resized, np.float32) / np.float32(255)
        return np.rint(combine(new, old, mode, alpha) * 255).astype(np.uint8)


def combine(new: ScoreMap, old: ScoreMap | None, mode: str, alpha: float) -> ScoreMap:
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


def median_over_time(score_maps: Iterable[ScoreMap], num_neighbors: int) -> Iterator[ScoreMap]:
    """Yield each frame's median scores over the frame and `num_neighbors` frames before and after it.

    s'[t] = median(s[t - n], ..., s[t + n]) for each pixel; beyond the ends, the first and the last frame are
    repeated.

    Raises:
        MediaError: If the frames change size.
    """
    window_length = 2 * num_neighbors + 1
    window: deque[ScoreMap] = deque(maxlen=window_length)
    for score_map in _repeat_ends(score_maps, num_neighbors):
        if window and score_map.shape != window[-1].shape:
            raise MediaError("the size of its frames changes, so its mask cannot be steadied")
        window.append(score_map)
        if len(window) == window_length:
            yield np.median(np.stack(window), axis=0).astype(np.float32) if num_neighbors else score_map


def _repeat_ends(values: Iterable[ScoreMap], times: int) -> Iterator[ScoreMap]:
    """Yield values, with the first and the last one repeated `times` more times."""
    last = None
    for value in values:
        if last is None:
            yield from [value] * times
        yield value
        last = value
    if last is not None:
        yield from [last] * times
