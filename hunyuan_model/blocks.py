"""Blocks in which video and text tokens attend to each other: double (separate weights) and single (shared).

Source: the released model code and Kong et al. 2024, arXiv 2412.03603, after Esser et al. 2024, arXiv
2403.03206. Always float32: the modulating embedding, modulation, norms, rotary angles. Everything else, also
the residual stream, computes in the dtype of its weights or of autocast. Module names follow the published
checkpoints.
"""
# Letters: B batch, L video tokens, T text tokens, N heads, D head width, C = N * D

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from modules.attention.attend import attend
from modules.attention.lengths import Lengths
from modules.attention.options import AttentionChoice
from modules.layers.norms import Float32LayerNorm, RMSNorm
from modules.layers.precision import run
from modules.layers.rope import rotate


@dataclass(frozen=True)
class HunyuanTokens:
    """Inputs of the blocks besides the tokens x (B L+T C, the video first); built once per forward pass."""

    grid: tuple[int, int, int]  # video tokens along frames, rows, columns
    rotary: Tensor  # rotations of the video tokens, L 1 D/2 2, or B L 1 D/2 2; text is not rotated
    lengths: Lengths | None  # how many of the L + T tokens are real; None: all
    # B C float32: timestep, pooled text and guidance, from which every block computes its modulation
    vector: Tensor
    dtype: torch.dtype  # of activations between layers
    attention: AttentionChoice

    @property
    def video(self) -> int:
        """Number of video tokens, L."""
        return self.rotary.shape[-4]


class Modulation(nn.Module):
    """Compute the shifts, scales and gates of a block."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(dim, count * dim)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        # vector: B C float32 -> count tensors B 1 C float32
        return run(self.linear, functional.silu(vector)).float().unsqueeze(1).chunk(self.count, dim=-1)


class Mlp(nn.Module):
    """Two layers with an activation between them."""

    def __init__(self, dim: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return run(self.fc2, self._activation(run(self.fc1, x)))


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, as trained."""
    return functional.gelu(x, approximate="tanh")


class MMDoubleStreamBlock(nn.Module):
    """Block in which video and text have separate weights and share one attention."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_width = dim // num_heads
        self.norm = Float32LayerNorm(dim, eps)  # has no weights, so one serves both streams and both branches
        self.img_mod = Modulation(dim, 6)
        self.img_attn_qkv = nn.Linear(dim, 3 * dim)
        self.img_attn_q_norm = RMSNorm(head_width, eps)
        self.img_attn_k_norm = RMSNorm(head_width, eps)
        self.img_attn_proj = nn.Linear(dim, dim)
        self.img_mlp = Mlp(dim, ffn_dim, gelu)
        self.txt_mod = Modulation(dim, 6)
        self.txt_attn_qkv = nn.Linear(dim, 3 * dim)
        self.txt_attn_q_norm = RMSNorm(head_width, eps)
        self.txt_attn_k_norm = RMSNorm(head_width, eps)
        self.txt_attn_proj = nn.Linear(dim, dim)
        self.txt_mlp = Mlp(dim, ffn_dim, gelu)

    def forward(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        # x: B L+T C
        video, text = x[:, : tokens.video], x[:, tokens.video :]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.img_mod(tokens.vector)
        text_shift1, text_scale1, text_gate1, text_shift2, text_scale2, text_gate2 = self.txt_mod(
            tokens.vector
        )

        h = run(self.img_attn_qkv, modulate(self.norm(video), shift1, scale1, tokens.dtype))
        q, k, v = heads(h, self.num_heads)
        q, k = rotate(self.img_attn_q_norm(q), tokens.rotary), rotate(self.img_attn_k_norm(k), tokens.rotary)
        h = run(self.txt_attn_qkv, modulate(self.norm(text), text_shift1, text_scale1, tokens.dtype))
        text_q, text_k, text_v = heads(h, self.num_heads)
        text_q, text_k = self.txt_attn_q_norm(text_q), self.txt_attn_k_norm(text_k)
        # B L+T N D
        q, k, v = torch.cat([q, text_q], dim=1), torch.cat([k, text_k], dim=1), torch.cat([v, text_v], dim=1)
        seen = attend(q, k, v, tokens.attention, tokens.lengths).flatten(2)

        video = add_gated(video, gate1, run(self.img_attn_proj, seen[:, : tokens.video]))
        text = add_gated(text, text_gate1, run(self.txt_attn_proj, seen[:, tokens.video :]))
        text = self.feed_forward(text, self.txt_mlp, text_shift2, text_scale2, text_gate2, tokens.dtype)
        # the expensive one last: if it runs in pieces, recomputing the block stops here
        video = self.feed_forward(video, self.img_mlp, shift2, scale2, gate2, tokens.dtype)
        return torch.cat([video, text], dim=1)

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
        self.widths = (3 * dim, ffn_dim)
        self.norm = Float32LayerNorm(dim, eps)
        self.modulation = Modulation(dim, 3)
        self.linear1 = nn.Linear(dim, 3 * dim + ffn_dim)
        self.q_norm = RMSNorm(dim // num_heads, eps)
        self.k_norm = RMSNorm(dim // num_heads, eps)
        self.linear2 = nn.Linear(dim + ffn_dim, dim)

    def forward(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        # x: B L+T C
        shift, scale, gate = self.modulation(tokens.vector)
        qkv, hidden = run(self.linear1, modulate(self.norm(x), shift, scale, tokens.dtype)).split(
            self.widths, dim=-1
        )
        q, k, v = heads(qkv, self.num_heads)
        seen = attend_turned(self.q_norm(q), self.k_norm(k), v, tokens)
        return add_gated(x, gate, run(self.linear2, torch.cat([seen, gelu(hidden)], dim=-1)))


def modulate(normed: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return normed * (1 + scale) + shift, computed in float32."""
    return torch.addcmul(shift, normed, 1 + scale).to(dtype)


def add_gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """Return x + gate * branch in one pass, in the dtype of x."""
    return torch.addcmul(x, gate.to(x.dtype), branch.to(x.dtype))


def heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split B L 3C into query, key and value, each B L N D."""
    query, key, value = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    return query, key, value


def attend_turned(query: Tensor, key: Tensor, value: Tensor, tokens: HunyuanTokens) -> Tensor:
    """Rotate the video tokens and attend; return B L+T C. query, key, value: B L+T N D, normalised."""
    query, key = _rotate_video(query, tokens), _rotate_video(key, tokens)
    return attend(query, key, value, tokens.attention, tokens.lengths).flatten(2)


def _rotate_video(x: Tensor, tokens: HunyuanTokens) -> Tensor:
    """Rotate the first L tokens of x, B L+T N D, by their positions."""
    return torch.cat([rotate(x[:, : tokens.video], tokens.rotary), x[:, tokens.video :]], dim=1)
