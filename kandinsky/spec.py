"""Kandinsky 5 and 6 outside their models: sources, latent spaces, noise, names in the transformer."""

from encoders.autoencoder import SCALE, SHIFT
from encoders.pictures import PREVIEW_BIAS, PREVIEW_FACTORS
from hunyuan_model.spec import LATENT as HUNYUAN_LATENT
from kandinsky.configs import LATENT_CHANNELS
from protocols.data import LatentSpec
from protocols.family import DitSpec, NoiseSpec, count_image_tokens
from protocols.rules import ModelRelease

RELEASE = ModelRelease(
    ("kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s", "kandinskylab/Kandinsky-5.0-T2V-Pro-sft-5s"),
    "MIT",
    "mit",
    "https://opensource.org/license/mit",
)
RELEASE_6 = ModelRelease(
    ("kandinskylab/Kandinsky-6.0-Lite-5s-Diffusers", "kandinskylab/Kandinsky-6.0-Pro-5s-Diffusers"),
    "MIT",
    "mit",
    "https://opensource.org/license/mit",
)
IMAGE_RELEASE = ModelRelease(
    ("kandinskylab/Kandinsky-5.0-T2I-Lite",), "MIT", "mit", "https://opensource.org/license/mit"
)
CLIP_LATENT = HUNYUAN_LATENT
# FLUX.1's autoencoder, whose latents are scaled but not shifted here: caches of FLUX.1 are other numbers
IMAGE_LATENT = LatentSpec(
    channels=LATENT_CHANNELS,
    stride=(1, 8, 8),
    pixel_step=16,
    frame_step=1,
    preview_factors=PREVIEW_FACTORS,
    # the colors are those of shifted latents
    preview_bias=(
        PREVIEW_BIAS[0] - SHIFT * SCALE * sum(row[0] for row in PREVIEW_FACTORS),
        PREVIEW_BIAS[1] - SHIFT * SCALE * sum(row[1] for row in PREVIEW_FACTORS),
        PREVIEW_BIAS[2] - SHIFT * SCALE * sum(row[2] for row in PREVIEW_FACTORS),
    ),
)


NOISE = NoiseSpec(training_offset=0.0, count_tokens=count_image_tokens)
DIT = DitSpec(
    block_lists=("visual_transformer_blocks",),
    further_blocks=("text_transformer_blocks",),
    lora_lists=("text_transformer_blocks",),
    lora_exclude=(".text_modulation", ".visual_modulation"),
    shared_inputs=(
        ("self_attention.to_query", "self_attention.to_key", "self_attention.to_value"),
        ("cross_attention.to_key", "cross_attention.to_value"),
    ),
    fp8_exclude=("norm", "modulation", "embeddings", "out_layer.out_layer"),
    input_layers=("visual_embeddings", "text_embeddings"),
    token_wise_methods=("feed",),
    modulated_input="modulated_input",
    # they compute in float32, and the released files have the modulation of all blocks in float32
    keep_float32=("time_embeddings.", "pooled_text_embeddings.", "out_layer.modulation."),
    keep_float32_layers=(".text_modulation.", ".visual_modulation."),
)
_BLOCKS_6 = ("visual_blocks",)
_TEXT_BLOCKS_6 = ("video_text_transformer_blocks", "audio_text_transformer_blocks")
DIT_6 = DitSpec(
    block_lists=_BLOCKS_6,
    further_blocks=_TEXT_BLOCKS_6,
    lora_lists=_TEXT_BLOCKS_6,
    lora_exclude=(".text_modulation", ".visual_modulation", ".va_modulation", ".av_modulation"),
    shared_inputs=DIT.shared_inputs,
    fp8_exclude=DIT.fp8_exclude,
    input_layers=("visual_embeddings", "video_text_embeddings", "audio_text_embeddings"),
    token_wise_methods=("feed",),
    modulated_input="modulated_input",
    keep_float32=(
        *("video_time_embeddings.", "video_pooled_text_embeddings.", "out_layer.modulation."),
        *("audio_time_embeddings.", "audio_pooled_text_embeddings.", "audio_outLayer.modulation."),
    ),
    keep_float32_layers=(".text_modulation.", ".visual_modulation.", ".va_modulation.", ".av_modulation."),
)
