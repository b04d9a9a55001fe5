"""Lumina-Image-2.0 as data: dimensions of its transformer, their source, latents, noise, names of parts."""

from dataclasses import dataclass

from encoders.pictures import PREVIEW_BIAS, PREVIEW_FACTORS
from protocols.data import LatentSpec
from protocols.family import DitSpec, NoiseSpec, count_image_tokens
from protocols.rules import ModelRelease, NpzFormat

LUMINA_2 = ModelRelease(
    ("Alpha-VLLM/Lumina-Image-2.0",),
    "Apache-2.0",
    "apache-2.0",
    "https://www.apache.org/licenses/LICENSE-2.0",
)
# between the system prompt and a caption, as trained
PROMPT_START = "<Prompt Start>"


@dataclass(frozen=True)
class LuminaConfig:
    """Dimensions of a Lumina-Image-2.0 transformer (NextDiT), read from a checkpoint's tensors."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_kv_heads: int  # heads of keys and values; num_heads / num_kv_heads query heads share each of them
    num_layers: int  # in which caption and image attend to each other
    noise_refiner_layers: int
    context_refiner_layers: int
    in_dim: int  # channels of the latents
    text_dim: int  # width of the language model's states
    time_dim: int  # width of the embedded time
    freq_dim: int = 256
    patch_size: int = 2
    rope_theta: float = 10000.0
    eps: float = 1e-5
    final_eps: float = 1e-6

    kind = "t2i"
    first_text_position = 0  # position of a caption's first token

    @property
    def head_width(self) -> int:
        """Return the number of channels of one attention head."""
        return self.dim // self.num_heads

    @property
    def rotary_widths(self) -> tuple[int, int, int]:
        """Return the channels of a head that encode the position in the caption, the row and the column."""
        return (self.head_width // 3,) * 3


LATENT = LatentSpec(
    channels=16,
    stride=(1, 8, 8),
    pixel_step=16,
    frame_step=1,
    preview_factors=PREVIEW_FACTORS,
    preview_bias=PREVIEW_BIAS,
    npz=NpzFormat("_lumina", "_lumina_te"),
)
NOISE = NoiseSpec(
    training_offset=0.0, output_sign=-1.0, table_is_shifted=True, count_tokens=count_image_tokens
)
DIT = DitSpec(
    block_lists=("layers",),
    shared_inputs=(("feed_forward.w1", "feed_forward.w3"),),
    lora_lists=("noise_refiner", "context_refiner", "final_layer"),  # as the known trainer
    fp8_exclude=("norm", "adaLN_modulation"),
    input_layers=("x_embedder", "cap_embedder"),
    token_wise_methods=("feed",),
    modulated_input="modulated_input",
    # they compute in float32; under 1 % of the model
    keep_float32=("t_embedder.",),
)
