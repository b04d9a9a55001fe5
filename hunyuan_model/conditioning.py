"""What a HunyuanVideo or SkyReels V1 transformer is given beside the noisy latents and the text.

The image-to-video transformer of SkyReels V1 takes 16 more channels: the latents of the first frame, encoded alone, in latent
frame 0, and zeros after it. Source: the released SkyReels V1 code. Latents here are in model space.
"""

from typing import Any

import torch
from torch import Tensor, nn

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


def strengthen_text(dit: nn.Module, tokens: float, mean: float) -> None:
    """--te_multiplier: from now on multiply what each block of the token refiner gives, and the embedding of the mean text.

    Source: the known tuners, which call the second one CLIP's although CLIP's vector takes another way.
    """

    def times(factor: float) -> Any:
        return lambda module, inputs, output: output * factor

    refiner = dit.get_submodule("txt_in")
    for block in refiner.get_submodule("individual_token_refiner.blocks").children():
        block.register_forward_hook(times(tokens))
    refiner.get_submodule("c_embedder").register_forward_hook(times(mean))
