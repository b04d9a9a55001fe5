"""The video VAE of MiniMax-H3: pixels to latents and back.

A video is encoded in clips of 17 frames, 5 latent frames each, of which the last 3 of the whole video are
dropped: 17n + 5 frames are 5n + 2 latent frames. Decoded clips share frames and fade into each other. Tiles
in height and width are part of the released model: its output is that of blended tiles.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.dialects import load_planned
from checkpoints.opening import open_checkpoint
from minimax_h3.vae_checkpoints import read_video_vae
from minimax_h3.video_vae_blocks import H3VideoDecoder, H3VideoEncoder, H3VideoVaeConfig
from modules.devices import dtype_name
from modules.layers.norms import run_in_weight_dtype

logger = logging.getLogger(__name__)

TILE = 256  # pixels along the side of a tile
OVERLAP = 64  # pixels that neighboring tiles share at least
# ImageNet's mean and standard deviation of pixels in 0..1: red, green, blue
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
FLOAT32_PARTS = ("encoder.", "quant_conv.")
FLOAT32_ENDS = (".norm1.weight", ".norm2.weight", ".scale1", ".scale2", "norm_out.weight", "norm_out.bias")


@dataclass(frozen=True)
class TileRow:
    """Tiles of equal size along one axis: their starts and their overlaps."""

    starts: tuple[int, ...]
    size: int
    overlaps: tuple[int, ...]


def cut_axis(length: int, size: int, minimum: int, step: int) -> TileRow:
    """Place tiles of `size` over `length`, with overlaps of at least `minimum`, as the released VAE does.

    All numbers are in pixels. The overlaps grow in turn by `step` until the tiles end exactly at `length`.
    """
    if size >= length:
        return TileRow((0,), length, ())
    count = max(2, math.ceil((length - minimum) / (size - minimum)))
    num_overlaps = count - 1
    overlaps = [minimum] * num_overlaps
    excess = size * count - sum(overlaps) - length  # pixels that the tiles cover beyond `length`
    for index in range(excess // step):
        overlaps[index % num_overlaps] += step
    starts = [0]
    for overlap in overlaps:
        starts.append(starts[-1] + size - overlap)
    return TileRow(tuple(starts), size, tuple(overlaps))


class H3VideoVae(nn.Module):
    """Encoder and decoder. Build it on the meta device and load a checkpoint with `load_video_vae`.

    `tile` is the edge of the tiles in pixels; None computes whole frames, whose result differs slightly from
    the release's.
    """

    def __init__(self, config: H3VideoVaeConfig, tile: int | None = TILE) -> None:
        super().__init__()
        channels = config.latent_channels
        self.encoder = H3VideoEncoder(config)
        self.quant_conv = nn.Conv3d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv3d(channels, channels, 1)
        self.decoder = H3VideoDecoder(config)
        self.config = config
        self.tile = tile

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the network."""
        return self.decoder.x_embedder.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.encoder.conv_in.weight.device

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor) -> Tensor:
        """Encode pixels to unnormalized posterior means and log variances, B 2Z f h w float32.

        `pixels` are B 3 F H W in -1..1, or bytes 0..255, on any device; F = 1 or 17n + 5, H and W multiples
        of 16. Raises ValueError for other sizes.
        """
        config = self.config
        frames, height, width = pixels.shape[2:]
        step = config.space_stride
        fits = frames == 1 or frames % config.clip_frames == config.tail
        if not fits or height % step or width % step:
            raise ValueError(
                f"{frames} frames of {height} x {width}: the VAE takes one frame or {config.clip_frames}n + "
                f"{config.tail}, with sides that are multiples of {step}"
            )
        # an image is a clip by itself; a video is encoded in clips of equal length, the last one padded
        if frames == 1:
            return self._encode_clip(pixels)
        clips = pixels.split(config.clip_frames, dim=2)
        moments = [self._encode_clip(self._pad_clip(clip)) for clip in clips]
        joined = torch.cat(moments, dim=2)
        # the last latents of a clip belong to its repeated last frame
        return joined[:, :, : joined.shape[2] - config.num_dropped_latents]

    def _pad_clip(self, clip: Tensor) -> Tensor:
        """Pad a clip to its full length by repeating the last frame."""
        missing = self.config.clip_frames - clip.shape[2]
        return torch.cat([clip, clip[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)

    def _encode_clip(self, pixels: Tensor) -> Tensor:
        """Encode a clip to posterior moments, in tiles if it is large."""
        values = pixels.to(self.device, torch.float32)
        shares = values / 255 if pixels.dtype == torch.uint8 else (values + 1) / 2  # 0..1
        mean, std = self._per_channel(PIXEL_MEAN), self._per_channel(PIXEL_STD)
        normalized = (shares - mean) / std

        def encode(part: Tensor) -> Tensor:
            return self.quant_conv(self.encoder(part))

        return self._in_tiles(encode, normalized, pixels_in=1, pixels_out=self.config.space_stride)

    @torch.no_grad()
    def decode(self, latents: Tensor, clamps: bool = True) -> Iterator[Tensor]:
        """Yield pixels in playing order, clip by clip: B 3 F H W, float32, -1..1.

        `latents` are B Z f h w, normalized, on any device. `clamps` says whether to clamp pixels to -1..1.
        """
        mean, std = self._per_channel(PIXEL_MEAN), self._per_channel(PIXEL_STD)
        for chunk in self._decode_clips(self.denormalize(latents.to(self.device).float())):
            pixels = (chunk * std + mean) * 2 - 1
            yield pixels.clamp_(-1, 1) if clamps else pixels

    def normalize(self, latents: Tensor) -> Tensor:
        """Normalize latents, B Z f h w, for the transformer."""
        mean, std = self._per_channel(self.config.latents_mean), self._per_channel(self.config.latents_std)
        return (latents - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        """Scale latents, B Z f h w, back from model space to the VAE's space."""
        mean, std = self._per_channel(self.config.latents_mean), self._per_channel(self.config.latents_std)
        return latents * std + mean

    def _per_channel(self, numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, device=self.device)[None, :, None, None, None]

    def _decode_clips(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield each clip's frames, without those that cross-fade into the next clip."""
        config = self.config
        if latents.shape[2] <= config.clip_latents - config.num_dropped_latents:
            yield self._decode_clip(latents)[:, :, config.first_padding :]
        else:
            yield from self._decode_joined_clips(latents)

    def _decode_joined_clips(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode a video's latents in chunks, called clips; cross-fade the frames that two clips share."""
        # A clip is decoded with the first latents of the next one, if the VAE's clips overlap.
        config = self.config
        has_overlap = config.num_dropped_latents > 0
        frames_left = self._count_frames(latents.shape[2])
        clip_frames = config.clip_latents * config.time_stride  # including the leading padding
        previous: Tensor | None = None  # frames of the previous clip that overlap with this one
        for clip_latents in self._split_into_clips(latents):
            decoded = self._decode_clip(clip_latents)
            clip = decoded[:, :, config.first_padding : clip_frames]
            if previous is not None:
                clip = _blend(previous, clip, config.shared_frames, axis=2)
            previous = decoded[:, :, clip_frames + config.first_padding :] if has_overlap else None
            clip = clip[:, :, :frames_left]
            frames_left -= clip.shape[2]
            yield clip
        # the last overlap has no next clip to be blended with
        if previous is not None and frames_left > 0:
            yield previous[:, :, :frames_left]

    def _split_into_clips(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the latents of each clip, with the first ones of the next clip if the VAE's clips overlap."""
        # The last latent is repeated until the last clip is full.
        length = self.config.clip_latents
        num_dropped = self.config.num_dropped_latents
        num_repeats = -(latents.shape[2] + num_dropped) % length
        padded = torch.cat([latents, *[latents[:, :, -1:]] * num_repeats], dim=2)
        num_clips = (padded.shape[2] + num_dropped) // length
        if num_dropped > 0:
            num_clips -= 1
        for index in range(num_clips):
            start = index * length
            yield padded[:, :, start : start + length + self.config.shared_latents]

    def _count_frames(self, latent_frames: int) -> int:
        """Return the number of frames that latents decode to; the first latent of a clip covers fewer."""
        clips = math.ceil(latent_frames / self.config.clip_latents)
        return latent_frames * self.config.time_stride - clips * self.config.first_padding

    def _decode_clip(self, latents: Tensor) -> Tensor:
        def decode(part: Tensor) -> Tensor:
            return self.decoder(run_in_weight_dtype(self.post_quant_conv, part))

        return self._in_tiles(decode, latents, pixels_in=self.config.space_stride, pixels_out=1)

    def _in_tiles(
        self, compute: Callable[[Tensor], Tensor], x: Tensor, pixels_in: int, pixels_out: int
    ) -> Tensor:
        """Apply `compute` to x, B C F H W, in tiles of height and width that are cross-faded."""
        # compute: Encodes pixels into latents, or decodes latents into pixels.
        # pixels_in: Side of an element of x in pixels of the video: 1 if x are pixels.
        # pixels_out: Side of an element of the result in pixels of the video.
        if self.tile is None:
            return compute(x)
        # tiles are cut in pixels of the video, and these numbers divided by `pixels_in` or `pixels_out`
        step = self.config.space_stride
        height, width = x.shape[-2] * pixels_in, x.shape[-1] * pixels_in
        rows = cut_axis(height, self.tile, OVERLAP, step)
        columns = cut_axis(width, self.tile, OVERLAP, step)
        if len(rows.starts) == len(columns.starts) == 1:
            return compute(x)
        tile_rows = []
        for top in rows.starts:
            row = x[..., top // pixels_in : (top + rows.size) // pixels_in, :]
            tiles = []
            for left in columns.starts:
                tile = row[..., left // pixels_in : (left + columns.size) // pixels_in]
                tiles.append(compute(tile))
            tile_rows.append(tiles)
        row_overlaps = [overlap // pixels_out for overlap in rows.overlaps]
        column_overlaps = [overlap // pixels_out for overlap in columns.overlaps]
        return _join_tiles(tile_rows, row_overlaps, column_overlaps)


def _join_tiles(
    tile_rows: list[list[Tensor]], row_overlaps: Sequence[int], column_overlaps: Sequence[int]
) -> Tensor:
    """Join overlapping decoded tiles, each cross-faded with the original tiles above it and to its left."""
    # The overlaps are the pixels that each row or column of tiles shares with the next one.
    joined_rows = []
    for row_index, tiles in enumerate(tile_rows):
        cut_tiles = []
        for index, tile in enumerate(tiles):
            if row_index > 0:
                tile_above = tile_rows[row_index - 1][index]
                tile = _blend(tile_above, tile, row_overlaps[row_index - 1], axis=-2)
            if index > 0:
                tile = _blend(tiles[index - 1], tile, column_overlaps[index - 1], axis=-1)
            if row_index < len(tile_rows) - 1:
                # the overlap is taken from the next tile, in which it is cross-faded
                tile = tile[..., : tile.shape[-2] - row_overlaps[row_index], :]
            if index < len(tiles) - 1:
                tile = tile[..., : tile.shape[-1] - column_overlaps[index]]
            cut_tiles.append(tile)
        joined_rows.append(torch.cat(cut_tiles, dim=-1))
    return torch.cat(joined_rows, dim=-2)


def _blend(before: Tensor, piece: Tensor, length: int, axis: int) -> Tensor:
    """Return `piece`, whose start is cross-faded with the end of `before` over `length` along an axis."""
    length = min(before.shape[axis], piece.shape[axis], length)
    shape = [1] * piece.ndim
    shape[axis] = length
    ramp = (torch.arange(length, device=piece.device, dtype=piece.dtype) / max(1, length)).view(shape)
    end = before.narrow(axis, before.shape[axis] - length, length)
    faded = end.lerp(piece.narrow(axis, 0, length), ramp)
    return torch.cat([faded, piece.narrow(axis, length, piece.shape[axis] - length)], dim=axis)


def load_video_vae(
    path: Path, device: torch.device, dtype: torch.dtype, tile: int | None = TILE
) -> H3VideoVae:
    """Load the video VAE of MiniMax-H3 from the official file, ComfyUI's file or diffusers' folder.

    `dtype` is the dtype of the decoder's layers; the encoder is always float32. `tile` is the edge of a tile
    in pixels; None computes whole frames. Raises CheckpointError if the file is damaged or contains another
    model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_video_vae(checkpoint)
        vae = load_planned(
            plan,
            lambda config: H3VideoVae(config, tile),
            device,
            lambda name, _: torch.float32 if _stays_float32(name) else dtype,
            label="the video VAE of MiniMax-H3",
        )
    logger.info("VAE: %s, decoding in %s", path, dtype_name(dtype))
    return vae


def _stays_float32(name: str) -> bool:
    return name.startswith(FLOAT32_PARTS) or name.endswith(FLOAT32_ENDS)
