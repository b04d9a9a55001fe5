"""HunyuanVideo 1.5 for code outside its models: sources, latent space, noise, names in the transformer."""

from hunyuan_model.spec import DIT as HUNYUAN
from hunyuan_video_15.configs import FRAME_STRIDE, LATENT_CHANNELS, STRIDE
from protocols.data import LatentSpec
from protocols.family import DitSpec
from protocols.rules import ModelRelease

RELEASE = ModelRelease(
    ("tencent/HunyuanVideo-1.5",),
    "Tencent Hunyuan Community",
    "other",
    "https://huggingface.co/tencent/HunyuanVideo-1.5/blob/main/LICENSE",
)
LATENT = LatentSpec(
    channels=LATENT_CHANNELS,
    stride=(FRAME_STRIDE, STRIDE, STRIDE),
    pixel_step=STRIDE,
    frame_step=FRAME_STRIDE,
    scale=1.03682,  # of the released VAE; caches hold latents before scaling
)
DIT = DitSpec(
    block_lists=("double_blocks",),
    shared_inputs=(
        ("img_attn_q", "img_attn_k", "img_attn_v"),
        ("txt_attn_q", "txt_attn_k", "txt_attn_v"),
    ),
    fp8_exclude=("norm", "_emb"),
    input_layers=HUNYUAN.input_layers,
    token_wise_methods=HUNYUAN.token_wise_methods,
    modulated_input=HUNYUAN.modulated_input,
    # they compute in float32; under 1 % of the model
    keep_float32=("time_in.", "txt_in.t_embedder.", "txt_in.c_embedder."),
)
