"""Enlarge frames by repeating pixels, also frames of more values than CUDA's kernel for that can count."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

# values of a result: beyond, CUDA's kernel for channels last leaves zeros, without an error
# (pytorch/pytorch#141831)
MOST = 2**31 - 1


def repeat_pixels(x: Tensor, factor: int, most: int = MOST) -> Tensor:
    """Repeat each pixel `factor` times in height and width: B C H W to B C fH fW, in the memory layout of x.

    most: values of a result that torch's own kernel is trusted with.
    """
    if x.numel() * factor**2 <= most:
        return interpolate(x, scale_factor=float(factor), mode="nearest")
    batch, channels, height, width = x.shape
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    large = torch.empty(
        (batch, channels, height * factor, width * factor),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if is_last else torch.contiguous_format,
    )
    squares = large.unflatten(3, (width, factor)).unflatten(2, (height, factor))  # B C H f W f
    squares.copy_(x[:, :, :, None, :, None])
    return large
