"""Names inside the FramePack transformer, for code that acts on it from outside."""

from hunyuan_model.spec import DIT as HUNYUAN
from modules.contract.family import DitSpec

DIT = DitSpec(
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    fp8_exclude=("norm",),  # the modulation's layers too, which are called so
    lora_exclude=("norm",),  # the same layers
    input_layers=("x_embedder", "clean_x_embedder", "context_embedder", "image_projection"),
    token_wise=HUNYUAN.token_wise,
    modulated_input=HUNYUAN.modulated_input,
    teacache_coefficients=HUNYUAN.teacache_coefficients,
    swap_counts=HUNYUAN.swap_counts,
    # as they compute so; under 1 % of the model
    keep_float32=("time_text_embed.", "context_embedder.time_text_embed.", "proj_out."),
)
