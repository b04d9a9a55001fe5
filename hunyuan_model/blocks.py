"""Blocks in which video and text tokens attend to each other: double (separate weights) and single (shared).

Source: the released model code and Kong et al. 2024, arXiv 2412.03603, after Esser et al. 2024, arXiv
2403.03206. Always float32: the modulating embedding, modulation, norms, rotary angles. Everything else, also
the residual stream, computes in the dtype of its weights or of autocast. Module names follow the published
checkpoints.
"""
# Letters: B batch, L video tokens, T text tokens, T' of a second text, N heads, D head width, C = N * D

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from hunyuan_model.joining import gelu, join_gelu, rotate_and_join, rotate_first
from modules.attention.attend import CombineAttention, SampleLengths, SecondText, attend
from modules.layers.modulation import add_gated, modulate, split_segments
from modules.layers.norms import Float32LayerNorm, RMSNorm, TwoLayerMlp, run_in_weight_dtype
from modules.layers.rope import select_rotations
from modules.speed_options import AttentionChoice
from runtime.offload.context import TokenShard
from runtime.run_blocks import Hidden

Heads = tuple[Tensor, Tensor, Tensor]  # query, key, value, each B L N D
NOWHERE = sys.maxsize  # an index after all tokens


@dataclass(frozen=True)
class HunyuanTokens:
    """Inputs of the blocks in addition to the tokens x, B L+T C with the video first.

    Built once per forward pass. With a second text, x is B L+T+T' C and texts are B T+T' C.
    """

    grid: tuple[int, int, int]  # video tokens along frames, rows, columns
    rotary: Tensor  # rotations of the video tokens, L 1 D/2 2, or B L 1 D/2 2; text is not rotated
    lengths: SampleLengths | None  # number of the L + T tokens that are real, per sample; None: all
    # B S C: timestep, pooled text and guidance after SiLU (`apply_silu`), from which every block computes its
    # modulation. A second row belongs to the second text only
    vector: Tensor
    dtype: torch.dtype  # dtype of activations between layers
    attention: AttentionChoice
    second_text: SecondText | None = None
    shard: TokenShard | None = None  # the tokens that this process has; None: all

    def cut(self, shard: TokenShard) -> Self:
        """Return the inputs for the tokens of one process."""
        return replace(self, rotary=shard.slice_rotary(self.rotary), shard=shard)

    @property
    def first_noisy_token(self) -> int:
        """Index of the first token of the noisy latents, which is the first token of `grid`."""
        return 0

    def select(self, kept: Tensor, num_left_out: int) -> Self:
        """Return the inputs for the tokens at the ascending positions `kept`, B K.

        Only tokens of the noisy latents are left out.
        """
        lengths = None if self.lengths is None else self.lengths.shorten(num_left_out)
        return replace(self, rotary=select_rotations(self.rotary, kept, num_left_out), lengths=lengths)

    @property
    def num_video_tokens(self) -> int:
        """Number of video tokens, L."""
        return self.rotary.shape[-4]

    @property
    def modulation_split(self) -> int:
        """Negative index where the second text begins in x and in the texts; 0 if there is none."""
        if self.second_text is None:
            return 0
        if self.shard is None:
            return -self.second_text.num_text_tokens
        return -self.shard.count_among_last(self.second_text.num_text_tokens) or NOWHERE

    @property
    def modulation_vectors(self) -> tuple[Tensor, Tensor]:
        """The modulation vectors of video tokens and of text tokens, each B S C."""
        return self.vector[:, :1], self.vector

    @property
    def video_modulation_split(self) -> int:
        """Negative index where the video tokens with a second modulation vector begin; 0: none."""
        return 0

    def split_video(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split x, B L+T ..., into video and text, in one operator so that its gradient is written once."""
        video, text = x.split((self.num_video_tokens, x.shape[1] - self.num_video_tokens), dim=1)
        return video, text

    def join(self, video: Heads, text: Heads) -> Heads:
        """Join normalized heads of video and text to query, key and value, B L+T N D; rotate the video's."""
        video_query, video_key, video_value = video
        text_query, text_key, text_value = text
        query = rotate_and_join(video_query, text_query, self.rotary)
        key = rotate_and_join(video_key, text_key, self.rotary)
        return query, key, torch.cat([video_value, text_value], dim=1)


@dataclass(frozen=True)
class TokensWithRotatedText(HunyuanTokens):
    """Inputs of blocks that rotate texts, too: `rotary` covers all tokens."""

    # its first L rows, sliced outside of compiled code, where lengths may vary
    image_token_rotary: Tensor = field(kw_only=True)

    def cut(self, shard: TokenShard) -> Self:
        """Return the inputs for the tokens of one process; the rotary rows of the video are cut as well."""
        return replace(super().cut(shard), image_token_rotary=shard.slice_rotary(self.image_token_rotary))

    def select(self, kept: Tensor, num_left_out: int) -> Self:
        """Return the inputs for the tokens at the ascending positions `kept`, B K, and their rotary rows."""
        image_rotary = select_rotations(self.image_token_rotary, kept, num_left_out)
        return replace(super().select(kept, num_left_out), image_token_rotary=image_rotary)

    @property
    def num_video_tokens(self) -> int:
        """Number of video tokens, L."""
        return self.image_token_rotary.shape[-4]

    def join(self, video: Heads, text: Heads) -> Heads:
        """Join normalized heads of video and text to query, key and value, B L+T N D; rotate all."""
        query, key, value = (torch.cat(both, dim=1) for both in zip(video, text, strict=True))
        return rotate_first(query, self.rotary), rotate_first(key, self.rotary), value


class EmbeddedText(NamedTuple):
    """Tokens of an embedded text, with their lengths and the modulation vector."""

    tokens: Tensor  # B T C
    lengths: SampleLengths | None  # number of real tokens of video and this text, per sample; None: all
    vector: Tensor  # B 1 C, as `HunyuanTokens.vector`


def join_tokens(
    video: Sequence[Tensor],
    texts: Sequence[EmbeddedText],
    combine_attention: CombineAttention | None,
    tokens_class: type[HunyuanTokens] = HunyuanTokens,
    /,
    **inputs: Any,
) -> Hidden:
    """Return the tokens of video and texts, B L+T C, and the other inputs of the blocks.

    Args:
        video: Tokens of the video, in parts.
        texts: The prompt and, if `combine_attention` is given, a second text.
        combine_attention: Merges the attentions to both texts; None without a second text.
        tokens_class: Class of the returned inputs.
        **inputs: Further fields of that class.
    """
    x = torch.cat([*video, *(text.tokens for text in texts)], dim=1)
    vectors = {id(text.vector): text.vector for text in texts}  # two texts may share one vector
    vector = torch.cat([*vectors.values()], dim=1)
    tokens = tokens_class(lengths=texts[0].lengths, vector=vector, **inputs)
    if combine_attention is not None:
        _, second = texts
        second_text = SecondText(
            tokens.num_video_tokens, second.tokens.shape[1], second.lengths, combine_attention
        )
        tokens = replace(tokens, second_text=second_text)
    return Hidden(x, tokens)


def apply_silu(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """Return SiLU of the embedded time, once for all blocks.

    Args:
        vector: Embedded time, float32.
        dtype: Dtype that the blocks compute in, to which a result without gradient is cast once. With a
            gradient it stays float32, because the gradients of all blocks are added.
    """
    activated = functional.silu(vector)
    return activated if activated.requires_grad else activated.to(dtype)


class HunyuanModulation(nn.Module):
    """Computes the shifts, scales and gates of a block. `name` is its linear layer's name in files."""

    def __init__(self, dim: int, count: int, name: str = "linear") -> None:
        super().__init__()
        self.count, self._name = count, name
        self.add_module(name, nn.Linear(dim, count * dim))

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Return `count` rows of modulation, each B S C float32, for a vector B S C from `apply_silu`."""
        # vector: B S C -> count tensors B S C float32
        linear = getattr(self, self._name)
        return run_in_weight_dtype(linear, vector).float().chunk(self.count, dim=-1)


class DoubleStreamBlock(nn.Module):
    """Block in which video and text have separate weights, set by subclasses, and share one attention."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm = Float32LayerNorm(dim, eps)  # has no weights, so one serves both streams and both branches

    def layers(self, is_text: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Return the modulation of text or video, output projection of attention, and feed-forward layers."""
        raise NotImplementedError

    def heads(self, x: Tensor, is_text: bool) -> Heads:
        """Return query, key and value of text or video tokens B L C; query and key normalized."""
        raise NotImplementedError

    def forward(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        """Apply the block to tokens x, B L+T C."""
        video, text = tokens.split_video(x)
        # conditioning vectors of video and text, from which modulations are computed
        video_vector, text_vector = tokens.modulation_vectors
        modulate_video, video_project, video_mlp = self.layers(is_text=False)
        modulate_text, text_project, text_mlp = self.layers(is_text=True)
        # each six tensors: shift, scale and gate of attention, then of the feed-forward layers
        video_modulation = modulate_video(video_vector)
        text_modulation = modulate_text(text_vector)

        video_heads = self._modulate_heads(
            video,
            video_modulation[0],
            video_modulation[1],
            tokens.video_modulation_split,
            tokens.dtype,
            is_text=False,
        )
        text_heads = self._modulate_heads(
            text, text_modulation[0], text_modulation[1], tokens.modulation_split, tokens.dtype, is_text=True
        )
        heads = tokens.join(video_heads, text_heads)
        del video_heads, text_heads
        video_branch, text_branch = tokens.split_video(attend_jointly(*heads, tokens))
        video = add_gated(
            video,
            video_modulation[2],
            run_in_weight_dtype(video_project, video_branch),
            tokens.video_modulation_split,
        )
        text = add_gated(
            text, text_modulation[2], run_in_weight_dtype(text_project, text_branch), tokens.modulation_split
        )

        # positional: code that computes it in pieces passes arguments by position
        text = self.feed_forward(text, text_mlp, tokens.dtype, tokens.modulation_split, *text_modulation[3:])
        # the video's feed-forward comes last: if it runs in pieces, recomputing the block can stop before it
        outputs = []
        for segment, *rows in split_segments(tokens.video_modulation_split, video_modulation[3:], video):
            outputs.append(self.feed_forward(segment, video_mlp, tokens.dtype, 0, *rows))
        return torch.cat([*outputs, text], dim=1)

    def _modulate_heads(
        self, x: Tensor, shift: Tensor, scale: Tensor, split: int, dtype: torch.dtype, is_text: bool
    ) -> Heads:
        """Return query, key and value of tokens of video or text, B L C, normalized and modulated."""
        return self.heads(modulate(self.norm(x), shift, scale, dtype, split=split), is_text)

    def modulated_input(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        """Return the input of attention for the video tokens of x, B L+T C to B L C."""
        modulation, *_ = self.layers(is_text=False)
        vector, _ = tokens.modulation_vectors
        shift, scale, *_ = modulation(vector)
        video = self.norm(x[:, : tokens.num_video_tokens])
        return modulate(video, shift, scale, tokens.dtype, split=tokens.video_modulation_split)

    def feed_forward(
        self,
        x: Tensor,
        mlp: nn.Module,
        dtype: torch.dtype,
        split: int,
        shift: Tensor,
        scale: Tensor,
        gate: Tensor,
    ) -> Tensor:
        """Add a stream's feed-forward branch to x, B L C. Modulation rows are B S C float32 each."""
        return add_gated(x, gate, mlp(modulate(self.norm(x), shift, scale, dtype, split=split)), split)


class MMDoubleStreamBlock(DoubleStreamBlock):
    """Double-stream block with the layers and names of HunyuanVideo and HunyuanImage."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        """Build the layers without weights, under the names of the released checkpoints."""
        super().__init__(dim, eps)
        self.num_heads = num_heads
        head_width = dim // num_heads
        # 6: shift, scale and gate for attention and for the feed-forward layers
        self.img_mod = HunyuanModulation(dim, 6)
        self.img_attn_qkv = nn.Linear(dim, 3 * dim)
        self.img_attn_q_norm = RMSNorm(head_width, eps)
        self.img_attn_k_norm = RMSNorm(head_width, eps)
        self.img_attn_proj = nn.Linear(dim, dim)
        self.img_mlp = TwoLayerMlp("fc1 fc2", (dim, ffn_dim, dim), gelu)
        self.txt_mod = HunyuanModulation(dim, 6)
        self.txt_attn_qkv = nn.Linear(dim, 3 * dim)
        self.txt_attn_q_norm = RMSNorm(head_width, eps)
        self.txt_attn_k_norm = RMSNorm(head_width, eps)
        self.txt_attn_proj = nn.Linear(dim, dim)
        self.txt_mlp = TwoLayerMlp("fc1 fc2", (dim, ffn_dim, dim), gelu)

    def layers(self, is_text: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Return text or video layers: modulation, attention's output projection, feed-forward."""
        if is_text:
            return self.txt_mod, self.txt_attn_proj, self.txt_mlp
        return self.img_mod, self.img_attn_proj, self.img_mlp

    def heads(self, x: Tensor, is_text: bool) -> Heads:
        """Return a stream's heads from one joint matrix for query, key and value."""
        if is_text:
            layers = self.txt_attn_qkv, self.num_heads, self.txt_attn_q_norm, self.txt_attn_k_norm
        else:
            layers = self.img_attn_qkv, self.num_heads, self.img_attn_q_norm, self.img_attn_k_norm
        return split_heads(x, *layers)


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
        """Apply the block to tokens x, B L+T C."""
        shift, scale, gate = self.modulation(tokens.vector)
        h = modulate(self.norm(x), shift, scale, tokens.dtype, split=tokens.modulation_split)
        # in one split, so that its gradient is written once
        *qkv, hidden = run_in_weight_dtype(self.linear1, h).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in qkv)
        attended = rotate_and_attend(self.q_norm(q), self.k_norm(k), v, tokens)
        return add_gated(
            x, gate, run_in_weight_dtype(self.linear2, join_gelu(attended, hidden)), tokens.modulation_split
        )


def split_heads(
    x: Tensor,
    qkv: nn.Module,
    num_heads: int,
    q_norm: nn.Module | None = None,
    k_norm: nn.Module | None = None,
) -> Heads:
    """Return query, key and value, each B L N D, of tokens B L C. Norms, if given, apply to q and k."""
    q, k, v = run_in_weight_dtype(qkv, x).unflatten(-1, (3, num_heads, -1)).unbind(2)
    return q if q_norm is None else q_norm(q), k if k_norm is None else k_norm(k), v


def attend_jointly(query: Tensor, key: Tensor, value: Tensor, tokens: HunyuanTokens) -> Tensor:
    """Return the attention of video and text to each other, B L+T C.

    `query`, `key` and `value` are B L+T N D; the video's queries and keys are already rotated.
    """
    second = tokens.second_text  # a second text, which the video attends to separately
    shard = tokens.shard  # this process's shard of the tokens
    choice = tokens.attention
    if shard is not None:  # exchange: all heads of this shard's tokens -> some heads of all tokens
        query, key, value = shard.gather_tokens(query, key, value)
    if second is None:
        attended = attend(query, key, value, choice, lengths=tokens.lengths)
        return (attended if shard is None else shard.gather_heads(attended)).flatten(2)
    first_attended = attend(
        second.drop_second_text(query),
        second.drop_second_text(key),
        second.drop_second_text(value),
        choice,
        lengths=tokens.lengths,
    )
    second_attended = attend(
        second.drop_first_text(query),
        second.drop_first_text(key),
        second.drop_first_text(value),
        choice,
        lengths=second.lengths,
    )
    if shard is None:
        return second.combine(first_attended, second_attended).flatten(2)
    return shard.combine(first_attended, second_attended, second).flatten(2)


def rotate_and_attend(query: Tensor, key: Tensor, value: Tensor, tokens: HunyuanTokens) -> Tensor:
    """Rotate the video tokens of normalized heads, B L+T N D, and compute `attend_jointly`."""
    query, key = rotate_first(query, tokens.rotary), rotate_first(key, tokens.rotary)
    return attend_jointly(query, key, value, tokens)
