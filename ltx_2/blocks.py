"""Blocks of LTX-2: two streams of tokens, video and audio, with weights of their own.

In each block a stream sees itself, its text and the other stream; there is one attention for each direction
between the streams. Source: the released code of LTX-2. Norms, modulation and rotation are always float32.
Everything else, including the residual stream, computes in the dtype of its weights or of autocast. Module
names follow the published checkpoints.
"""
# Letters: B batch, L video tokens, M sound tokens, T text tokens, S times (2 with given frames), N heads,
# D head width, C width of a stream, W of the wider one

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ltx_2.configs import EPS, SOUND, VIDEO, LtxConfig, StreamNames
from modules.attention.attend import attend
from modules.layers.half_rope import rotate_halves
from modules.layers.modulation import add_gated, modulate, split_segments
from modules.layers.norms import NamedFeedForward, RMSNorm, run_in_weight_dtype
from modules.layers.rope import rotate
from modules.speed_options import SDPA, AttentionChoice

if TYPE_CHECKING:  # loaded only if processes share tokens
    from runtime.offload.context import TokenShard

Parts = dict[StreamNames, Tensor]  # the tokens of each stream, B L C
gelu = partial(functional.gelu, approximate="tanh")
UNSEEN = -1e4  # added to attention logits whose weight has to be 0


@dataclass(frozen=True)
class LtxReferences:
    """Reference latents of a video, whose tokens precede the video's."""

    latents: Sequence[Tensor] = ()  # each B Z f h w, with sides reduced by a whole factor
    time: int = 1  # the step at which their frames were taken
    # references' fraction of the timestep; above 0 they are noisy, and their velocity is returned too
    share: float = 0.0
    strengths: Tensor | None = None  # M, 0..1: how strongly the video attends to each token; None: fully

    @property
    def counts(self) -> list[int]:
        """Return the number of tokens of each reference."""
        return [math.prod(latents.shape[2:]) for latents in self.latents]


@dataclass(frozen=True)
class LtxAudioReferences(LtxReferences):
    """Clean audio references, B Z T K each, whose tokens precede the audio's."""

    is_before: bool = False  # they end before the audio begins; else they begin with it
    is_hidden_from_video: bool = False  # the video does not attend to them
    is_without_text: bool = False  # they do not attend to the text

    @property
    def counts(self) -> list[int]:
        """Return the number of tokens of each reference."""
        return [latents.shape[2] for latents in self.latents]


@dataclass(frozen=True)
class CrossInputs:
    """Inputs of a stream's attention to the other stream."""

    rotary: Tensor  # by time only, L N D/2 2
    rows: Tensor  # B S 4 C float32: by its own time, scale and shift for either direction
    gate: Tensor  # B 1 C float32, by the other stream's time
    # B 1 1: 0 for samples in which the other stream has no influence; None: it has influence in all
    influence: Tensor | None = None


@dataclass(frozen=True)
class Stream:
    """Inputs of the blocks for the video or the audio stream, in addition to its tokens."""

    rotary: Tensor  # rotations of its tokens, L N D/2 2, or B L N D/2 2
    texts: tuple[Tensor, ...]  # each B T C; one unless there is a second text
    rows: Tensor  # B S R C float32: shifts, scales and gates by time, R 6 or 9
    time: Tensor  # B S C float32, embedded
    # B 1 2 C float32: shift and scale of the text, 0 if no time changes them; None: the text is not modulated
    text_rows: Tensor | None
    # if S > 1: the number of tokens in front that have the first time; or each token's index of its time, B L
    split: int | Tensor = 0
    fractions: Tensor | None = None  # S fractions of the timestep; None: tokens in front are clean, if any
    cross: CrossInputs | None = None  # None: there is no attention to another stream
    shard: "TokenShard | None" = None  # the tokens that this process has; None if it has all
    # from `dim_references`, for all tokens; None: no attention is dimmed
    dimmed: tuple[Tensor, Tensor] | None = None
    num_hidden: int = 0  # number of tokens in front, of all, to which the other stream does not attend
    num_without_text: int = 0  # number of tokens in front that do not attend to the text

    @property
    def length(self) -> int:
        """Return the number of tokens of the stream."""
        return self.rotary.shape[-4]

    def cut(self, shard: "TokenShard") -> "Stream":
        """Return the inputs for the tokens that one process computes."""
        cross, split = self.cross, self.split
        if cross is not None:
            cross = replace(cross, rotary=shard.slice_rotary(cross.rotary))
        return replace(
            self,
            rotary=shard.slice_rotary(self.rotary),
            cross=cross,
            split=shard.take(split) if isinstance(split, Tensor) else shard.count_among_first(split),
            num_without_text=shard.count_among_first(self.num_without_text),
            shard=shard,
        )


