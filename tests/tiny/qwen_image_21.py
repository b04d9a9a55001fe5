"""A complete tiny Qwen-Image-2.1 on disk, in the released file layouts."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_image_21.configs import LATENT, QwenImage21Config, default_axes
from qwen_image_21.model import QwenImage21Model
from tests.tiny.dit_files import TinyModel, draw_state, write_dialect
from tests.tiny.hunyuan_encoders import save
from tests.tiny.language_models import DIM, qwen3_vl, write_model, write_qwen_tokenizer
from tests.tiny.qwen_image_21_vae import vae_state

HEADS, HEAD_WIDTH = 2, 32
CONFIG = QwenImage21Config(
    dim=HEADS * HEAD_WIDTH,
    ffn_dim=3 * HEADS * HEAD_WIDTH,
    num_heads=HEADS,
    num_layers=2,
    channels=LATENT.channels,
    text_dim=DIM,
    axes=default_axes(HEAD_WIDTH),
    freq_dim=256,
)
CLASS = "QwenImage21Transformer2DModel"


def tiny_state(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    """Random weights under the released names. sizes: fields of the config to change."""
    config = replace(CONFIG, **sizes)  # type: ignore[arg-type]
    state = draw_state(lambda: QwenImage21Model(config), seed, dtype)
    # the scale of this norm is near 0 in files
    return {name: tensor - 1 if "text_norm" in name else tensor for name, tensor in state.items()}


def in_comfyui_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in ComfyUI's layout: two layers of each block stacked, behind a prefix."""
    stacked = dict(state)
    for name in [name for name in state if name.endswith(".gate_layer.weight")]:
        proj = name.replace("gate_layer", "proj")
        gate_up = name.replace("gate_layer", "gate_up")
        stacked[gate_up] = torch.cat([stacked.pop(name), stacked.pop(proj)])
    return {f"model.diffusion_model.{name}": tensor for name, tensor in stacked.items()}


def config_json(**changes: Any) -> dict[str, Any]:
    """diffusers' config.json of CONFIG."""
    return {
        "_class_name": CLASS,
        "patch_size": 1,
        "in_channels": CONFIG.channels,
        "out_channels": CONFIG.channels,
        "num_layers": CONFIG.num_layers,
        "attention_head_dim": HEAD_WIDTH,
        "num_attention_heads": HEADS,
        "context_in_dim": CONFIG.text_dim,
        "mlp_ratio": 3,
        "axes_dims_rope": list(CONFIG.axes),
        "eps": CONFIG.eps,
        "causal_condition": True,
        **changes,
    }


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "qwen_image_2.1"
) -> Path:
    """Write a transformer in a layout of `write_dialect`, or "comfyui". Returns what --dit is given."""
    folder.mkdir(parents=True, exist_ok=True)
    if dialect == "comfyui":
        return save(folder / f"{name}.safetensors", in_comfyui_names(state))
    return write_dialect(folder / f"{name}.safetensors", state, dialect, dict)


def write_turbo(folder: Path, levels: object, dialect: str = "diffusers_sharded") -> Path:
    """Write a release whose model_index.json has `levels`. Returns its folder `transformer`."""
    path = write_dit(folder, tiny_state(), dialect)
    (path / "config.json").write_text(json.dumps(config_json()), encoding="utf-8")
    index = {"_class_name": "QwenImage21Pipeline", "sample_sigmas": levels}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return path


def write_tiny_qwen_image_21(
    folder: Path, dtype: torch.dtype = torch.float32, name: str = "dit", **sizes: int
) -> TinyModel:
    """Write transformer, VAE and text encoder with its tokenizer below `folder`.

    name: of the transformer's file. sizes: of the transformer.
    """
    dit = write_dit(folder, tiny_state(dtype=dtype, **sizes), name=name)
    vae = save(folder / "vae.safetensors", vae_state())
    text_encoder = write_qwen_tokenizer(folder / "text_encoder")
    write_model(text_encoder / "model.safetensors", qwen3_vl())
    return TinyModel(dit, vae, text_encoder)
