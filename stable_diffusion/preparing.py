"""Guide images of ControlNets: read, resized to the picture's size and prepared.

The pixels are those of diffusers' ControlNet pipelines: Lanczos, RGB, 0..1.
"""

from collections import OrderedDict
from pathlib import Path

import cv2
import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from modules.media.reading import Frame, read_image, resize_frame
from stable_diffusion.control_options import CannyThresholds

KEPT = 16  # prepared images that are kept for the next batch; one of 1024 x 1024 takes 3 MB


class GuideImages:
    """Make tensors of guide images. Each is read and prepared once for each size, the last ones are kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Path, CannyThresholds | None, int, int], Frame] = OrderedDict()

    def pixels(self, path: Path, canny: CannyThresholds | None, width: int, height: int) -> Tensor:
        """Return an image of that size: 3 H W float32 in 0..1.

        canny: the thresholds of edges that are drawn in its place. Raises MediaError if the image cannot be
        read.
        """
        key = (path, canny, width, height)
        if key not in self._kept:
            self._kept[key] = _prepare(read_image(path), canny, width, height)
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return rearrange(torch.from_numpy(self._kept[key]).float() / 255, "h w c -> c h w")


def _prepare(image: Frame, canny: CannyThresholds | None, width: int, height: int) -> Frame:
    if image.shape[:2] != (height, width):
        image = resize_frame(image, (width, height), "lanczos")
    # edges are found at the picture's size, so that lines stay one pixel wide
    return image if canny is None else draw_edges(image, canny)


def draw_edges(image: Frame, thresholds: CannyThresholds) -> Frame:
    """Return the edges of an image, white on black: H W 3 of H W 3.

    Canny's method on the grey image, without blurring it. Source: Canny 1986, in OpenCV's form.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    edges = cv2.Canny(grey, thresholds.low, thresholds.high)
    return np.repeat(edges[..., None], 3, axis=2)
