"""A complete tiny Ideogram 4 on disk, in the released file layouts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ideogram4.configs import STATES, Ideogram4Config
from ideogram4.files import FIRST_TYPE, MODEL_TYPE, SECOND_TYPE
from ideogram4.model import Ideogram4Model
from tests.tiny.dit_files import TinyModel, draw_state, write_dialect
from tests.tiny.flux_2 import vae_state
from tests.tiny.language_models import DIM, qwen3_vl, write_model, write_qwen_tokenizer

CONFIG = Ideogram4Config(
    dim=96,
    ffn_dim=256,  # 8 / 3 of the width, as released
    num_heads=2,
    num_kv_heads=2,
    num_layers=2,
    noise_refiner_layers=0,
    context_refiner_layers=0,
    in_dim=128,
    text_dim=len(STATES) * DIM,
    time_dim=24,
)
SECOND_NAME = "dit_unconditional.safetensors"


def tiny_state(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    """Random weights under the released names. sizes: fields of the config to change."""
    config = replace(CONFIG, **sizes)  # type: ignore[arg-type]
    return draw_state(lambda: Ideogram4Model(config), seed, dtype)


def in_diffusers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in diffusers' layout, where queries, keys and values are layers of their own."""
    split = {}
    for name, tensor in state.items():
        if name.endswith(".attention.qkv.weight"):
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace(".qkv.", f".to_{letter}.")] = rows.contiguous()
        else:
            split[name.replace(".attention.o.", ".attention.to_out.0.")] = tensor
    return split


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "ideogram4"
) -> Path:
    """Write a transformer in one of the layouts of `write_dialect`. Returns what a user gives to --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_dialect(folder / f"{name}.safetensors", state, dialect, in_diffusers_names)


def save(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """Write tensors into a file with its metadata. Returns it."""
    save_file(dict(state), path, metadata=None if metadata is None else dict(metadata))
    return path


def write_second(folder: Path, dtype: torch.dtype = torch.float32, **sizes: int) -> Path:
    """Write the network that predicts without a text, with metadata that say so. Returns its file."""
    state = tiny_state(1, dtype, **sizes)
    return save(folder / SECOND_NAME, state, {MODEL_TYPE: SECOND_TYPE})


def write_text_encoder(folder: Path) -> Path:
    """Write a language model and its tokenizer into a folder. Returns it."""
    write_qwen_tokenizer(folder)
    write_model(folder / "model.safetensors", qwen3_vl(layers=STATES[-1]))
    return folder


def write_tiny_ideogram4(
    folder: Path, dtype: torch.dtype = torch.float32, name: str = "dit", **sizes: int
) -> TinyModel:
    """Write both transformers, autoencoder and text encoder with its tokenizer below `folder`.

    name: of the first transformer's file. sizes: of the transformers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_second(folder, dtype, **sizes)
    return TinyModel(
        save(folder / f"{name}.safetensors", tiny_state(dtype=dtype, **sizes), {MODEL_TYPE: FIRST_TYPE}),
        save(folder / "vae.safetensors", vae_state()),
        write_text_encoder(folder / "text_encoder"),
    )
