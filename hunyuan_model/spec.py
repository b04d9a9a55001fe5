"""HunyuanVideo for code outside its models: latent space, guidance, names in the transformer."""

from protocols.data import LatentSpec
from protocols.family import DitSpec

# Least squares fit of latents in model space to colors (R, G, B), which all known tools use
PREVIEW_FACTORS = (
    (-0.0395, -0.0331, 0.0445),
    (0.0696, 0.0795, 0.0518),
    (0.0135, -0.0945, -0.0282),
    (0.0108, -0.0250, -0.0765),
    (-0.0209, 0.0032, 0.0224),
    (-0.0804, -0.0254, -0.0639),
    (-0.0991, 0.0271, -0.0669),
    (-0.0646, -0.0422, -0.0400),
    (-0.0696, -0.0595, -0.0894),
    (-0.0799, -0.0208, -0.0375),
    (0.1166, 0.1627, 0.0962),
    (0.1165, 0.0432, 0.0407),
    (-0.2315, -0.1920, -0.1355),
    (-0.0270, 0.0401, -0.0821),
    (-0.0616, -0.0997, -0.0727),
    (0.0249, -0.0469, -0.1703),
)
PREVIEW_BIAS = (0.0259, -0.0192, -0.0761)
LATENT = LatentSpec(
    channels=16,
    stride=(4, 8, 8),
    pixel_step=16,
    frame_step=4,
    scale=0.476986,
    preview_factors=PREVIEW_FACTORS,
    preview_bias=PREVIEW_BIAS,
)
GUIDANCE_UNIT = 1000  # the model was distilled with 1000 times the scale
DIT = DitSpec(
    block_lists=("double_blocks", "single_blocks"),
    fp8_exclude=(
        "norm",
        "time_in",
        "vector_in",
        "guidance_in",
        "txt_in",
        "img_in",
        "modulation",
        "bias",
        "head",
    ),
    lora_exclude=("img_mod", "txt_mod", "modulation"),
    input_layers=("img_in", "txt_in"),
    token_wise_methods=("feed_forward",),
    modulated_input="modulated_input",
    # from the released TeaCache code (Liu et al. 2024); FramePack uses them too
    teacache_coefficients=(733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
    # a single block is about half as large
    swap_counts=lambda blocks: (blocks // 2, (blocks - blocks // 2) * 2 + 1),
    # they compute in float32; under 1 % of the model
    keep_float32=("time_in.", "vector_in.", "guidance_in.", "txt_in.t_embedder.", "txt_in.c_embedder."),
)
