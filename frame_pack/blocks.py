"""HunyuanVideo's blocks as in FramePack's files: separate query, key and value, with diffusers' names.

Computation and dtypes are those of `hunyuan_model.blocks` and `hunyuan_model.token_refiner`, whose parts are
used. Source: the released model code; Zhang and Agrawala 2025, arXiv 2504.12626.
"""
# Letters: B batch, L latent tokens, T tokens of image and text, N heads, D head width, C = N * D

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from hunyuan_model.blocks import (
    Heads,
    HunyuanModulation,
    HunyuanTokens,
    attend_jointly,
    attend_turned,
)
from hunyuan_model.joining import gelu, join_gelu, turn_and_join
from modules.attention.attend import attend
from modules.attention.lengths import Lengths
from modules.attention.options import AttentionChoice
from modules.layers.modulation import add_gated, modulate
from modules.layers.norms import Float32LayerNorm, RMSNorm
from modules.layers.precision import in_own_dtype


class FramePackAttention(nn.Module):
    """Joint attention of latent tokens and image and text tokens; the two groups have separate weights."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_q = RMSNorm(dim // num_heads, eps)
        self.norm_k = RMSNorm(dim // num_heads, eps)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.norm_added_q = RMSNorm(dim // num_heads, eps)
        self.norm_added_k = RMSNorm(dim // num_heads, eps)
        # in the order of the released code, which determines the order of a LoRA's tensors
        self.add_k_proj = nn.Linear(dim, dim)
        self.add_v_proj = nn.Linear(dim, dim)
        self.add_q_proj = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_add_out = nn.Linear(dim, dim)

    def forward(
        self, video: Tensor, text: Tensor, tokens: HunyuanTokens, others: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        # video: B L C    text: B T C    others: a second text, if there is one. What each sees is returned
        text_q, text_k, text_v = self.text_heads(text)
        # B L+T N D
        q = turn_and_join(self.norm_q(heads(self.to_q, video, self.num_heads)), text_q, tokens.rotary)
        k = turn_and_join(self.norm_k(heads(self.to_k, video, self.num_heads)), text_k, tokens.rotary)
        v = torch.cat([heads(self.to_v, video, self.num_heads), text_v], dim=1)
        seen, *others_seen = attend_jointly(q, k, v, tokens, [self.text_heads(other) for other in others])
        video_seen, text_seen = tokens.split_video(seen)
        return (
            in_own_dtype(self.to_out[0], video_seen),
            in_own_dtype(self.to_add_out, text_seen),
            *(in_own_dtype(self.to_add_out, other_seen) for other_seen in others_seen),
        )

    def text_heads(self, text: Tensor) -> Heads:
        """Return the query, key and value of a text, B T C."""
        q, k, v = (
            heads(layer, text, self.num_heads)
            for layer in (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        )
        return self.norm_added_q(q), self.norm_added_k(k), v


class SingleAttention(nn.Module):
    """Attention among all tokens with shared weights; the block projects the result."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_q = RMSNorm(dim // num_heads, eps)
        self.norm_k = RMSNorm(dim // num_heads, eps)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)

    def forward(self, x: Tensor, tokens: HunyuanTokens, others: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        # x: B L+T C    others: a second text, if there is one. What each sees is returned
        q, k, v = self.project(x)
        return attend_turned(q, k, v, tokens, [self.project(other) for other in others])

    def project(self, x: Tensor) -> Heads:
        """Return query, key and value of tokens, B L C."""
        return (
            self.norm_q(heads(self.to_q, x, self.num_heads)),
            self.norm_k(heads(self.to_k, x, self.num_heads)),
            heads(self.to_v, x, self.num_heads),
        )


class RefinerAttention(nn.Module):
    """Attention among text tokens, without positions."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, lengths: Lengths | None, attention: AttentionChoice) -> Tensor:
        # x: B T C
        q, k, v = (heads(layer, x, self.num_heads) for layer in (self.to_q, self.to_k, self.to_v))
        return in_own_dtype(self.to_out[0], attend(q, k, v, attention, lengths).flatten(2))


class FeedForwardProjection(nn.Module):
    """First layer of a feed-forward, under its name in the files."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return in_own_dtype(self.proj, x)


class FramePackFeedForward(nn.Module):
    """Two layers with an activation between them."""

    def __init__(self, dim: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        # the second entry is dropout in the released code and has no weights
        self.net = nn.ModuleList([FeedForwardProjection(dim, hidden), nn.Identity(), nn.Linear(hidden, dim)])
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return in_own_dtype(self.net[2], self._activation(self.net[0](x)))


class HunyuanVideoTransformerBlock(nn.Module):
    """Block in which latents, and image and text, have separate weights and share one attention."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        # has no weights, so one serves both streams and both branches
        self.layer_norm = Float32LayerNorm(dim, eps)
        self.norm1 = HunyuanModulation(dim, 6)
        self.norm1_context = HunyuanModulation(dim, 6)
        self.attn = FramePackAttention(dim, num_heads, eps)
        self.ff = FramePackFeedForward(dim, ffn_dim, gelu)
        self.ff_context = FramePackFeedForward(dim, ffn_dim, gelu)

    def forward(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        # x: B L+T C
        x, others = tokens.split_away(x)
        video, text = tokens.split_video(x)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.norm1(tokens.vector)
        text_modulation = self.norm1_context(tokens.vector)
        modulations = [self.norm1_context(vector) for _, vector in others]
        seen, text_seen, *others_seen = self.attn(
            modulate(self.layer_norm(video), shift1, scale1, tokens.dtype),
            self.modulate_text(text, text_modulation, tokens.dtype),
            tokens,
            [
                self.modulate_text(other, modulation, tokens.dtype)
                for (other, _), modulation in zip(others, modulations, strict=True)
            ],
        )
        text = self.finish_text(text, text_seen, text_modulation, tokens.dtype)
        finished = [
            self.finish_text(other, other_seen, modulation, tokens.dtype)
            for (other, _), other_seen, modulation in zip(others, others_seen, modulations, strict=True)
        ]
        # the expensive one last: if it runs in pieces, recomputing the block stops here
        video = self.feed_forward(add_gated(video, gate1, seen), self.ff, shift2, scale2, gate2, tokens.dtype)
        return torch.cat([video, text, *finished], dim=1)

    def modulate_text(self, text: Tensor, modulation: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return what a text, B T C, gives to the attention. modulation: six tensors B 1 C."""
        shift, scale, *_ = modulation
        return modulate(self.layer_norm(text), shift, scale, dtype)

    def finish_text(
        self, text: Tensor, seen: Tensor, modulation: Sequence[Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Add to a text what it sees, B T C, and its feed-forward."""
        _, _, gate1, shift2, scale2, gate2 = modulation
        text = add_gated(text, gate1, seen)
        return self.feed_forward(text, self.ff_context, shift2, scale2, gate2, dtype)

    def modulated_input(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        """Return what attention gets for the latent tokens of x: B L+T C -> B L C."""
        shift, scale, *_ = self.norm1(tokens.vector)
        return modulate(self.layer_norm(x[:, : tokens.video]), shift, scale, tokens.dtype)

    def feed_forward(
        self,
        x: Tensor,
        ff: FramePackFeedForward,
        shift: Tensor,
        scale: Tensor,
        gate: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """Add the feed-forward branch of a stream to x; each token is processed independently.

        x: B L C; shift, scale, gate: B 1 C float32.
        """
        return add_gated(x, gate, ff(modulate(self.layer_norm(x), shift, scale, dtype)))


class HunyuanVideoSingleTransformerBlock(nn.Module):
    """Block in which all tokens share all weights; attention and feed-forward run in parallel."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.layer_norm = Float32LayerNorm(dim, eps)
        self.norm = HunyuanModulation(dim, 3)
        self.attn = SingleAttention(dim, num_heads, eps)
        self.proj_mlp = nn.Linear(dim, ffn_dim)
        self.proj_out = nn.Linear(dim + ffn_dim, dim)

    def forward(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        # x: B L+T C
        x, others = tokens.split_away(x)
        h, gate = self.begin(x, tokens.vector, tokens.dtype)
        begun = [self.begin(other, vector, tokens.dtype) for other, vector in others]
        seen, *others_seen = self.attn(h, tokens, [other_h for other_h, _ in begun])
        x = self.finish(x, seen, h, gate)
        if not others:
            return x
        finished = [
            self.finish(other, other_seen, *other_begun)
            for (other, _), other_seen, other_begun in zip(others, others_seen, begun, strict=True)
        ]
        return torch.cat([x, *finished], dim=1)

    def begin(self, x: Tensor, vector: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return what tokens, B L C, give to attention and feed-forward, and their gate."""
        shift, scale, gate = self.norm(vector)
        return modulate(self.layer_norm(x), shift, scale, dtype), gate

    def finish(self, x: Tensor, seen: Tensor, h: Tensor, gate: Tensor) -> Tensor:
        """Add to tokens what they see and their feed-forward."""
        return add_gated(
            x, gate, in_own_dtype(self.proj_out, join_gelu(seen, in_own_dtype(self.proj_mlp, h)))
        )


class FramePackRefinerBlock(nn.Module):
    """Self-attention and feed-forward among text tokens.

    Timestep and mean text only gate the two branches.
    """

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.norm1 = Float32LayerNorm(dim, eps, affine=True)
        self.attn = RefinerAttention(dim, num_heads)
        self.norm2 = Float32LayerNorm(dim, eps, affine=True)
        self.ff = FramePackFeedForward(dim, ffn_dim, functional.silu)
        self.norm_out = HunyuanModulation(dim, 2)

    def forward(
        self, x: Tensor, vector: Tensor, lengths: Lengths | None, attention: AttentionChoice
    ) -> Tensor:
        # x: B T C    vector: B C float32
        gate1, gate2 = self.norm_out(vector)
        x = add_gated(x, gate1, self.attn(self.norm1(x).to(x.dtype), lengths, attention))
        return add_gated(x, gate2, self.ff(self.norm2(x).to(x.dtype)))


def heads(layer: nn.Linear, x: Tensor, num_heads: int) -> Tensor:
    """Apply the layer to B L C and split the result into heads: B L N D."""
    return in_own_dtype(layer, x).unflatten(-1, (num_heads, -1))
