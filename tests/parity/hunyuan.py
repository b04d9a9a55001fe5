"""HunyuanVideo's pipelines of PyPI's diffusers, loaded from the files that are given to our scripts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.golden_cases import read_case
from tests.tiny.hunyuan_dit import diffusers_state

TEMPLATE = read_case("text_constants")[0]["hunyuanvideo_llm_templates"]["dit-llm-encode-video"]


def in_diffusers(tensors: Mapping[str, Tensor]) -> HunyuanVideoTransformer3DModel:
    """A transformer of the official names."""
    dim, in_channels, _, _, _ = tensors["img_in.proj.weight"].shape
    width = len(tensors["double_blocks.0.img_attn_q_norm.weight"])

    def count(start: str) -> int:
        return 1 + max(
            int(name.removeprefix(start).split(".")[1]) for name in tensors if name.startswith(start + ".")
        )

    dit = HunyuanVideoTransformer3DModel(
        in_channels=in_channels,
        out_channels=16,
        num_attention_heads=dim // width,
        attention_head_dim=width,
        num_layers=count("double_blocks"),
        num_single_layers=count("single_blocks"),
        num_refiner_layers=count("txt_in.individual_token_refiner.blocks"),
        mlp_ratio=len(tensors["double_blocks.0.img_mlp.fc1.weight"]) / dim,
        text_embed_dim=tensors["txt_in.input_embedder.weight"].shape[1],
        pooled_projection_dim=tensors["vector_in.in_layer.weight"].shape[1],
        guidance_embeds="guidance_in.mlp.0.weight" in tensors,
        rope_axes_dim=(width // 8, width * 7 // 16, width * 7 // 16),
    )
    dit.load_state_dict(diffusers_state(tensors))
    return dit.eval().requires_grad_(False)


def load_vae(path: Path) -> AutoencoderKLHunyuanVideo:
    """A VAE of the official names, which are those of diffusers."""
    tensors = load_file(path)
    widths = tuple(
        len(tensors[f"encoder.down_blocks.{level}.resnets.0.conv1.conv.weight"]) for level in range(4)
    )
    vae = AutoencoderKLHunyuanVideo(block_out_channels=widths, norm_num_groups=min(32, widths[0] // 2))
    vae.load_state_dict(tensors)
    return vae.eval().requires_grad_(False)


def load_clip(folder: Path) -> CLIPTextModel:
    """The text tower of a CLIP that may have both."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    tensors = {
        name.removeprefix("text_model."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    vocabulary = len(tensors["embeddings.token_embedding.weight"])
    width = len(tensors["encoder.layers.0.mlp.fc1.weight"])
    layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layers."))
    sizes = {"vocab_size": vocabulary, "intermediate_size": width, "num_hidden_layers": layers}
    clip = CLIPTextModel(CLIPTextConfig(**{**config, **sizes}))
    clip.load_state_dict({name: tensors[name.removeprefix("text_model.")] for name in clip.state_dict()})
    return clip.eval()


def pipeline(
    folder: Path,
    flow_shift: float,
    image: bool = False,
    dit_dtype: torch.dtype = torch.float32,
    encoder_dtype: torch.dtype = torch.float32,
) -> HunyuanVideoPipeline:
    """On the CPU, in float32 where nothing else is said. image: the pipeline of SkyReels' image-to-video."""
    kind = HunyuanSkyreelsImageToVideoPipeline if image else HunyuanVideoPipeline
    made = kind(
        **text_parts(folder, encoder_dtype),
        transformer=in_diffusers(load_file(folder / "dit.safetensors")).to(dit_dtype),
        vae=load_vae(folder / "vae.safetensors").to(encoder_dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=flow_shift),
    )
    made.set_progress_bar_config(disable=True)
    return made


def text_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> HunyuanVideoPipeline:
    """The encoders of a folder alone, for the pipeline's way with prompts."""
    return HunyuanVideoPipeline(**text_parts(folder, dtype), transformer=None, vae=None, scheduler=None)


def text_parts(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    llama = LlamaForCausalLM.from_pretrained(folder / "text_encoder", dtype=dtype)
    return {
        "text_encoder": llama.model.eval(),
        "tokenizer": PreTrainedTokenizerFast.from_pretrained(folder / "text_encoder"),
        "text_encoder_2": load_clip(folder / "text_encoder_2").to(dtype),
        "tokenizer_2": CLIPTokenizer.from_pretrained(folder / "text_encoder_2"),
    }


def draw_noise(seed: int, frames: int, height: int, width: int) -> Tensor:
    """1 16 F h w float32: a draw in bfloat16 for every latent frame (formats.md, section 9)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (1, 16, 1, height // 8, width // 8)
    drawn = [
        torch.randn(shape, generator=generator, dtype=torch.bfloat16) for _ in range((frames - 1) // 4 + 1)
    ]
    return torch.cat(drawn, dim=2).float()
