"""FramePack as data: the dimensions of its transformer, which FramePack-F1 shares."""

from dataclasses import dataclass

from hunyuan_model.configs import JointConfig
from hunyuan_model.spec import DIT as HUNYUAN
from protocols.family import DitSpec
from protocols.rules import ModelRelease

DERIVED = (
    "Tencent Hunyuan Community, by derivation",  # from HunyuanVideo
    "other",
    "https://huggingface.co/lllyasviel/FramePackI2V_HY",
)
FRAMEPACK = ModelRelease(("lllyasviel/FramePackI2V_HY",), *DERIVED)
FRAMEPACK_F1 = ModelRelease(("lllyasviel/FramePack_F1_I2V_HY_20250503",), *DERIVED)


@dataclass(frozen=True, kw_only=True)
class FramePackConfig(JointConfig):
    """Dimensions of a FramePack transformer, read from a checkpoint's tensors."""

    pooled_dim: int  # width of the CLIP text encoder's pooled output
    image_dim: int  # width of the image encoder's states
    image_hidden_dim: int  # width between the two layers that project these to tokens
    patch_size: tuple[int, int, int] = (1, 2, 2)

    @property
    def kind(self) -> str:
        """Always i2v: every video starts from an image."""
        return "i2v"


DIT = DitSpec(
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    shared_inputs=(
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
    fp8_exclude=("norm",),  # the modulation's layers too, which are called so
    lora_exclude=("norm",),  # the same layers
    input_layers=("x_embedder", "clean_x_embedder", "context_embedder", "image_projection"),
    token_wise_methods=HUNYUAN.token_wise_methods,
    modulated_input=HUNYUAN.modulated_input,
    teacache_coefficients=HUNYUAN.teacache_coefficients,
    swap_counts=HUNYUAN.swap_counts,
    # they compute in float32; under 1 % of the model
    keep_float32=("time_text_embed.", "context_embedder.time_text_embed.", "proj_out."),
)
