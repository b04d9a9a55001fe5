"""Facts about Lumina-Image-2.0 for code outside its models: latent space, noise, names in the transformer."""

from modules.contract.family import DitSpec, LatentSpec
from modules.contract.noise import NoiseSpec, count_picture_tokens
from modules.contract.npz import NpzFormat

# Least squares fit of FLUX's latents in model space to colours (R, G, B), which all known tools use
PREVIEW_FACTORS = (
    (-0.0346, 0.0244, 0.0681),
    (0.0034, 0.0210, 0.0687),
    (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329),
    (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915),
    (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421),
    (-0.0515, 0.0201, 0.0011),
    (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749),
    (-0.1264, -0.0522, -0.1103),
    (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
)
PREVIEW_BIAS = (-0.0329, -0.0718, -0.0851)
LATENT = LatentSpec(
    channels=16,
    stride=(1, 8, 8),
    pixel_step=16,
    frame_step=1,
    preview_factors=PREVIEW_FACTORS,
    preview_bias=PREVIEW_BIAS,
    npz=NpzFormat("_lumina", "_lumina_te"),
)
NOISE = NoiseSpec(training_offset=0.0, table_is_shifted=True, tokens=count_picture_tokens)
DIT = DitSpec(
    block_lists=("layers",),
    fp8_exclude=("norm", "adaLN_modulation"),
    input_layers=("x_embedder", "cap_embedder"),
    token_wise=("feed",),
    modulated_input="modulated_input",
    # as they compute so; under 1 % of the model
    keep_float32=("t_embedder.",),
)
