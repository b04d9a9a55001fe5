"""The video VAE of HunyuanVideo 1.5: pixels to latents and back, 16 pixels and 4 frames to one.

Space and time are folded into channels between levels, and shortcuts average or repeat channels (Chen et al.
2024, arXiv 2410.10733). Convolutions and attention see no later frame, so a clip is computed one group of
frames at a time, with the result of the whole clip. Tiles bound the memory of large frames and change the
result slightly; they overlap by a quarter, as in the released VAE. Latents are those of cache files: not
multiplied by the scaling factor. Module names follow the published file.
"""
# Letters: B batch, C channels, T frames of a group, H height, W width, Z latent channels

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from checkpoints.dialects import (
    LoadPlan,
    Names,
    count,
    load_planned,
    make_shape_reader,
    make_wrong_kind_error,
    rename_sources,
    translate_name,
)
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from encoders.autoencoder import as_matrices
from encoders.frame_groups import FrameCache, RmsNorm
from encoders.tiles import AxisTiling, compute_in_tiles
from hunyuan_video_15.configs import FRAME_STRIDE, LATENT_CHANNELS, NAME, STRIDE
from modules.attention.attend import attend
from modules.devices import dtype_name
from modules.errors import CheckpointError
from modules.layers.convolution import cast_for_convolution, conv3d, empty_clip, set_memory_format
from modules.media.pixels import check_clip, from_bytes

logger = logging.getLogger(__name__)

KERNEL = 3  # of every convolution: a frame, and the two before it
Factors = tuple[int, int, int]  # frames, rows and columns that are folded into one
# at the end of each level of the encoder but the last; the decoder unfolds in the reverse order
FOLDS: tuple[Factors, ...] = ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
LEVELS = len(FOLDS) + 1
LABEL = f"the VAE of {NAME}"
RELEASED_FILES = (
    "vae/diffusion_pytorch_model.safetensors of tencent/HunyuanVideo-1.5, "
    "hunyuanvideo15_vae_fp16.safetensors or a diffusers vae folder"
)


@dataclass(frozen=True)
class HunyuanVideo15VaeConfig:
    """Dimensions of a VAE, read from a checkpoint's tensors."""

    latent_channels: int  # Z
    widths: tuple[int, ...]  # channels of each level, from the frames to the latents
    encoder_blocks: int  # residual blocks in a level
    decoder_blocks: int


