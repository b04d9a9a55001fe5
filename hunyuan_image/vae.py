"""The VAE of HunyuanImage-2.1: pictures to latents and back, 32 pixels to one along each side.

Latents are those of cache files: not multiplied by the scaling factor. A picture is a clip of one frame.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from encoders.tiles import Cut, compute_in_tiles, sample_posterior
from hunyuan_image.configs import STRIDE
from hunyuan_image.vae_blocks import (
    HunyuanImageVaeConfig,
    HunyuanImageVaeDecoder,
    HunyuanImageVaeEncoder,
    compute_in_rows,
)
from hunyuan_image.vae_checkpoints import WHAT, read_vae
from modules.checkpoints.dialects import load_planned
from modules.checkpoints.opening import open_checkpoint
from modules.devices import dtype_name
from modules.layers.convolution import lay_out, layouts
from modules.media.pixels import check_clip, from_bytes

logger = logging.getLogger(__name__)

LOG_VARIANCE = (-30.0, 20.0)  # limits


class HunyuanImageVae(nn.Module):
    """Encoder and decoder. Build it on the meta device and load a checkpoint with `load_vae`.

    tile: edge in pixels above which pictures are cut into overlapping tiles, which changes the result a
    little; None: never.
    """

    def __init__(self, config: HunyuanImageVaeConfig, tile: int | None = None) -> None:
        super().__init__()
        self.encoder = HunyuanImageVaeEncoder(config)
        self.decoder = HunyuanImageVaeDecoder(config)
        self.tile = tile

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.encoder.norm_out.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.encoder.norm_out.weight.device

    @torch.no_grad()
    def encode(self, pixels: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Return a sample of the posterior, or its mean if `generators` is None.

        pixels: B 3 1 H W in -1..1, or bytes 0..255, on any device; H and W multiples of 32. generators: one
        for each picture; the noise is drawn in float32. Returns B Z 1 H/32 W/32, float32, on the VAE's
        device. Raises ValueError for other sizes.
        """
        if generators is not None and len(generators) != len(pixels):
            raise ValueError(f"{len(generators)} generators for {len(pixels)} pictures")
        moments = self.moments(pixels)
        if generators is not None:
            return sample_posterior(moments, generators, LOG_VARIANCE)
        return moments.chunk(2, dim=1)[0].contiguous()

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Return means and logarithms of variances, B 2Z 1 H/32 W/32 float32, as the network gives them."""
        check_clip(pixels, 1, STRIDE)
        if pixels.shape[2] != 1:
            raise ValueError(f"{pixels.shape[2]} frames: the VAE encodes single pictures")
        picture = pixels.squeeze(2)
        if self.tile is None or max(picture.shape[-2:]) <= self.tile:
            return self._encode(picture).unsqueeze(2)
        cut = Cut(self.tile // STRIDE, STRIDE, 1)
        return compute_in_tiles(self._encode, picture, cut, self.device).unsqueeze(2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the pictures, B 3 1 H W, float32, -1..1.

        latents: B Z 1 h w, on any device. The result is on the VAE's device, of tiles in host memory.
        """
        latent = latents.squeeze(2)
        if self.tile is None or max(latent.shape[-2:]) <= self.tile // STRIDE:
            pixels = self._decode(latent)
        else:
            cut = Cut(self.tile // STRIDE, 1, STRIDE)
            pixels = compute_in_tiles(self._decode, latent, cut, torch.device("cpu"))
        yield pixels.clamp_(-1, 1).unsqueeze(2)

    def _encode(self, picture: Tensor) -> Tensor:
        return self.encoder(self._place(picture)).float()

    def _decode(self, latent: Tensor) -> Tensor:
        return self.decoder(self._place(latent)).float()

    def _place(self, x: Tensor) -> Tensor:
        """Move to the VAE's device, dtype and memory layout. Bytes become -1..1."""
        if x.dtype == torch.uint8:
            x = from_bytes(x.to(self.device))
        return x.to(self.device, self.dtype, memory_format=layouts(self.device)[1])


def load_vae(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    chunk_size: int | None = None,
    tile: int | None = None,
) -> HunyuanImageVae:
    """Load the VAE from any of its file layouts.

    chunk_size: rows that a convolution computes at a time; it changes memory, not results. tile: edge of a
    tile in pixels. Raises CheckpointError if the file is damaged or holds another model.
    """

    def build(config: HunyuanImageVaeConfig) -> HunyuanImageVae:
        return HunyuanImageVae(config, tile)

    with open_checkpoint(path) as checkpoint:
        vae = load_planned(read_vae(checkpoint), build, device, dtype, WHAT)
    lay_out(vae, device)
    if chunk_size is not None:
        compute_in_rows(vae, chunk_size)
    logger.info("VAE: %s, computing in %s", path, dtype_name(dtype))
    return vae
