"""The stream of images through tools for finished videos, and the contract of a tool (`Stage`).

Also converts pixels to network inputs, and back.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from modules.devices import send_ahead
from modules.errors import OptionError
from modules.media.encoding import OutputFrame, Pixels


@dataclass(frozen=True)
class Clip:
    """Size, rate and length of a stream of images, known before the first image is read."""

    path: Path  # path of the video, for messages
    width: int
    height: int
    rate: Fraction | None  # images a second on average; None: a single image
    frames: int | None  # frame count in the file's header, for progress bars; None if unknown
    is_deep: bool  # whether results have 16 bits per channel instead of 8


class Stage(Protocol):
    """A loaded postprocessing tool, which can process several clips one after another."""

    @property
    def name(self) -> str:
        """Name of the tool in messages, such as `upscaler`."""

    def plan_output(self, clip: Clip) -> Clip:
        """Return the size, rate and length of the stage's output for a clip.

        Raises MediaError or OptionError if the stage cannot process the clip, such as one that is
        too small.
        """

    def run(self, frames: Iterator[OutputFrame], clip: Clip) -> Iterator[OutputFrame]:
        """Yield the processed images in playing order, with a bounded number of images in memory.

        Unchanged images keep their pixels and dtype. A summary of the clip is logged after the last image.

        Raises:
            UserError: If the result must not be kept; nothing is written then.
        """


def to_tensor(pixels: Pixels, device: torch.device) -> Tensor:
    """Copy pixels, H W 3 in 8 or 16 bits, to the device as 1 3 H W float32, 0..1."""
    writable = np.require(pixels, requirements=["C", "W"])  # torch wants memory that may be written to
    is_deep = writable.dtype == np.uint16
    white = 255.0
    if is_deep:
        # sent as int16 and reinterpreted as unsigned, because not every device supports uint16
        signed = send_ahead(torch.from_numpy(writable.view(np.int16)), device)
        values = signed.to(torch.int32) & 0xFFFF
        white = 65535.0
    else:
        values = send_ahead(torch.from_numpy(writable), device)
    return rearrange(values.to(torch.float32), "h w c -> 1 c h w") / white


def to_pixels(image: Tensor, is_deep: bool) -> Pixels:
    """Convert an image, 1 3 H W in 0..1, to 8 or 16 bit integers, H W 3 on the CPU."""
    values = (image[0].to(torch.float32).clamp(0, 1) * (65535.0 if is_deep else 255.0)).round()
    if is_deep:  # with a sign, as in `to_tensor`
        values = torch.where(values < 32768, values, values - 65536)
    rounded = rearrange(values.to(torch.int16 if is_deep else torch.uint8), "c h w -> h w c")
    pixels: Pixels = rounded.contiguous().cpu().numpy()
    return pixels.view(np.uint16) if is_deep else pixels


def batch_norm(width: int) -> nn.BatchNorm2d:
    """Return a BatchNorm2d without num_batches_tracked, which some files lack and inference does not use."""
    norm = nn.BatchNorm2d(width)
    norm.num_batches_tracked = None
    return norm


LARGEST = 65535  # pixels of a side; no codec and few image files take more


def enlarged_size(width: int, height: int, factor: float) -> tuple[int, int]:
    """Return width and height multiplied by a factor, rounded down."""
    return int(width * factor), int(height * factor)


def enlarged_clip(clip: Clip, factor: float, option: str) -> Clip:
    """Return the clip with its size multiplied by `factor`.

    Raises OptionError, naming `option`, for a size that no file can have.
    """
    width, height = enlarged_size(clip.width, clip.height, factor)
    if min(width, height) < 1 or max(width, height) > LARGEST:
        raise OptionError(
            f"{option} {factor:g} makes {width} x {height} pixels of the {clip.width} x {clip.height} of "
            f"{clip.path}. Pass another {option}"
        )
    return replace(clip, width=width, height=height)
