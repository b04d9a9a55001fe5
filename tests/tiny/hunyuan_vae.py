"""A tiny random HunyuanVideo VAE in the released file layouts."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_model.vae import HunyuanVae
from hunyuan_model.vae_blocks import HunyuanVaeConfig
from tests.tiny.dit_files import write_tensors
from tests.tiny.wan_encoders import random_tensors


def vae_config(width: int = 8, z: int = 16) -> HunyuanVaeConfig:
    """The released structure at another base width: levels of width 1, 2, 4, 4, two channels to a group."""
    levels = (width, 2 * width, 4 * width, 4 * width)
    return HunyuanVaeConfig(z, min(32, width // 2), levels, 2, levels[::-1], 3)


def vae_tensors(width: int = 8, seed: int = 4) -> dict[str, Tensor]:
    """A VAE with the names of the official file, which are those of diffusers."""
    with torch.device("meta"):
        network = HunyuanVae(vae_config(width))
    return random_tensors(network, seed)


def vae_comfy_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same VAE with the names of ComfyUI's file."""
    stored = {}
    for name, tensor in tensors.items():
        if re.search(r"\.attentions\.0\.to_.+\.weight", name):
            tensor = tensor[..., None, None, None]
        name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{3 - int(found[1])}", name)
        for ours, theirs in (
            (r"down_blocks\.", "down."),
            (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
            (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
            (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
            (r"mid_block\.resnets\.0", "mid.block_1"),
            (r"mid_block\.resnets\.1", "mid.block_2"),
            (r"resnets\.", "block."),
            (r"conv_shortcut", "nin_shortcut"),
            (r"(up|down)samplers\.0", r"\1sample"),
            (r"conv_norm_out", "norm_out"),
        ):
            name = re.sub(ours, theirs, name)
        stored[name] = tensor.contiguous()
    return stored


def write_vae(path: Path, width: int = 8, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny VAE with the official names, pickled where the name of the file ends so."""
    return write_tensors(path, {name: tensor.to(dtype) for name, tensor in vae_tensors(width).items()})
