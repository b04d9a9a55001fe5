"""Blocks of LTX-2: two streams of tokens, video and audio, with weights of their own.

In each block a stream sees itself, its text and the other stream; there is one attention for each direction
between the streams. Source: the released code of LTX-2. Norms, modulation and rotation are always float32.
Everything else, including the residual stream, computes in the dtype of its weights or of autocast. Module
names follow the published checkpoints.
"""
# Letters: B batch, L video tokens, M audio tokens, T text tokens, S times (2 with given frames), N heads,
# D head width, C width of a stream, W of the wider one

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from ltx_2.configs import AUDIO, EPS, VIDEO, LtxConfig, Modality
from modules.attention.attend import attend
from modules.layers.half_rope import rotate_halves
from modules.layers.modulation import add_gated, modulate, split_segments
from modules.layers.norms import NamedFeedForward, RMSNorm, run_in_weight_dtype
from modules.layers.rope import rotate
from modules.speed_options import SDPA, AttentionChoice
from runtime.offload.context import TokenShard

ByModality = dict[Modality, Tensor]  # a tensor for each stream, such as its tokens, B L C
gelu = partial(functional.gelu, approximate="tanh")
MASKED = -1e4  # added to attention logits whose weight has to be 0


@dataclass(frozen=True)
class LtxReferences:
    """Reference latents of a video, whose tokens precede the video's."""

    latents: Sequence[Tensor] = ()  # each B Z f h w, with sides reduced by a whole factor
    frame_stride: int = 1  # every n-th frame of a reference clip was taken
    # their timestep as a fraction of the video's; above 0 they are noisy, and their velocity is returned too
    timestep_fraction: float = 0.0
    # M, 0..1: how strongly the video attends to each token; None: fully
    attention_strengths: Tensor | None = None

    @property
    def token_counts(self) -> list[int]:
        """Return the number of tokens of each reference."""
        return [math.prod(latents.shape[2:]) for latents in self.latents]

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of all references."""
        return sum(self.token_counts)

    @property
    def num_hidden_from_other(self) -> int:
        """Return the number of tokens to which the other stream does not attend."""
        return 0

    @property
    def num_without_text(self) -> int:
        """Return the number of tokens that do not attend to the text."""
        return 0


@dataclass(frozen=True)
class LtxAudioReferences(LtxReferences):
    """Clean audio references, B Z T K each, whose tokens precede the audio's."""

    ends_before_audio: bool = False  # they end before the audio begins; else they begin with it
    is_hidden_from_video: bool = False  # the video does not attend to them
    is_without_text: bool = False  # they do not attend to the text

    @property
    def token_counts(self) -> list[int]:
        """Return the number of tokens of each reference."""
        return [latents.shape[2] for latents in self.latents]

    @property
    def num_hidden_from_other(self) -> int:
        """Return the number of tokens to which the video does not attend."""
        return self.num_tokens * self.is_hidden_from_video

    @property
    def num_without_text(self) -> int:
        """Return the number of tokens that do not attend to the text."""
        return self.num_tokens * self.is_without_text


@dataclass(frozen=True)
class CrossInputs:
    """Inputs of a stream's attention to the other stream."""

    rotary_emb: Tensor  # by time only, L N D/2 2
    # B S 4 C float32, from the stream's own timestep: scale and shift toward each stream
    modulation: Tensor
    gate: Tensor  # B 1 C float32, from the other stream's timestep
    # B 1 1: factor of the gate, 0 for samples without audio; None: 1 in all
    gate_factor: Tensor | None = None


@dataclass(frozen=True)
class TokenTimesteps:
    """A timestep for each token of a stream, as a fraction of the stream's timestep; 0 for a clean token."""

    fractions: Tensor  # S float32, each different
    indices: Tensor  # B L int64: index of each token's fraction


