"""Guide images of ControlNets: read, resized to the picture's size and prepared.

The pixels are those of diffusers' ControlNet pipelines: Lanczos, RGB, 0..1.
"""
# Letters: B pictures, H W pixels

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from modules.errors import OptionError
from modules.media.reading import Frame, read_image, resize_frame
from stable_diffusion.contract import AskedPicture, UnetCall
from stable_diffusion.control_options import CannyThresholds, ControlUse
from stable_diffusion.pixels import STRIDE

KEPT = 16  # prepared images that are kept for the next batch; one of 1024 x 1024 takes 3 MB


class GuideImages:
    """The guide images of all models of a run: each prepared once for each size, the last ones are kept."""

    def __init__(self, uses: Sequence[ControlUse], option: str) -> None:
        """uses: of the models, in the order of `AskedPicture.guides`. option: that gives the models."""
        self._uses, self._option = uses, option
        self._kept: OrderedDict[tuple[Path, CannyThresholds | None, int, int], Frame] = OrderedDict()

    def check(self, pictures: Sequence[AskedPicture]) -> None:
        """Raise OptionError if a picture has not as many guides as there are models, or one for all."""
        for picture in pictures:
            if len(picture.guides) not in {1, len(self._uses)}:
                raise OptionError(
                    f"{picture.label}: {len(picture.guides)} guide images, but {self._option} has "
                    f"{len(self._uses)}. Give --guide_image_path one for each model, or a single one for all."
                )

    def read(self, pictures: Sequence[AskedPicture], width: int, height: int) -> tuple[Tensor, ...]:
        """Return the guides at a size in pixels: for each model B 3 H W float32 in 0..1.

        Raises MediaError if one cannot be read.
        """
        found = []
        for number, use in enumerate(self._uses):
            paths = [picture.guides[number if len(picture.guides) > 1 else 0] for picture in pictures]
            found.append(torch.stack([self._pixels(path, use.canny, width, height) for path in paths]))
        return tuple(found)

    def _pixels(self, path: Path, canny: CannyThresholds | None, width: int, height: int) -> Tensor:
        key = (path, canny, width, height)
        if key not in self._kept:
            self._kept[key] = prepare(read_image(path), canny, width, height)
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return rearrange(torch.from_numpy(self._kept[key]).float() / 255, "h w c -> c h w")


class BatchGuides:
    """The guides of one batch on its device, at the size of the features that a call has."""

    def __init__(
        self, images: GuideImages, pictures: Sequence[AskedPicture], width: int, height: int
    ) -> None:
        """Read them; raises as `GuideImages.check` and `GuideImages.read`."""
        self._images, self._pictures = images, pictures
        images.check(pictures)
        self._size = (width, height)
        self._guides = images.read(pictures, width, height)

    def at(self, call: UnetCall, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return for each model B 3 H W in 0..1, at the size of the call's latents (Gradual Latent grows)."""
        height, width = (int(side) * STRIDE for side in call.sample.shape[-2:])
        if self._size != (width, height):
            self._guides = self._images.read(self._pictures, width, height)
            self._size = (width, height)
        self._guides = tuple(each.to(call.sample.device, dtype) for each in self._guides)
        return self._guides


def is_active(use: ControlUse, call: UnetCall) -> bool:
    """Tell whether a model acts in the step of a call: in the first ones, as far as its ratio goes."""
    return call.step / call.num_steps <= use.ratio


def prepare(image: Frame, canny: CannyThresholds | None, width: int, height: int) -> Frame:
    """Return an image, H W 3, at a size. canny: thresholds of the edges that are drawn in its place."""
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
    return np.repeat(np.asarray(edges, dtype=np.uint8)[..., None], 3, axis=2)
