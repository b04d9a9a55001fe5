"""Show latents without a decoder: a linear map from their channels to colours, enlarged to the video's size.

The maps are data of each family, `LatentSpec.preview_factors` and `preview_bias`. Source: least squares fits
of latents to downscaled pixels, which all known tools use.
"""

from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch import Tensor

from modules.contract.family import LatentSpec
from modules.devices import numbers_on
from modules.media.reading import Frame

LEAST_RANGE = 1e-6  # of colours: a clip of one colour stays dark instead of becoming noise


def project(latents: Tensor, spec: LatentSpec) -> Tensor:
    """Map latents (C F h w in model space) to colours 3 F h w, float32 on their device, not limited.

    Does not wait for the device. Computed in float32 even under autocast.
    """
    factors = numbers_on(latents.device, spec.preview_factors, torch.float32)  # C 3
    bias = numbers_on(latents.device, spec.preview_bias, torch.float32)
    with torch.autocast(latents.device.type, enabled=False):
        return torch.einsum("cfhw,cr->rfhw", latents.float(), factors) + bias.view(3, 1, 1, 1)


def enlarge(colours: Tensor, rows: int, columns: int) -> Iterator[Frame]:
    """Yield frames H W 3 in 0..255 of colours 3 F h w: stretched to the whole range over the clip, bicubic.

    rows, columns: how often each colour is repeated. Values that are NaN or infinite become dark.
    """
    colours = colours.nan_to_num(0.0, 0.0, 0.0)
    lowest, highest = colours.amin(), colours.amax()
    colours = (colours - lowest) * (255 / (highest - lowest).clamp(min=LEAST_RANGE))
    for frame in colours.permute(1, 2, 3, 0).contiguous().numpy():
        # OpenCV: torch's bicubic, the same to the last bit but one, takes eight times as long
        larger = cv2.resize(frame, None, fx=columns, fy=rows, interpolation=cv2.INTER_CUBIC)
        yield np.rint(larger.clip(0, 255)).astype(np.uint8)


def to_frames(colours: Tensor) -> Tensor:
    """Return F H W 3 as uint8 of colours F 3 H W, of which 0..1 is shown. Stays on its device."""
    return (colours.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
