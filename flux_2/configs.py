"""FLUX.2 as data: dimensions of its transformer, latents, noise, names of parts."""

from collections.abc import Sequence
from dataclasses import dataclass

from protocols.data import LatentSpec
from protocols.family import DitSpec, NoiseSpec

AXES = 4  # axes of positions: image, row, column, index in the text; they share the width of a head


@dataclass(frozen=True)
class Flux2Config:
    """Dimensions of a FLUX.2 transformer, read from a checkpoint's tensors."""

    dim: int
    ffn_dim: int
    num_heads: int
    double_blocks: int
    single_blocks: int
    channels: int  # number of latent channels; each latent position is a token
    text_dim: int  # width of the joined states of the language model
    freq_dim: int = 256
    has_guidance: bool = False  # guidance is an input of the model
    rope_theta: float = 2000.0
    eps: float = 1e-6

    @property
    def kind(self) -> str:
        """Return the kind of model: dev, which takes guidance as an input, or klein."""
        return "dev" if self.has_guidance else "klein"


def count_latents(shape: Sequence[int]) -> int:
    """Return the number of tokens of an image, one for each latent pixel of `shape`, B C F H W."""
    return shape[-2] * shape[-1]


def count_swapped(blocks: int) -> tuple[int, int]:
    """Return how many double and single blocks to swap out of the device.

    A single block is half as large as a double block. klein 4B has five double blocks and swaps 13 blocks at
    most; the others have eight. One block of each list stays.
    """
    max_double = 4 if blocks <= 13 else 7  # all but one of klein 4B's five, or of the others' eight
    double = min(blocks // 2, max_double)
    return double, 2 * (blocks - double)


# a square of 2 x 2 latent pixels of the autoencoder is one of 128 channels
LATENT = LatentSpec(
    channels=128,
    stride=(1, 16, 16),
    pixel_step=16,
    frame_step=1,
    flat_in_caches=True,
    names_frames=False,
    shares_caches=True,
)
NOISE = NoiseSpec(count_tokens=count_latents)
DIT = DitSpec(
    block_lists=("double_blocks", "single_blocks"),
    fp8_exclude=("norm",),
    input_layers=("img_in", "txt_in"),
    token_wise_methods=("feed_forward",),
    modulated_input="modulated_input",
    swap_counts=count_swapped,
    # they compute in float32; under 1 % of the model
    keep_float32=("time_in.", "guidance_in."),
)
