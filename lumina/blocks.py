"""Blocks of Lumina-Image-2.0: attention and feed-forward between two norms each, modulated by the time.

Source: the released model code and Qin et al. 2025, arXiv 2503.21758, after Zhuo et al. 2024, arXiv
2406.18583. The embedding of time, modulation, norms and rotary angles are always float32. Everything else,
including the residual stream, computes in the dtype of its weights or of autocast. Module names follow the
published checkpoints.
"""
# Letters: B batch, L image tokens, T caption tokens, N heads, K heads of keys, D head width, C = N * D

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from lumina.configs import LuminaConfig
from modules.attention.attend import SampleLengths, SecondText, attend
from modules.layers.modulation import add_gated, modulate
from modules.layers.norms import Float32LayerNorm, RMSNorm, run_float32, run_in_weight_dtype
from modules.layers.rope import rotate, select_rotations, sinusoid
from modules.speed_options import AttentionChoice
from runtime.offload.context import TokenShard

Heads = tuple[Tensor, Tensor, Tensor]  # query, key, value, each B L N D


@dataclass(frozen=True)
class LuminaTokens:
    """Inputs of the blocks in addition to the tokens x, B L+T C with the image first.

    Built once per forward pass. In the published code the caption comes first. Attention does not depend on
    the order of its tokens, only on their positions, and with the image first it has the same indices in all
    samples of a batch. With a second caption x is B L+T+T' C (`modules.attention.attend`).
    """

    grid: tuple[int, int]  # image tokens along rows, columns
    rotary: Tensor  # rotations of all tokens, L+T 1 D/2 2, or B L+T 1 D/2 2 where captions differ in length
    lengths: SampleLengths | None  # how many of the L + T tokens are real; None: all
    time: Tensor  # B time_dim float32, from which every block computes its modulation
    dtype: torch.dtype  # dtype of activations between layers
    attention: AttentionChoice
    second_text: SecondText | None = None
    second_rotary: Tensor | None = None  # as `rotary`, of image and second caption
    shard: TokenShard | None = None  # the tokens that this process has; None: all

    def cut(self, shard: TokenShard) -> Self:
        """Return the inputs for the tokens of one process; `rotary` still covers all tokens."""
        return replace(self, shard=shard)

    @property
    def first_noisy_token(self) -> int:
        """Return the index of the first token of the noisy latents, whose tokens form `grid`."""
        return 0

    def select(self, kept: Tensor, num_left_out: int) -> Self:
        """Return the block inputs for some tokens of x; only tokens of the noisy latents are dropped.

        `kept` are the ascending indices of the remaining tokens, B K; `num_left_out` tokens are dropped.
        """
        lengths = None if self.lengths is None else self.lengths.shorten(num_left_out)
        return replace(self, rotary=select_rotations(self.rotary, kept, num_left_out), lengths=lengths)

    @property
    def image(self) -> int:
        """Return the number of image tokens, L."""
        return self.grid[0] * self.grid[1]


class TimeEmbedding(nn.Module):
    """Embed each sample's time, from 0 for noise to 1 for the clean image: B to B time_dim float32."""

    def __init__(self, config: LuminaConfig, hidden: int | None = None) -> None:
        """Build two layers; `hidden` is the width between them, by default the embedding's width."""
        super().__init__()
        self.freq_dim = config.freq_dim
        hidden = hidden or config.time_dim
        self.mlp = nn.Sequential(
            nn.Linear(config.freq_dim, hidden), nn.SiLU(), nn.Linear(hidden, config.time_dim)
        )

    def forward(self, times: Tensor) -> Tensor:
        """Return embeddings, B time_dim float32, of times, B."""
        hidden = run_float32(self.mlp[0], sinusoid(times, self.freq_dim, torch.float32))
        return run_float32(self.mlp[2], functional.silu(hidden))


class GroupedAttention(nn.Module):
    """Grouped-query attention: several heads of queries share one head of keys and values."""

    def __init__(self, config: LuminaConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_width
        self.qkv = nn.Linear(config.dim, rows, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_width, config.eps)
        self.k_norm = RMSNorm(config.head_width, config.eps)

    def heads(self, x: Tensor) -> Heads:
        """Return queries (B L N D), keys and values (B L K D) of tokens B L C; the first two normalized."""
        qkv = run_in_weight_dtype(self.qkv, x).unflatten(-1, (self.num_heads + 2 * self.num_kv_heads, -1))
        query, key, value = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=2)
        return self.q_norm(query), self.k_norm(key), value

    def rotate_heads(self, heads: Tensor, rotary: Tensor) -> Tensor:
        """Return heads of queries or keys, B L N D, with their positions."""
        return rotate(heads, rotary)

    def attend_heads(
        self, heads: Iterable[Tensor], rotary: Tensor, tokens: LuminaTokens, lengths: SampleLengths | None
    ) -> Tensor:
        """Return the attention of tokens, B L N D, from heads without rotary embedding."""
        query, key, value = heads
        query, key = self.rotate_heads(query, rotary), self.rotate_heads(key, rotary)
        return attend(query, *repeat_kv_heads(query, key, value), tokens.attention, lengths)

    def forward(self, x: Tensor, tokens: LuminaTokens) -> Tensor:
        """Return the self-attention of tokens x, B L+T C, or B L+T+T' C with a second caption."""
        return self.project(self.attend_tokens(x, tokens))

    def attend_tokens(self, x: Tensor, tokens: LuminaTokens) -> Tensor:
        """Return the self-attention of tokens x, B L C, with the heads concatenated.

        With several processes, each attends with all tokens and some of the heads.
        """
        heads: tuple[Tensor, ...] = self.heads(x)
        token_part = tokens.shard
        if token_part is not None:
            heads = token_part.gather_tokens(heads[0], *repeat_kv_heads(*heads))
        if tokens.second_text is not None:
            return self._attend_with_two_captions(heads, tokens, tokens.second_text).flatten(2)
        attended = self.attend_heads(heads, tokens.rotary, tokens, tokens.lengths)
        if token_part is not None:
            attended = token_part.gather_heads(attended)
        return attended.flatten(2)

    def _attend_with_two_captions(
        self, heads: tuple[Tensor, ...], tokens: LuminaTokens, second: SecondText
    ) -> Tensor:
        """Return the image's attention to two captions, combined, and the attention among the captions."""
        assert tokens.second_rotary is not None
        with_first = self.attend_heads(
            map(second.drop_second_text, heads), tokens.rotary, tokens, tokens.lengths
        )
        with_second = self.attend_heads(
            map(second.drop_first_text, heads), tokens.second_rotary, tokens, second.lengths
        )
        if tokens.shard is None:
            return second.combine(with_first, with_second)
        return tokens.shard.combine(with_first, with_second, second)

    def project(self, attended: Tensor) -> Tensor:
        """Project the concatenated heads of attention, B L C, to the layer's output, B L C."""
        return run_in_weight_dtype(self.out, attended)