class HunyuanVideo15Conv(nn.Module):
    """A causal 3x3x3 convolution; borders and the clip's first frame are repeated as padding."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(width_in, width_out, KERNEL)

    def forward(self, x: Tensor, cache: FrameCache | None, norm: RmsNorm | None = None) -> Tensor:
        """Convolve the next frames of a clip, x B C T H W to B C' T H W.

        Args:
            x: The frames.
            cache: Last frames of earlier groups, updated here; None if x is the only frame of its clip.
            norm: Norm to apply first, followed by SiLU.
        """
        batch, channels, frames, height, width = x.shape
        num_previous = 0 if cache is None else KERNEL - 1
        padded = empty_clip(x, batch, channels, num_previous + frames, height + 2, width + 2)
        inside = padded[:, :, num_previous:, 1:-1, 1:-1]  # a view
        if norm is None:
            inside.copy_(x)
        else:
            functional.silu(norm(x, out=inside), inplace=True)
        current = padded[:, :, num_previous:]
        current[..., 0, :] = current[..., 1, :]
        current[..., -1, :] = current[..., -2, :]
        current[..., 0] = current[..., 1]
        current[..., -1] = current[..., -2]
        if cache is None:  # all three taps in time see the same frame
            weight = self.conv.weight.float().sum(dim=2).to(self.conv.weight.dtype)
            return functional.conv2d(padded.squeeze(2), weight, self.conv.bias).unsqueeze(2)
        previous = cache.get_frames(self, x.device)
        padded[:, :, :num_previous] = current[:, :, :1] if previous is None else previous
        cache.store_frames(self, padded[:, :, -num_previous:])
        return conv3d(self.conv, padded)


class HunyuanVideo15ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = RmsNorm(width)
        self.conv1 = HunyuanVideo15Conv(width, width)
        self.norm2 = RmsNorm(width)
        self.conv2 = HunyuanVideo15Conv(width, width)

    def forward(self, x: Tensor, cache: FrameCache | None) -> Tensor:
        """Apply the block to the next frames x, B C T H W."""
        return self.conv2(self.conv1(x, cache, self.norm1), cache, self.norm2).add_(x)


class HunyuanVideo15VaeAttention(nn.Module):
    """One-head attention of each pixel to its own and all earlier frames, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RmsNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Tensor, cache: FrameCache | None) -> Tensor:
        """Add the attention to the next frame x, B C 1 H W; keys and values stay in the cache."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # B H*W C
        seen = torch.cat([self.k(tokens), self.v(tokens)], dim=-1)
        if cache is not None:
            earlier = cache.get_frames(self, x.device)
            seen = seen if earlier is None else torch.cat([earlier, seen], dim=1)
            cache.store_frames(self, seen)
        key, value = seen.unsqueeze(2).chunk(2, dim=-1)
        attended = attend(self.q(tokens).unsqueeze(2), key.contiguous(), value.contiguous()).squeeze(2)
        return x + self.proj_out(attended).transpose(1, 2).unflatten(2, x.shape[2:])


class HunyuanVideo15Middle(nn.Module):
    """Layers at the lowest resolution: a residual block, attention, and another residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = HunyuanVideo15ResidualBlock(width)
        self.attn_1 = HunyuanVideo15VaeAttention(width)
        self.block_2 = HunyuanVideo15ResidualBlock(width)

    def forward(self, x: Tensor, cache: FrameCache | None) -> Tensor:
        """Apply the three layers to the next frame x, B C 1 H W."""
        return self.block_2(self.attn_1(self.block_1(x, cache), cache), cache)


