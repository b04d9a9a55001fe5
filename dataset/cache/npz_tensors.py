"""Arrays of npz files as tensors, and tensors as arrays that other programs read."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.cache.npz_files import Array, Outline, read_arrays
from dataset.sources.masks import shrink_mask
from modules.errors import CacheError


def read_tensors(path: Path, outlines: Mapping[str, Outline], is_whole: bool) -> dict[str, Tensor]:
    """Return the arrays of these outlines: read, or as tensors on the meta device."""
    if is_whole:
        return {name: torch.from_numpy(array) for name, array in read_arrays(path, outlines).items()}
    dtypes = {one.dtype: torch.from_numpy(np.empty(0, one.dtype)).dtype for one in outlines.values()}
    return {
        name: torch.empty(one.shape, dtype=dtypes[one.dtype], device="meta") for name, one in outlines.items()
    }


def as_array(tensor: Tensor, keep_half: bool) -> Array:
    """Return a tensor as other programs read it: numbers of less than 32 bits as float32.

    keep_half: float16 stays.
    """
    if tensor.is_floating_point() and not (keep_half and tensor.dtype == torch.float16):
        tensor = tensor.double() if tensor.dtype == torch.float64 else tensor.float()
    found: Array = tensor.detach().cpu().contiguous().numpy()
    return found


def shrink_alpha(path: Path, mask: Tensor, grid: tuple[int, int], stride: tuple[int, int, int]) -> Tensor:
    """Return the mask of the loss, 1 H W of latents, for an alpha mask in pixels or in latent pixels."""
    height, width = grid
    if mask.shape == grid:
        return mask[None].half()
    if mask.shape != (height * stride[1], width * stride[2]):
        raise CacheError(f"{path}: its alpha_mask has the shape {tuple(mask.shape)}, its latents have {grid}")
    return shrink_mask(mask.float()[None] * 255, stride)
