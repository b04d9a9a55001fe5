"""Z-Image as data: dimensions of its transformer, its source, latents, noise, names of parts."""

from dataclasses import dataclass

from encoders.autoencoder import SCALE, SHIFT
from encoders.pictures import PREVIEW_BIAS, PREVIEW_FACTORS
from lumina.configs import LuminaConfig
from protocols.data import LatentSpec
from protocols.family import DitSpec, NoiseSpec, count_image_tokens
from protocols.rules import ModelRelease

Z_IMAGE = ModelRelease(
    ("Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo"),
    "Apache-2.0",
    "apache-2.0",
    "https://www.apache.org/licenses/LICENSE-2.0",
)
PATCH = 2  # latent pixels along each side of a token
TOKEN_STEP = 32  # texts and images are padded to multiples of so many tokens
TIME_SCALE = 1000.0  # the network takes the fraction of data times this


@dataclass(frozen=True)
class ZImageConfig(LuminaConfig):
    """Dimensions of a Z-Image transformer, read from a checkpoint's tensors."""

    time_hidden: int = 1024  # width between the layers that embed the time
    rope_theta: float = 256.0

    first_text_position = 1

    @property
    def rotary_widths(self) -> tuple[int, int, int]:
        """Return the channels of a head that encode the position in the text, the row and the column."""
        return self.head_width // 4, 3 * self.head_width // 8, 3 * self.head_width // 8


# FLUX.1's autoencoder; cache files hold what it samples, before shift and scale
LATENT = LatentSpec(
    channels=16,
    stride=(1, 8, 8),
    pixel_step=16,
    frame_step=1,
    scale=SCALE,
    shift=-SHIFT * SCALE,
    preview_factors=PREVIEW_FACTORS,
    preview_bias=PREVIEW_BIAS,
    flat_in_caches=True,
)
NOISE = NoiseSpec(output_sign=-1.0, count_tokens=count_image_tokens)
DIT = DitSpec(
    block_lists=("layers",),
    shared_inputs=(
        ("attention.to_q", "attention.to_k", "attention.to_v"),
        ("feed_forward.w1", "feed_forward.w3"),
    ),
    fp8_exclude=("norm", "adaLN_modulation"),
    lora_lists=("noise_refiner", "context_refiner"),
    lora_exclude=("_modulation", "_refiner"),  # as the known trainer
    input_layers=("all_x_embedder", "cap_embedder"),
    token_wise_methods=("feed",),
    modulated_input="modulated_input",
    num_unswapped=2,
    # in 16 bits they lose most; under 1 % of the model
    keep_float32=("t_embedder.",),
)