class FoldClip(nn.Module):
    """Fold frames, rows and columns into channels, B C T H W to B C' T/f H/2 W/2; a shortcut averages.

    The clip's first frame is folded alone: half of its channels stand for the missing frame, twice the same.
    """

    def __init__(self, width_in: int, width_out: int, factors: Factors) -> None:
        super().__init__()
        self.conv = HunyuanVideo15Conv(width_in, width_out // prod(factors))
        self.factors = factors
        self.width_out = width_out

    def forward(self, x: Tensor, cache: FrameCache | None, is_first: bool) -> Tensor:
        """Return the next frames of x at the lower resolution; `is_first`: x is the clip's first frame."""
        frames, rows, columns = self.factors
        folded = fold(self.conv(x, cache), (1, rows, columns) if is_first else self.factors)
        shortcut = fold(x, (1, rows, columns) if is_first else self.factors)
        if is_first:
            folded = folded.repeat(1, frames, 1, 1, 1)
        return folded.add_(average_channels(shortcut, self.width_out))


class UnfoldClip(nn.Module):
    """Unfold channels to frames, rows and columns, B C T H W to B C' f*T 2H 2W; a shortcut repeats channels.

    The clip's first frame stays one frame, of half the channels.
    """

    def __init__(self, width_in: int, width_out: int, factors: Factors) -> None:
        super().__init__()
        self.conv = HunyuanVideo15Conv(width_in, width_out * prod(factors))
        self.factors = factors
        self.width_out = width_out

    def forward(self, x: Tensor, cache: FrameCache | None, is_first: bool) -> Tensor:
        """Return the next frames of x at the higher resolution; `is_first`: x is the clip's first frame."""
        _, rows, columns = self.factors
        factors = (1, rows, columns) if is_first else self.factors
        unfolded = unfold(self.conv(x, cache), factors)[:, : self.width_out]
        return unfolded + repeat_channels(unfold(x, factors), self.width_out)


def fold(x: Tensor, factors: Factors) -> Tensor:
    """Fold blocks of pixels into channels, B C T H W to B (frame row column C) T' H' W'."""
    frames, rows, columns = factors
    return rearrange(x, "b c (t i) (h j) (w k) -> b (i j k c) t h w", i=frames, j=rows, k=columns)


def unfold(x: Tensor, factors: Factors) -> Tensor:
    """Undo `fold`: B (frame row column C) T H W to B C T' H' W'."""
    frames, rows, columns = factors
    return rearrange(x, "b (i j k c) t h w -> b c (t i) (h j) (w k)", i=frames, j=rows, k=columns)


def average_channels(x: Tensor, width: int) -> Tensor:
    """Average groups of neighboring channels, B C T H W to B width T H W."""
    return x.unflatten(1, (width, -1)).mean(dim=2)


def repeat_channels(x: Tensor, width: int) -> Tensor:
    """Repeat each channel to widen B C T H W to B width T H W."""
    return x.repeat_interleave(width // x.shape[1], dim=1)


class HunyuanVideo15Level(nn.Module):
    """Residual blocks of one resolution, to which the encoder and the decoder add what changes it."""

    downsample: FoldClip | None
    upsample: UnfoldClip | None

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(HunyuanVideo15ResidualBlock(width) for _ in range(blocks))
        self.downsample = None
        self.upsample = None

    def forward(self, x: Tensor, cache: FrameCache | None, is_first: bool) -> Tensor:
        """Apply the level to the next frames x, B C T H W; `is_first`: x is the clip's first frame."""
        for block in self.block:
            x = block(x, cache)
        for change in (self.downsample, self.upsample):
            if change is not None:
                x = change(x, cache, is_first)
        return x


class HunyuanVideo15VaeEncoder(nn.Module):
    """Encode pixels B 3 T H W as means and logarithms of variances, B 2Z t h w."""

    def __init__(self, config: HunyuanVideo15VaeConfig) -> None:
        super().__init__()
        widths = config.widths
        self.moments = 2 * config.latent_channels
        self.conv_in = HunyuanVideo15Conv(3, widths[0])
        self.down = nn.ModuleList(HunyuanVideo15Level(width, config.encoder_blocks) for width in widths)
        for level, (width, following), factors in zip(self.down, pairwise(widths), FOLDS, strict=False):
            level.downsample = FoldClip(width, following, factors)
        self.mid = HunyuanVideo15Middle(widths[-1])
        self.norm_out = RmsNorm(widths[-1])
        self.conv_out = HunyuanVideo15Conv(widths[-1], self.moments)

    def forward(self, x: Tensor, cache: FrameCache | None, is_first: bool) -> Tensor:
        """Encode the clip's first frame or the next four, B 3 T H W, to one latent frame, B 2Z 1 h w."""
        x = self.conv_in(x, cache)
        for level in self.down:
            x = level(x, cache, is_first)
        x = self.mid(x, cache)
        return self.conv_out(x, cache, self.norm_out).add_(average_channels(x, self.moments))


class HunyuanVideo15VaeDecoder(nn.Module):
    """Decode latents B Z t h w to pixels B 3 T H W. Levels are in computing order."""

    def __init__(self, config: HunyuanVideo15VaeConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = HunyuanVideo15Conv(config.latent_channels, widths[0])
        self.mid = HunyuanVideo15Middle(widths[0])
        self.up = nn.ModuleList(HunyuanVideo15Level(width, config.decoder_blocks) for width in widths)
        for level, (width, following), factors in zip(
            self.up, pairwise(widths), reversed(FOLDS), strict=False
        ):
            level.upsample = UnfoldClip(width, following, factors)
        self.norm_out = RmsNorm(widths[-1])
        self.conv_out = HunyuanVideo15Conv(widths[-1], 3)

    def forward(self, x: Tensor, cache: FrameCache | None, is_first: bool) -> Tensor:
        """Decode the next latent frame, B Z 1 h w, to one frame if it is the first, else four: B 3 T H W."""
        x = self.conv_in(x, cache).add_(repeat_channels(x, self.conv_in.conv.out_channels))
        x = self.mid(x, cache)
        for level in self.up:
            x = level(x, cache, is_first)
        return self.conv_out(x, cache, self.norm_out)


class HunyuanVideo15Vae(nn.Module):
    """Encoder and decoder. Build it on the meta device and load a checkpoint with `load_vae`.

    Args:
        tile: Edge of a tile in pixels. Larger frames are cut into overlapping tiles, and each tile goes
            through the whole clip before the next; None computes frames as a whole.
    """

    def __init__(self, config: HunyuanVideo15VaeConfig, tile: int | None = None) -> None:
        super().__init__()
        self.encoder = HunyuanVideo15VaeEncoder(config)
        self.decoder = HunyuanVideo15VaeDecoder(config)
        self.tile = tile

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the VAE."""
        return self.decoder.norm_out.gamma.dtype

    @property
    def device(self) -> torch.device:
        """Device of the VAE."""
        return self.decoder.norm_out.gamma.device

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return the means of the posterior, B Z n+1 H/16 W/16 float32 on the VAE's device.

        Args:
            pixels: B 3 F H W in -1..1, or bytes 0..255, on any device (moved group by group). F = 4n + 1; H
                and W are multiples of 16.

        Raises:
            ValueError: For other sizes.
        """
        check_clip(pixels, FRAME_STRIDE, STRIDE)
        if self.tile is None or max(pixels.shape[-2:]) <= self.tile:
            return self._encode(pixels)
        tiling = AxisTiling(self.tile // STRIDE, STRIDE, 1)
        return compute_in_tiles(self._encode, pixels, tiling, self.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield pixels in playing order, one frame and then four at a time: B 3 T H W, float32, -1..1.

        `latents` are B Z f h w, on any device. The chunks are on the VAE's device. With tiles they are in
        host memory, and the first one is yielded after the last tile is done.
        """
        chunks = self._decode(latents)
        if self.tile is not None and max(latents.shape[-2:]) > self.tile // STRIDE:
            tiling = AxisTiling(self.tile // STRIDE, 1, STRIDE)
            pixels = compute_in_tiles(self._decode_all, latents, tiling, torch.device("cpu"))
            chunks = iter(pixels.split([1] + [FRAME_STRIDE] * (latents.shape[2] - 1), dim=2))
        for chunk in chunks:
            yield chunk.clamp(-1, 1)

    def _encode(self, pixels: Tensor) -> Tensor:
        """Encode the first frame, then groups of frames, each of which becomes one latent frame."""
        frames = pixels.shape[2]
        cache = FrameCache() if frames > 1 else None
        means: list[Tensor] = []
        for group in pixels.split([1] + [FRAME_STRIDE] * ((frames - 1) // FRAME_STRIDE), dim=2):
            if group.dtype == torch.uint8:
                group = from_bytes(group.to(self.device))
            group = cast_for_convolution(group, self.device, self.dtype)
            moments = self.encoder(group, cache, is_first=not means)
            means.append(moments.chunk(2, dim=1)[0].float())
        return torch.cat(means, dim=2)

    def _decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the pixels of one latent frame after another, not clamped."""
        frames = latents.shape[2]
        cache = FrameCache() if frames > 1 else None
        for index in range(frames):
            latent = cast_for_convolution(latents[:, :, index : index + 1], self.device, self.dtype)
            yield self.decoder(latent, cache, is_first=index == 0).float()

    def _decode_all(self, latents: Tensor) -> Tensor:
        return torch.cat(list(self._decode(latents)), dim=2)


FROM_DIFFUSERS: Names = (
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(.+)", r"encoder.down.\1.block.\2"),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.(.+)", r"encoder.down.\1.downsample.\2"),
    (r"decoder\.up_blocks\.(\d+)\.resnets\.(.+)", r"decoder.up.\1.block.\2"),
    (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.(.+)", r"decoder.up.\1.upsample.\2"),
    (r"(encoder|decoder)\.mid_block\.resnets\.0\.(.+)", r"\1.mid.block_1.\2"),
    (r"(encoder|decoder)\.mid_block\.resnets\.1\.(.+)", r"\1.mid.block_2.\2"),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.to_([qkv])\.(.+)", r"\1.mid.attn_1.\2.\3"),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.(norm|proj_out)\.(.+)", r"\1.mid.attn_1.\2.\3"),
)


def read_vae(checkpoint: Checkpoint) -> LoadPlan[HunyuanVideo15VaeConfig]:
    """Plan how to load the VAE, from the released file or a diffusers folder.

    Raises CheckpointError for another file.
    """
    checkpoint = checkpoint.without_prefix("module.", "_orig_mod.", "first_stage_model.", "vae.")
    sources = rename_sources(
        list_tensor_sources(checkpoint), lambda name: translate_name(name, FROM_DIFFUSERS)
    )
    wrong_kind_error = make_wrong_kind_error(checkpoint, LABEL, "--vae", RELEASED_FILES)
    if not sources.keys() >= {"encoder.mid.attn_1.norm.gamma", "encoder.down.2.downsample.conv.conv.weight"}:
        raise wrong_kind_error
    as_matrices(sources, r".+\.attn_1\.(q|k|v|proj_out)\.weight")  # convolutions in files, linear layers here
    shape = make_shape_reader(checkpoint, sources, wrong_kind_error)
    levels = {count(sources, r"encoder\.down\.\d+"), count(sources, r"decoder\.up\.\d+")}
    if levels != {LEVELS}:
        raise _make_error(
            checkpoint, f"it has {' and '.join(map(str, sorted(levels)))} levels, the model has {LEVELS}"
        )
    widths = tuple(
        shape(f"encoder.down.{level}.block.0.conv1.conv.weight", axes=5)[0] for level in range(LEVELS)
    )
    channels = shape("decoder.conv_in.conv.weight", axes=5)[1]
    if channels != LATENT_CHANNELS:
        raise _make_error(checkpoint, f"it has {channels} latent channels, the model has {LATENT_CHANNELS}")
    fits = widths[-1] % (2 * channels) == 0
    for (near, far), factors in zip(pairwise(widths), FOLDS, strict=True):
        # the clip's first frame has half the channels where frames are folded
        fits &= far % prod(factors) == 0 and near * 4 % far == 0
    if not fits:
        raise _make_error(
            checkpoint, f"its levels have {', '.join(map(str, widths))} channels, which do not fit"
        )
    config = HunyuanVideo15VaeConfig(
        latent_channels=channels,
        widths=widths,
        encoder_blocks=count(sources, r"encoder\.down\.0\.block\.\d+"),
        decoder_blocks=count(sources, r"decoder\.up\.0\.block\.\d+"),
    )
    return LoadPlan(config, checkpoint, sources)


def _make_error(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path} is not {LABEL}: {why}.\n  Pass {RELEASED_FILES} to --vae.", checkpoint.path
    )


def load_vae(
    path: Path, device: torch.device, dtype: torch.dtype, tile: int | None = None
) -> HunyuanVideo15Vae:
    """Load the VAE from the released file or a diffusers folder.

    Args:
        path: File or folder.
        device: Device to load onto.
        dtype: Compute dtype.
        tile: Edge of a tile in pixels; None computes frames as a whole.

    Raises:
        CheckpointError: If the file is damaged or contains another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_vae(checkpoint)
        vae = load_planned(plan, lambda config: HunyuanVideo15Vae(config, tile), device, dtype, label=LABEL)
    set_memory_format(vae, device)
    logger.info("VAE: %s, computing in %s", path, dtype_name(dtype))
    return vae
