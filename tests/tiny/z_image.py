"""A complete tiny Z-Image on disk, in the released file layouts and ComfyUI's."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tests.tiny.dit_files import TinyModel, draw_state, write_dialect
from tests.tiny.hunyuan_encoders import save
from tests.tiny.language_models import DIM, qwen3, write_model, write_qwen_tokenizer
from tests.tiny.picture_encoders import write_autoencoder
from z_image.configs import ZImageConfig
from z_image.model import ZImageModel

TEXT_DIM = DIM
# width and heads as diffusers computes them: the feed-forward is 8 / 3 as wide, the time 256 at most
CONFIG = ZImageConfig(
    dim=96,
    ffn_dim=256,
    num_heads=3,
    num_kv_heads=3,
    num_layers=2,
    noise_refiner_layers=1,
    context_refiner_layers=1,
    in_dim=16,
    text_dim=TEXT_DIM,
    time_dim=96,
)
_COMFY_NAMES = (
    ("attention.to_out.0", "attention.out"),
    ("attention.norm_q", "attention.q_norm"),
    ("attention.norm_k", "attention.k_norm"),
    ("all_x_embedder.2-1", "x_embedder"),
    ("all_final_layer.2-1", "final_layer"),
)


def tiny_state(seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    """Random weights under the released names. sizes: fields of the config to change."""
    config = replace(CONFIG, **sizes)  # type: ignore[arg-type]
    return draw_state(lambda: ZImageModel(config), seed, dtype)


def comfy_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights in ComfyUI's layout: queries, keys and values in one."""
    found = {}
    for name, tensor in state.items():
        for ours, theirs in _COMFY_NAMES:
            name = name.replace(ours, theirs)
        if ".attention.to_q." in name:
            parts = [state[name.replace("to_q", f"to_{character}")] for character in "qkv"]
            found[name.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".attention.to_k." not in name and ".attention.to_v." not in name:
            found[name] = tensor
    return found


def write_dit(
    folder: Path, state: Mapping[str, Tensor], dialect: str = "safetensors", name: str = "z_image"
) -> Path:
    """Write a transformer in one of the layouts of `write_dialect`. Returns what a user gives to --dit."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_dialect(folder / f"{name}.safetensors", state, dialect, dict)


def write_qwen3(folder: Path) -> Path:
    """A folder as transformers write it, with the tokenizer inside. Returns the folder."""
    write_model(folder / "model.safetensors", qwen3())
    return write_qwen_tokenizer(folder)


def write_tiny_z_image(folder: Path, dtype: torch.dtype = torch.float32, **sizes: int) -> TinyModel:
    """Write transformer, VAE and text encoder with its tokenizer below `folder`.

    sizes: of the transformer.
    """
    dit = write_dit(folder, tiny_state(dtype=dtype, **sizes), name="dit")
    vae = write_autoencoder(folder / "vae.safetensors")
    return TinyModel(dit, vae, write_qwen3(folder / "text_encoder"))


def write_adapter(path: Path, seed: int = 3) -> Path:
    """A LoRA as trainers of Z-Image-Turbo add in training steps, by released paths."""
    generator, tensors = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for name, weight in tiny_state().items():
        if name.startswith("layers.") and ".attention.to_" in name:
            rows, columns = weight.shape
            start = f"diffusion_model.{name.removesuffix('.weight')}"
            tensors[f"{start}.lora_A.weight"] = 0.1 * torch.randn(2, columns, generator=generator)
            tensors[f"{start}.lora_B.weight"] = 0.1 * torch.randn(rows, 2, generator=generator)
    return save(path, tensors)
