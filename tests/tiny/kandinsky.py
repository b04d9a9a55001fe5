"""A complete tiny Kandinsky 5 on disk, in the released file layouts."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kandinsky.configs import KandinskyConfig
from kandinsky.model import KandinskyModel
from tests.tiny.dit_files import draw_state, write_dialect
from tests.tiny.hunyuan_encoders import (
    CLIP_DIM,
    clip_config_json,
    clip_text_layouts,
    clip_text_tensors,
    save,
    write_clip_tokenizer,
)
from tests.tiny.hunyuan_vae import write_vae
from tests.tiny.language_models import DIM, qwen25_vl, write_model, write_qwen_tokenizer
from tests.tiny.picture_encoders import write_autoencoder

CONFIG = KandinskyConfig(
    dim=64,
    ffn_dim=144,
    head_width=32,
    num_layers=2,
    text_layers=2,
    in_channels=33,
    out_channels=16,
    text_dim=DIM,
    pooled_dim=CLIP_DIM,
    time_dim=48,
)
IMAGE_CONFIG = replace(CONFIG, in_channels=16)
CONFIGS = {"video": CONFIG, "image": IMAGE_CONFIG}


def tiny_state(
    kind: str = "video", seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int
) -> dict[str, Tensor]:
    """Random weights under the released names. sizes: fields of the config to change."""
    config = replace(CONFIGS[kind], **sizes)  # type: ignore[arg-type]
    return draw_state(lambda: KandinskyModel(config), seed, dtype)


@dataclass(frozen=True)
class TinyKandinsky:
    """Paths of a tiny checkpoint set, as given to --dit, --vae, --text_encoder_qwen, --text_encoder_clip."""

    dit: Path
    vae: Path
    qwen: Path
    clip: Path

    @property
    def texts(self) -> list[str]:
        """The options that name the text encoders."""
        return ["--text_encoder_qwen", str(self.qwen), "--text_encoder_clip", str(self.clip)]

    @property
    def models(self) -> list[str]:
        """The options that name the models of a training or generation."""
        return ["--dit", str(self.dit), "--vae", str(self.vae), *self.texts]


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "kandinsky5lite"
) -> Path:
    """Write a transformer in one of the layouts of `write_dialect`. Returns what a user gives to --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_dialect(folder / f"{name}.safetensors", state, dialect, dict)


def write_qwen(folder: Path) -> Path:
    """Write Qwen2.5-VL and its tokenizer into a folder. Returns it."""
    write_qwen_tokenizer(folder)
    return write_model(folder / "model.safetensors", qwen25_vl()).parent


def write_clip(folder: Path) -> Path:
    """Write CLIP-L and its tokenizer into a folder. Returns it."""
    write_clip_tokenizer(folder)
    save(folder / "model.safetensors", clip_text_layouts(clip_text_tensors())["both"])
    (folder / "config.json").write_text(json.dumps(clip_config_json()), encoding="utf-8")
    return folder


def write_tiny_kandinsky(
    folder: Path, kind: str = "video", dtype: torch.dtype = torch.float32, name: str = "dit", **sizes: int
) -> TinyKandinsky:
    """Write transformer, VAE and text encoders with their tokenizers below `folder`.

    name: of the transformer's file. sizes: of the transformer.
    """
    vae = folder / "vae.safetensors"
    return TinyKandinsky(
        write_dit(folder, tiny_state(kind, dtype=dtype, **sizes), name=name),
        write_autoencoder(vae) if kind == "image" else write_vae(vae),
        write_qwen(folder / "text_encoder"),
        write_clip(folder / "text_encoder_2"),
    )
