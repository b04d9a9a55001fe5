"""A complete tiny Fibo 2.0 on disk, in the released file layouts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fibo_2.configs import STATES, Fibo2Config
from fibo_2.model import Fibo2Model
from tests.tiny.dit_files import TinyModel, draw_state, write_dialect
from tests.tiny.flux_2 import vae_state
from tests.tiny.hunyuan_encoders import save
from tests.tiny.language_models import DIM, qwen3_vl, write_model, write_qwen_tokenizer

CONFIG = Fibo2Config(
    dim=64,
    ffn_dim=128,  # as diffusers' class makes it: (64 * 8 // 3) // 64 * 64
    num_heads=2,
    num_kv_heads=2,
    num_layers=3,
    noise_refiner_layers=1,
    context_refiner_layers=0,
    in_dim=128,
    text_dim=3 * DIM,
    time_dim=64,
    freq_dim=256,
    max_gist=16,
    perceiver_layers=1,
    injections=(0, 2),
)


def tiny_state(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> dict[str, Tensor]:
    """Random weights under the released names. sizes: fields of the config to change."""
    config = replace(CONFIG, **sizes)
    return draw_state(lambda: Fibo2Model(config), seed, dtype)


def stack(state: Mapping[str, Tensor], path: str, parts: str, name: str) -> dict[str, Tensor]:
    """The state with the parts of one layer stacked. path: what stands before the names of the parts."""
    found = dict(state)
    rows = [found.pop(f"{path}{part}.weight") for part in parts.split()]
    return {**found, f"{path}{name}.weight": torch.cat(rows)}


def in_comfyui_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in ComfyUI's layout."""
    found = dict(state)
    for name in state:
        if name.endswith(".attention.to_q.weight"):
            found = stack(found, name.removesuffix("to_q.weight"), "to_q to_k to_v", "qkv")
        elif name.endswith("_attention.to_k.weight"):
            found = stack(found, name.removesuffix("to_k.weight"), "to_k to_v", "to_kv")
        elif name.endswith(".w1.weight"):
            found = stack(found, name.removesuffix("w1.weight"), "w1 w3", "w13")
    renamed = {}
    for name, tensor in found.items():
        name = name.replace(".attention.to_out.0.", ".attention.out.").replace(".to_out.0.", ".to_out.")
        renamed[name.replace(".norm_q.", ".q_norm.").replace(".norm_k.", ".k_norm.")] = tensor
    return renamed


def in_early_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of the release's own code."""
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in (
            ("x_embedder.", "all_x_embedder.2-1."),
            ("final_layer.", "all_final_layer.2-1."),
        ):
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        if name.startswith("perceiver."):
            name = name.replace("_attention.to_out.0.", "_out.").replace("_attention.to_", "_")
            name = name.replace("_attention.norm_", "_norm_")
        renamed[name] = tensor
    return renamed


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "fibo2_dev"
) -> Path:
    """Write a transformer in a layout of `write_dialect`, "comfyui" or "early"; what --dit is given."""
    folder.mkdir(parents=True, exist_ok=True)
    if dialect == "comfyui":
        return save(folder / f"{name}.safetensors", in_comfyui_names(state))
    if dialect == "early":
        return save(folder / f"{name}.safetensors", in_early_names(state))
    return write_dialect(folder / f"{name}.safetensors", state, dialect, dict)


def write_text_encoder(folder: Path) -> Path:
    """Write a language model and its tokenizer into a folder. Returns it."""
    write_qwen_tokenizer(folder)
    write_model(folder / "model.safetensors", qwen3_vl(layers=STATES[-1] + 1))
    return folder


def write_tiny_fibo_2(
    folder: Path, dtype: torch.dtype = torch.float32, name: str = "dit", **sizes: Any
) -> TinyModel:
    """Write transformer, autoencoder and text encoder with its tokenizer below `folder`.

    name: of the transformer's file. sizes: of the transformer.
    """
    return TinyModel(
        write_dit(folder, tiny_state(dtype=dtype, **sizes), name=name),
        save(folder / "vae.safetensors", vae_state()),
        write_text_encoder(folder / "text_encoder"),
    )
