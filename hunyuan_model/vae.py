"""The HunyuanVideo video VAE: pixels to latents and back.

Untiled, a clip is computed as a whole, as in training. Tiles bound the memory by the tile and change the
result a little: in height and width from 256 pixels on, in time from 64 frames on, each sharing a quarter
with its neighbours, as in the released VAE. Latents here are those of cache files: not multiplied by the
scaling factor.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hunyuan_model.vae_blocks import Decoder, Encoder, VaeConfig
from hunyuan_model.vae_checkpoints import read_vae
from hunyuan_model.vae_tiles import Cut, in_spans, in_tiles
from modules.checkpoints.dialects import load_planned
from modules.checkpoints.opening import open_checkpoint
from modules.devices import dtype_name
from modules.errors import OptionError
from modules.layers.memory_layouts import lay_out, layouts
from modules.media.pixels import check_clip, from_bytes

logger = logging.getLogger(__name__)

FRAMES = 4  # pixel frames of one latent frame; the first latent frame holds one
PIXELS = 8  # height and width of one latent pixel
TILE = 256  # edge of a tile in pixels where none is asked for
TILE_FRAMES = 64
LEAST_TILE = 32  # four latents: three quarters of it are a whole number
LOG_VARIANCE = (-30.0, 20.0)  # limits


@dataclass(frozen=True)
class Tiling:
    """From which size on a clip is cut, and into pieces of which size."""

    edge: int = TILE  # pixels
    frames: int = TILE_FRAMES


class HunyuanVae(nn.Module):
    """Encoder and decoder. Build it on the meta device and load a checkpoint (`load_vae`).

    chunk_size: how many frames a layer computes at a time; None: as many as 2**26 values take. It changes
    memory, not results. tiling: None computes every clip as a whole.
    """

    def __init__(
        self, config: VaeConfig, chunk_size: int | None = None, tiling: Tiling | None = None
    ) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, 1)
        self.chunk_size = chunk_size
        self.tiling = tiling

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.quant_conv.weight.device

    @torch.no_grad()
    def encode(self, pixels: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """A sample of the posterior, drawn in float32 from one generator for each clip; without generators
        its mean.

        pixels: B 3 F H W in -1..1, or bytes 0..255, on any device; F = 4n + 1, H and W multiples of 8. Of
        bytes as much is made numbers at a time as is computed at a time, so that a long clip takes no more
        memory than it has. Returns B Z n+1 H/8 W/8, float32, on the VAE's device. Raises ValueError for other
        sizes.
        """
        if generators is not None and len(generators) != len(pixels):
            raise ValueError(f"{len(generators)} generators for {len(pixels)} clips")
        mean, log_variance = self._all_moments(pixels).chunk(2, dim=1)
        if generators is not None:  # in place: of a long clip even latents are large
            deviation = log_variance.clamp_(*LOG_VARIANCE).mul_(0.5).exp_()
            for item, each in enumerate(generators):
                noise = torch.randn(mean.shape[1:], generator=each, device=each.device)
                mean[item] += deviation[item].mul_(noise.to(self.device))
        return mean.contiguous()

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, each as `encode` returns."""
        mean, log_variance = self._all_moments(pixels).chunk(2, dim=1)
        return mean.contiguous(), log_variance.clamp(*LOG_VARIANCE)

    def _all_moments(self, pixels: Tensor) -> Tensor:
        """Both, B 2Z n+1 H/8 W/8 float32. Raises ValueError for sizes that cannot be encoded."""
        check_clip(pixels, FRAMES, PIXELS)
        if self.tiling is None or pixels.shape[2] <= self.tiling.frames:
            return self._encode(pixels)
        batch, _, frames, height, width = pixels.shape
        shape = (
            batch,
            self.quant_conv.out_channels,
            (frames - 1) // FRAMES + 1,
            height // PIXELS,
            width // PIXELS,
        )
        moments, done = torch.empty(shape, device=self.device), 0
        for span in in_spans(self._encode, pixels, Cut(self.tiling.frames // FRAMES, FRAMES, 1)):
            moments[:, :, done : done + span.shape[2]] = span
            done += span.shape[2]
        return moments

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Pixels in playing order: first one frame, then four at a time. B 3 F H W, float32, -1..1.

        latents: B Z f h w, on any device. The chunks lie on the VAE's device; with tiles in height and width
        in host memory.
        """
        for chunk in self.decode_unclamped(latents):
            yield chunk.clamp_(-1, 1)

    @torch.no_grad()
    def decode_unclamped(self, latents: Tensor) -> Iterator[Tensor]:
        """As `decode`, before the values are limited to -1..1."""
        if self.tiling is None or latents.shape[2] <= self.tiling.frames // FRAMES:
            yield from _in_playing_order(self._decode(latents))
            return
        for span in in_spans(self._decode, latents, Cut(self.tiling.frames // FRAMES, 1, FRAMES)):
            yield from _in_playing_order(span)
            del span  # before the next is computed

    def _encode(self, pixels: Tensor) -> Tensor:
        """Moments B 2Z f h w, float32, of pixels few enough in time."""
        if self.tiling is None or max(pixels.shape[-2:]) <= self.tiling.edge:
            return self._moments(pixels)
        return in_tiles(self._moments, pixels, Cut(self.tiling.edge // PIXELS, PIXELS, 1), self.device)

    def _decode(self, latents: Tensor) -> Tensor:
        """Pixels B 3 F H W, float32, of latents few enough in time."""
        if self.tiling is None or max(latents.shape[-2:]) <= self.tiling.edge // PIXELS:
            return self._pixels(latents)
        return in_tiles(
            self._pixels, latents, Cut(self.tiling.edge // PIXELS, 1, PIXELS), torch.device("cpu")
        )

    def _moments(self, pixels: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(self._placed(pixels), self.chunk_size)).float()

    def _pixels(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(self._placed(latents)), self.chunk_size).float()

    def _placed(self, x: Tensor) -> Tensor:
        """On the VAE's device, in its dtype and in the memory layout of its weights, which all that follows
        keeps.
        """
        if x.dtype == torch.uint8:
            x = from_bytes(x.to(self.device))
        return x.to(self.device, self.dtype, memory_format=layouts(self.device)[0])


def _in_playing_order(pixels: Tensor) -> Iterator[Tensor]:
    """Four frames at a time, the odd one before them, each in memory of its own."""
    frames = pixels.shape[2]
    for part in pixels.split([1] * (frames % FRAMES) + [FRAMES] * (frames // FRAMES), dim=2):
        yield part.clone()


def load_vae(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    chunk_size: int | None = None,
    tile: int | None = None,
    tiling: bool = False,
    tile_frames: int = TILE_FRAMES,
) -> HunyuanVae:
    """Load a HunyuanVideo VAE from any of its file layouts.

    chunk_size: frames a layer computes at a time. tiling: cut clips as the released VAE does. tile: edge of a
    tile in pixels, rounded down to a multiple of 8; it turns tiling on. tile_frames: length of a tile, a
    multiple of 16. Raises OptionError for sizes that cannot be, CheckpointError where the file is damaged or
    of another model.
    """
    if chunk_size is not None and chunk_size < 1:
        raise OptionError(
            f"--vae_chunk_size {chunk_size}: give the number of frames to compute at a time, from 1 on."
        )
    if tile is not None and tile < LEAST_TILE:
        raise OptionError(
            f"--vae_spatial_tile_sample_min_size {tile}: a tile has at least {LEAST_TILE} pixels."
        )
    cuts = Tiling(TILE if tile is None else tile, tile_frames) if tiling or tile is not None else None
    with open_checkpoint(path) as checkpoint:
        plan = read_vae(checkpoint)
        vae = load_planned(
            plan, lambda config: HunyuanVae(config, chunk_size, cuts), device, dtype, "the HunyuanVideo VAE"
        )
    lay_out(vae, device)
    logger.info("VAE: %s, computing in %s", path, dtype_name(dtype))
    return vae
