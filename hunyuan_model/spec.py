"""Facts about HunyuanVideo for code outside its models: latent space, guidance, names in the transformer."""

from modules.contract.family import DitSpec, LatentSpec

LATENT = LatentSpec(channels=16, stride=(4, 8, 8), pixel_step=16, frame_step=4, scale=0.476986)
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
    token_wise=("feed_forward",),
    modulated_input="modulated_input",
    # of the released TeaCache code (Liu et al. 2024), which FramePack uses too
    teacache_coefficients=(733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
    # a single block is about half as large
    swap_counts=lambda blocks: (blocks // 2, (blocks - blocks // 2) * 2 + 1),
    # as they compute so; under 1 % of the model
    keep_float32=("time_in.", "vector_in.", "guidance_in.", "txt_in.t_embedder.", "txt_in.c_embedder."),
)
