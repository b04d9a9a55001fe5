"""What stands in place of a VAE: pixels are the latents of HiDream-O1-Image."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from modules.media.pixels import from_bytes


@dataclass
class Pixels:
    """Converts between bytes and pixels in -1..1. It has the methods of a VAE, and no weights."""

    device: torch.device

    def to(self, device: torch.device) -> Self:
        """Set the device to compute on, and return the object."""
        self.device = device
        return self

    def encode(self, clips: Tensor) -> Tensor:
        """Convert bytes to pixels in -1..1.

        float16 takes the bytes of bfloat16, and its error is 1/60 of the distance of two colors, not 1/8.

        Args:
            clips: B 3 F H W uint8.

        Returns:
            B 3 F H W float16.
        """
        # a memory plan sets the meta device, whose tensors it could not read again
        return from_bytes(clips if self.device.type == "meta" else clips.to(self.device)).half()

    def decode(self, latents: Tensor) -> Tensor:
        """Limit pixels to -1..1, and return them in float32; B 3 F H W."""
        return latents.float().clamp(-1, 1)
