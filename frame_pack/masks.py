"""Turn the transparency of a picture into a factor for its latents."""

import numpy
import torch
from PIL import Image
from torch import Tensor


def latent_mask(alpha: Tensor, height: int, width: int) -> Tensor:
    """Resize transparency to the size of latents: 0 for transparent, 1 for opaque.

    alpha: H W uint8, cropped to the part of a picture that covers the latents. height, width: of the latents.
    Returns height x width, float32, on the CPU. Lanczos, as in the known tuners.
    """
    scale = min(alpha.shape[1] / width, alpha.shape[0] / height)
    left, top = (alpha.shape[1] - scale * width) / 2, (alpha.shape[0] - scale * height) / 2
    box = (left, top, alpha.shape[1] - left, alpha.shape[0] - top)
    small = Image.fromarray(alpha.cpu().numpy()).resize((width, height), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(numpy.asarray(small).copy()).float() / 255


def apply_masks(latents: Tensor, alpha: Tensor | None) -> Tensor:
    """Multiply latents B C F h w by the masks of `alpha`, B H W uint8. Returns their dtype.

    If `alpha` is None, the latents are returned unchanged.
    """
    if alpha is None:
        return latents
    masks = torch.stack([latent_mask(one, *latents.shape[-2:]) for one in alpha])
    return (latents * masks[:, None, None].to(latents.device)).to(latents.dtype)