def repeat_kv_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat the heads of keys and values, B L K D, until there is one for each query head, B L N D."""
    repeats = query.shape[2] // key.shape[2]
    if repeats == 1:
        return key, value
    return key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)


class FeedForward(nn.Module):
    """Gated feed-forward: w2(silu(w1 x) * w3 x). Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: LuminaConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward to x, B L C."""
        return run_in_weight_dtype(
            self.w2, functional.silu(run_in_weight_dtype(self.w1, x)) * run_in_weight_dtype(self.w3, x)
        )


class JointTransformerBlock(nn.Module):
    """Attention and feed-forward, each normalized before and after and added to the stream.

    Without modulation there are only the norms, as in the blocks that refine captions.
    """

    attention_class: ClassVar[type[GroupedAttention]] = GroupedAttention
    activates_time: ClassVar[bool] = True  # before the layer that computes scales and gates from it

    def __init__(self, config: LuminaConfig, is_modulated: bool = True) -> None:
        super().__init__()
        self.attention = self.attention_class(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = RMSNorm(config.dim, config.eps)
        self.ffn_norm1 = RMSNorm(config.dim, config.eps)
        self.attention_norm2 = RMSNorm(config.dim, config.eps)
        self.ffn_norm2 = RMSNorm(config.dim, config.eps)
        if is_modulated:
            linear = nn.Linear(config.time_dim, 4 * config.dim)
            before = [nn.SiLU()] if self.activates_time else []
            self.adaLN_modulation = nn.Sequential(*before, linear)
        self.is_modulated = is_modulated

    def forward(self, x: Tensor, tokens: LuminaTokens) -> Tensor:
        """Apply the block to tokens x, B L+T C."""
        # x: B L+T C
        scale1, gate1, scale2, gate2 = self.modulation(tokens.time)
        branch = self.attention(modulate(self.attention_norm1(x), None, scale1, tokens.dtype), tokens)
        x = add_gated(x, gate1, self.attention_norm2(branch))
        # the expensive one last: if it runs in pieces, recomputing the block stops here
        return self.feed(x, scale2, gate2, tokens.dtype)

    def modulation(self, time: Tensor) -> tuple[Tensor | None, ...]:
        """Return scale and gate for attention and for the feed-forward, each B 1 C float32.

        Each is None in a block without modulation.
        """
        if not self.is_modulated:
            return (None,) * 4
        *before, last = self.adaLN_modulation
        for layer in before:
            time = layer(time)
        rows = run_in_weight_dtype(last, time).float()
        scale1, gate1, scale2, gate2 = rows.unsqueeze(1).chunk(4, dim=-1)
        return scale1, gate1.tanh(), scale2, gate2.tanh()

    def modulated_input(self, x: Tensor, tokens: LuminaTokens) -> Tensor:
        """Return the normalized and modulated image tokens, B L C, of x, B L+T C."""
        scale, *_ = self.modulation(tokens.time)
        return modulate(self.attention_norm1(x[:, : tokens.image]), None, scale, tokens.dtype)

    def feed(self, x: Tensor, scale: Tensor | None, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Add the output of the feed-forward network, multiplied by `gate`, to x, B L C."""
        branch = self.feed_forward(modulate(self.ffn_norm1(x), None, scale, dtype))
        return add_gated(x, gate, self.ffn_norm2(branch))


class LuminaFinalLayer(nn.Module):
    """Final norm, scaled by the timestep, and projection to patches."""

    def __init__(self, config: LuminaConfig) -> None:
        super().__init__()
        self.norm_final = Float32LayerNorm(config.dim, config.final_eps)
        self.linear = nn.Linear(config.dim, config.patch_size**2 * config.in_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_dim, config.dim))

    def forward(self, x: Tensor, tokens: LuminaTokens) -> Tensor:
        """Return the patches of the prediction for image tokens x, B L C."""
        scale = (
            run_in_weight_dtype(self.adaLN_modulation[1], functional.silu(tokens.time)).float().unsqueeze(1)
        )
        return run_in_weight_dtype(self.linear, modulate(self.norm_final(x), None, scale, tokens.dtype))
