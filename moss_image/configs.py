"""MOSS-Image as data: dimensions of its transformer, its source, noise, training times, names of parts."""

from dataclasses import dataclass

from flux_2.configs import LATENT, count_latents
from protocols.family import DitSpec, NoiseSpec
from protocols.rules import CutLogit, ModelRelease

__all__ = ["LATENT"]  # that of FLUX.2, whose encoder it has

RELEASE = ModelRelease(
    ("OpenMOSS-Team/MOSS-Image-Base", "OpenMOSS-Team/MOSS-Image-SFT"),
    "Apache-2.0",
    "apache-2.0",
    "https://www.apache.org/licenses/LICENSE-2.0",
)
AXES = 4  # axes of positions: reference, clock, row, column; each rotates a quarter of a head's channels


@dataclass(frozen=True)
class MossImageConfig:
    """Dimensions of a MOSS-Image transformer, read from a checkpoint's tensors."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    refiner_blocks: int  # over the text alone
    channels: int  # number of latent channels; each latent position is a token
    text_dim: int  # width of the language model's states
    freq_dim: int = 256
    rope_theta: float = 10000.0
    eps: float = 1e-6

    kind = "t2i"

    @property
    def head_width(self) -> int:
        """Return the number of channels of one attention head."""
        return self.dim // self.num_heads


# Source: the report's last stage of pre-training, arXiv 2610.23374; the mean sigma is 0.744
TIMES = CutLogit(mean=1.09, std=0.95, cut=0.95, uniform_share=0.01)
NOISE = NoiseSpec(training_offset=0.0, count_tokens=count_latents, cut_logit=TIMES)
DIT = DitSpec(
    block_lists=("layers",),
    shared_inputs=(("proj.q", "proj.k", "proj.v"),),
    fp8_exclude=("norm",),
    num_fused_matrices={".proj.ffn_up_gate": 2, ".qkv": 3},
    further_blocks=("text_embedder.blocks",),
    input_layers=("text_embedder",),
    token_wise_methods=("feed",),
    modulated_input="modulated_input",
    # they compute in float32; under 2 % of the model
    keep_float32=("time_embedding.", "shared_block_modulation.", "video_head_modulation."),
)
