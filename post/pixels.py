"""Pixels of pictures <-> what networks compute with."""

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from modules.devices import send_ahead
from post.contract import Pixels


def to_tensor(pixels: Pixels, device: torch.device) -> Tensor:
    """Return pixels (H W 3) as 1 3 H W in float32, 0..1, on the device; few bytes go there."""
    whole = np.require(pixels, requirements=["C", "W"])  # torch wants memory that may be written to
    on_device = send_ahead(torch.from_numpy(whole), device)
    most = 255.0 if whole.dtype == np.uint8 else 65535.0
    return rearrange(on_device.to(torch.float32), "h w c -> 1 c h w") / most


def to_pixels(image: Tensor, is_deep: bool) -> Pixels:
    """Return 1 3 H W of 0..1, limited and rounded, as pixels H W 3 with 16 or 8 bits on the host."""
    most, dtype = (65535.0, torch.uint16) if is_deep else (255.0, torch.uint8)
    values = (image[0].to(torch.float32).clamp(0, 1) * most).round()
    # through int32: not every device converts to 16 bits without a sign
    whole = values.to(torch.int32).to(dtype) if is_deep else values.to(dtype)
    pixels: Pixels = rearrange(whole, "c h w -> h w c").contiguous().cpu().numpy()
    return pixels


def to_bytes(pixels: Pixels) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return pixels with 8 bits, for detectors and for PNG files."""
    if pixels.dtype == np.uint8:
        return pixels  # type: ignore[return-value]
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
