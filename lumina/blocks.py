"""Blocks of Lumina-Image-2.0: attention and feed-forward between two norms each, modulated by the time.

Source: the released model code and Qin et al. 2025, arXiv 2503.21758, after Zhuo et al. 2024, arXiv
2406.18583. Always float32: the embedding of time, modulation, norms, rotary angles. Everything else, also the
residual stream, computes in the dtype of its weights or of autocast. Module names follow the published
checkpoints.
"""
# Letters: B batch, L image tokens, T caption tokens, N heads, K heads of keys, D head width, C = N * D

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lumina.configs import LuminaConfig
from modules.attention.attend import attend
from modules.attention.lengths import Lengths
from modules.attention.options import AttentionChoice
from modules.contract.generation import Steer
from modules.layers import modulation
from modules.layers.norms import Float32LayerNorm, RMSNorm
from modules.layers.precision import in_own_dtype, run_float32
from modules.layers.rope import rotate
from modules.layers.sinusoid import sinusoid

Heads = tuple[Tensor, Tensor, Tensor]  # query, key, value, each B L N D


@dataclass(frozen=True)
class AwayCaption:
    """A second caption, which stands behind the first one in x and goes its own way through the blocks.

    The image attends to itself and the first caption, and once more to itself and the second one; what its
    tokens see in the two is combined. Each caption attends to the image and itself, as if it were the only
    one. Source: Chen et al. 2025, arXiv 2505.21179, for transformers with joint attention.
    """

    count: int  # tokens of the second caption, T'
    rotary: Tensor  # of image and second caption: as `LuminaTokens.rotary` of L + T' tokens
    lengths: Lengths | None  # how many of the L + T' tokens are real
    steer: Steer


@dataclass(frozen=True)
class LuminaTokens:
    """Inputs of the blocks besides the tokens x (B L+T C, the image first); built once per forward pass.

    In the published code the caption stands in front. Attention does not depend on the order of its tokens,
    only on their positions, and with the image first it lies at the same place in all samples of a batch.
    With a second caption x is B L+T+T' C.
    """

    grid: tuple[int, int]  # image tokens along rows, columns
    rotary: Tensor  # rotations of all tokens, L+T 1 D/2 2, or B L+T 1 D/2 2 where captions differ in length
    lengths: Lengths | None  # how many of the L + T tokens are real; None: all
    time: Tensor  # B time_dim float32, from which every block computes its modulation
    dtype: torch.dtype  # of activations between layers
    attention: AttentionChoice
    away: AwayCaption | None = None

    @property
    def image(self) -> int:
        """Number of image tokens, L."""
        return self.grid[0] * self.grid[1]


