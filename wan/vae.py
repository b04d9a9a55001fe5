"""The Wan2.1 video VAE: pixels to latents and back.

It works on one group of frames at a time, so that memory does not grow with the length of the clip.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from modules.checkpoints.dialects import load_planned
from modules.checkpoints.opening import open_checkpoint
from modules.devices import dtype_name
from modules.layers.memory_layouts import lay_out, layouts
from modules.media.pixels import check_clip
from wan.encoder_checkpoints import read_vae
from wan.vae_blocks import TimeMemory, WanVaeConfig, WanVaeDecoder, WanVaeEncoder
from wan.vae_tiles import Tile, add_tile, tiles

logger = logging.getLogger(__name__)

FRAMES = 4  # pixel frames of one latent frame; the first latent frame holds one
PIXELS = 8  # height and width of one latent pixel, in pixels

# Statistics of the latents, per channel: released code, wan/modules/vae.py
# fmt: off
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
       3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on


class WanVae(nn.Module):
    """Encoder and decoder. Build it on the meta device and load a checkpoint with `load_vae`.

    cache_on_cpu: keep the features between frame groups in host memory. tile: edge in pixels; larger pictures
    are cut into overlapping tiles of this size, and each tile goes through the whole clip before the next.
    """

    def __init__(self, config: WanVaeConfig, cache_on_cpu: bool = False, tile: int | None = None) -> None:
        super().__init__()
        self.encoder = WanVaeEncoder(config)
        self.decoder = WanVaeDecoder(config)
        self.conv1 = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.conv2 = nn.Conv3d(config.latent_channels, config.latent_channels, 1)
        self.cache_on_cpu = cache_on_cpu
        self.tile = tile

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.conv1.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.conv1.weight.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return the normalised means of the posterior.

        pixels: B 3 F H W in -1..1, on any device (moved group by group); F = 4n + 1, H and W multiples of 8.
        Returns B Z n+1 H/8 W/8, float32, on the VAE's device. Raises ValueError for other sizes.
        """
        check_clip(pixels, FRAMES, PIXELS)
        batch, _, frames, height, width = pixels.shape
        rows, columns = self._tiles(height // PIXELS), self._tiles(width // PIXELS)
        if len(rows) == len(columns) == 1:
            return self._encode(pixels)
        latents = torch.zeros(
            (batch, self.conv2.in_channels, (frames - 1) // FRAMES + 1, height // PIXELS, width // PIXELS),
            device=self.device,
        )
        for row in rows:
            for column in columns:
                add_tile(
                    latents, self._encode(pixels[..., row.pick(PIXELS), column.pick(PIXELS)]), row, column, 1
                )
        return latents

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield pixels in playing order: one frame, then four at a time. B 3 F H W, float32, -1..1.

        latents: B Z f h w, normalised, on any device. The chunks are on the VAE's device. With tiles they are
        in host memory, and the first one is yielded after the last tile is done.
        """
        for chunk in self.decode_unclamped(latents):
            yield chunk.clamp_(-1, 1)

    @torch.no_grad()
    def decode_unclamped(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the same as `decode`, before clamping to -1..1."""
        rows, columns = self._tiles(latents.shape[-2]), self._tiles(latents.shape[-1])
        if len(rows) == len(columns) == 1:
            yield from self._decode(latents)
            return
        batch, _, frames, height, width = latents.shape
        pixels = torch.zeros(batch, 3, (frames - 1) * FRAMES + 1, height * PIXELS, width * PIXELS)
        for row in rows:
            for column in columns:
                start = 0
                for chunk in self._decode(latents[..., row.pick(1), column.pick(1)]):
                    add_tile(pixels[:, :, start : start + chunk.shape[2]], chunk, row, column, PIXELS)
                    start += chunk.shape[2]
        yield from pixels.split([1] + [FRAMES] * (frames - 1), dim=2)

    def _tiles(self, size: int) -> tuple[Tile, ...]:
        """Return the tiles of an axis of `size` latent pixels."""
        return tiles(size, size if self.tile is None else max(1, self.tile // PIXELS))

    def _encode(self, pixels: Tensor) -> Tensor:
        frames = pixels.shape[2]
        memory = TimeMemory(self.cache_on_cpu) if frames > 1 else None
        groups = pixels.split([1] + [FRAMES] * ((frames - 1) // FRAMES), dim=2)
        moments = [self.conv1(self.encoder(self._place(group), memory)) for group in groups]
        means = torch.cat([moment.chunk(2, dim=1)[0].float() for moment in moments], dim=2)
        mean, std = self._statistics()
        return ((means - mean) / std).contiguous()

    def _decode(self, latents: Tensor) -> Iterator[Tensor]:
        frames = latents.shape[2]
        memory = TimeMemory(self.cache_on_cpu) if frames > 1 else None
        mean, std = self._statistics()
        for index in range(frames):
            latent = latents[:, :, index : index + 1].to(self.device).float() * std + mean
            yield self.decoder(self.conv2(self._place(latent)), memory).float()

    def _place(self, x: Tensor) -> Tensor:
        """Move to the VAE's device, dtype and memory layout. All layers keep the layout."""
        return x.to(self.device, self.dtype, memory_format=layouts(self.device)[0])

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, 1 Z 1 1 1, float32: in 16 bits they would tint every video."""
        mean, std = (torch.tensor(values, device=self.device).view(1, -1, 1, 1, 1) for values in (MEAN, STD))
        return mean, std


def load_vae(
    path: Path, device: torch.device, dtype: torch.dtype, cache_on_cpu: bool = False, tile: int | None = None
) -> WanVae:
    """Load a Wan2.1 VAE from any of its file layouts.

    Raises CheckpointError if the file is damaged or holds another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_vae(checkpoint)
        vae = load_planned(
            plan, lambda config: WanVae(config, cache_on_cpu, tile), device, dtype, "the Wan2.1 VAE"
        )
    lay_out(vae, device)
    logger.info("VAE: %s, computing in %s", path, dtype_name(dtype))
    return vae
