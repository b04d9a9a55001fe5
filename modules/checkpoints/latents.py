"""Read latent files, as generation writes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.checkpoints.containers import load_pickled
from modules.checkpoints.finite import is_finite
from modules.checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError


@dataclass(frozen=True)
class SavedLatents:
    """Contents of a latent file."""

    latents: Tensor  # B C F H W
    metadata: Mapping[str, str]


def load_latents(path: Path, option: str = "--latent_path", only_shape: bool = False) -> SavedLatents:
    """Read a latent file: safetensors, or a pickled tensor. option: names it in messages.

    only_shape: the latents have no numbers, they are on the meta device, and only the file's header is read.
    Raises CheckpointError if the file is damaged or has no latents.
    """
    metadata: Mapping[str, str] = {}
    found: Any = None
    if path.suffix == ".safetensors":
        with open_checkpoint(path) as file:
            metadata = file.metadata
            info = file.tensors.get("latent")
            if info is not None:
                found = torch.empty(info.shape, device="meta") if only_shape else file.read("latent")
    else:
        content = load_pickled(path)  # mapped: nothing is read yet
        found = content.get("latent") if isinstance(content, dict) else content
        if only_shape and isinstance(found, Tensor):
            found = found.to("meta")
    if not isinstance(found, Tensor):
        raise CheckpointError(
            f"{option} {path} has no tensor `latent`. Give a file written with --output_type latent",
            path,
        )
    if found.ndim == 4:
        found = found[None]
    if found.ndim != 5 or len(found) != 1 or not found.numel():
        raise CheckpointError(
            f"{option} {path}: `latent` has the shape {tuple(found.shape)}; C F H W of one video is needed",
            path,
        )
    if not only_shape and not bool(is_finite(found)):
        raise CheckpointError(
            f"{option} {path}: its latents have values that are NaN or infinite, which show nothing. Make "
            "them again",
            path,
        )
    return SavedLatents(found.float(), metadata)
