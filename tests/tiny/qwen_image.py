"""A complete tiny Qwen-Image on disk, in the released file layouts."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qwen_image.configs import QwenImageConfig
from qwen_image.model import QwenImageModel
from tests.tiny.dit_files import TinyModel, draw_state, write_dialect
from tests.tiny.hunyuan_encoders import save
from tests.tiny.hunyuan_image import TEXT_DIM, write_qwen
from tests.tiny.language_models import qwen25_vl, write_model, write_qwen_tokenizer
from tests.tiny.wan_encoders import vae_tensors

CONFIG = QwenImageConfig(dim=64, ffn_dim=256, num_heads=2, num_layers=2, channels=16, text_dim=TEXT_DIM)


def tiny_state(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    """Random weights under the published names. sizes: fields of the config to change."""
    config = replace(CONFIG, **sizes)
    return draw_state(lambda: QwenImageModel(config), seed, dtype)


def write_dit(
    folder: Path, state: dict[str, Tensor], dialect: str = "safetensors", name: str = "qwen_image"
) -> Path:
    """Write a transformer in one of the layouts of `write_dialect`. Returns what a user gives to --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_dialect(folder / f"{name}.safetensors", state, dialect, dict)


def write_tiny_qwen_image(
    folder: Path, dtype: torch.dtype = torch.float32, edits: bool = False, layered: bool = False, **sizes: int
) -> TinyModel:
    """Write transformer, VAE and text encoder with its tokenizer below `folder`.

    edits: the text encoder sees pictures. layered: Qwen-Image-Layered. sizes: of the transformer.
    """
    dit = write_dit(folder, tiny_state(dtype=dtype, has_layers=layered, **sizes), name="dit")
    vae = save(folder / "vae.safetensors", vae_tensors(colors=4 if layered else 3))
    if edits:
        tokenizer = write_qwen_tokenizer(folder / "text_encoder")
        return TinyModel(dit, vae, write_model(tokenizer / "model.safetensors", qwen25_vl()).parent)
    return TinyModel(dit, vae, write_qwen(folder / "text_encoder"))
