"""A complete tiny Krea 2 on disk, in the released file layouts."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from krea2.configs import STATES, Krea2Config, Krea2StreamConfig
from krea2.model import Krea2Model
from tests.tiny.dit_files import TinyModel, draw_state, write_dialect
from tests.tiny.hunyuan_encoders import save
from tests.tiny.language_models import DIM, qwen3_vl, write_model, write_qwen_tokenizer
from tests.tiny.wan_encoders import vae_tensors

# heads of 32; a head of keys serves two of queries
CONFIG = Krea2Config(
    *(64, 96, 2, 1), text=Krea2StreamConfig(DIM, 80, DIM // 16, DIM // 16), num_layers=2, freq_dim=32
)


def tiny_state(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    """Random weights under the released names. sizes: fields of the config to change."""
    config = replace(CONFIG, **sizes)  # type: ignore[arg-type]
    state = draw_state(lambda: Krea2Model(config), seed, dtype)
    # scales of norms and rows of modulation are near 0
    return {name: one - 1 if one.ndim == 1 and "bias" not in name else one for name, one in state.items()}


def in_diffusers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under diffusers' names, as diffusers converts them."""
    from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers

    found: dict[str, Tensor] = convert_krea2_transformer_checkpoint_to_diffusers(dict(state))
    return found


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "krea2"
) -> Path:
    """Write a transformer in one of the layouts of `write_dialect`. Returns what a user gives to --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_dialect(folder / f"{name}.safetensors", state, dialect, in_diffusers_names)


def write_tiny_krea2(
    folder: Path, dtype: torch.dtype = torch.float32, name: str = "dit", **sizes: int
) -> TinyModel:
    """Write transformer, VAE and text encoder with its tokenizer below `folder`.

    name: of the transformer's file. sizes: of the transformer.
    """
    dit = write_dit(folder, tiny_state(dtype=dtype, **sizes), name=name)
    vae = save(folder / "vae.safetensors", vae_tensors())
    text_encoder = write_qwen_tokenizer(folder / "text_encoder")
    write_model(text_encoder / "model.safetensors", qwen3_vl(layers=STATES[-1] + 1))
    return TinyModel(dit, vae, text_encoder)
