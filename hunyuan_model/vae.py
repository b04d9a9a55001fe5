"""The HunyuanVideo video VAE: pixels to latents and back.

Without tiles a clip is computed as a whole, as in training. Tiles bound the memory and change the result
slightly. They apply in height and width above 256 pixels and in time above 64 frames; neighbors overlap by a
quarter, as in the released VAE. Latents are those of cache files: not multiplied by the scaling factor.

The image-to-video transformer of SkyReels V1 takes 16 more channels: the latents of the first frame, encoded
alone, in latent frame 0, and zeros in the other frames. Source: the released SkyReels V1 code.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.dialects import load_planned
from checkpoints.opening import open_checkpoint
from encoders.tiles import (
    AxisTiling,
    compute_in_spans,
    compute_in_tiles,
    posterior_generator,
    sample_posterior,
)
from hunyuan_model.vae_blocks import HunyuanVaeConfig, HunyuanVaeDecoder, HunyuanVaeEncoder
from hunyuan_model.vae_checkpoints import read_vae
from modules.devices import dtype_name
from modules.errors import OptionError
from modules.layers.convolution import cast_for_convolution, set_memory_format
from modules.media.pixels import byte_clips, check_clip, from_bytes
from protocols.data import Batch, CacheEntry, LatentSpec, MediaBatch, MomentsBatch, split_items

logger = logging.getLogger(__name__)

FRAMES = 4  # pixel frames per latent frame; the first latent frame has one
PIXELS = 8  # height and width of one latent pixel, in pixels
TILE = 256  # default edge of a tile in pixels
TILE_FRAMES = 64
MIN_TILE = 32  # four latents: three quarters of a tile must be a whole number
LOG_VARIANCE = (-30.0, 20.0)  # limits of the posterior's log variances


@dataclass(frozen=True)
class Tiling:
    """Edge and length of a tile; larger clips are cut into overlapping tiles."""

    edge: int = TILE  # pixels
    frames: int = TILE_FRAMES


class HunyuanVae(nn.Module):
    """Encoder and decoder. Build it on the meta device and load a checkpoint with `load_vae`.

    Args:
        chunk_size: Number of frames that a layer computes at a time; None for as many as fit into 2**26
            values. It changes memory, not results.
        tiling: Size of tiles; None computes every clip as a whole.
    """

    def __init__(
        self, config: HunyuanVaeConfig, chunk_size: int | None = None, tiling: Tiling | None = None
    ) -> None:
        super().__init__()
        self.encoder = HunyuanVaeEncoder(config)
        self.decoder = HunyuanVaeDecoder(config)
        self.quant_conv = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(config.latent_channels, config.latent_channels, 1)
        self.chunk_size = chunk_size
        self.tiling = tiling

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the VAE."""
        return self.quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the VAE."""
        return self.quant_conv.weight.device

    @torch.no_grad()
    def encode(self, pixels: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Return a sample of the posterior, B Z n+1 H/8 W/8 float32 on the VAE's device.

        Args:
            pixels: B 3 F H W in -1..1, or bytes 0..255, on any device. F = 4n + 1; H and W are multiples of
                8. Bytes are converted piece by piece, so that a long clip takes no extra memory.
            generators: One for each clip, for noise in float32; None returns the mean instead of a sample.

        Raises:
            ValueError: For other sizes.
        """
        if generators is not None and len(generators) != len(pixels):
            raise ValueError(f"{len(generators)} generators for {len(pixels)} clips")
        moments = self.moments(pixels)
        if generators is not None:
            return sample_posterior(moments, generators, LOG_VARIANCE)
        return moments.chunk(2, dim=1)[0].contiguous()

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> Tensor:
        """Return means and logarithms of variances, B 2Z n+1 H/8 W/8 float32, as the network computes them.

        Raises ValueError if the number of frames is not 4n + 1, or a side is not a multiple of 8 pixels.
        """
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
        moments = torch.empty(shape, device=self.device)
        # a latent frame is made from FRAMES frames, and tiles are cut between latent frames
        tiling = AxisTiling(self.tiling.frames // FRAMES, FRAMES, 1)
        start = 0
        for span in compute_in_spans(self._encode, pixels, tiling):
            stop = start + span.shape[2]
            moments[:, :, start:stop] = span
            start = stop
        return moments

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield pixels in playing order, one frame and then four at a time: B 3 F H W, float32, -1..1.

        `latents` are B Z f h w, on any device. The chunks are on the VAE's device; with tiles in height and
        width they are in host memory.
        """
        for chunk in self.decode_unclamped(latents):
            yield chunk.clamp_(-1, 1)

    @torch.no_grad()
    def decode_unclamped(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield pixels in playing order, one frame and then four at a time, not clamped to -1..1."""
        if self.tiling is None or latents.shape[2] <= self.tiling.frames // FRAMES:
            yield from _in_playing_order(self._decode(latents))
            return
        for span in compute_in_spans(
            self._decode, latents, AxisTiling(self.tiling.frames // FRAMES, 1, FRAMES)
        ):
            yield from _in_playing_order(span)
            del span  # free it before the next one is computed

    def _encode(self, pixels: Tensor) -> Tensor:
        """Return the moments B 2Z f h w, float32, of pixels that need not be cut in time."""
        if self.tiling is None or max(pixels.shape[-2:]) <= self.tiling.edge:
            return self._moments(pixels)
        return compute_in_tiles(
            self._moments, pixels, AxisTiling(self.tiling.edge // PIXELS, PIXELS, 1), self.device
        )

    def _decode(self, latents: Tensor) -> Tensor:
        """Return the pixels B 3 F H W, float32, of latents that need not be cut in time."""
        if self.tiling is None or max(latents.shape[-2:]) <= self.tiling.edge // PIXELS:
            return self._pixels(latents)
        return compute_in_tiles(
            self._pixels, latents, AxisTiling(self.tiling.edge // PIXELS, 1, PIXELS), torch.device("cpu")
        )

    def _moments(self, pixels: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(self._place(pixels), self.chunk_size)).float()

    def _pixels(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(self._place(latents)), self.chunk_size).float()

    def _place(self, x: Tensor) -> Tensor:
        """Move to the VAE's device, dtype and memory layout, which all layers keep. Bytes become -1..1."""
        if x.dtype == torch.uint8:
            x = from_bytes(x.to(self.device))
        return cast_for_convolution(x, self.device, self.dtype)


def _in_playing_order(pixels: Tensor) -> Iterator[Tensor]:
    """Yield the single first frame if there is one, then four frames at a time, each in its own memory."""
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

    Args:
        path: The file.
        device: Device to load onto.
        dtype: Compute dtype.
        chunk_size: Number of frames that a layer computes at a time; None for as many as fit into 2**26
            values.
        tile: Edge of a tile in pixels, rounded down to a multiple of 8; turns tiling on.
        tiling: Cut clips into tiles as the released VAE does.
        tile_frames: Length of a tile in frames, a multiple of 16.

    Raises:
        OptionError: For invalid sizes.
        CheckpointError: If the file is damaged or contains another model.
    """
    if chunk_size is not None and chunk_size < 1:
        raise OptionError(
            f"--vae_chunk_size {chunk_size}: pass the number of frames to compute at a time, at least 1."
        )
    if tile is not None and tile < MIN_TILE:
        raise OptionError(f"--vae_spatial_tile_sample_min_size {tile}: use at least {MIN_TILE} pixels.")
    cuts = None
    if tiling or tile is not None:
        cuts = Tiling(TILE if tile is None else tile, tile_frames)
    with open_checkpoint(path) as checkpoint:
        plan = read_vae(checkpoint)
        vae = load_planned(
            plan,
            lambda config: HunyuanVae(config, chunk_size, cuts),
            device,
            dtype,
            label="the HunyuanVideo VAE",
        )
    set_memory_format(vae, device)
    logger.info("VAE: %s, computing in %s", path, dtype_name(dtype))
    return vae


def encode_latents(vae: HunyuanVae, media: MediaBatch, with_image: bool) -> list[CacheEntry]:
    """Encode clips in one batch, and return the cache entry of each.

    An entry has a posterior sample, drawn with a seed from the clip's name, in the VAE's dtype; it is not
    scaled to model space. With `with_image`, it also has the first frame encoded alone, for image-to-video
    training.
    """
    generators = [posterior_generator(key) for key in media.keys]
    pixels = byte_clips(media.frames)
    tensors = {"latents": vae.encode(pixels, generators).to(vae.dtype)}
    if with_image:
        tensors["latents_image"] = vae.encode(pixels[:, :, :1], generators).to(vae.dtype)
    return split_items(tensors)


def sample_moments(media: MomentsBatch, dtype: torch.dtype) -> list[CacheEntry]:
    """Return cache entries with posterior samples drawn from moments; each clip's name seeds its sample.

    They equal the result of `encode_latents` with a VAE of this dtype. If the moments include first frames,
    entries also have `latents_image`.
    """
    generators = [posterior_generator(key) for key in media.keys]
    latents = sample_posterior(_copy_moments(media.moments), generators, LOG_VARIANCE)
    tensors = {"latents": latents.to(dtype)}
    if media.image is not None:
        image = sample_posterior(_copy_moments(media.image), generators, LOG_VARIANCE)
        tensors["latents_image"] = image.to(dtype)
    return split_items(tensors)


def _copy_moments(moments: Tensor) -> Tensor:
    return moments.to(torch.float32, copy=True)


def first_frame_condition(first: Tensor, frames: int) -> Tensor:
    """Return the additional channels of F latent frames, B C F h w float32.

    `first` are the first frames' latents, B C 1 h w in model space; the other frames are zero.
    """
    condition = first.new_zeros((*first.shape[:2], frames, *first.shape[3:]), dtype=torch.float32)
    condition[:, :, :1] = first
    return condition


def find_first_frame(batch: Batch, latents: Tensor, spec: LatentSpec) -> Tensor:
    """Return the first frames of a training batch, B C 1 h w in model space.

    They come from caches of the frame alone. If these are missing, the first latent frames are used, which is
    logged once.
    """
    if "latents_image" in batch.tensors:
        return spec.to_model(batch.tensor("latents_image"))
    _note_missing_image()
    return latents[:, :, :1]


@lru_cache(maxsize=1)  # once, not with every batch
def _note_missing_image() -> None:
    logger.warning(
        "caches without latents_image: the first frame of latents is used, which was encoded together with "
        "later frames. cache_latents.py --i2v caches it alone, as generation encodes it."
    )
