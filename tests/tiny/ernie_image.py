"""A complete tiny ERNIE-Image on disk, in the released file layouts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ernie_image.configs import ErnieImageConfig
from ernie_image.model import ErnieImageModel
from tests.tiny.dit_files import TinyModel, draw_state, write_dialect
from tests.tiny.flux_2 import vae_state
from tests.tiny.hunyuan_encoders import save
from tests.tiny.language_models import DIM, ministral3, write_mistral_tokenizer, write_model

CONFIG = ErnieImageConfig(dim=96, ffn_dim=144, num_heads=2, num_layers=2, channels=128, text_dim=DIM)


def tiny_state(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    """Random weights under the released names. sizes: fields of the config to change."""
    config = replace(CONFIG, **sizes)  # type: ignore[arg-type]
    return draw_state(lambda: ErnieImageModel(config), seed, dtype)


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "ernie-image"
) -> Path:
    """Write a transformer in one of the layouts of `write_dialect`. Returns what a user gives to --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_dialect(folder / f"{name}.safetensors", state, dialect, dict)


def write_text_encoder(folder: Path) -> Path:
    """Write a language model and its tokenizer into a folder. Returns it."""
    write_mistral_tokenizer(folder)
    write_model(folder / "model.safetensors", ministral3(), "old multimodal")
    return folder


def write_tiny_ernie_image(
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
