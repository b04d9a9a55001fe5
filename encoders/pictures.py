"""Parts that all families of picture models share, and the colours of latents for previews."""

from collections.abc import Mapping
from typing import Protocol

from encoders.tiles import posterior_generator
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

# Least squares fit of latents in model space to colours (R, G, B), which all known tools use
PREVIEW_FACTORS = (
    (-0.0346, 0.0244, 0.0681),
    (0.0034, 0.0210, 0.0687),
    (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329),
    (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915),
    (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421),
    (-0.0515, 0.0201, 0.0011),
    (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749),
    (-0.1264, -0.0522, -0.1103),
    (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
)
PREVIEW_BIAS = (-0.0329, -0.0718, -0.0851)


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
