"""The video VAE of LTX-2 and LTX-2.3: pixels to latents and back.

It works on one latent frame at a time, and the result is that of the whole clip: memory does not grow with
the length of the clip. Tiles in height and width bound the memory of large frames and change the result.
Latents are those of the model: the posterior's means, normalized with the statistics in the VAE's file.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.dialects import load_planned
from checkpoints.opening import open_checkpoint
from encoders.tiles import Tile, add_in_tiles, decode_in_tiles, split_into_tiles
from ltx_2.vae_checkpoints import read_video_vae
from ltx_2.video_vae_blocks import ClipMemory, VideoVaeConfig, VideoVaeDecoder, VideoVaeEncoder
from modules.devices import dtype_name
from modules.layers.convolution import cast_for_convolution, set_memory_format
from modules.media.pixels import check_clip, from_bytes

logger = logging.getLogger(__name__)

MIN_TILE = 2  # latent pixels: a border is mirrored, and neighbors overlap


class LtxVideoVae(nn.Module):
    """Encoder and decoder. Build it on the meta device and load a checkpoint with `load_video_vae`.

    `tile` is the edge of a tile in pixels: larger frames are cut into overlapping tiles of at most this size,
    and each tile goes through the whole clip before the next.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: VideoVaeConfig, tile: int | None = None) -> None:
        super().__init__()
        self.encoder = VideoVaeEncoder(config)
        self.decoder = VideoVaeDecoder(config)
        self.register_buffer("latents_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latents_std", torch.ones(config.latent_channels))
        self.config = config
        self.tile = tile

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the network."""
        return self.encoder.conv_in.conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.encoder.conv_in.conv.weight.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return the normalized means of the posterior, B Z n+1 H/S W/S float32, on the VAE's device.

        Args:
            pixels: B 3 F H W in -1..1, or bytes 0..255, on any device (moved group by group). F = sn + 1; H
                and W are multiples of S, for the strides s of time (8) and S of space (32).

        Raises:
            ValueError: For other sizes.
        """
        time_stride, space_stride, _ = self.config.stride
        check_clip(pixels, time_stride, space_stride)
        batch, _, frames, height, width = pixels.shape
        size = (frames - 1) // time_stride + 1, height // space_stride, width // space_stride
        rows, columns = self._tiles(size[1]), self._tiles(size[2])
        if len(rows) == len(columns) == 1:
            means = torch.cat(list(self._means(pixels)), dim=2)
        else:
            means = torch.zeros((batch, self.config.latent_channels, *size), device=self.device)
            add_in_tiles(self._means, pixels, (rows, columns), (space_stride, 1), means)
        mean, std = self._statistics()
        return (means - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor, clamps: bool = True) -> Iterator[Tensor]:
        """Decode latents; yield pixels in playing order, some frames at a time: B 3 F H W, float32, -1..1.

        The chunks are on the VAE's device. With tiles they are in host memory, and the first one is yielded
        after the last tile is done.

        Args:
            latents: B Z f h w, normalized, on any device.
            clamps: Whether to clamp pixels to -1..1.

        Raises:
            ValueError: If the VAE mirrors borders and latents have a side of 1.
        """
        grid = self._tiles(latents.shape[-2]), self._tiles(latents.shape[-1])
        for chunk in decode_in_tiles(self._pixels, latents, grid, self.config.stride):
            yield chunk.clamp_(-1, 1) if clamps else chunk

    def _tiles(self, size: int) -> tuple[Tile, ...]:
        edge = size if self.tile is None else self.tile // self.config.stride[1]
        return split_into_tiles(size, max(MIN_TILE, edge))

    def _means(self, pixels: Tensor) -> Iterator[Tensor]:
        """Yield the posterior mean of each latent frame, B Z 1 h w float32."""
        step = self.config.stride[0]
        memory = ClipMemory()
        for group in pixels.split([1] + [step] * ((pixels.shape[2] - 1) // step), dim=2):
            if group.dtype == torch.uint8:
                group = from_bytes(group.to(self.device))
            frames = cast_for_convolution(group, self.device, self.dtype)
            yield self.encoder(frames, memory)[:, : self.config.latent_channels].float()

    def _pixels(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode latents in one piece, and yield their pixels, B 3 F H W float32."""
        mean, std = self._statistics()
        scaled = (frame.to(self.device).float() * std + mean for frame in latents.split(1, dim=2))
        frames = (cast_for_convolution(frame, self.device, self.dtype) for frame in scaled)
        for chunk in self.decoder(frames):
            yield chunk.float()

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return the latents' mean and standard deviation per channel, each 1 Z 1 1 1 float32."""
        return self.latents_mean.view(1, -1, 1, 1, 1), self.latents_std.view(1, -1, 1, 1, 1)


def load_video_vae(
    path: Path, device: torch.device, dtype: torch.dtype, tile: int | None = None
) -> LtxVideoVae:
    """Load the video VAE of LTX-2 or LTX-2.3 from its own file, the official file or a diffusers folder.

    `tile` is the edge of a tile in pixels; None computes whole frames.

    Raises CheckpointError if the file is damaged or contains another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_video_vae(checkpoint)
        vae = load_planned(
            plan,
            lambda config: LtxVideoVae(config, tile),
            device,
            # latent statistics: rounded to 16 bits they would tint every video
            lambda name, _: torch.float32 if name.startswith("latents_") else dtype,
            label="the video VAE of LTX-2",
        )
    set_memory_format(vae, device)
    logger.info("VAE: %s, computing in %s", path, dtype_name(dtype))
    return vae
