"""FLUX.1 and Chroma for code outside their models: latents, noise, names in the transformer."""

from dataclasses import replace

from encoders.pictures import PREVIEW_BIAS, PREVIEW_FACTORS
from flux.configs import CHROMA
from modules.flow import schedule
from protocols.data import LatentSpec
from protocols.family import DitSpec, NoiseSpec, count_image_tokens
from protocols.rules import NpzFormat

# cached latents are in model space already: (z - 0.1159) * 0.3611
LATENT = LatentSpec(
    channels=16,
    stride=(1, 8, 8),
    pixel_step=16,
    frame_step=1,
    preview_factors=PREVIEW_FACTORS,
    preview_bias=PREVIEW_BIAS,
    npz=NpzFormat("_flux", "_flux_te", zeros={"txt_ids": ("t5_out", 3)}),
)
NOISE = NoiseSpec(training_offset=0.0, table_is_shifted=True, count_tokens=count_image_tokens)
GUIDANCE_UNIT = 1000.0  # the models were trained with 1000 times the scale
FLUX_DIT = DitSpec(
    block_lists=("double_blocks", "single_blocks"),
    fp8_exclude=("norm", "bias"),  # modulations too are in 8 bits: they are a quarter of FLUX.1's weights
    input_layers=("img_in", "txt_in"),
    token_wise_methods=("feed_forward",),
    modulated_input="modulated_input",
    # of the released TeaCache code (Liu et al. 2024, arXiv 2411.19108) for FLUX.1
    teacache_coefficients=(498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    # a single block is about half as large
    swap_counts=lambda blocks: (blocks // 2, (blocks - blocks // 2) * 2),
    keep_float32=("time_in.", "vector_in.", "guidance_in."),
)
CHROMA_DIT = replace(FLUX_DIT, teacache_coefficients=())  # calibrate first


def dit_spec(kind: str) -> DitSpec:
    """Return the module names inside a transformer of this kind."""
    return CHROMA_DIT if kind == CHROMA else FLUX_DIT


# how far the schedule is shifted, by the number of tokens of an image: exp(mu), mu on a line through these.
# Source: the released FLUX.1 code.
FEW, MANY = (256, 0.5), (4096, 1.15)


def count_tokens(height: int, width: int) -> int:
    """Return the number of tokens of an image whose size is given in pixels."""
    return count_image_tokens(LATENT.shape(1, height, width))


def size_shift(tokens: int) -> float:
    """Return the flow shift of an image with this many tokens."""
    return schedule.size_shift(tokens, FEW, MANY)
