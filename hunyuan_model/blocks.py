"""Blocks in which video and text tokens attend to each other: double (separate weights) and single (shared).

Source: the released model code and Kong et al. 2024, arXiv 2412.03603, after Esser et al. 2024, arXiv
2403.03206. Always float32: the modulating embedding, modulation, norms, rotary angles. Everything else, also
the residual stream, computes in the dtype of its weights or of autocast. Module names follow the published
checkpoints.
"""
# Letters: B batch, L video tokens, T text tokens, N heads, D head width, C = N * D

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from hunyuan_model.joining import gelu, join_gelu, turn_and_join, turn_first
from modules.attention.attend import attend
from modules.attention.lengths import Lengths
from modules.attention.options import AttentionChoice
from modules.contract.generation import Steer
from modules.layers.modulation import add_gated, modulate
from modules.layers.norms import Float32LayerNorm, RMSNorm
from modules.layers.precision import in_own_dtype

Heads = tuple[Tensor, Tensor, Tensor]  # query, key, value, each B L N D


@dataclass(frozen=True)
class AwayTokens:
    """A second text, which stands behind the first one in x and goes its own way through the blocks.

    The video attends to itself and the first text, and once more to itself and the second one; what its
    tokens see in the two is combined. Each text attends to the video and itself, as if it were the only one.
    Source: Chen et al. 2025, arXiv 2505.21179, for transformers with joint attention.
    """

    count: int  # tokens of the second text, T'
    vector: Tensor  # as `HunyuanTokens.vector`, of the second pooled text; modulates only this text
    lengths: Lengths | None  # how many of the L + T' tokens are real
    steer: Steer


