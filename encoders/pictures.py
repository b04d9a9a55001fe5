"""Cache entries of single pictures, for every family whose models make pictures."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from encoders.posterior import posterior_generator
from modules.contract.data import CacheEntry, MediaBatch, MediaTable, MomentsRules
from modules.errors import DatasetError
from modules.media.pixels import byte_clips

# of a family that makes pictures: there are no moments of them
NO_MOMENTS = MomentsRules(refusal="the model makes pictures, not clips")


class PictureEncoder(Protocol):
    """An autoencoder of pictures."""

    @property
    def device(self) -> torch.device: ...

    # B 3 1 H W bytes or -1..1, a generator for each -> B Z 1 h w
    def encode(self, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor: ...


def encode_pictures(vae: PictureEncoder, media: MediaBatch) -> list[list[CacheEntry]]:
    """Return the cache entry of each picture: a posterior sample, seeded by its name, float32."""
    entries = []
    for part in media.split_for(vae.device):
        latents = vae.encode(byte_clips(part.frames), [posterior_generator(key) for key in part.keys])
        entries += [[CacheEntry({"latents": latent.clone()})] for latent in latents]
    return entries


def check_pictures(table: MediaTable, who: str) -> None:
    """Raise DatasetError if a table has clips or control media. who: the model, for messages."""
    if table.kind != "image":
        raise DatasetError(
            f"{table.name}: the table has clips, and {who} can only learn pictures. Give image_directory or "
            "image_jsonl_file, or train a video model."
        )
    if table.has_control:
        raise DatasetError(
            f"{table.name}: the table has control images, which {who} cannot take. Remove them."
        )
