"""FLUX 3 as data: dimensions of its transformer, its source, noise, names of parts."""

from dataclasses import dataclass

from flux_2.configs import AXES, LATENT, count_latents
from protocols.family import DitSpec, NoiseSpec
from protocols.rules import ModelRelease

__all__ = ["AXES", "LATENT"]  # the model shares FLUX.2's autoencoder

RELEASE = ModelRelease(
    ("black-forest-labs/flux-3-image-klein-base", "black-forest-labs/flux-3-image-klein"),
    "FLUX Kommunity License v1.0",
    "other",
    "https://huggingface.co/black-forest-labs/flux-3-image-klein-base/blob/main/LICENSE.md",
)
# lists of blocks in which the tokens of one kind attend to each other alone: image, references, text
IMAGE_BLOCKS, REFERENCE_BLOCKS, TEXT_BLOCKS = MODALITY_BLOCK_LISTS = (
    "content_mode_blocks.image",
    "content_mode_blocks.image_cond",
    "txt_mode_blocks",
)
JOINT_BLOCKS = "single_blocks"
TEXT_LENGTH_MULTIPLE = 80  # texts are as long as a multiple of so many tokens


@dataclass(frozen=True)
class Flux3Config:
    """Dimensions of a FLUX 3 transformer, read from a checkpoint's tensors."""

    dim: int
    ffn_dim: int
    num_heads: int
    mode_blocks: int  # number of blocks in each of the three lists
    joint_blocks: int
    channels: int  # number of latent channels; each latent position is a token
    text_dim: int  # width of the joined states of the language model
    freq_dim: int = 256
    is_flow_map: bool = False  # distilled: the time that a step jumps to is an input of the model
    rope_theta: float = 10000.0
    eps: float = 1e-6

    kind = "klein"

    @property
    def head_width(self) -> int:
        """Return the number of channels of one attention head."""
        return self.dim // self.num_heads


def count_swapped(blocks: int) -> tuple[int, ...]:
    """Return how many blocks of each list to swap out of the device; all blocks are equally large.

    Joint blocks leave first. Up to 26 of the released 28 may leave, then up to four of each list of five.
    """
    joint = min(blocks, 26)
    num_single = blocks - joint
    shares = [num_single // 3 + (num_single % 3 > index) for index in range(3)]
    return (*shares, joint)


NOISE = NoiseSpec(training_offset=0.0, count_tokens=count_latents)  # in training too the time is 1000 sigma
DIT = DitSpec(
    block_lists=(*MODALITY_BLOCK_LISTS, JOINT_BLOCKS),
    shared_inputs=(("q_proj", "k_proj", "v_proj", "mlp_in"),),
    fp8_exclude=("norm",),
    input_layers=("txt_in",),
    token_wise_methods=("feed_forward",),
    modulated_input="modulated_input",
    swap_counts=count_swapped,
    # they compute in float32; under 1 % of the model
    keep_float32=("time_in.", "ref_time_in."),
)
