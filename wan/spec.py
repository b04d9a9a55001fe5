"""Latents of Wan2.1 and Wan2.2, and names inside their transformers for code that acts on them."""

from modules.contract.data import LatentSpec
from modules.contract.family import DitSpec

# Least squares fit of latents in model space to colours (R, G, B), which all known tools use
PREVIEW_FACTORS = (
    (-0.1299, -0.1692, 0.2932),
    (0.0671, 0.0406, 0.0442),
    (0.3568, 0.2548, 0.1747),
    (0.0372, 0.2344, 0.1420),
    (0.0313, 0.0189, -0.0328),
    (0.0296, -0.0956, -0.0665),
    (-0.3477, -0.4059, -0.2925),
    (0.0166, 0.1902, 0.1975),
    (-0.0412, 0.0267, -0.1364),
    (-0.1293, 0.0740, 0.1636),
    (0.0680, 0.3019, 0.1128),
    (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699),
    (0.0060, -0.0633, 0.0005),
    (0.3477, 0.2275, 0.2950),
    (0.1984, 0.0913, 0.1861),
)
PREVIEW_BIAS = (-0.1835, -0.0868, -0.3360)

LATENT = LatentSpec(
    channels=16,
    stride=(4, 8, 8),
    pixel_step=16,
    frame_step=4,
    preview_factors=PREVIEW_FACTORS,
    preview_bias=PREVIEW_BIAS,
)

# of TI2V-5B, whose VAE folds 2 x 2 pixels more into each latent
LATENT_5B = LatentSpec(channels=48, stride=(4, 16, 16), pixel_step=32, frame_step=4)

DIT = DitSpec(
    block_lists=("blocks",),
    fp8_exclude=(
        "norm",
        "patch_embedding",
        "text_embedding",
        "time_embedding",
        "time_projection",
        "head",
        "modulation",
        "img_emb",
    ),
    input_layers=("patch_embedding", "text_embedding", "img_emb"),
    token_wise=("feed_forward",),
    modulated_input="modulated_input",
    # as they compute so; under 1 % of the model
    keep_float32=("time_embedding.", "time_projection.", "head.head."),
)
