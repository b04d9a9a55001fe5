"""Parts that all families of picture models share."""

from collections.abc import Mapping
from typing import Protocol

from encoders.posterior import posterior_generator
from modules.contract.data import (
    CacheEntry,
    Conditions,
    MediaBatch,
    MediaEncoders,
    MediaTable,
    MomentsBatch,
    MomentsRules,
)
from modules.contract.requests import Prepared
from modules.errors import DatasetError
from modules.media.pixels import byte_clips

# of a family that makes pictures: there are no moments of them
NO_MOMENTS = MomentsRules(refusal="the model makes pictures, not clips")


class ModelOfPictures(Protocol):
    """The part of a family that is the same for all models of pictures, which derive from it."""

    def sections_of(self, table: MediaTable, frames: int) -> int | None:
        """Return None: a picture has one file."""
        return None

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Return the cache entry of each picture: a posterior sample, seeded by its name, float32."""
        entries, vae = [], encoders.vae
        for part in media.split_for(vae.device):
            latents = vae.encode(byte_clips(part.frames), [posterior_generator(key) for key in part.keys])
            entries += [[CacheEntry({"latents": latent.clone()})] for latent in latents]
        return entries

    def latents_from_moments(self, media: MomentsBatch) -> list[CacheEntry]:
        """Not for pictures: `NO_MOMENTS` refuses them before."""
        raise AssertionError(NO_MOMENTS.refusal)

    def needs_media(self, prepared: Prepared) -> bool:
        """Return False: no image must be encoded before denoising."""
        return False

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Return no conditions: there are those of texts only."""
        return {0: {}}


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
