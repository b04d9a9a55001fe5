"""HunyuanImage's pipeline of PyPI's diffusers, with the weights that are given to our scripts."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLHunyuanImage, FlowMatchEulerDiscreteScheduler, HunyuanImagePipeline
from diffusers.guiders import AdaptiveProjectedMixGuidance
from safetensors.torch import load_file
from torch import nn
from transformers import (
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5EncoderModel,
)

from tests.encoders.their_t5 import their_t5
from tests.hunyuan_image.making import in_diffusers
from tests.tiny.hunyuan_image import BYT5, CHANNELS, QWEN, VAE, TinyHunyuanImage, diffusers_vae


def load_pipeline(tiny: TinyHunyuanImage, shift: float) -> HunyuanImagePipeline:
    """The whole pipeline, without guidance; the transformer is that of `write_tiny_hunyuan_image`."""
    vae = AutoencoderKLHunyuanImage(
        3, 3, CHANNELS, VAE.widths, 2, spatial_compression_ratio=32, sample_size=384, scaling_factor=0.75289
    )
    vae.load_state_dict(diffusers_vae(load_file(tiny.vae)))
    pipeline = HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=vae.eval(),
        text_encoder=language_model(tiny.text_encoder),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_file=str(tiny.text_encoder / "tokenizer.json"),
            pad_token="<|endoftext|>",
            padding_side="right",
        ),
        text_encoder_2=glyph_encoder(tiny.byt5),
        tokenizer_2=ByT5Tokenizer(),
        transformer=in_diffusers(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def guider(scale: float, start_step: int) -> AdaptiveProjectedMixGuidance:
    """The released guidance with another scale of its plain part, and another step at which it changes."""
    return AdaptiveProjectedMixGuidance(
        guidance_scale=scale, adaptive_projected_guidance_start_step=start_step
    )


def language_model(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": QWEN.vocabulary,
        "hidden_size": QWEN.dim,
        "intermediate_size": QWEN.ffn_dim,
        "num_hidden_layers": QWEN.num_layers,
        "num_attention_heads": QWEN.num_heads,
        "num_key_value_heads": QWEN.num_kv_heads,
        "rms_norm_eps": QWEN.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": QWEN.theta, "mrope_section": [4, 6, 6]},
    }
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
    vision["out_hidden_size"] = QWEN.dim
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
        )
    model.model.visual = nn.Identity()
    model.to_empty(device="cpu")
    state = load_file(folder / "model.safetensors")
    named = {name.replace("model.", "model.language_model.", 1): value for name, value in state.items()}
    model.load_state_dict(named)
    rotary = model.model.language_model.rotary_emb
    model.model.language_model.rotary_emb = type(rotary)(model.config.text_config)  # its numbers were on meta
    return model.eval().requires_grad_(False)


def glyph_encoder(path: Path) -> T5EncoderModel:
    """ByT5 in transformers, with the weights of a file."""
    return their_t5(BYT5, load_file(path))
