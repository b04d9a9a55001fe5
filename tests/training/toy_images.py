"""Toy families unlike the video families, for the same loops: pictures, and a model that predicts noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dataset.caching.existing import Caches
from modules.contract.data import (
    CacheEntry,
    Conditions,
    LatentSpec,
    MediaBatch,
    MediaEncoders,
    MediaTable,
    SamplingDefaults,
)
from modules.contract.family import DitSpec, NoiseSpec
from modules.contract.loading import Placement
from modules.contract.steps import NO_TWEAKS, Tweaks
from tests.training.toy import WIDTH, ToyBlock, ToyFamily
from training.loss import Trains

LATENT = LatentSpec(channels=3, stride=(1, 8, 8), pixel_step=16, frame_step=1, scale=2.0, shift=-1.0)
PATCH = 4 * LATENT.channels  # numbers of a token: 2 x 2 latents
LEVELS = tuple(0.03 * 500 ** (index / 999) for index in range(1000))  # of noise, up to 15


def count_tokens(shape: Sequence[int]) -> int:
    return (shape[-2] // 2) * (shape[-1] // 2)


class MeanVae(nn.Module):
    """A latent is the mean colour of 8 x 8 pixels, 0..1."""

    device = torch.device("cpu")

    def encode(self, frames: Tensor) -> Tensor:
        pixels = frames[:, 0].permute(0, 3, 1, 2).float() / 255  # B C H W
        return nn.functional.avg_pool2d(pixels, 8).unsqueeze(2)  # B C F H W


class PictureDit(nn.Module):
    """Tokens B L 12 -> B L 12. It wants times from 0 to 1 and remembers what it was fed."""

    spec = DitSpec(("blocks",))

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH, WIDTH)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(2))
        self.head = nn.Linear(WIDTH, PATCH)
        self.fed: list[tuple[Tensor, Tensor]] = []

    def forward(self, tokens: Tensor, times: Tensor, text: Sequence[Tensor]) -> Tensor:
        self.fed.append((tokens.detach(), times))
        added = torch.stack([one.mean() for one in text]) + times
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, added.view(-1, 1, 1))
        return self.head(x)


@dataclass(frozen=True)
class PictureFamily(ToyFamily):
    """Pictures with transparency.

    The network says which way the data lies; or the noise, if `noise` has a table.
    """

    noise: NoiseSpec = NoiseSpec(training_offset=0.0, table_is_shifted=True, tokens=count_tokens)
    name: str = "pictures"
    cache_tag: str = "pic"
    latent: LatentSpec = LATENT
    dit: DitSpec = PictureDit.spec
    defaults: SamplingDefaults = SamplingDefaults(3, 1.0, 5.0, None, 3.0, "euler", 32, 32, 1)
    media_identity: Mapping[str, str] = field(default_factory=lambda: {"vae": "means"})
    network: PictureDit = field(default_factory=PictureDit)

    def media_encoders(self, device: torch.device, images: bool = True) -> MediaEncoders:
        return MediaEncoders(MeanVae())

    def check_table(self, table: MediaTable) -> None: ...

    def sections_of(self, table: MediaTable, frames: int) -> int | None:
        return None

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        latents = encoders.vae.encode(media.frames)
        opaque = torch.full(media.frames.shape[2:4], 255).expand(len(latents), -1, -1)
        alpha = opaque if media.alpha is None else media.alpha
        made = zip(latents, alpha.float() / 255, strict=True)
        return [[CacheEntry({"latents": picture, "alpha_mask": mask})] for picture, mask in made]

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        return self.network

    def predict(
        self, dit: nn.Module, noisy: Tensor, timesteps: Tensor, cond: Conditions, tweaks: Tweaks = NO_TWEAKS
    ) -> Tensor:
        times, factor = timesteps / 1000, -1.0  # the network points to the data, velocities to the noise
        if self.noise.table:
            sigmas = torch.tensor(self.noise.table)[timesteps.long()]
            noisy, factor = noisy / (1 + sigmas.square()).sqrt().view(-1, 1, 1, 1, 1), 1.0
        _, channels, frames, height, width = noisy.shape
        tokens = nn.functional.pixel_unshuffle(noisy.squeeze(2), 2).flatten(2).transpose(1, 2)  # B L 12
        found = dit(tokens, times, cond["letters"]).transpose(1, 2).unflatten(2, (height // 2, width // 2))
        return factor * nn.functional.pixel_shuffle(found, 2).view(-1, channels, frames, height, width)


_: tuple[type[Caches], type[Trains]] = PictureFamily, PictureFamily
