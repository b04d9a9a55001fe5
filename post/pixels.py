"""Convert pixels of pictures to networks' inputs, and back."""

from dataclasses import replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from modules.devices import send_ahead
from modules.errors import OptionError
from post.contract import Clip, Pixels


def to_tensor(pixels: Pixels, device: torch.device) -> Tensor:
    """Return pixels (H W 3) as 1 3 H W in float32, 0..1, on the device; few bytes go there."""
    whole = np.require(pixels, requirements=["C", "W"])  # torch wants memory that may be written to
    is_deep = whole.dtype == np.uint16
    # with a sign and back: not every device knows 16 bits without one
    on_device = send_ahead(torch.from_numpy(whole.view(np.int16) if is_deep else whole), device)
    values = on_device.to(torch.int32) & 0xFFFF if is_deep else on_device
    return rearrange(values.to(torch.float32), "h w c -> 1 c h w") / (65535.0 if is_deep else 255.0)


def to_pixels(image: Tensor, is_deep: bool) -> Pixels:
    """Return 1 3 H W of 0..1, limited and rounded, as pixels H W 3 with 16 or 8 bits on the host."""
    values = (image[0].to(torch.float32).clamp(0, 1) * (65535.0 if is_deep else 255.0)).round()
    if is_deep:  # with a sign, as in `to_tensor`
        values = torch.where(values < 32768, values, values - 65536)
    whole = rearrange(values.to(torch.int16 if is_deep else torch.uint8), "c h w -> h w c")
    pixels: Pixels = whole.contiguous().cpu().numpy()
    return pixels.view(np.uint16) if is_deep else pixels


def to_bytes(pixels: Pixels) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return pixels with 8 bits, for detectors and for PNG files."""
    if pixels.dtype == np.uint8:
        return pixels  # type: ignore[return-value]
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


LARGEST = 65535  # pixels of a side; no codec and few picture files take more


def enlarged_size(width: int, height: int, factor: float) -> tuple[int, int]:
    """Return width and height, in pixels, of a picture that is enlarged that many times."""
    return int(width * factor), int(height * factor)


def enlarged_clip(clip: Clip, factor: float, option: str) -> Clip:
    """Return the clip in its new size.

    Raises OptionError, naming `option`, for a size that no file can have.
    """
    width, height = enlarged_size(clip.width, clip.height, factor)
    if min(width, height) < 1 or max(width, height) > LARGEST:
        raise OptionError(
            f"{option} {factor:g} makes {width} x {height} pixels of the {clip.width} x {clip.height} of "
            f"{clip.path}. Give another {option}"
        )
    return replace(clip, width=width, height=height)
