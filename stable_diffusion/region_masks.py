"""Regions of the parts of a prompt, read from the colours of a mask image."""
# Letters: B pictures, P parts of a prompt, H W size of the mask

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from PIL import Image
from torch import Tensor

from modules.media.opening import open_image

_CHANNELS = 3
_DARK = 1e-4  # below it, no part has a pixel: they share it


def read_regions(path: Path, parts: int, width: int, height: int, color_codes: int | None = None) -> Tensor:
    """Return the region of each part of a prompt: P height width, float32, 0..1.

    The red, green and blue channels are the regions of parts 1 to 3. color_codes: pure colours are regions
    instead, as many as this: red is bit 1 of the number of a part, green bit 2, blue bit 4. Parts without a
    channel or a colour, and those whose region is empty, act everywhere.
    Raises MediaError if the image cannot be read.
    """
    with open_image(path) as image:
        pixels = image.convert("RGB")
    # colours must not blend into other codes
    method = Image.Resampling.BILINEAR if color_codes is None else Image.Resampling.NEAREST
    if pixels.size != (width, height):
        pixels = pixels.resize((width, height), method)
    colors = np.asarray(pixels)
    codes = ((colors >= 128) * np.array([1, 2, 4])).sum(-1)  # H W
    regions = torch.ones(parts, height, width)
    for part in range(min(parts, color_codes or _CHANNELS)):
        region = colors[..., part] / np.float32(255) if color_codes is None else codes == part + 1
        if region.any():
            regions[part] = torch.from_numpy(region.astype(np.float32))
    return regions


def whole(parts: int) -> Tensor:
    """Return regions that all cover the whole picture: P 1 1."""
    return torch.ones(parts, 1, 1)


def resize(regions: Tensor, size: tuple[int, int]) -> Tensor:
    """Return regions B P H W at another size (rows, columns), bilinear: B P h w."""
    if regions.shape[-2:] == size:
        return regions
    return functional.interpolate(regions, size, mode="bilinear", align_corners=False)


def part_weights(regions: Tensor) -> Tensor:
    """Return regions ... P H W divided by their sum; 1 / P where no part has a region."""
    total = regions.sum(-3, keepdim=True)
    shared = torch.full_like(regions, 1 / regions.shape[-3])
    return torch.where(total < _DARK, shared, regions / total.clamp(min=_DARK))


def part_shares(regions: Tensor) -> Tensor:
    """Return how much of the picture each part has: regions P H W -> P, of sum 1."""
    return part_weights(regions).mean((-2, -1))


def stack(regions: Sequence[Tensor]) -> Tensor:
    """Return the regions of the pictures of a batch, P H W each (or P 1 1), as B P H W."""
    height, width = (max(region.shape[axis] for region in regions) for axis in (-2, -1))
    return torch.stack([region.expand(-1, height, width) for region in regions])
