"""Names inside the Wan2.1 transformer, for code that acts on it from outside."""

from modules.contract.family import DitSpec

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
