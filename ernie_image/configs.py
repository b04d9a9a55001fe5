"""ERNIE-Image as data: dimensions of its transformer, its source, latents, noise, names of parts."""

from dataclasses import dataclass, replace

from flux_2 import configs as flux_2
from protocols.family import DitSpec, NoiseSpec
from protocols.rules import ModelRelease

RELEASE = ModelRelease(
    ("baidu/ERNIE-Image", "baidu/ERNIE-Image-Turbo"),
    "Apache-2.0",
    "apache-2.0",
    "https://www.apache.org/licenses/LICENSE-2.0",
)
# Added to the variances of the latents' statistics. Source: diffusers' ErnieImagePipeline. FLUX.2 adds 1e-4.
VARIANCE_EPS = 1e-5
# FLUX.2's autoencoder; each packed latent is a token. Its caches differ by that number
LATENT = replace(flux_2.LATENT, shares_caches=False)


@dataclass(frozen=True)
class ErnieImageConfig:
    """Dimensions of an ERNIE-Image transformer, read from a checkpoint's tensors."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    channels: int  # number of latent channels; each latent position is a token
    text_dim: int  # width of the language model's states
    rope_theta: float = 256.0
    eps: float = 1e-6

    kind = "t2i"

    @property
    def head_width(self) -> int:
        """Return the number of channels of one attention head."""
        return self.dim // self.num_heads

    @property
    def rotary_widths(self) -> tuple[int, int, int]:
        """Return the channels of a head that encode the position in the text, the row and the column."""
        return self.head_width // 4, 3 * self.head_width // 8, 3 * self.head_width // 8


NOISE = NoiseSpec(training_offset=0.0, count_tokens=flux_2.count_latents)
DIT = DitSpec(
    block_lists=("layers",),
    shared_inputs=(
        ("self_attention.to_q", "self_attention.to_k", "self_attention.to_v"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ),
    fp8_exclude=("norm", "adaLN"),
    input_layers=("x_embedder", "text_proj"),
    token_wise_methods=("feed",),
    modulated_input="modulated_input",
    # they compute in float32, once for all blocks; under 2 % of the model
    keep_float32=("time_embedding.", "adaLN_modulation.", "final_norm."),
)
