"""A complete tiny MOSS-Image on disk, in the released file layouts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from encoders.autoencoder_blocks import AutoencoderConfig
from flux_2.vae import Flux2Vae
from moss_image.configs import MossImageConfig
from moss_image.model import MossImageModel
from tests.tiny.dit_files import TinyModel, draw_state, write_dialect
from tests.tiny.flux_2 import add_statistics
from tests.tiny.hunyuan_encoders import save
from tests.tiny.language_models import DIM, qwen35, write_model, write_qwen_tokenizer
from tests.tiny.picture_encoders import as_released
from tests.tiny.wan_encoders import random_tensors

CONFIG = MossImageConfig(
    dim=64,
    ffn_dim=96,
    num_heads=2,
    num_layers=2,
    refiner_blocks=2,
    channels=128,
    text_dim=DIM,
    freq_dim=32,
)
SMALL_DECODER = AutoencoderConfig(32, 32, (32, 64, 64, 64), 2, 3, decoder_widths=(32, 32, 32, 64))


def tiny_state(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    """Random weights under the released names. sizes: fields of the config to change."""
    config = replace(CONFIG, **sizes)  # type: ignore[arg-type]
    return draw_state(lambda: MossImageModel(config), seed, dtype)


def with_bands(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with the frequencies that released files hold."""
    width = len(state["layers.0.q_norm.weight"]) // 8
    return {**state, "rope.bands": 10000.0 ** -(torch.arange(width) / width)}


def in_comfyui_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in Comfy-Org's layout: queries, keys and values of each block stacked."""
    stacked = dict(state)
    for name in [name for name in state if name.endswith(".proj.q.weight")]:
        parts = [stacked.pop(name.replace(".q.", f".{character}.")) for character in "qkv"]
        stacked[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return stacked


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "moss_image_base"
) -> Path:
    """Write a transformer in a layout of `write_dialect`, or "comfyui". Returns what --dit is given."""
    folder.mkdir(parents=True, exist_ok=True)
    if dialect == "comfyui":
        return save(folder / f"{name}.safetensors", in_comfyui_names(state))
    return write_dialect(folder / f"{name}.safetensors", state, dialect, dict)


def vae_state(seed: int = 6, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """FLUX.2's autoencoder with a narrower decoder, in the names of flux2-vae.safetensors."""
    with torch.device("meta"):
        network = Flux2Vae(SMALL_DECODER)
    state = add_statistics(as_released(random_tensors(network, seed)), seed)
    return {name: tensor if tensor.ndim == 0 else tensor.to(dtype) for name, tensor in state.items()}


def write_text_encoder(folder: Path) -> Path:
    """Write a language model and its tokenizer into a folder. Returns it."""
    write_qwen_tokenizer(folder)
    write_model(folder / "model.safetensors", qwen35())
    return folder


def write_tiny_moss_image(
    folder: Path, dtype: torch.dtype = torch.float32, name: str = "dit", **sizes: int
) -> TinyModel:
    """Write transformer, autoencoder and text encoder with its tokenizer below `folder`.

    name: of the transformer's file. sizes: of the transformer.
    """
    return TinyModel(
        write_dit(folder, tiny_state(dtype=dtype, **sizes), name=name),
        save(folder / "vae.safetensors", vae_state()),
        write_text_encoder(folder / "text_encoder"),
    )
