"""Latents of Wan2.1, and names inside its transformer for code that acts on it from outside."""

from modules.contract.family import DitSpec, LatentSpec

LATENT = LatentSpec(channels=16, stride=(4, 8, 8), pixel_step=16, frame_step=4)
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
    # as they compute so; under 1 % of the model
    keep_float32=("time_embedding.", "time_projection.", "head.head."),
)
