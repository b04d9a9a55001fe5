"""What a HunyuanVideo or SkyReels V1 transformer is given beside the noisy latents and the text.

The image-to-video transformer of SkyReels V1 takes 16 more channels: the latents of the first frame, encoded alone, in latent
frame 0, and zeros after it. Source: the released SkyReels V1 code. Latents here are in model space.
"""

import torch
from torch import Tensor

from modules.seeds import derive_seed


def first_frame_condition(first: Tensor, frames: int) -> Tensor:
    """The further channels, B C F h w float32. first: B C 1 h w. frames: F, latent frames of the video."""
    condition = first.new_zeros((*first.shape[:2], frames, *first.shape[3:]), dtype=torch.float32)
    condition[:, :, :1] = first
    return condition


def posterior_generator(owner: int | str) -> torch.Generator:
    """What the sample of an encoded clip is drawn from. owner: the name of the cached item, or the seed of the video to make.

    So an item's cache does not depend on what else a run had to do, nor a video on anything but its seed.
    """
    return torch.Generator().manual_seed(derive_seed("posterior", owner))
