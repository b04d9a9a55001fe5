"""Layers of MiniMax-H3's video VAE: a causal convolutional encoder and a transformer as decoder.

Module names follow the released file. The encoder, norms and the residual stream of the decoder are always
float32; the decoder's other layers compute in the dtype of their weights. Source: the released weights of
MiniMax-H3, and diffusers' `AutoencoderKLMiniMaxH3` for what the tensors do not show.
"""
# Letters: B batch, C channels, F frames, H height, W width, L tokens, N heads, D head width, Z latents'

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from modules.attention.attend import attend
from modules.layers.norms import RMSNorm, run_in_weight_dtype
from modules.layers.rope import cos_and_sin

GROUPS = 32  # number of groups of channels that are normalized together
ENCODER_EPS = 1e-6
DECODER_EPS = 1e-5
THETA = 100.0  # base of the decoder's frequencies


@dataclass(frozen=True)
class H3VaeLevel:
    """A level of the encoder: residual blocks of one width, and the resampling after them."""

    width: int
    num_blocks: int
    time_stride: int = 1
    space_stride: int = 1

    @property
    def resamples(self) -> bool:
        """Return whether the level ends with a resampling."""
        return self.time_stride * self.space_stride > 1


@dataclass(frozen=True)
class H3VideoVaeConfig:
    """Dimensions of the video VAE, read from a checkpoint's tensors and its config.json."""

    levels: tuple[H3VaeLevel, ...]
    latent_channels: int = 24
    dim: int = 2048  # width of the decoder
    head_width: int = 64
    ffn_dim: int = 8192
    num_layers: int = 36
    num_registers: int = 4  # number of learned tokens after those of the latents
    groups: int = GROUPS
    rotary_fraction: float = 0.75  # fraction of a head's channels that is rotated
    clip_frames: int = 17  # number of frames that are encoded together
    num_dropped_latents: int = 3  # latent frames that are dropped at the end of a video
    latents_mean: tuple[float, ...] = ()  # of each latent channel
    latents_std: tuple[float, ...] = ()

    @property
    def time_stride(self) -> int:
        """Return how many pixel frames a latent frame covers."""
        return math.prod(level.time_stride for level in self.levels)

    @property
    def space_stride(self) -> int:
        """Return how many rows and columns of pixels a latent pixel covers."""
        return math.prod(level.space_stride for level in self.levels)

    @property
    def first_padding(self) -> int:
        """Return how many frames a clip lacks to fill its first latent frame."""
        return -self.clip_frames % self.time_stride

    @property
    def tail(self) -> int:
        """Return how many frames a video has after its last whole clip."""
        return (self.clip_latents - self.num_dropped_latents) * self.time_stride - self.first_padding

    @property
    def clip_latents(self) -> int:
        """Return the number of latent frames of a clip."""
        return math.ceil(self.clip_frames / self.time_stride)

    @property
    def shared_latents(self) -> int:
        """Return how many of the next clip's latent frames are decoded together with a clip."""
        return -self.num_dropped_latents % self.clip_latents

    @property
    def shared_frames(self) -> int:
        """Return how many frames two neighboring clips both decode."""
        return max(0, self.shared_latents * self.time_stride - self.first_padding)