class TimeEmbedding(nn.Module):
    """Embed the time of each sample, 0 noise to 1 image: B -> B time_dim float32."""

    def __init__(self, config: LuminaConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.mlp = nn.Sequential(
            nn.Linear(config.freq_dim, config.time_dim),
            nn.SiLU(),
            nn.Linear(config.time_dim, config.time_dim),
        )

    def forward(self, times: Tensor) -> Tensor:
        hidden = run_float32(self.mlp[0], sinusoid(times, self.freq_dim, torch.float32))
        return run_float32(self.mlp[2], functional.silu(hidden))


class GroupedAttention(nn.Module):
    """Self-attention in which each head of keys and values serves several heads of queries."""

    def __init__(self, config: LuminaConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_width
        self.qkv = nn.Linear(config.dim, rows, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_width, config.eps)
        self.k_norm = RMSNorm(config.head_width, config.eps)

    def heads(self, x: Tensor) -> Heads:
        """Return query (B L N D), key and value (B L K D) of tokens B L C; the first two normed."""
        qkv = in_own_dtype(self.qkv, x).unflatten(-1, (self.num_heads + 2 * self.num_kv_heads, -1))
        query, key, value = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=2)
        return self.q_norm(query), self.k_norm(key), value

    def look(
        self, heads: Heads, rotary: Tensor, attention: AttentionChoice, lengths: Lengths | None
    ) -> Tensor:
        """Return what tokens see, B L C, of heads whose queries and keys are not rotated yet."""
        query, key, value = heads
        query, key = rotate(query, rotary), rotate(key, rotary)
        served = self.num_heads // self.num_kv_heads
        key, value = (one.repeat_interleave(served, dim=2) for one in (key, value))
        return attend(query, key, value, attention, lengths).flatten(2)

    def forward(self, x: Tensor, tokens: LuminaTokens) -> Tensor:
        # x: B L+T C, with a second caption B L+T+T' C
        away = tokens.away
        if away is None:
            return in_own_dtype(
                self.out, self.look(self.heads(x), tokens.rotary, tokens.attention, tokens.lengths)
            )
        heads, first, length = self.heads(x), x.shape[1] - away.count, tokens.image
        beside = tuple(torch.cat([one[:, :length], one[:, first:]], dim=1) for one in heads)
        own = tuple(one[:, :first] for one in heads)
        seen = self.look(own, tokens.rotary, tokens.attention, tokens.lengths)  # type: ignore[arg-type]
        other = self.look(beside, away.rotary, tokens.attention, away.lengths)  # type: ignore[arg-type]
        image, other_image = (one[:, :length].unflatten(-1, (self.num_heads, -1)) for one in (seen, other))
        steered = away.steer(image, other_image).flatten(2)
        return in_own_dtype(self.out, torch.cat([steered, seen[:, length:], other[:, length:]], dim=1))


class FeedForward(nn.Module):
    """Gated feed-forward: w2(silu(w1 x) * w3 x). Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: LuminaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return in_own_dtype(self.w2, functional.silu(in_own_dtype(self.w1, x)) * in_own_dtype(self.w3, x))


class JointTransformerBlock(nn.Module):
    """Attention and feed-forward, each normed before and after and added to the stream.

    Without modulation the norms stand alone, as in the blocks that refine captions.
    """

    def __init__(self, config: LuminaConfig, is_modulated: bool = True) -> None:
        super().__init__()
        self.attention = GroupedAttention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = RMSNorm(config.dim, config.eps)
        self.ffn_norm1 = RMSNorm(config.dim, config.eps)
        self.attention_norm2 = RMSNorm(config.dim, config.eps)
        self.ffn_norm2 = RMSNorm(config.dim, config.eps)
        if is_modulated:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_dim, 4 * config.dim))
        self.is_modulated = is_modulated

    def forward(self, x: Tensor, tokens: LuminaTokens) -> Tensor:
        # x: B L+T C
        scale1, gate1, scale2, gate2 = self.modulation(tokens.time)
        branch = self.attention(modulate(self.attention_norm1(x), scale1, tokens.dtype), tokens)
        x = add_gated(x, gate1, self.attention_norm2(branch))
        # the expensive one last: if it runs in pieces, recomputing the block stops here
        return self.feed(x, scale2, gate2, tokens.dtype)

    def modulation(self, time: Tensor) -> tuple[Tensor | None, ...]:
        """Return scale and gate of attention and of feed-forward, each B 1 C float32; None: none."""
        if not self.is_modulated:
            return (None,) * 4
        made = in_own_dtype(self.adaLN_modulation[1], functional.silu(time)).float()
        scale1, gate1, scale2, gate2 = made.unsqueeze(1).chunk(4, dim=-1)
        return scale1, gate1.tanh(), scale2, gate2.tanh()

    def modulated_input(self, x: Tensor, tokens: LuminaTokens) -> Tensor:
        """Return what attention gets for the image tokens of x: B L+T C -> B L C."""
        scale, *_ = self.modulation(tokens.time)
        return modulate(self.attention_norm1(x[:, : tokens.image]), scale, tokens.dtype)

    def feed(self, x: Tensor, scale: Tensor | None, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Add the feed-forward branch to x, B L C; each token is processed independently."""
        branch = self.feed_forward(modulate(self.ffn_norm1(x), scale, dtype))
        return add_gated(x, gate, self.ffn_norm2(branch))


class LuminaFinalLayer(nn.Module):
    """Final norm, scaled by the time, and projection to patches."""

    def __init__(self, config: LuminaConfig) -> None:
        super().__init__()
        self.norm_final = Float32LayerNorm(config.dim, config.final_eps)
        self.linear = nn.Linear(config.dim, config.patch_size**2 * config.in_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_dim, config.dim))

    def forward(self, x: Tensor, tokens: LuminaTokens) -> Tensor:
        scale = in_own_dtype(self.adaLN_modulation[1], functional.silu(tokens.time)).float().unsqueeze(1)
        return in_own_dtype(self.linear, modulate(self.norm_final(x), scale, tokens.dtype))


def modulate(normed: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return normed * (1 + scale), computed in float32."""
    if scale is None:
        return normed
    if torch.compiler.is_compiling():
        return (normed.float() * (1 + scale)).to(dtype)
    scaled: Tensor = _Scale.apply(normed, 1 + scale, dtype)
    return scaled


class _Scale(torch.autograd.Function):
    """Multiplication that casts while it reads and writes, as `modules.layers.modulation` does."""

    @staticmethod
    def forward(ctx: Any, normed: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(normed if ctx.needs_input_grad[1] else None, factor)
        ctx.dtype = normed.dtype
        return torch.mul(normed, factor, out=torch.empty_like(normed, dtype=dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        normed, factor = ctx.saved_tensors
        of_normed = torch.empty_like(gradient, dtype=ctx.dtype)
        torch.mul(gradient, factor, out=of_normed)
        if not ctx.needs_input_grad[1]:
            return of_normed, None, None
        return of_normed, (gradient.float() * normed.float()).sum_to_size(factor.shape), None


def add_gated(x: Tensor, gate: Tensor | None, branch: Tensor) -> Tensor:
    """Return x + gate * branch in one pass, in the dtype of x."""
    return x + branch.to(x.dtype) if gate is None else modulation.add_gated(x, gate, branch)