@dataclass(frozen=True)
class HunyuanTokens:
    """Inputs of the blocks besides the tokens x (B L+T C, the video first); built once per forward pass.

    With a second text x is B L+T+T' C.
    """

    grid: tuple[int, int, int]  # video tokens along frames, rows, columns
    rotary: Tensor  # rotations of the video tokens, L 1 D/2 2, or B L 1 D/2 2; text is not rotated
    lengths: Lengths | None  # how many of the L + T tokens are real; None: all
    # B C float32: timestep, pooled text and guidance, from which every block computes its modulation
    vector: Tensor
    dtype: torch.dtype  # of activations between layers
    attention: AttentionChoice
    away: AwayTokens | None = None

    @property
    def video(self) -> int:
        """Number of video tokens, L."""
        return self.rotary.shape[-4]

    def split_video(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split x, B L+T ..., into video and text; in one split, so that its gradient is written once."""
        video, text = x.split((self.video, x.shape[1] - self.video), dim=1)
        return video, text

    def join(self, video: Heads, text: Heads) -> Heads:
        """Return query, key and value of all tokens, B L+T N D, of normalised ones; the video is rotated."""
        query, key = (turn_and_join(*both, self.rotary) for both in zip(video[:2], text[:2], strict=True))
        return query, key, torch.cat([video[2], text[2]], dim=1)

    def split_away(self, x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Split x into video and text, B L+T C, and a list of the second text with its vector, if any."""
        if self.away is None:
            return x, []
        return x[:, : -self.away.count], [(x[:, -self.away.count :], self.away.vector)]


class HunyuanModulation(nn.Module):
    """Compute the shifts, scales and gates of a block."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(dim, count * dim)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        # vector: B C float32 -> count tensors B 1 C float32
        return (
            in_own_dtype(self.linear, functional.silu(vector)).float().unsqueeze(1).chunk(self.count, dim=-1)
        )


class Mlp(nn.Module):
    """Two layers with an activation between them."""

    def __init__(self, dim: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return in_own_dtype(self.fc2, self._activation(in_own_dtype(self.fc1, x)))


class MMDoubleStreamBlock(nn.Module):
    """Block in which video and text have separate weights and share one attention."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_width = dim // num_heads
        self.norm = Float32LayerNorm(dim, eps)  # has no weights, so one serves both streams and both branches
        self.img_mod = HunyuanModulation(dim, 6)
        self.img_attn_qkv = nn.Linear(dim, 3 * dim)
        self.img_attn_q_norm = RMSNorm(head_width, eps)
        self.img_attn_k_norm = RMSNorm(head_width, eps)
        self.img_attn_proj = nn.Linear(dim, dim)
        self.img_mlp = Mlp(dim, ffn_dim, gelu)
        self.txt_mod = HunyuanModulation(dim, 6)
        self.txt_attn_qkv = nn.Linear(dim, 3 * dim)
        self.txt_attn_q_norm = RMSNorm(head_width, eps)
        self.txt_attn_k_norm = RMSNorm(head_width, eps)
        self.txt_attn_proj = nn.Linear(dim, dim)
        self.txt_mlp = Mlp(dim, ffn_dim, gelu)

    def forward(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        # x: B L+T C
        x, others = tokens.split_away(x)
        video, text = tokens.split_video(x)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.img_mod(tokens.vector)
        text_modulation = self.txt_mod(tokens.vector)
        modulations = [self.txt_mod(vector) for _, vector in others]

        h = in_own_dtype(self.img_attn_qkv, modulate(self.norm(video), shift1, scale1, tokens.dtype))
        q, k, v = heads(h, self.num_heads)
        q, k = self.img_attn_q_norm(q), self.img_attn_k_norm(k)
        joined = tokens.join((q, k, v), self.text_heads(text, text_modulation, tokens.dtype))
        del h, q, k, v  # the video's alone
        other_heads = [
            self.text_heads(other, modulation, tokens.dtype)
            for (other, _), modulation in zip(others, modulations, strict=True)
        ]
        seen, *others_seen = attend_jointly(*joined, tokens, other_heads)

        video_seen, text_seen = tokens.split_video(seen)
        video = add_gated(video, gate1, in_own_dtype(self.img_attn_proj, video_seen))
        text = self.finish_text(text, text_seen, text_modulation, tokens.dtype)
        finished = [
            self.finish_text(other, one_seen, modulation, tokens.dtype)
            for (other, _), one_seen, modulation in zip(others, others_seen, modulations, strict=True)
        ]
        # the expensive one last: if it runs in pieces, recomputing the block stops here
        video = self.feed_forward(video, self.img_mlp, shift2, scale2, gate2, tokens.dtype)
        return torch.cat([video, text, *finished], dim=1)

    def text_heads(self, text: Tensor, modulation: Sequence[Tensor], dtype: torch.dtype) -> Heads:
        """Return the query, key and value of a text, B T C. modulation: six tensors B 1 C."""
        shift, scale, *_ = modulation
        q, k, v = heads(
            in_own_dtype(self.txt_attn_qkv, modulate(self.norm(text), shift, scale, dtype)), self.num_heads
        )
        return self.txt_attn_q_norm(q), self.txt_attn_k_norm(k), v

    def finish_text(
        self, text: Tensor, seen: Tensor, modulation: Sequence[Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Add to a text what it sees, B T C, and its feed-forward."""
        _, _, gate1, shift2, scale2, gate2 = modulation
        text = add_gated(text, gate1, in_own_dtype(self.txt_attn_proj, seen))
        return self.feed_forward(text, self.txt_mlp, shift2, scale2, gate2, dtype)

    def modulated_input(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        """Return what attention gets for the video tokens of x: B L+T C -> B L C."""
        shift, scale, *_ = self.img_mod(tokens.vector)
        return modulate(self.norm(x[:, : tokens.video]), shift, scale, tokens.dtype)

    def feed_forward(
        self, x: Tensor, mlp: Mlp, shift: Tensor, scale: Tensor, gate: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Add the feed-forward branch of a stream to x; each token is processed independently.

        x: B L C; shift, scale, gate: B 1 C float32.
        """
        return add_gated(x, gate, mlp(modulate(self.norm(x), shift, scale, dtype)))


class MMSingleStreamBlock(nn.Module):
    """Block in which video and text share all weights; attention and feed-forward run in parallel."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.widths = (dim, dim, dim, ffn_dim)
        self.norm = Float32LayerNorm(dim, eps)
        self.modulation = HunyuanModulation(dim, 3)
        self.linear1 = nn.Linear(dim, 3 * dim + ffn_dim)
        self.q_norm = RMSNorm(dim // num_heads, eps)
        self.k_norm = RMSNorm(dim // num_heads, eps)
        self.linear2 = nn.Linear(dim + ffn_dim, dim)

    def forward(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        # x: B L+T C
        x, others = tokens.split_away(x)
        q, k, v, hidden, gate = self.begin(x, tokens.vector, tokens.dtype)
        begun = [self.begin(other, vector, tokens.dtype) for other, vector in others]
        other_heads = [(self.q_norm(q2), self.k_norm(k2), v2) for q2, k2, v2, *_ in begun]
        seen, *others_seen = attend_turned(self.q_norm(q), self.k_norm(k), v, tokens, other_heads)
        x = self.finish(x, seen, hidden, gate)
        if not others:
            return x
        finished = [
            self.finish(other, one_seen, hidden2, gate2)
            for (other, _), one_seen, (*_, hidden2, gate2) in zip(others, others_seen, begun, strict=True)
        ]
        return torch.cat([x, *finished], dim=1)

    def begin(self, x: Tensor, vector: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return query, key and value of tokens, B L N D, their feed-forward's input, and their gate."""
        shift, scale, gate = self.modulation(vector)
        # in one split, so that its gradient is written once
        *qkv, hidden = in_own_dtype(self.linear1, modulate(self.norm(x), shift, scale, dtype)).split(
            self.widths, dim=-1
        )
        return *(one.unflatten(-1, (self.num_heads, -1)) for one in qkv), hidden, gate

    def finish(self, x: Tensor, seen: Tensor, hidden: Tensor, gate: Tensor) -> Tensor:
        """Add to tokens what they see and their feed-forward."""
        return add_gated(x, gate, in_own_dtype(self.linear2, join_gelu(seen, hidden)))


def heads(qkv: Tensor, num_heads: int) -> Heads:
    """Split B L 3C into query, key and value, each B L N D."""
    query, key, value = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    return query, key, value


def attend_jointly(
    query: Tensor, key: Tensor, value: Tensor, tokens: HunyuanTokens, others: Sequence[Heads] = ()
) -> tuple[Tensor, ...]:
    """Compute the attention of the video with its text; return B L+T C.

    query, key, value: B L+T N D, those of the video rotated. others: those of a second text, B T' N D, if
    there is one. Then the video attends to that one too, what it sees is combined, and what the second text
    sees, B T' C, is returned as well.
    """
    seen = attend(query, key, value, tokens.attention, tokens.lengths)
    away, length = tokens.away, tokens.video
    if away is None:
        return (seen.flatten(2),)
    (second,) = others
    query, key, value = (
        torch.cat([one[:, :length], other], dim=1)
        for one, other in zip((query, key, value), second, strict=True)
    )
    other_seen = attend(query, key, value, tokens.attention, away.lengths)
    steered = away.steer(seen[:, :length], other_seen[:, :length])
    return torch.cat([steered, seen[:, length:]], dim=1).flatten(2), other_seen[:, length:].flatten(2)


def attend_turned(
    query: Tensor, key: Tensor, value: Tensor, tokens: HunyuanTokens, others: Sequence[Heads] = ()
) -> tuple[Tensor, ...]:
    """Rotate the video tokens, B L+T N D and normalised, and do as `attend_jointly`."""
    query, key = turn_first(query, tokens.rotary), turn_first(key, tokens.rotary)
    return attend_jointly(query, key, value, tokens, others)