class CausalConv(nn.Conv3d):
    """3D convolution causal in time: zeros before the first frame, mirrored borders in space."""

    def __init__(
        self, width_in: int, width_out: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)
    ) -> None:
        super().__init__(width_in, width_out, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve a clip x, B C T H W."""
        return super().forward(_pad_front(self._mirror(x), self.kernel_size[0] - 1))

    def _mirror(self, x: Tensor) -> Tensor:
        if self.kernel_size[1] == 1:
            return x
        if self.stride[1] == 2:
            return functional.pad(x, (0, 1, 0, 1, 0, 0), mode="reflect")
        return functional.pad(x, (1, 1, 1, 1, 0, 0), mode="reflect")


def _pad_front(x: Tensor, frames: int) -> Tensor:
    return functional.pad(x, (0, 0, 0, 0, frames, 0)) if frames else x


class FrameNorm(nn.GroupNorm):
    """Group norm of each frame separately, B C F H W."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each frame of x, B C F H W."""
        frames = x.transpose(1, 2).flatten(0, 1)
        return super().forward(frames).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class EncoderBlock(nn.Module):
    """Residual block of the encoder."""

    def __init__(self, width_in: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = FrameNorm(groups, width_in, eps=ENCODER_EPS)
        self.conv1 = CausalConv(width_in, width)
        self.norm2 = FrameNorm(groups, width, eps=ENCODER_EPS)
        self.conv2 = CausalConv(width, width)
        if width_in != width:
            self.nin_shortcut = CausalConv(width_in, width, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x, B C T H W to B C' T H W."""
        branch = self.conv1(functional.silu(self.norm1(x)))
        branch = self.conv2(functional.silu(self.norm2(branch)))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return x + branch


class EncoderLevel(nn.Module):
    """Residual blocks, then a convolution that halves the resolution in space or time."""

    def __init__(self, width_in: int, level: H3VaeLevel, groups: int) -> None:
        super().__init__()
        widths = [width_in, *[level.width] * level.num_blocks]
        self.block = nn.ModuleList(
            EncoderBlock(before, level.width, groups) for before in widths[: level.num_blocks]
        )
        if level.resamples:
            stride = (level.time_stride, level.space_stride, level.space_stride)
            self.downsample = nn.ModuleDict({"conv": CausalConv(level.width, level.width, stride=stride)})

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks and the resampling to x, B C T H W."""
        for block in self.block:
            x = block(x)
        if hasattr(self, "downsample"):
            x = self.downsample["conv"](x)
        return x


class H3VideoEncoder(nn.Module):
    """Encode pixels, B 3 F H W, as posterior moments, B 2Z f h w, float32."""

    def __init__(self, config: H3VideoVaeConfig) -> None:
        super().__init__()
        first, last = config.levels[0].width, config.levels[-1].width
        self.conv_in = CausalConv(3, first)
        widths = [first, *(level.width for level in config.levels)]
        self.down = nn.ModuleList(
            EncoderLevel(before, level, config.groups)
            for before, level in zip(widths[:-1], config.levels, strict=True)
        )
        self.norm_out = FrameNorm(config.groups, last, eps=ENCODER_EPS)
        self.conv_out = CausalConv(last, 2 * config.latent_channels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels, B 3 F H W, to posterior moments, B 2Z f h w."""
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class DecoderAttention(nn.Module):
    """Self-attention in which queries and keys get a norm without weights, in float32."""

    def __init__(self, config: H3VideoVaeConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.to_qkv = nn.Linear(config.dim, 3 * config.dim)
        self.to_out = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Return the self-attention of tokens x, B L C."""
        # x: B L C, returned alike
        query, key, value = self.to_qkv(x).unflatten(-1, (3, -1, self.head_width)).unbind(2)
        query = rotate_first(_normalize_head(query), rotary)
        key = rotate_first(_normalize_head(key), rotary)
        return self.to_out(attend(query, key, value).flatten(2))


def _normalize_head(x: Tensor) -> Tensor:
    return functional.rms_norm(x.float(), x.shape[-1:], eps=DECODER_EPS).to(x.dtype)


def rotate_first(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate the first 2K channels of each head in pairs, channel k with channel k + K.

    It is computed in float32 and returned in the dtype of x. `x` is B L N D; `rotary` is L 1 K 2, cosines and
    sines of K pairs; the channels after 2K stay unchanged.
    """
    pairs = rotary.shape[-2]
    cosine, sine = rotary.unbind(-1)
    first, second, rest = x.split((pairs, pairs, x.shape[-1] - 2 * pairs), dim=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat([part.to(x.dtype) for part in (*turned, rest)], dim=-1)


class DecoderFeedForward(nn.Module):
    """Gated feed-forward w2(silu(gate) * value). Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: H3VideoVaeConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, 2 * config.ffn_dim)
        self.w2 = nn.Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward to x, B L C."""
        gate, value = self.w1(x).chunk(2, dim=-1)
        return self.w2(functional.silu(gate) * value)


class DecoderBlock(nn.Module):
    """Attention and feed-forward, each with a norm before it and learned scales on its output."""

    def __init__(self, config: H3VideoVaeConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim, DECODER_EPS)
        self.attn = DecoderAttention(config)
        self.scale1 = nn.Parameter(torch.zeros(config.dim))
        self.norm2 = RMSNorm(config.dim, DECODER_EPS)
        self.ff = DecoderFeedForward(config)
        self.scale2 = nn.Parameter(torch.zeros(config.dim))

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Apply the block to tokens x, B L C float32."""
        # x: B L C float32
        dtype = self.attn.to_qkv.weight.dtype
        x = x + self.attn(self.norm1(x).to(dtype), rotary) * self.scale1
        return x + self.ff(self.norm2(x).to(dtype)) * self.scale2


class H3VideoDecoder(nn.Module):
    """Decode latents B Z f h w to pixels B 3 4f 16h 16w, float32, with attention among all latents."""

    def __init__(self, config: H3VideoVaeConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = nn.Linear(config.latent_channels, config.dim)
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_registers, config.dim))
        self.transformer_blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(config.dim, eps=DECODER_EPS)
        self.proj_out = nn.Linear(config.dim, 3 * config.time_stride * config.space_stride**2)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode latents, B Z f h w, to pixels, B 3 4f 16h 16w."""
        grid = latents.shape[2:]
        x = run_in_weight_dtype(self.x_embedder, latents.flatten(2).mT).float()
        num_latents = x.shape[1]
        registers = self.register_tokens.float().expand(len(x), -1, -1)
        # learned registers and a token of zeros follow the latents, as trained; the output leaves them out
        empty = x.new_zeros(len(x), 1, x.shape[2])
        x = torch.cat([x, registers, empty], dim=1)
        rotary = self._make_rotation(tuple(grid), x.shape[1] - num_latents, x.device)
        for block in self.transformer_blocks:
            x = block(x, rotary)
        patches = run_in_weight_dtype(self.proj_out, self.norm_out(x[:, :num_latents])).float()
        patch_sizes = (3, self.config.time_stride, self.config.space_stride, self.config.space_stride)
        patches = patches.unflatten(1, grid).unflatten(-1, patch_sizes)  # B f h w 3 t s s
        pixels = patches.permute(0, 4, 1, 5, 2, 6, 3, 7)
        # merge each grid axis with its axis of the patch: f t, h s, w s
        return pixels.flatten(6).flatten(4, 5).flatten(2, 3)

    def _make_rotation(self, grid: tuple[int, ...], num_extra_tokens: int, device: torch.device) -> Tensor:
        """Return (cosine, sine) pairs of all tokens, L 1 K 2."""
        # The centers of a clip's tokens are spread over -1..1 along each axis. `num_extra_tokens` counts
        # further tokens, at 0.
        rotated_width = int(self.config.head_width * self.config.rotary_fraction)
        exponents = torch.arange(0, 1, 6 / rotated_width, device=device)
        frequencies = 1 / THETA**exponents
        axes = [2 * (torch.arange(0.5, size, device=device) / size) - 1 for size in grid]
        positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
        positions = torch.cat([positions, positions.new_zeros(num_extra_tokens, 3)])
        angles = 2 * math.pi * positions[:, :, None] * frequencies
        return cos_and_sin(angles.flatten(1)).unsqueeze(1)
