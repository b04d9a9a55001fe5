"""The video VAEs of Wan2.1 and Wan2.2: pixels to latents and back.

It works on one group of frames at a time, so that memory does not grow with the length of the clip.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.dialects import load_planned
from checkpoints.opening import open_checkpoint
from encoders.frame_groups import FrameCache
from encoders.tiles import add_in_tiles, decode_in_tiles, split_into_tiles
from modules.devices import dtype_name, tensor_on
from modules.layers.convolution import cast_for_convolution, set_memory_format
from modules.media.pixels import check_clip
from wan.configs import RELEASES
from wan.vae_blocks import WanVaeConfig, WanVaeHalf
from wan.vae_checkpoints import read_vae
from wan.vae_shortcuts import fold_patches, unfold_patches

logger = logging.getLogger(__name__)


class WanVae(nn.Module):
    """Encoder and decoder. Build it on the meta device and load a checkpoint with `load_vae`.

    Args:
        cache_on_cpu: Keep the features between frame groups in host memory.
        tile: Edge of a tile in pixels. Larger frames are cut into overlapping tiles, and each tile goes
            through the whole clip before the next; None computes frames as a whole.
    """

    def __init__(self, config: WanVaeConfig, cache_on_cpu: bool = False, tile: int | None = None) -> None:
        super().__init__()
        self.encoder = WanVaeHalf(config, is_encoder=True)
        self.decoder = WanVaeHalf(config, is_encoder=False)
        self.conv1 = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.conv2 = nn.Conv3d(config.latent_channels, config.latent_channels, 1)
        self.config = config
        self.cache_on_cpu = cache_on_cpu
        self.tile = tile

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the VAE."""
        return self.conv1.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the VAE."""
        return self.conv1.weight.device

    @torch.no_grad()
    def encode(self, pixels: Tensor, as_moments: bool = False) -> Tensor:
        """Encode a clip to normalized means of the posterior, B Z n+1 H/S W/S float32 on the VAE's device.

        Args:
            pixels: B 3 F H W in -1..1, on any device (moved group by group). F = 4n + 1, and H and W are
                multiples of the stride S, 8 or 16.
            as_moments: Return means and logarithms of variances instead, B 2Z ..., not normalized.

        Raises:
            ValueError: For other sizes.
        """
        frame_stride, stride, _ = RELEASES[self.config.latent_channels].stride
        check_clip(pixels, frame_stride, stride)
        batch, _, frames, height, width = pixels.shape
        latent_frames = (frames - 1) // frame_stride + 1
        latent_height = height // stride
        latent_width = width // stride
        if self.tile is None:
            return self._encode(pixels, as_moments)
        tile_edge = max(1, self.tile // stride)  # in latent pixels
        if max(latent_height, latent_width) <= tile_edge:
            return self._encode(pixels, as_moments)
        grid = (split_into_tiles(latent_height, tile_edge), split_into_tiles(latent_width, tile_edge))
        # conv1 takes the 2Z channels of moments, conv2 the Z channels of latents
        channels = (self.conv1 if as_moments else self.conv2).in_channels
        latents = torch.zeros(
            (batch, channels, latent_frames, latent_height, latent_width), device=self.device
        )
        add_in_tiles(
            lambda tile: [self._encode(tile, as_moments)],
            pixels,
            tiles=grid,
            pixels_per_latent=(stride, 1),
            out=latents,
        )
        return latents

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Encode a clip, B 3 4n+1 H W, to means and log variances, not normalized: B 2Z n+1 H/S W/S."""
        return self.encode(pixels, as_moments=True)

    @torch.no_grad()
    def decode(self, latents: Tensor, clamps: bool = True) -> Iterator[Tensor]:
        """Yield pixels in playing order, one frame and then four at a time: B 3 F H W, float32, -1..1.

        The chunks are on the VAE's device. With tiles they are in host memory, and the first one is yielded
        after the last tile is done.

        Args:
            latents: B Z f h w, normalized, on any device.
            clamps: Whether to clamp pixels to -1..1.
        """
        chunks = self._decode(latents)
        if self.tile is not None:
            stride = RELEASES[self.config.latent_channels].stride
            tile_edge = max(1, self.tile // stride[1])  # in latent pixels
            grid = (
                split_into_tiles(latents.shape[-2], tile_edge),
                split_into_tiles(latents.shape[-1], tile_edge),
            )
            chunks = decode_in_tiles(self._decode, latents, grid, stride)
        for chunk in chunks:
            yield chunk.clamp_(-1, 1) if clamps else chunk

    def _encode(self, pixels: Tensor, as_moments: bool) -> Tensor:
        """Encode the first frame, then groups of frames, each of which becomes one latent frame."""
        frames = pixels.shape[2]
        parts = []
        frame_cache = FrameCache(self.cache_on_cpu) if frames > 1 else None
        step = RELEASES[self.config.latent_channels].stride[0]
        patch = self.config.patch
        for group in pixels.split([1] + [step] * ((frames - 1) // step), dim=2):
            if patch > 1:
                group = fold_patches(group.to(self.device, self.dtype), patch)
            group = cast_for_convolution(group, self.device, self.dtype)
            moments = self.conv1(self.encoder(group, frame_cache))
            parts.append((moments if as_moments else moments.chunk(2, dim=1)[0]).float())
        latents = torch.cat(parts, dim=2)
        return latents if as_moments else normalize_latents(latents)

    def _decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the pixels of one latent frame after another."""
        frames = latents.shape[2]
        frame_cache = FrameCache(self.cache_on_cpu) if frames > 1 else None
        mean, std = _statistics(latents.shape[1], self.device)
        for index in range(frames):
            latent = latents[:, :, index : index + 1].to(self.device).float() * std + mean
            latent = cast_for_convolution(latent, self.device, self.dtype)
            chunk = self.decoder(self.conv2(latent), frame_cache)
            if self.config.patch > 1:
                chunk = unfold_patches(chunk, self.config.patch)
            yield chunk.float()


def normalize_latents(means: Tensor) -> Tensor:
    """Normalize posterior means to latents, B Z f h w float32, with the statistics for Z channels."""
    mean, std = _statistics(means.shape[1], means.device)
    return ((means.float() - mean) / std).contiguous()


def _statistics(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, 1 Z 1 1 1, float32: in 16 bits they would tint every video."""
    release = RELEASES[channels]
    mean, std = (
        tensor_on(device, values, torch.float32).view(1, -1, 1, 1, 1)
        for values in (release.mean, release.std)
    )
    return mean, std


def load_vae(
    path: Path, device: torch.device, dtype: torch.dtype, cache_on_cpu: bool = False, tile: int | None = None
) -> WanVae:
    """Load the VAE of Wan2.1 or of Wan2.2 from any of its file layouts; the tensors show which one it is.

    Raises CheckpointError if the file is damaged or contains another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_vae(checkpoint)
        name = f"the {RELEASES[plan.config.latent_channels].name} VAE"
        vae = load_planned(plan, lambda config: WanVae(config, cache_on_cpu, tile), device, dtype, label=name)
    set_memory_format(vae, device)
    logger.info("VAE: %s, computing in %s", path, dtype_name(dtype))
    return vae
