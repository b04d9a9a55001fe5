"""Tiny random encoders that the picture families share, in their file layouts: autoencoder, T5, CLIP-L."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from encoders.autoencoder import Autoencoder
from encoders.autoencoder_blocks import AutoencoderConfig
from encoders.t5_network import T5Config, T5Network
from tests.tiny.hunyuan_encoders import (
    CLIP_DIM,
    clip_text_layouts,
    clip_text_tensors,
    prefixed,
    save,
    write_clip_tokenizer,
)
from tests.tiny.wan_encoders import random_tensors, t5_config, t5_hf_tensors, write_tokenizer

T5_DIM = 32


def autoencoder_config(width: int = 32) -> AutoencoderConfig:
    """The released structure at another base width: levels of width 1, 2, 2, 2; 32 norm groups."""
    return AutoencoderConfig(16, 32, (width, 2 * width, 2 * width, 2 * width), 2, 3)


def autoencoder_tensors(seed: int = 6, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """FLUX's autoencoder with the names and shapes of ae.safetensors."""
    with torch.device("meta"):
        network = Autoencoder(autoencoder_config())
    return {name: tensor.to(dtype) for name, tensor in as_released(random_tensors(network, seed)).items()}


def as_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an autoencoder as files have them: attention is made of 1x1 convolutions."""
    is_matrix = re.compile(r"attn_1\.(q|k|v|proj_out)\.weight")
    return {
        name: tensor[..., None, None] if is_matrix.search(name) else tensor for name, tensor in state.items()
    }


def autoencoder_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same autoencoder with the names of diffusers' AutoencoderKL."""
    stored = {}
    for name, tensor in tensors.items():
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            tensor = tensor[..., 0, 0]
        name = re.sub(r"decoder\.up\.(\d)", lambda found: f"decoder.up_blocks.{3 - int(found[1])}", name)
        for ours, theirs in (
            (r"encoder\.down\.", "encoder.down_blocks."),
            (r"mid\.attn_1\.norm", "mid_block.attentions.0.group_norm"),
            (r"mid\.attn_1\.proj_out", "mid_block.attentions.0.to_out.0"),
            (r"mid\.attn_1\.", "mid_block.attentions.0.to_"),
            (r"mid\.block_1", "mid_block.resnets.0"),
            (r"mid\.block_2", "mid_block.resnets.1"),
            (r"\.block\.", ".resnets."),
            (r"nin_shortcut", "conv_shortcut"),
            (r"\.(up|down)sample\.", r".\1samplers.0."),
            (r"\.norm_out", ".conv_norm_out"),
        ):
            name = re.sub(ours, theirs, name)
        stored[name] = tensor.contiguous()
    return stored


def write_autoencoder(path: Path, seed: int = 6, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny ae.safetensors."""
    return save(path, autoencoder_tensors(seed, dtype))


def write_autoencoder_folder(folder: Path, seed: int = 6) -> Path:
    """The same as a folder `vae` of diffusers."""
    save(folder / "diffusion_pytorch_model.safetensors", autoencoder_diffusers(autoencoder_tensors(seed)))
    config = {"_class_name": "AutoencoderKL", "norm_num_groups": 32}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def t5xxl_config(dim: int = T5_DIM) -> T5Config:
    """A T5 v1.1: all blocks use one table of relative positions."""
    return replace(t5_config(dim=dim), shares_positions=True)


def t5xxl_tensors(seed: int = 7, dtype: torch.dtype = torch.float32, dim: int = T5_DIM) -> dict[str, Tensor]:
    """A T5 v1.1 with Hugging Face's names, the embedding twice, as in t5xxl_fp16.safetensors."""
    with torch.device("meta"):
        network = T5Network(t5xxl_config(dim))
    tensors = t5_hf_tensors(random_tensors(network, seed))
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def write_t5xxl(folder: Path, dtype: torch.dtype = torch.float32, dim: int = T5_DIM) -> Path:
    """A tiny t5xxl_fp16.safetensors with its tokenizer beside it, in `t5xxl`."""
    write_tokenizer(folder / "t5xxl")
    return save(folder / "t5xxl_fp16.safetensors", t5xxl_tensors(dtype=dtype, dim=dim))


def write_clip_l(folder: Path, dtype: torch.dtype = torch.float32, dim: int = CLIP_DIM) -> Path:
    """A tiny clip_l.safetensors with its tokenizer beside it, in `clip_l`."""
    write_clip_tokenizer(folder / "clip_l")
    tensors = clip_text_tensors(dtype=dtype, dim=dim)
    return save(folder / "clip_l.safetensors", clip_text_layouts(tensors)["text"])


def all_in_one(autoencoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder in a file that holds other networks too."""
    one = torch.ones(2)
    return {
        **prefixed(autoencoder, "vae."),
        "model.diffusion_model.img_in.weight": one,
        "text_encoders.t5xxl.transformer.shared.weight": one,
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight": one,
    }
