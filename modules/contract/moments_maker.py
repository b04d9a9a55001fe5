"""A VAE with its text encoders, as preparing clips for a later training uses them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.contract.family import LatentSpec, TextEncoder

# pixels B 3 F H W in -1..1 -> moments B 2C f h w: means, then logarithms of variances, before normalisation
EncodeMoments = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MakerSettings:
    """A user's choices for the networks."""

    dtype: torch.dtype  # of the VAE
    tiled: bool  # encode large frames in tiles
    max_tokens: int | None  # of a caption; None: the encoder's own number


@dataclass(frozen=True)
class MomentsMaker:
    """The networks of one model; none is loaded yet."""

    architecture: str  # `Family.name` of the model
    latent: LatentSpec
    identity: Mapping[str, str]  # of the VAE: what moments depend on besides the pixels
    usable_frames: Callable[[int], int]  # the most frames that the VAE takes, up to a number
    load: Callable[[torch.device], EncodeMoments]
    text_encoders: tuple[TextEncoder, ...]


def causal_frames(frames: int) -> int:
    """Return the most frames of the form 4n + 1 up to a number, as VAEs with a first frame alone take."""
    return (frames - 1) // 4 * 4 + 1
