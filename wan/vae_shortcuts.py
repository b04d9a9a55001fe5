"""Shortcuts without weights around the stages of the Wan2.2 VAE, and its patches of pixels.

A stage changes channels and resolution. Its shortcut does too: the pixels of a small block (frames x rows x
columns, in this order, the last one fastest) and the channels form one long axis, which is averaged in
groups, or whose values are repeated. Source: the released VAE of Wan2.2.
"""
# Letters: B batch, C channels, T frames, H height, W width

from itertools import product
from math import prod

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Factors = tuple[int, int, int]  # frames, rows, columns of a block


def fold_patches(pixels: Tensor, patch: int) -> Tensor:
    """Fold blocks of pixels, B C T H W to B CPP T H/P W/P. Unlike `pixel_unshuffle`, columns are outer."""
    return rearrange(pixels, "b c t (h row) (w column) -> b (c column row) t h w", row=patch, column=patch)


def unfold_patches(channels: Tensor, patch: int) -> Tensor:
    """Undo `fold_patches`: B CPP T H W to B C T HP WP."""
    return rearrange(channels, "b (c column row) t h w -> b c t (h row) (w column)", row=patch, column=patch)


def fits_shortcut(width: int, width_out: int, factors: Factors, is_down: bool) -> bool:
    """Return whether a stage's widths allow the averages (down) or repetitions (up) of its shortcut."""
    block = prod(factors)
    pair = (width, width_out)
    if is_down:
        return width * block % width_out == 0
    return max(pair) % min(pair) == 0 and width_out * block % width == 0


def average_groups(x: Tensor, width: int, factors: Factors) -> Tensor:
    """Return group means of x, B C T H W to B width T/frames H/rows W/columns.

    Zeros before the clip's only or first frame complete a block of frames.
    """
    frames, rows, columns = factors
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % frames, 0))
    folded = rearrange(x, "b c (t i) (h j) (w k) -> b (c i j k) t h w", i=frames, j=rows, k=columns)
    return folded.unflatten(1, (width, -1)).mean(dim=2)


def add_repeated(h: Tensor, x: Tensor, factors: Factors) -> Tensor:
    """Add x, B C T H W, to h, B C' T' H*rows W*columns, repeating its values in blocks; return h.

    h is changed in place. Each value of x becomes a block of frames, rows and columns, whose pixels are
    filled from the channels of x in order; if h has more channels, x's are repeated. T' is T * frames,
    or less at the beginning of a clip, where the first frames of the first block are left out. One pixel of
    all blocks is added at a time, so that no enlarged copy of x is made.
    """
    frames, rows, columns = factors
    block = prod(factors)
    num_channels = h.shape[1]
    if num_channels > x.shape[1]:
        x = x.repeat_interleave(num_channels // x.shape[1], dim=1)
    channel_step = x.shape[1] // num_channels
    num_skipped = x.shape[2] * frames - h.shape[2]  # frames that the first block lacks
    pixels = product(range(frames), range(rows), range(columns))
    for index, (frame, row, column) in enumerate(pixels):
        # a frame that the first block lacks begins in the second one
        first_block = 1 if frame < num_skipped else 0
        first_frame = first_block * frames + frame - num_skipped
        first_channel = index * channel_step // block
        values = x[:, first_channel::channel_step, first_block:]
        h[:, :, first_frame::frames, row::rows, column::columns] += values
    return h
