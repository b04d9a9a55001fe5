"""Caches of FramePack as the known tuners write them, without our record."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

TEXT_ROWS = 512
LATENTS = {"architecture": "framepack", "width": "48", "height": "32", "format_version": "1.0.1"}


def cached_name(key: str, tensor: Tensor, grid: str) -> str:
    """The name in the file of what batches call `key`."""
    if key.endswith("_mask"):
        return key
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{key}_{grid}_{dtype}" if key.startswith("latents") else f"{key}_{dtype}"


def write_latents(path: Path, tensors: Mapping[str, Tensor], frames: int | None = None) -> None:
    """A latent cache.

    tensors: by the names of batches, without batch dimension. frames: of the clip; None for an image.
    """
    grid = "x".join(map(str, tensors["latents"].shape[1:]))  # that of the target, in the names of all
    count = {} if frames is None else {"frame_count": str(frames)}
    save_file(
        {cached_name(key, tensor, grid): tensor for key, tensor in tensors.items()}, path, LATENTS | count
    )


def write_text(path: Path, tensors: Mapping[str, Tensor], caption: str) -> None:
    """A text cache."""
    metadata = {"architecture": "framepack", "caption1": caption, "format_version": "1.0.1"}
    save_file({cached_name(key, tensor, ""): tensor for key, tensor in tensors.items()}, path, metadata)


def random_text(words: int, llm_dim: int, clip_dim: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A text of so many tokens, zeros behind them."""
    mask = torch.arange(TEXT_ROWS) < words
    states = torch.randn(TEXT_ROWS, llm_dim, generator=generator) * mask[:, None]
    return {
        "llama_vec": states,
        "llama_attention_mask": mask,
        "clip_l_pooler": torch.randn(clip_dim, generator=generator),
    }
