"""Complete tiny FLUX 3 models on disk, in the released file layouts: base and distilled."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flux_3.configs import Flux3Config
from flux_3.files import FLUX_3_USE
from flux_3.model import Flux3Model
from tests.tiny.dit_files import TinyModel, draw_state, write_dialect
from tests.tiny.flux_2 import vae_state
from tests.tiny.hunyuan_encoders import save
from tests.tiny.language_models import DIM, qwen3_vl, write_model, write_qwen_tokenizer

TEXT_LAYERS = FLUX_3_USE.states[-1] + 1  # one more than is read
CONFIG = Flux3Config(
    dim=64,
    ffn_dim=192,
    num_heads=2,
    mode_blocks=2,
    joint_blocks=3,
    channels=128,
    text_dim=len(FLUX_3_USE.states) * DIM,
    freq_dim=32,
)


def tiny_state(
    seed: int = 0, dtype: torch.dtype = torch.float32, is_flow_map: bool = False, **sizes: int
) -> dict[str, Tensor]:
    """Random weights under the released names.

    is_flow_map: distilled. sizes: fields of the config to change.
    """
    config = replace(CONFIG, is_flow_map=is_flow_map, **sizes)  # type: ignore[arg-type]
    state = draw_state(lambda: Flux3Model(config), seed, dtype)
    state["txt_in.weight"] *= 0.1  # states of middle layers are large: what blocks add to them has to show
    return state


def in_diffusers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under diffusers' names, as diffusers converts them."""
    from diffusers.loaders.single_file_utils import convert_flux3_transformer_checkpoint_to_diffusers

    converted: dict[str, Tensor] = convert_flux3_transformer_checkpoint_to_diffusers(dict(state))
    return converted


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "flux3"
) -> Path:
    """Write a transformer in one of the layouts of `write_dialect`. Returns what a user gives to --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_dialect(folder / f"{name}.safetensors", state, dialect, in_diffusers_names)


def write_text_encoder(folder: Path) -> Path:
    """Write a language model with layers enough, and its tokenizer, into a folder. Returns it."""
    write_qwen_tokenizer(folder)
    write_model(folder / "model.safetensors", qwen3_vl(layers=TEXT_LAYERS))
    return folder


def write_tiny_flux_3(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    is_flow_map: bool = False,
    name: str = "dit",
    **sizes: int,
) -> TinyModel:
    """Write transformer, autoencoder and text encoder with its tokenizer below `folder`.

    name: of the transformer's file. sizes: of the transformer.
    """
    return TinyModel(
        write_dit(folder, tiny_state(dtype=dtype, is_flow_map=is_flow_map, **sizes), name=name),
        save(folder / "vae.safetensors", vae_state()),
        write_text_encoder(folder / "text_encoder"),
    )