@dataclass(frozen=True)
class StreamConditioning:
    """Inputs of the blocks for the video or the audio stream, in addition to its tokens.

    S timesteps occur in a stream: 1 if all tokens have the same, 2 if the leading conditioning tokens
    (references, clean frames) have their own, or any number with `token_timesteps`.
    """

    rotary_emb: Tensor  # of its tokens, L N D/2 2, or B L N D/2 2
    text_embeddings: tuple[Tensor, ...]  # each B T C; one unless there is a second text
    modulation: Tensor  # B S R C float32: shifts, scales and gates of each timestep, R 6 or 9
    embedded_timestep: Tensor  # B S C float32
    # B 1 2 C float32: shift and scale of the text, 0 without dependence on the timestep; None: not modulated
    text_modulation: Tensor | None
    num_conditioning_tokens: int = 0  # leading tokens with their own timestep
    token_timesteps: TokenTimesteps | None = None  # replaces `num_conditioning_tokens`
    cross: CrossInputs | None = None  # None: there is no attention to another stream
    token_range: TokenShard | None = None  # the tokens that this process has; None if it has all
    # from `make_attention_bias`, for all tokens; None: attention has no bias
    attention_bias: tuple[Tensor, Tensor] | None = None
    num_hidden_from_other: int = 0  # leading tokens, of all, to which the other stream does not attend
    num_without_text: int = 0  # leading tokens that do not attend to the text

    @property
    def length(self) -> int:
        """Return the number of tokens of the stream."""
        return self.rotary_emb.shape[-4]

    @property
    def modulation_split(self) -> int | Tensor:
        """Return which row of a modulation B S C each token takes, as `modulate` and `add_gated` read it."""
        if self.token_timesteps is not None:
            return self.token_timesteps.indices
        return self.num_conditioning_tokens

    def norm_and_modulate(
        self, x: Tensor, shift: Tensor | None, scale: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Normalize tokens x, B L C; then shift and scale each token by the row of its timestep, B S C."""
        return modulate(norm_tokens(x.float()), shift, scale, dtype, split=self.modulation_split)

    def add_gated(self, x: Tensor, gate: Tensor | None, branch: Tensor) -> Tensor:
        """Return x + gate * branch, where each token takes the gate of its timestep, B S C."""
        return add_gated(x, gate, branch, self.modulation_split)

    def cut(self, shard: TokenShard) -> "StreamConditioning":
        """Return these inputs for one process's shard of the stream's tokens."""
        cross, token_timesteps = self.cross, self.token_timesteps
        if cross is not None:
            cross = replace(cross, rotary_emb=shard.slice_rotary(cross.rotary_emb))
        if token_timesteps is not None:
            token_timesteps = replace(token_timesteps, indices=shard.take(token_timesteps.indices))
        return replace(
            self,
            rotary_emb=shard.slice_rotary(self.rotary_emb),
            cross=cross,
            num_conditioning_tokens=shard.count_among_first(self.num_conditioning_tokens),
            token_timesteps=token_timesteps,
            num_without_text=shard.count_among_first(self.num_without_text),
            token_range=shard,
        )


@dataclass(frozen=True)
class LtxTokens:
    """Inputs of the blocks in addition to the tokens x, B L+M W with the video first.

    Built once per forward pass. The narrower stream is padded with zeros to W channels.
    """

    streams: dict[Modality, StreamConditioning]
    grid: tuple[int, ...]  # latent frames, rows, columns; empty without video
    audio_grid: tuple[int, ...]  # latent audio frames and their frequency bins; empty without audio
    dtype: torch.dtype  # dtype of activations between layers
    attention: AttentionChoice
    # combines attentions to several texts, B L N D; None: one text
    combine_text_attention: Callable[..., Tensor] | None
    skips_self_attention: bool = False  # self-attention returns its values unmixed
    returns_reference_velocity: bool = False

    def without_self_attention(self) -> "LtxTokens":
        """Return the inputs for a pass in which self-attention returns its values unmixed."""
        return replace(self, skips_self_attention=True)

    @property
    def stream_lengths(self) -> tuple[int, ...]:
        """Return each stream's number of tokens."""
        return tuple(stream.length for stream in self.streams.values())

    def cut(self, *parts: TokenShard) -> "LtxTokens":
        """Return the inputs for one process, which has a part of each stream's tokens."""
        streams = {}
        for (modality, stream), part in zip(self.streams.items(), parts, strict=True):
            streams[modality] = stream.cut(part)
        return replace(self, streams=streams)

    def split(self, x: Tensor) -> ByModality:
        """Split tokens x into each stream's tokens, B L C."""
        if len(self.streams) == 1:
            return dict.fromkeys(self.streams, x)
        parts = {}
        wide = x.split(self.stream_lengths, dim=1)
        for (modality, stream), tokens in zip(self.streams.items(), wide, strict=True):
            parts[modality] = tokens[..., : stream.embedded_timestep.shape[-1]]
        return parts

    def join(self, parts: ByModality) -> Tensor:
        """Concatenate the tokens of all streams, B L+M W."""
        if len(parts) == 1:
            return next(iter(parts.values()))
        width = max(tokens.shape[-1] for tokens in parts.values())
        wide = [functional.pad(tokens, (0, width - tokens.shape[-1])) for tokens in parts.values()]
        return torch.cat(wide, dim=1)


class LtxAttention(nn.Module):
    """Attention from one set of tokens to another; q and k are normalized over all heads together."""

    def __init__(
        self, num_heads: int, has_gates: bool, rotates_halves: bool, query_dim: int, key_dim: int, dim: int
    ) -> None:
        """Build the layers.

        `dim` is the width of all heads together; `has_gates` gives each head's output a gate. With
        `rotates_halves`, rotary pairs are channels of a head's two halves, else neighbors.
        """
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(query_dim, dim)
        self.to_k = nn.Linear(key_dim, dim)
        self.to_v = nn.Linear(key_dim, dim)
        self.q_norm = RMSNorm(dim, EPS)
        self.k_norm = RMSNorm(dim, EPS)
        self.to_out = nn.ModuleList([nn.Linear(dim, query_dim)])
        if has_gates:
            self.to_gate_logits = nn.Linear(query_dim, num_heads)
        self._rotate = rotate_halves if rotates_halves else rotate

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
            # B L N; zero logits give gates of 1
            gates = 2 * run_in_weight_dtype(self.to_gate_logits, x).sigmoid()
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
        attention = partial(LtxAttention, config.num_heads, config.has_head_gates, config.rotates_halves)
        # shift, scale and gate: of self-attention, of the feed-forward, and of the attention to the text
        num_rows = 9 if config.modulates_text else 6
        for modality, stream in config.streams.items():
            prefix = modality.prefix
            dim = stream.dim
            setattr(self, f"{prefix}attn1", attention(dim, dim, dim))
            setattr(self, f"{prefix}attn2", attention(dim, dim, dim))
            setattr(self, f"{prefix}ff", NamedFeedForward(dim, stream.ffn_dim, gelu, stream.ff_bias))
            setattr(self, f"{prefix}scale_shift_table", nn.Parameter(torch.zeros(num_rows, dim)))
            if config.modulates_text:
                setattr(self, f"{prefix}prompt_scale_shift_table", nn.Parameter(torch.zeros(2, dim)))
        if len(config.streams) < 2:
            return
        for modality, other in ((VIDEO, AUDIO), (AUDIO, VIDEO)):
            dim = config.streams[modality].dim
            setattr(self, modality.cross_attn, attention(dim, config.streams[other].dim, config.cross_dim))
            # scale and shift as query, scale and shift as key, and the gate
            setattr(self, modality.cross_table, nn.Parameter(torch.zeros(5, dim)))

    def forward(self, x: Tensor, tokens: LtxTokens) -> Tensor:
        """Apply the block to tokens x, B L+M W."""
        # attention of each stream, then between the streams, then the feed-forward of each stream
        modulations = {}
        hidden_states = {}
        for modality, stream_x in tokens.split(x).items():
            modulations[modality] = self._compute_modulation(modality, tokens.streams[modality])
            hidden_states[modality] = self.attend_itself_and_text(
                modality, stream_x, tokens, modulations[modality]
            )
        if all(stream.cross is not None for stream in tokens.streams.values()):
            hidden_states = self.attend_each_other(hidden_states, tokens)
        # the video's feed-forward comes last: if it runs in pieces, recomputing the block can stop before it
        outputs = {}
        for modality in reversed(hidden_states):
            outputs[modality] = self.add_feed_forward(
                modality, hidden_states[modality], tokens, modulations[modality]
            )
        return tokens.join({modality: outputs[modality] for modality in hidden_states})

    def modulated_input(self, x: Tensor, tokens: LtxTokens) -> Tensor:
        """Return the first stream's modulated input of self-attention, B L C, from a block's input x."""
        modality, stream_x = next(iter(tokens.split(x).items()))
        stream = tokens.streams[modality]
        shift, scale, *_ = self._compute_modulation(modality, stream)
        return stream.norm_and_modulate(stream_x, shift, scale, tokens.dtype)

    def attend_itself_and_text(
        self, modality: Modality, x: Tensor, tokens: LtxTokens, modulation: Sequence[Tensor]
    ) -> Tensor:
        """Add self-attention and cross-attention to the text to a stream's tokens x, B L C."""
        stream = tokens.streams[modality]
        # the last three, of the attention to the text, are not in LTX-2.0
        shift, scale, gate, _, _, _, *text_attention = modulation
        h = stream.norm_and_modulate(x, shift, scale, tokens.dtype)
        x = stream.add_gated(x, gate, self._attend_itself(modality, h, tokens))

        text_shift, text_scale, text_gate = text_attention or (None, None, None)
        h = stream.norm_and_modulate(x, text_shift, text_scale, tokens.dtype)
        return stream.add_gated(x, text_gate, self._attend_text(modality, h, tokens))

    def attend_each_other(self, hidden_states: ByModality, tokens: LtxTokens) -> ByModality:
        """Apply cross-attention between the streams; both directions read the same input tokens."""
        inputs = {}
        for modality, x in hidden_states.items():
            inputs[modality] = self._modulate_cross_inputs(modality, x, tokens)
        outputs = {}
        for modality, other in ((VIDEO, AUDIO), (AUDIO, VIDEO)):
            cross = tokens.streams[modality].cross
            assert cross is not None  # there are two streams
            gate = getattr(self, modality.cross_table)[4:] + cross.gate  # float32, as the gate
            if cross.gate_factor is not None:
                gate = gate * cross.gate_factor
            query_input, key_input = inputs[modality][modality], inputs[other][modality]
            branch = self._attend_other(modality, other, query_input, key_input, tokens=tokens)
            outputs[modality] = add_gated(hidden_states[modality], gate, branch)
        return outputs

    def _modulate_cross_inputs(self, modality: Modality, x: Tensor, tokens: LtxTokens) -> ByModality:
        """Return a stream's inputs of attention between the streams, B L C, keyed by the receiving stream."""
        stream = tokens.streams[modality]
        assert stream.cross is not None
        table = getattr(self, modality.cross_table)  # added in float32, as the modulation
        # scale and shift for the attention of the video, and for the attention of the audio
        video_scale, video_shift, audio_scale, audio_shift = (table[:4] + stream.cross.modulation).unbind(2)
        h = norm_tokens(x.float())
        split = stream.modulation_split
        return {
            VIDEO: modulate(h, video_shift, video_scale, tokens.dtype, split=split),
            AUDIO: modulate(h, audio_shift, audio_scale, tokens.dtype, split=split),
        }

    def add_feed_forward(
        self, modality: Modality, x: Tensor, tokens: LtxTokens, modulation: Sequence[Tensor]
    ) -> Tensor:
        """Add the feed-forward branch to a stream's tokens x, B L C."""
        stream = tokens.streams[modality]
        shift, scale, gate = modulation[3:6]
        layer = getattr(self, f"{modality.prefix}ff")
        if stream.token_timesteps is not None:  # in one piece, because the modulation is per token
            h = stream.norm_and_modulate(x, shift, scale, tokens.dtype)
            return stream.add_gated(x, gate, layer(h))
        outputs = []
        # conditioning tokens, if any, then the others: a segment has one shift, scale and gate
        segments = split_segments(stream.num_conditioning_tokens, (shift, scale, gate), x)
        for segment, *segment_modulation in segments:
            # positional: code that computes it in pieces passes arguments by position
            outputs.append(self.feed_forward(segment, layer, tokens.dtype, *segment_modulation))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def feed_forward(
        self, x: Tensor, layer: nn.Module, dtype: torch.dtype, shift: Tensor, scale: Tensor, gate: Tensor
    ) -> Tensor:
        """Add a feed-forward branch to tokens x, B L C, that share a shift, scale and gate, B 1 C float32."""
        return add_gated(x, gate, layer(modulate(norm_tokens(x.float()), shift, scale, dtype)))

    def _attend_itself(self, modality: Modality, x: Tensor, tokens: LtxTokens) -> Tensor:
        """Return a stream's self-attention, over the tokens of all processes."""
        layer = getattr(self, f"{modality.prefix}attn1")
        stream = tokens.streams[modality]
        value = layer.values(x)
        if tokens.skips_self_attention:
            return layer.project(x, value)
        query, key = layer.queries(x, stream.rotary_emb), layer.keys(x, stream.rotary_emb)
        if stream.token_range is not None:  # with several processes, each computes some heads for all tokens
            query, key, value = stream.token_range.gather_tokens(query, key, value)
        if stream.attention_bias is None:
            attended = _attend(query, key, value, tokens)
        else:
            attended = _attend_with_bias(*stream.attention_bias, query, key, value, tokens)
        if stream.token_range is not None:
            attended = stream.token_range.gather_heads(attended)
        return layer.project(x, attended)

    def _attend_text(self, modality: Modality, x: Tensor, tokens: LtxTokens) -> Tensor:
        """Return a stream's cross-attention to its text, combined with that to a second text, if any."""
        layer = getattr(self, f"{modality.prefix}attn2")
        stream = tokens.streams[modality]
        texts = stream.text_embeddings
        if stream.text_modulation is not None:
            table = getattr(self, f"{modality.prefix}prompt_scale_shift_table")
            shift, scale = (table + stream.text_modulation).unbind(2)
            texts = tuple(modulate(text, shift, scale, tokens.dtype) for text in texts)
        query = layer.queries(x)
        attended = [_attend(query, layer.keys(text), layer.values(text), tokens) for text in texts]
        combine = tokens.combine_text_attention
        combined = attended[0] if combine is None else combine(*attended)
        if stream.num_without_text:  # the attention of these leading references to the text is 0
            without, combined = combined.tensor_split([stream.num_without_text], dim=1)
            combined = torch.cat([torch.zeros_like(without), combined], dim=1)
        return layer.project(x, combined)

    def _attend_other(
        self, modality: Modality, other: Modality, x: Tensor, other_x: Tensor, tokens: LtxTokens
    ) -> Tensor:
        """Return the attention of a stream's tokens x, B L C, to the tokens of the other stream."""
        layer = getattr(self, modality.cross_attn)
        stream = tokens.streams[modality]
        other_stream = tokens.streams[other]
        assert stream.cross is not None
        assert other_stream.cross is not None
        query = layer.queries(x, stream.cross.rotary_emb)
        key = layer.keys(other_x, other_stream.cross.rotary_emb)
        value = layer.values(other_x)
        first_visible = other_stream.num_hidden_from_other  # hidden reference tokens come first
        if stream.token_range is None or other_stream.token_range is None:
            attended = _attend(query, key[:, first_visible:], value[:, first_visible:], tokens)
            return layer.project(x, attended)
        # with several processes, each computes some heads for all tokens
        (query,) = stream.token_range.gather_tokens(query)
        key, value = other_stream.token_range.gather_tokens(key, value)
        attended = _attend(query, key[:, first_visible:], value[:, first_visible:], tokens)
        return layer.project(x, stream.token_range.gather_heads(attended))

    def _compute_modulation(self, modality: Modality, stream: StreamConditioning) -> Sequence[Tensor]:
        """Return the shifts, scales and gates of a stream's layers in this block, each B S C float32."""
        table: Tensor = getattr(self, f"{modality.prefix}scale_shift_table")
        return (table + stream.modulation).unbind(2)  # the sum is float32, as the modulation


def _attend(query: Tensor, key: Tensor, value: Tensor, tokens: LtxTokens) -> Tensor:
    """Compute attention in one dtype, because files may mix the dtypes of q, k and v."""
    dtype = tokens.dtype
    return attend(query.to(dtype), key.to(dtype), value.to(dtype), tokens.attention)


def make_attention_bias(
    strengths: Tensor, token_counts: Sequence[int], num_video_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return query and key channels, L E each, whose products are a bias on the logits of self-attention.

    The bias of a query and a key is, over the tokens of R references followed by the video:

        1. log(strength) of the reference token between a reference and the video: two channels
        2. `MASKED` between two references: one channel for each reference
        3. 0 within a reference and within the video

    Source: the released code of LTX-2.

    Args:
        strengths: M, 0..1: how strongly each reference token and the video attend to each other.
        token_counts: Number of tokens of each reference. These come before the video's.
        num_video_tokens: Number of tokens of the video.
    """
    is_video = functional.pad(torch.ones_like(strengths[:1]).expand(num_video_tokens), (len(strengths), 0))
    logarithms = functional.pad(strengths.log().clamp(min=MASKED), (0, num_video_tokens))
    membership = torch.block_diag(*(strengths.new_ones(count, 1) for count in token_counts))
    membership = functional.pad(membership, (0, 0, 0, num_video_tokens))  # L R: token in reference
    masked = MASKED * (1 - membership) * (1 - is_video[:, None])  # L R: keys of the other references
    # bias: is_video * logarithms + logarithms * is_video + membership * masked
    queries = torch.stack([is_video, logarithms, *membership.unbind(1)], dim=1)
    keys = torch.stack([logarithms, is_video, *masked.unbind(1)], dim=1)
    padding = (0, -queries.shape[1] % 8)  # kernels need widths that are multiples of 8
    return functional.pad(queries, padding), functional.pad(keys, padding)


def _attend_with_bias(
    bias_queries: Tensor, bias_keys: Tensor, query: Tensor, key: Tensor, value: Tensor, tokens: LtxTokens
) -> Tensor:
    """Compute attention with a bias on its logits: the product of `bias_queries` and `bias_keys`, L E each.

    They become additional channels of queries and keys. torch computes it, because 8-bit kernels are too
    coarse.
    """
    head_dim = query.shape[-1]
    bias_dim = bias_queries.shape[-1]
    divisor = math.sqrt(head_dim + bias_dim)  # attention divides the logits by it
    shape = (*query.shape[:3], bias_dim)
    bias_query = (bias_queries * divisor)[None, :, None].expand(shape)  # added to the logits undivided
    bias_key = bias_keys[None, :, None].expand(shape)
    scaled_query = query * (divisor / math.sqrt(head_dim))  # as if attention divided by sqrt(head_dim)
    query = torch.cat([scaled_query, bias_query.to(query.dtype)], dim=-1)
    key = torch.cat([key, bias_key.to(key.dtype)], dim=-1)
    value = functional.pad(value, (0, bias_dim))
    torch_attention = replace(tokens.attention, mode=SDPA.mode)
    return _attend(query, key, value, replace(tokens, attention=torch_attention))[..., :head_dim]