@dataclass(frozen=True)
class LtxTokens:
    """Inputs of the blocks in addition to the tokens x, B L+M W with the video first.

    Built once per forward pass. The narrower stream is padded with zeros to W channels.
    """

    streams: dict[StreamNames, Stream]
    grid: tuple[int, ...]  # latent frames, rows, columns; empty without video
    audio_grid: tuple[int, ...]  # latent audio frames and their frequency bins; empty without audio
    dtype: torch.dtype  # dtype of activations between layers
    attention: AttentionChoice
    combine: Callable[..., Tensor] | None  # combines attentions to several texts, B L N D; None: one text
    sees_values: bool = False  # self-attention is replaced by its values
    keeps_references: bool = False  # whether the velocities of references are returned too

    def without_self_attention(self) -> "LtxTokens":
        """Return the inputs for a pass in which self-attention returns its values unmixed."""
        return replace(self, sees_values=True)

    @property
    def stream_lengths(self) -> tuple[int, ...]:
        """Return each stream's number of tokens."""
        return tuple(stream.length for stream in self.streams.values())

    def cut(self, *parts: "TokenShard") -> "LtxTokens":
        """Return the inputs for one process, which has a part of each stream's tokens."""
        streams = {}
        for (names, stream), shard in zip(self.streams.items(), parts, strict=True):
            streams[names] = stream.cut(shard)
        return replace(self, streams=streams)

    def split(self, x: Tensor) -> Parts:
        """Split tokens x into each stream's tokens, B L C."""
        if len(self.streams) == 1:
            return dict.fromkeys(self.streams, x)
        parts = {}
        wide = x.split(self.stream_lengths, dim=1)
        for (names, stream), tokens in zip(self.streams.items(), wide, strict=True):
            parts[names] = tokens[..., : stream.time.shape[-1]]
        return parts

    def join(self, parts: Parts) -> Tensor:
        """Concatenate the tokens of all streams, B L+M W."""
        if len(parts) == 1:
            return next(iter(parts.values()))
        width = max(tokens.shape[-1] for tokens in parts.values())
        wide = [functional.pad(tokens, (0, width - tokens.shape[-1])) for tokens in parts.values()]
        return torch.cat(wide, dim=1)


