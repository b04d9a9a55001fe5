"""The video VAEs of Wan2.1 and Wan2.2: pixels to latents and back.

It works on one group of frames at a time, so that memory does not grow with the length of the clip.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from encoders.tiles import Tile, add_in_tiles, decode_in_tiles, tiles
from modules.checkpoints.dialects import load_planned
from modules.checkpoints.opening import open_checkpoint
from modules.devices import dtype_name, numbers_on
from modules.layers.convolution import lay_out, layouts
from modules.media.pixels import check_clip
from wan.configs import RELEASES
from wan.vae_blocks import TimeMemory, WanVaeConfig, WanVaeDecoder, WanVaeEncoder
from wan.vae_checkpoints import read_vae
from wan.vae_shortcuts import fold_patches, unfold_patches

logger = logging.getLogger(__name__)


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
        self.config = config
        self.cache_on_cpu = cache_on_cpu
        self.tile = tile

    @property
    def dtype(self) -> torch.dtype:
        return self.conv1.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv1.weight.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return the normalised means of the posterior.

        pixels: B 3 F H W in -1..1, on any device (moved group by group); F = 4n + 1, H and W multiples of the
        stride S, 8 or 16. Returns B Z n+1 H/S W/S, float32, on the VAE's device. Raises ValueError for other
        sizes.
        """
        return self._in_tiles(pixels, self._encode, self.conv2.in_channels)

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Return means and logarithms of variances, not normalised: B 2Z n+1 H/S W/S, as `encode` does."""
        return self._in_tiles(pixels, self._moments, self.conv1.out_channels)

    def _in_tiles(self, pixels: Tensor, encode: Callable[[Tensor], Tensor], channels: int) -> Tensor:
        """Encode pixels, in tiles if they are larger than one. channels: of the result of `encode`."""
        step, side, _ = self.config.stride
        check_clip(pixels, step, side)
        batch, _, frames, height, width = pixels.shape
        rows, columns = self._tiles(height // side), self._tiles(width // side)
        if len(rows) == len(columns) == 1:
            return encode(pixels)
        latents = torch.zeros(
            (batch, channels, (frames - 1) // step + 1, height // side, width // side), device=self.device
        )
        add_in_tiles(lambda tile: [encode(tile)], pixels, (rows, columns), (side, 1), latents)
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
        grid = self._tiles(latents.shape[-2]), self._tiles(latents.shape[-1])
        yield from decode_in_tiles(self._decode, latents, grid, self.config.stride)

    def _tiles(self, size: int) -> tuple[Tile, ...]:
        return tiles(size, size if self.tile is None else max(1, self.tile // self.config.stride[1]))

    def _encode(self, pixels: Tensor) -> Tensor:
        means = [moments.chunk(2, dim=1)[0].float() for moments in self._groups(pixels)]
        return normalise(torch.cat(means, dim=2))

    def _moments(self, pixels: Tensor) -> Tensor:
        return torch.cat([moments.float() for moments in self._groups(pixels)], dim=2)

    def _groups(self, pixels: Tensor) -> list[Tensor]:
        """Return the moments of each group of frames."""
        frames = pixels.shape[2]
        memory = TimeMemory(self.cache_on_cpu) if frames > 1 else None
        (step, _, _), patch = self.config.stride, self.config.patch
        groups = pixels.split([1] + [step] * ((frames - 1) // step), dim=2)
        return [self.conv1(self.encoder(self._place(group, patch), memory)) for group in groups]

    def _decode(self, latents: Tensor) -> Iterator[Tensor]:
        frames = latents.shape[2]
        memory = TimeMemory(self.cache_on_cpu) if frames > 1 else None
        mean, std = _statistics(latents.shape[1], self.device)
        for index in range(frames):
            latent = latents[:, :, index : index + 1].to(self.device).float() * std + mean
            chunk = self.decoder(self.conv2(self._place(latent)), memory)
            yield unfold_patches(chunk, self.config.patch).float()

    def _place(self, x: Tensor, patch: int = 1) -> Tensor:
        """Move to the VAE's device, dtype and memory layout. All layers keep the layout.

        patch: fold so many rows and columns into channels first.
        """
        if patch > 1:
            x = fold_patches(x.to(self.device, self.dtype), patch)
        return x.to(self.device, self.dtype, memory_format=layouts(self.device)[0])


def normalise(means: Tensor) -> Tensor:
    """Return latents of caches and model, B Z f h w float32, of means; their channels say whose VAE it is."""
    mean, std = _statistics(means.shape[1], means.device)
    return ((means.float() - mean) / std).contiguous()


def _statistics(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, 1 Z 1 1 1, float32: in 16 bits they would tint every video."""
    release = RELEASES[channels]
    mean, std = (
        numbers_on(device, values, torch.float32).view(1, -1, 1, 1, 1)
        for values in (release.mean, release.std)
    )
    return mean, std


def load_vae(
    path: Path, device: torch.device, dtype: torch.dtype, cache_on_cpu: bool = False, tile: int | None = None
) -> WanVae:
    """Load the VAE of Wan2.1 or of Wan2.2, which one its tensors say, from any of its file layouts.

    Raises CheckpointError if the file is damaged or holds another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_vae(checkpoint)
        name = f"the {RELEASES[plan.config.latent_channels].name} VAE"
        vae = load_planned(plan, lambda config: WanVae(config, cache_on_cpu, tile), device, dtype, name)
    lay_out(vae, device)
    logger.info("VAE: %s, computing in %s", path, dtype_name(dtype))
    return vae
