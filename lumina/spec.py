"""Facts about Lumina-Image-2.0 for code outside its models: latent space, noise, names in the transformer."""

from encoders.autoencoder_colours import PREVIEW_BIAS, PREVIEW_FACTORS
from modules.contract.family import DitSpec, LatentSpec
from modules.contract.noise import NoiseSpec, count_picture_tokens
from modules.contract.npz import NpzFormat

LATENT = LatentSpec(
    channels=16,
    stride=(1, 8, 8),
    pixel_step=16,
    frame_step=1,
    preview_factors=PREVIEW_FACTORS,
    preview_bias=PREVIEW_BIAS,
    npz=NpzFormat("_lumina", "_lumina_te"),
)
NOISE = NoiseSpec(training_offset=0.0, output_sign=-1.0, table_is_shifted=True, tokens=count_picture_tokens)
DIT = DitSpec(
    block_lists=("layers",),
    fp8_exclude=("norm", "adaLN_modulation"),
    input_layers=("x_embedder", "cap_embedder"),
    token_wise=("feed",),
    modulated_input="modulated_input",
    # as they compute so; under 1 % of the model
    keep_float32=("t_embedder.",),
)
