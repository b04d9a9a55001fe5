"""Read latent files, as generation writes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from modules.checkpoints.containers import load_pickled
from modules.checkpoints.opening import open_checkpoint
from modules.errors import CheckpointError


@dataclass(frozen=True)
class SavedLatents:
    """Contents of a latent file."""

    latents: Tensor  # B C F H W
    metadata: Mapping[str, str]


def load_latents(path: Path, option: str = "--latent_path") -> SavedLatents:
    """Read a latent file: safetensors, or a pickled tensor. option: names it in messages.

    Raises CheckpointError if the file is damaged or has no latents.
    """
    metadata: Mapping[str, str] = {}
    if path.suffix == ".safetensors":
        with open_checkpoint(path) as file:
            metadata = file.metadata
            found = file.read("latent") if "latent" in file.tensors else None
    else:
        content = load_pickled(path)
        found = content.get("latent") if isinstance(content, dict) else content
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
    return SavedLatents(found.float(), metadata)
