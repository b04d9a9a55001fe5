"""A tiny transformer of MiniMax-H3: diffusers' with random weights, and its tensors as released."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from diffusers import MiniMaxH3Transformer3DModel
from torch import Tensor

WIDTH = 32  # of a head
SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": WIDTH,
    "hidden_size": 48,
    "num_layers": 3,
    "num_refiner_layers": 2,
    "ffn_dim": 80,
    "text_dim": 24,
    "freq_dim": 32,
    "time_embed_hidden_dim": 40,
    "time_embed_dim": 16,
    "rope_freq_dim": 4,
}
RENAMED = (
    ("token_refiner.refiner_blocks.", "token_refiner.blocks."),
    ("transformer_blocks.", "blocks."),
    ("audio_proj_in.", "audio_patch_proj."),
    ("context_embedder.", "condition_proj."),
    ("linear_1.", "proj_in."),
    ("linear_2.", "proj_out."),
    ("norm_out.norm.", "final_layer.norm."),
    ("norm_out.linear.", "final_layer.adaln_proj.linear."),
    ("audio_proj_out.", "final_layer.audio_out."),
    ("norm_q.", "q_norm."),
    ("norm_k.", "k_norm."),
    ("to_out.0.", "out_proj."),
    ("ff.net.0.proj.", "mlp.fc1."),
    ("ff.net.2.", "mlp.fc2."),
)
STARTS = {"proj_in.": "video_patch_proj.", "proj_out.": "final_layer.video_out."}


@cache
def their_dit(**changes: int) -> MiniMaxH3Transformer3DModel:
    """diffusers' network with random weights. changes: of `SIZES`."""
    torch.manual_seed(5)
    dit = MiniMaxH3Transformer3DModel(**{**SIZES, **changes}).eval()
    for name, parameter in dit.named_parameters():
        if "norm" in name and parameter.ndim == 1 and "linear" not in name:
            torch.nn.init.normal_(parameter, mean=1, std=0.2)
    return dit


def released_name(name: str) -> str:
    for start, ours in STARTS.items():
        if name.startswith(start):
            return ours + name.removeprefix(start)
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours)
    return name


def released(tensors: Mapping[str, Tensor], is_interleaved: bool = False) -> dict[str, Tensor]:
    """The tensors under released names, rows of queries, keys and values stacked, or interleaved by head."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = released_name(name)
        if ours.endswith("mlp.fc1.weight"):
            value, gate = tensor.chunk(2)
            tensor = torch.cat([gate, value])
        if ".to_q." in name:
            parts = [tensors[name.replace("to_q", f"to_{character}")] for character in "qkv"]
            fused = torch.cat(parts)
            if is_interleaved:
                width = len(tensors[name.replace("to_q", "norm_q")])
                fused = torch.stack([part.unflatten(0, (-1, width)) for part in parts], dim=1).flatten(0, 2)
            made[ours.replace("to_q", "qkv_proj")] = fused
        elif ".to_k." not in name and ".to_v." not in name:
            made[ours] = tensor.contiguous()
    made["rope.inv_freq"] = torch.zeros(SIZES["rope_freq_dim"])
    return made