class LtxAttention(nn.Module):
    """Attention from one set of tokens to another; q and k are normalized over all heads together."""

    def __init__(
        self, heads: int, is_gated: bool, splits_heads: bool, query_dim: int, key_dim: int, dim: int
    ) -> None:
        """Build the layers.

        `dim` is the width of all heads together; `is_gated` gives each head's output a gate. With
        `splits_heads`, rotary pairs are channels of a head's two halves, else neighbors.
        """
        super().__init__()
        self.num_heads = heads
        self.to_q = nn.Linear(query_dim, dim)
        self.to_k = nn.Linear(key_dim, dim)
        self.to_v = nn.Linear(key_dim, dim)
        self.q_norm = RMSNorm(dim, EPS)
        self.k_norm = RMSNorm(dim, EPS)
        self.to_out = nn.ModuleList([nn.Linear(dim, query_dim)])
        if is_gated:
            self.to_gate_logits = nn.Linear(query_dim, heads)
        self._rotate = rotate_halves if splits_heads else rotate

    def queries(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        """Return the queries of x, B L N D."""
        return self._rotate_heads(self.q_norm(run_in_weight_dtype(self.to_q, x)), rotary)

    def keys(self, x: Tensor, rotary: Tensor | None = None) -> Tensor:
        """Return the normalized, rotated keys of x, B L N D."""
        return self._rotate_heads(self.k_norm(run_in_weight_dtype(self.to_k, x)), rotary)

    def values(self, x: Tensor) -> Tensor:
        """Project x to values, B L N D."""
        return run_in_weight_dtype(self.to_v, x).unflatten(-1, (self.num_heads, -1))

    def project(self, x: Tensor, attended: Tensor) -> Tensor:
        """Gate the attention output, B L N D, by tokens x, B L C, and project it to B L C."""
        if hasattr(self, "to_gate_logits"):
            gates = (
                2 * run_in_weight_dtype(self.to_gate_logits, x).sigmoid()
            )  # B L N; zero logits give gates of 1
            attended = attended * gates.unsqueeze(-1).to(attended.dtype)
        return run_in_weight_dtype(self.to_out[0], attended.flatten(2))

    def _rotate_heads(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        heads = x.unflatten(-1, (self.num_heads, -1))
        return heads if rotary is None else self._rotate(heads, rotary)


def norm_tokens(x: Tensor) -> Tensor:
    """Apply RMSNorm without weights over the channels, in the dtype of x."""
    return functional.rms_norm(x, x.shape[-1:], eps=EPS)


class LtxBlock(nn.Module):
    """Self-attention, cross-attention to the text and to the other stream, and feed-forward.

    Each stream has its own layers. All are modulated by shift, scale and gate of the timestep, except the
    attention to the text in LTX-2.0.
    """

    def __init__(self, config: LtxConfig) -> None:
        """Build self-attention, text attention and feed-forward of each stream, and attention between two."""
        super().__init__()
        attention = partial(LtxAttention, config.num_heads, config.is_gated, config.splits_heads)
        # shift, scale and gate: of self-attention, of the feed-forward, and of the attention to the text
        num_rows = 9 if config.modulates_text else 6
        for names, stream in config.streams.items():
            prefix = names.prefix
            dim = stream.dim
            setattr(self, f"{prefix}attn1", attention(dim, dim, dim))
            setattr(self, f"{prefix}attn2", attention(dim, dim, dim))
            setattr(self, f"{prefix}ff", NamedFeedForward(dim, stream.ffn_dim, gelu, stream.ff_bias))
            setattr(self, f"{prefix}scale_shift_table", nn.Parameter(torch.zeros(num_rows, dim)))
            if config.modulates_text:
                setattr(self, f"{prefix}prompt_scale_shift_table", nn.Parameter(torch.zeros(2, dim)))
        if len(config.streams) < 2:
            return
        for names, other in ((VIDEO, SOUND), (SOUND, VIDEO)):
            dim = config.streams[names].dim
            setattr(self, names.cross_attn, attention(dim, config.streams[other].dim, config.cross_dim))
            # scale and shift as query, scale and shift as key, and the gate
            setattr(self, names.cross_table, nn.Parameter(torch.zeros(5, dim)))

    def forward(self, x: Tensor, tokens: LtxTokens) -> Tensor:
        """Apply the block to tokens x, B L+M W."""
        # x: B L+M W
        rows = {names: self._split_rows(names, stream) for names, stream in tokens.streams.items()}
        parts = {}
        for names, stream_x in tokens.split(x).items():
            parts[names] = self.see_itself_and_text(names, stream_x, tokens, rows[names])
        if all(stream.cross is not None for stream in tokens.streams.values()):
            parts = self.see_each_other(parts, tokens)
        # the feed-forward comes last: if it runs in pieces, recomputing the block can stop before it
        changed = {names: self.change(names, parts[names], tokens, rows[names]) for names in reversed(parts)}
        return tokens.join({names: changed[names] for names in parts})

    def modulated_input(self, x: Tensor, tokens: LtxTokens) -> Tensor:
        """Return the first stream's modulated input of self-attention, B L C, from a block's input x."""
        names, first = next(iter(tokens.split(x).items()))
        stream = tokens.streams[names]
        shift, scale, *_ = self._split_rows(names, stream)
        return modulate(norm_tokens(first.float()), shift, scale, tokens.dtype, split=stream.split)

    def see_itself_and_text(
        self, names: StreamNames, x: Tensor, tokens: LtxTokens, rows: Sequence[Tensor]
    ) -> Tensor:
        """Add self-attention and cross-attention to text to a stream, B L C; `rows` are its `_split_rows`."""
        stream = tokens.streams[names]
        # the last three, of the attention to the text, are not in LTX-2.0
        shift, scale, gate, _, _, _, *text_rows = rows
        h = modulate(norm_tokens(x.float()), shift, scale, tokens.dtype, split=stream.split)
        x = add_gated(x, gate, self._see_itself(names, h, tokens), stream.split)

        text_shift, text_scale, text_gate = text_rows or (None, None, None)
        h = modulate(norm_tokens(x.float()), text_shift, text_scale, tokens.dtype, split=stream.split)
        return add_gated(x, text_gate, self._see_text(names, h, tokens), stream.split)

    def see_each_other(self, parts: Parts, tokens: LtxTokens) -> Parts:
        """Apply cross-attention between the streams; both directions read the same input tokens."""
        inputs = {names: self._modulate_cross_inputs(names, x, tokens) for names, x in parts.items()}
        changed = {}
        for names, other in ((VIDEO, SOUND), (SOUND, VIDEO)):
            cross = tokens.streams[names].cross
            assert cross is not None  # there are two streams
            gate = getattr(self, names.cross_table)[4:] + cross.gate  # float32, as the gate
            if cross.influence is not None:
                gate = gate * cross.influence
            query_input, key_input = inputs[names][names], inputs[other][names]
            branch = self._see_other(names, other, query_input, key_input, tokens=tokens)
            changed[names] = add_gated(parts[names], gate, branch)
        return changed

    def _modulate_cross_inputs(
        self, names: StreamNames, x: Tensor, tokens: LtxTokens
    ) -> dict[StreamNames, Tensor]:
        """Return a stream's inputs of attention between the streams, B L C, keyed by the receiving stream."""
        stream = tokens.streams[names]
        assert stream.cross is not None
        table = getattr(self, names.cross_table)  # added in float32, as the rows
        # scale and shift for the attention of the video, and for the attention of the audio
        video_scale, video_shift, audio_scale, audio_shift = (table[:4] + stream.cross.rows).unbind(2)
        h = norm_tokens(x.float())
        return {
            VIDEO: modulate(h, video_shift, video_scale, tokens.dtype, split=stream.split),
            SOUND: modulate(h, audio_shift, audio_scale, tokens.dtype, split=stream.split),
        }

    def change(self, names: StreamNames, x: Tensor, tokens: LtxTokens, all_rows: Sequence[Tensor]) -> Tensor:
        """Add a stream's feed-forward branch, B L C; `all_rows` are the stream's `_split_rows`."""
        stream = tokens.streams[names]
        rows = all_rows[3:6]
        layer = getattr(self, f"{names.prefix}ff")
        if isinstance(stream.split, Tensor):  # in one piece, because the rows are per token
            shift, scale, gate = rows
            h = modulate(norm_tokens(x.float()), shift, scale, tokens.dtype, split=stream.split)
            return add_gated(x, gate, layer(h), stream.split)
        parts = []
        for part, *row in split_segments(stream.split, rows, x):
            # positional: code that computes it in pieces passes arguments by position
            parts.append(self.feed_forward(part, layer, tokens.dtype, *row))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def feed_forward(
        self, x: Tensor, layer: nn.Module, dtype: torch.dtype, shift: Tensor, scale: Tensor, gate: Tensor
    ) -> Tensor:
        """Add a feed-forward branch to a segment x, B L C. Modulation rows are B 1 C float32 each."""
        return add_gated(x, gate, layer(modulate(norm_tokens(x.float()), shift, scale, dtype)))

    def _see_itself(self, names: StreamNames, x: Tensor, tokens: LtxTokens) -> Tensor:
        """Return a stream's self-attention, over the tokens of all processes."""
        layer = getattr(self, f"{names.prefix}attn1")
        stream = tokens.streams[names]
        value = layer.values(x)
        if tokens.sees_values:
            return layer.project(x, value)
        query, key = layer.queries(x, stream.rotary), layer.keys(x, stream.rotary)
        attend_all = _attend if stream.dimmed is None else partial(_attend_dimmed, *stream.dimmed)
        if stream.shard is None:
            return layer.project(x, attend_all(query, key, value, tokens))
        query, key, value = stream.shard.gather_tokens(query, key, value)
        return layer.project(x, stream.shard.gather_heads(attend_all(query, key, value, tokens)))

    def _see_text(self, names: StreamNames, x: Tensor, tokens: LtxTokens) -> Tensor:
        """Return a stream's cross-attention to its text, combined with that to a second text, if any."""
        layer = getattr(self, f"{names.prefix}attn2")
        stream = tokens.streams[names]
        texts = stream.texts
        if stream.text_rows is not None:
            table = getattr(self, f"{names.prefix}prompt_scale_shift_table")
            shift, scale = (table + stream.text_rows).unbind(2)
            texts = tuple(modulate(text, shift, scale, tokens.dtype) for text in texts)
        query = layer.queries(x)
        attended = [_attend(query, layer.keys(text), layer.values(text), tokens) for text in texts]
        combined = attended[0] if tokens.combine is None else tokens.combine(*attended)
        if stream.num_without_text:  # these references see no text: their attention is 0
            without, combined = combined.tensor_split([stream.num_without_text], dim=1)
            combined = torch.cat([torch.zeros_like(without), combined], dim=1)
        return layer.project(x, combined)

    def _see_other(
        self, names: StreamNames, other: StreamNames, x: Tensor, other_x: Tensor, tokens: LtxTokens
    ) -> Tensor:
        """Return the attention of a stream's tokens x, B L W, to the tokens of the other stream."""
        layer = getattr(self, names.cross_attn)
        stream = tokens.streams[names]
        other_stream = tokens.streams[other]
        assert stream.cross is not None
        assert other_stream.cross is not None
        query = layer.queries(x, stream.cross.rotary)
        key = layer.keys(other_x, other_stream.cross.rotary)
        value = layer.values(other_x)
        first = other_stream.num_hidden  # hidden reference tokens come first
        if stream.shard is None or other_stream.shard is None:
            return layer.project(x, _attend(query, key[:, first:], value[:, first:], tokens))
        # with several processes, each computes some heads for all tokens
        (query,) = stream.shard.gather_tokens(query)
        key, value = other_stream.shard.gather_tokens(key, value)
        attended = _attend(query, key[:, first:], value[:, first:], tokens)
        return layer.project(x, stream.shard.gather_heads(attended))

    def _split_rows(self, names: StreamNames, stream: Stream) -> Sequence[Tensor]:
        """Return the shifts, scales and gates of a stream's layers, each B S C float32."""
        table: Tensor = getattr(self, f"{names.prefix}scale_shift_table")
        return (table + stream.rows).unbind(2)  # the sum is float32, as the rows


def _attend(query: Tensor, key: Tensor, value: Tensor, tokens: LtxTokens) -> Tensor:
    """Compute attention in one dtype, because files may mix the dtypes of q, k and v."""
    dtype = tokens.dtype
    return attend(query.to(dtype), key.to(dtype), value.to(dtype), tokens.attention)


def dim_references(strengths: Tensor, counts: Sequence[int], num_video_tokens: int) -> tuple[Tensor, Tensor]:
    """Return extra query and key channels, L E each, whose products add a bias to attention's logits.

    The bias weakens attention between references and video, and hides references from each other. The product
    of a query and a key over these channels is the number to add: two channels give the logarithms between
    video and references, and one channel for each reference R gives UNSEEN between its queries and the keys
    of the other references. Source: the released code of LTX-2.

    Args:
        strengths: M, 0..1: how strongly each reference token and the video attend to each other. The
            logarithm is added to the logits.
        counts: Number of tokens of each reference. These come before the video's.
        num_video_tokens: Number of tokens of the video.
    """
    is_video = functional.pad(torch.ones_like(strengths[:1]).expand(num_video_tokens), (len(strengths), 0))
    logarithms = functional.pad(strengths.log().clamp(min=UNSEEN), (0, num_video_tokens))
    membership = torch.block_diag(*(strengths.new_ones(count, 1) for count in counts))
    membership = functional.pad(membership, (0, 0, 0, num_video_tokens))  # L R: token in reference
    hidden = UNSEEN * (1 - membership) * (1 - is_video[:, None])  # L R: keys of the other references
    # is_video * logarithms + logarithms * is_video + membership * hidden
    queries = torch.stack([is_video, logarithms, *membership.unbind(1)], dim=1)
    keys = torch.stack([logarithms, is_video, *hidden.unbind(1)], dim=1)
    padding = (0, -queries.shape[1] % 8)  # kernels need widths that are multiples of 8
    return functional.pad(queries, padding), functional.pad(keys, padding)


def _attend_dimmed(
    more_queries: Tensor, more_keys: Tensor, query: Tensor, key: Tensor, value: Tensor, tokens: LtxTokens
) -> Tensor:
    """Compute attention whose logits get the bias of extra channels, which weaken attention to references.

    The channels `more_queries` and `more_keys`, L E each, are such that their product is the bias. Always in
    torch, because 8-bit kernels are too coarse.
    """
    width = query.shape[-1]
    num_more = more_queries.shape[-1]
    divisor = math.sqrt(width + num_more)  # attention divides the logits by it
    shape = (*query.shape[:3], num_more)
    extra_query = (more_queries * divisor)[None, :, None].expand(shape)  # added to the logits undivided
    extra_key = more_keys[None, :, None].expand(shape)
    scaled_query = query * (divisor / math.sqrt(width))  # as if attention divided by sqrt(width)
    query = torch.cat([scaled_query, extra_query.to(query.dtype)], dim=-1)
    key = torch.cat([key, extra_key.to(key.dtype)], dim=-1)
    value = functional.pad(value, (0, num_more))
    choice = replace(tokens.attention, mode=SDPA.mode)
    return _attend(query, key, value, replace(tokens, attention=choice))[..., :width]
