"""The transformer of Qwen-Image-2.1: single-stream blocks over an image and the prefix before it.

Names of modules are the released ones, which are those of diffusers. The embedding of time, modulation, norms
and rotary angles are always float32.

The released model has one sequence: the text, with the tokens of each reference image where the text names
it, and then the generated image. A text token sees the tokens before it; a token of an image also sees its
whole image. So nothing except the generated image depends on that image or on the time: text and references,
the prefix, are modulated with time 0. Their keys and values are computed once for all steps of a generation
(`QwenImage21Model.compute_keys_values`).

Here the image comes first, as in all models, and the prefix after it: attention depends on positions and on
what a token may see, not on the order in memory.
"""
# Letters: B batch, L tokens of the image, P of the prefix, R of references, T of text, N heads, D head
# width, C = N * D, S rows of modulation: the image's, then the prefix'

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from modules.attention.attend import CombineAttention, SecondText, attend, attend_causally
from modules.layers.modulation import add_gated, modulate, split_segments
from modules.layers.norms import (
    CenteredRMSNorm,
    Float32LayerNorm,
    RMSNorm,
    activation_dtype,
    run_float32,
    run_in_weight_dtype,
)
from modules.layers.rope import (
    GridTable,
    consecutive_rotations,
    rotate,
    select_rotations,
    sinusoid,
    spread_over_grid,
)
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from qwen_image_21.configs import DIT, QwenImage21Config
from runtime.kv_cache import compute_keys_values, use_keys_values
from runtime.offload.context import TokenShard
from runtime.run_blocks import BlockNetwork, Hidden

ROWS = 4  # that modulate a block: scale and gate of attention, then of feed-forward
LARGEST = 65504.0  # in float16

gelu = partial(functional.gelu, approximate="tanh")  # as trained

Grid = tuple[int, int]  # rows and columns of an image's tokens


class Segment(NamedTuple):
    """Consecutive tokens of a prefix that see the same tokens."""

    start: int  # in the prefix
    end: int
    is_text: bool  # text tokens attend to earlier ones; tokens of a reference attend to the entire reference


@dataclass(frozen=True)
class Prefix:
    """Order of texts and references in the prefix of a sample."""

    num_text_tokens: int  # real tokens of its text
    reference_slots: tuple[int, ...]  # rising: how many tokens of the text stand before each reference
    reference_grids: tuple[Grid, ...]

    @property
    def segments(self) -> list[Segment]:
        """Split the tokens before the noisy image into runs of text and reference images, in order."""
        segments: list[Segment] = []
        start = 0  # of the next segment, in the prefix
        text_start = 0  # of the next run of text, in the text alone
        for text_end, (rows, columns) in zip(self.reference_slots, self.reference_grids, strict=True):
            num_text = text_end - text_start
            if num_text > 0:
                segments.append(Segment(start, start + num_text, is_text=True))
                start += num_text
                text_start = text_end
            segments.append(Segment(start, start + rows * columns, is_text=False))
            start += rows * columns
        num_text = self.num_text_tokens - text_start  # after the last reference
        if num_text > 0:
            segments.append(Segment(start, start + num_text, is_text=True))
        return segments

    @property
    def length(self) -> int:
        """Return the number of tokens in the prefix, including references."""
        return self.num_text_tokens + sum(rows * columns for rows, columns in self.reference_grids)


@dataclass(frozen=True)
class QwenImage21Tokens:
    """Inputs of the blocks in addition to x, B L+P C, or B L+P+P' C with a second text."""

    grid: Grid  # rows and columns of the image's tokens
    num_image_tokens: int  # number of tokens of the image, L; 0 while a prefix alone is computed
    modulation_split: int  # where the prefix begins, among the tokens that this process has
    # one list for each sample, or a single one if all are alike; numbers, so that compiled code accepts any
    segments: tuple[tuple[Segment, ...], ...]
    rotary: Tensor  # rotations of all tokens, L+P 1 D/2 2, or B L+P 1 D/2 2 if prefixes differ
    modulation: Tensor  # B S 4C float32: scales and gates of all blocks
    time: Tensor  # B 1 C float32, the embedded time of the image
    dtype: torch.dtype  # dtype of activations between layers
    attention: AttentionChoice
    stores_keys_values: bool = False  # there is a prefix alone, whose keys and values the blocks keep
    second_text: SecondText | None = None
    second_segments: tuple[tuple[Segment, ...], ...] = ()
    second_rotary: Tensor | None = None  # as `rotary`, of the image and the second prefix
    shard: TokenShard | None = None  # the tokens that this process has; None: all

    @property
    def first_noisy_token(self) -> int:
        """Return the index of the generated image's first token, which is always 0."""
        return 0

    def cut(self, shard: TokenShard) -> Self:
        """Return the inputs for one process's tokens; `rotary` still covers all tokens."""
        return replace(self, shard=shard, modulation_split=shard.count_among_first(self.num_image_tokens))

    def select(self, kept: Tensor, num_left_out: int) -> Self:
        """Return the block inputs for some tokens of x; only tokens of the noisy latents are dropped.

        `kept` are the ascending indices of the remaining tokens, B K; `num_left_out` tokens are dropped.
        """
        num_image_tokens = self.num_image_tokens - num_left_out
        rotary = select_rotations(self.rotary, kept, num_left_out)
        return replace(
            self, num_image_tokens=num_image_tokens, modulation_split=num_image_tokens, rotary=rotary
        )


class QwenImage21Attention(nn.Module):
    """Attention of image tokens to all tokens; tokens of the prefix attend only to earlier ones."""

    def __init__(self, config: QwenImage21Config) -> None:
        super().__init__()
        dim = config.dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])
        self.norm_q = RMSNorm(config.head_width, config.eps)
        self.norm_k = RMSNorm(config.head_width, config.eps)
        # keys and values of the prefix, B P N D; see `runtime/kv_cache.py`
        self.cached_keys_values: Sequence[Tensor] = ()

    def forward(self, x: Tensor, tokens: QwenImage21Tokens) -> Tensor:
        """Return the attention of tokens x, B L+P C."""
        # x: B L+P C
        heads = tuple(
            run_in_weight_dtype(layer, x).unflatten(-1, (-1, *self.norm_q.normalized_shape))
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        attended = self.attend_tokens((self.norm_q(heads[0]), self.norm_k(heads[1]), heads[2]), tokens)
        return run_in_weight_dtype(self.to_out[0], attended.flatten(2))

    def attend_tokens(self, heads: tuple[Tensor, ...], tokens: QwenImage21Tokens) -> Tensor:
        """Return the self-attention of all tokens, B L+P N D, from their query, key and value heads."""
        # a second text, for normalized attention guidance (NAG); this process's shard of the tokens
        second, shard = tokens.second_text, tokens.shard
        if shard is not None:
            # exchange tokens for heads: each process attends with all tokens and some heads
            heads = shard.gather_tokens(*heads)
        if second is None:
            attended = self.attend_heads(heads, tokens.rotary, tokens, tokens.segments)
            return attended if shard is None else shard.gather_heads(attended)
        assert tokens.second_rotary is not None
        # the image attends with each text separately; then both results are combined
        first_heads = tuple(map(second.drop_second_text, heads))
        second_heads = tuple(map(second.drop_first_text, heads))
        attended = self.attend_heads(first_heads, tokens.rotary, tokens, tokens.segments)
        second_attended = self.attend_heads(
            second_heads, tokens.second_rotary, tokens, tokens.second_segments
        )
        if shard is None:
            return second.combine(attended, second_attended)
        return shard.combine(attended, second_attended, second)

    def attend_heads(
        self,
        heads: tuple[Tensor, ...],
        rotary: Tensor,
        tokens: QwenImage21Tokens,
        segments: Sequence[Sequence[Segment]],
    ) -> Tensor:
        """Return the attention of an image and its prefix, B L+P N D, from heads before rotation.

        `segments` lists the texts and references in each sample's prefix; one list if all are equal.
        """
        query, key, value = heads
        query = rotate(query, rotary)
        key = rotate(key, rotary)
        # a pass over the prefix alone stores its keys and values; later passes of the image reuse them
        if tokens.stores_keys_values:
            self.cached_keys_values = key, value
        elif self.cached_keys_values:
            cached_key, cached_value = self.cached_keys_values
            key = torch.cat([key, cached_key], dim=1)
            value = torch.cat([value, cached_value], dim=1)
        if len(segments) == 1:  # all samples have the same layout
            return attend_segments(query, key, value=value, tokens=tokens, segments=segments[0])
        attended = []
        samples = zip(query.split(1), key.split(1), value.split(1), segments, strict=True)
        for sample_query, sample_key, sample_value, sample_segments in samples:
            attended.append(attend_segments(sample_query, sample_key, sample_value, tokens, sample_segments))
        return torch.cat(attended)


def attend_segments(
    query: Tensor, key: Tensor, value: Tensor, tokens: QwenImage21Tokens, segments: Sequence[Segment]
) -> Tensor:
    """Compute the attention of samples whose prefixes have equal segments (texts and reference images).

    The image attends to all tokens, a segment to itself and earlier ones, text causally; padding gives zeros.

    `query` is B L+P N D, or B L N D if the keys and values of the prefix are cached. `key` and `value`
    are B L+P N D.
    """
    choice = tokens.attention
    start = tokens.num_image_tokens  # the prefix follows the image
    end = start + segments[-1].end
    outputs = []
    if start:  # no image tokens while the prefix alone is computed
        outputs.append(attend(query[:, :start], key[:, :end], value[:, :end], choice))
    if query.shape[1] > start:  # the queries of the prefix are computed too, not cached
        for segment in segments:
            # a segment sees all earlier ones and itself
            queries = query[:, start + segment.start : start + segment.end]
            keys = key[:, start : start + segment.end]
            values = value[:, start : start + segment.end]
            if segment.is_text:
                outputs.append(attend_causally(queries, keys, values, choice))
            else:
                outputs.append(attend(queries, keys, values, choice))
        outputs.append(torch.zeros_like(query[:, end:]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


class QwenImage21FeedForward(nn.Module):
    """Gated feed-forward: out(silu(gate_layer x) * proj x). Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: QwenImage21Config) -> None:
        super().__init__()
        self.proj = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.gate_layer = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.out = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward to x, B L C."""
        gates = functional.silu(run_in_weight_dtype(self.gate_layer, x))
        return run_in_weight_dtype(self.out, gates * run_in_weight_dtype(self.proj, x))


class QwenImage21Block(nn.Module):
    """Attention and feed-forward, each after a norm. All blocks share the same modulation."""

    def __init__(self, config: QwenImage21Config) -> None:
        super().__init__()
        self.img_norm1 = Float32LayerNorm(config.dim, config.eps)
        self.attn = QwenImage21Attention(config)
        self.img_norm2 = Float32LayerNorm(config.dim, config.eps)
        self.img_mlp = QwenImage21FeedForward(config)

    def forward(self, x: Tensor, tokens: QwenImage21Tokens) -> Tensor:
        """Apply the block to tokens x, B L+P C."""
        # x: B L+P C
        scale, gate, *feed_rows = tokens.modulation.chunk(ROWS, dim=-1)  # each B S C
        h = modulate(self.img_norm1(x), None, scale, tokens.dtype, split=tokens.modulation_split)
        x = add_gated(x, gate, self.attn(h, tokens), tokens.modulation_split)
        # the expensive one last: if it runs in pieces, recomputing the block stops here
        parts = []
        for part, *rows in split_segments(tokens.modulation_split, feed_rows, x):
            # without names: code that computes it in pieces takes arguments by their order
            parts.append(self.feed(part, tokens.dtype, *rows))
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return x.clamp(-LARGEST, LARGEST) if x.dtype == torch.float16 else x

    def modulated_input(self, x: Tensor, tokens: QwenImage21Tokens) -> Tensor:
        """Return the modulated input of attention for the image tokens of x, B L+P C to B L C."""
        scale = tokens.modulation[:, :1].chunk(ROWS, dim=-1)[0]
        return modulate(self.img_norm1(x[:, : tokens.modulation_split]), None, scale, tokens.dtype)

    def feed(self, x: Tensor, dtype: torch.dtype, scale: Tensor, gate: Tensor) -> Tensor:
        """Add the feed-forward branch to x, B L C; each token is processed independently."""
        return add_gated(x, gate, self.img_mlp(modulate(self.img_norm2(x), None, scale, dtype)))


class QwenImage21Time(nn.Module):
    """Embed timesteps, 0..1000, as B C float32."""

    def __init__(self, config: QwenImage21Config) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.timestep_embedder = nn.ModuleDict(
            {
                "linear_1": nn.Linear(config.freq_dim, config.dim, bias=False),
                "linear_2": nn.Linear(config.dim, config.dim, bias=False),
            }
        )

    def forward(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps, B, as B C float32."""
        # float32 angles, as in training
        waves = sinusoid(timesteps, self.freq_dim, torch.float32)
        hidden = functional.silu(run_float32(self.timestep_embedder["linear_1"], waves))
        return run_float32(self.timestep_embedder["linear_2"], hidden)


class QwenImage21TextLayers(nn.Module):
    """Project the language model's states, ... text_dim, to tokens, ... C."""

    def __init__(self, config: QwenImage21Config) -> None:
        super().__init__()
        self.text_norm = CenteredRMSNorm(config.text_dim, config.eps)
        self.in_layer = nn.Linear(config.text_dim, config.dim, bias=False)
        self.out_layer = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """Project text states, ... text_dim, to tokens, ... C."""
        return run_in_weight_dtype(
            self.out_layer, gelu(run_in_weight_dtype(self.in_layer, self.text_norm(states)))
        )


class QwenImage21LastNorm(nn.Module):
    """Final norm, scaled by the timestep."""

    def __init__(self, config: QwenImage21Config) -> None:
        super().__init__()
        self.norm = Float32LayerNorm(config.dim, config.eps)
        self.linear = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, tokens: QwenImage21Tokens) -> Tensor:
        """Normalize tokens x, B L C, and scale them by a factor computed from the timestep."""
        scale = run_in_weight_dtype(self.linear, functional.silu(tokens.time)).float()
        return modulate(self.norm(x), None, scale, tokens.dtype)


class QwenImage21Layout(NamedTuple):
    """Grid and prefixes, which determine a rotary table."""

    grid: Grid  # rows and columns of the image's tokens; (0, 0) without an image
    prefixes: tuple[Prefix, ...]  # prefix of each sample
    has_prefix: bool  # else the table is of the image alone


class PrefixTokens(NamedTuple):
    """Tokens of texts with the tokens of their references inserted."""

    x: Tensor  # B P C, with padding at the end
    prefixes: tuple[Prefix, ...]


class QwenImage21Model(BlockNetwork):
    """Predict the velocity of noisy latents of an image from states of Qwen3-VL and reference images.

    Simplified, without references, a second text and the code around the blocks:

        x = cat([img_in(noisy), txt_in(text)])                              # B L+T C
        time = time_text_embed(timesteps), time0 = time_text_embed(0)       # each B C
        rows, rows0 = modulation(silu(time)), modulation(silu(time0))       # rows0 for the text; each B 4C
        for block in transformer_blocks:
            scale, gate, scale2, gate2 = rows (or rows0), the gates' tanh   # each B 1 C
            x = x + gate * attn(norm(x) * (1 + scale))      # the image sees all, the text what precedes
            x = x + gate2 * mlp(norm(x) * (1 + scale2))
        velocity = proj_out(norm(x[:, :L]) * (1 + norm_out(silu(time))))    # B L Z, returned as B Z 1 H W
    """

    spec = DIT
    compute_dtype_parameter = "transformer_blocks.0.attn.norm_q.weight"

    def __init__(self, config: QwenImage21Config, attention: AttentionChoice = SDPA) -> None:
        """Build the network without weights. `attention` is passed to `modules.attention.attend`."""
        super().__init__()
        self.config = config
        self.attention = attention
        dim = config.dim
        self.time_text_embed = QwenImage21Time(config)
        self.txt_in = QwenImage21TextLayers(config)
        self.img_in = nn.Linear(config.channels, dim, bias=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, ROWS * dim, bias=False))
        self.transformer_blocks = nn.ModuleList(QwenImage21Block(config) for _ in range(config.num_layers))
        self.norm_out = QwenImage21LastNorm(config)
        self.proj_out = nn.Linear(dim, config.channels, bias=False)
        self._rotary = GridTable[QwenImage21Layout](self._make_table)

    def forward(self, *inputs: Any, overrides: Overrides = NO_OVERRIDES, **named_inputs: Any) -> Any:
        """Predict the velocity from `embed`'s arguments; with a section cache, keep each pass's prefix."""
        kv_cache, position = overrides.section_cache, overrides.step_position
        changes_prefix = overrides.nag is not None or overrides.is_perturbed
        if kv_cache is None or position is None or changes_prefix:
            return super().forward(*inputs, overrides=overrides, **named_inputs)
        if position.pass_key not in kv_cache:
            kv_cache[position.pass_key] = self.compute_keys_values(*inputs, **named_inputs)
        with use_keys_values(kv_cache[position.pass_key], self.attentions()):
            return super().forward(*inputs, overrides=overrides, is_prefix_cached=True, **named_inputs)

    def compute_keys_values(
        self, noisy: Tensor, timesteps: Tensor, **prompt: Any
    ) -> dict[QwenImage21Attention, Sequence[Tensor]]:
        """Return each block's keys and values of the prefix (text, references), computed once for all steps.

        `prompt` has the text, its mask and the references, by the names of `embed`.
        """
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        embedded = self.embed_prefix(dtype, **prompt)
        # the prefix is clean: time 0
        times = self.time_text_embed(torch.zeros_like(timesteps))[:, None]
        # no image: only the prefix has keys and values
        layout = QwenImage21Layout((0, 0), embedded.prefixes, has_prefix=True)
        tokens = QwenImage21Tokens(
            grid=(0, 0),
            num_image_tokens=0,
            modulation_split=0,
            segments=list_segments(embedded.prefixes),
            rotary=self._rotary.get_table(layout, noisy.device),
            modulation=self.modulation_rows(times),
            time=times,
            dtype=dtype,
            attention=self.attention,
            stores_keys_values=True,
        )
        return compute_keys_values(self, Hidden(embedded.x, tokens), self.attentions())

    def attentions(self) -> list[QwenImage21Attention]:
        """Return the attention layer of each block."""
        return [block.attn for block in self.transformer_blocks if isinstance(block, QwenImage21Block)]

    def embed(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        text_mask: Tensor,
        slots: Tensor,
        overrides: Overrides = NO_OVERRIDES,
        references: Sequence[Tensor] = (),
        is_prefix_cached: bool = False,
    ) -> Hidden:
        """Embed an image and its prefix (text and references) as tokens, B L+P C, with the blocks' inputs.

        1. Embed the image, and the prefix of each text unless it is cached.
        2. Compute modulation for the image and for the prefix, which is clean (timestep 0).
        3. With normalized attention guidance (NAG), add the second text's tokens and positions.

        Args:
            noisy: B Z 1 H W.
            timesteps: B, 0..1000.
            text: States of the language model, B T text_dim.
            text_mask: B T, true or 1 for real tokens, which come first.
            slots: B n ascending, on the host: the text token before which each reference is inserted.
            overrides: Changes to this call. For normalized attention guidance (NAG), they contain a second
                `text`, `text_mask` and `slots`.
            references: Clean latents of n images to edit, each B Z 1 h w of its own size.
            is_prefix_cached: Omit the prefix, because the blocks have stored its keys and values.

        Raises:
            ValueError: If sizes do not match.
        """
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        grid = self.get_token_grid(noisy)
        x = self.embed_image(noisy).to(dtype)
        num_image_tokens = x.shape[1]
        time = self.time_text_embed(timesteps)[:, None]
        times = time  # B 1 C for the image; then B 2 C: the prefix is clean, at timestep 0
        embedded: list[PrefixTokens] = []
        if is_prefix_cached:  # the blocks still need the positions of the prefix
            prefixes = order_prefixes(text_mask, slots, references)
        else:
            # of the prompt and, if `overrides` have one, of the second text
            prompts = overrides.text_inputs(len(noisy), text=text, text_mask=text_mask, slots=slots)
            embedded = self._embed_prefixes(prompts, slots, references, dtype)
            x = torch.cat([x, *(prefix.x for prefix in embedded)], dim=1)
            prefixes = embedded[0].prefixes
            times = torch.cat([time, self.time_text_embed(torch.zeros_like(timesteps))[:, None]], dim=1)
        layout = QwenImage21Layout(grid, prefixes, has_prefix=not is_prefix_cached)
        tokens = QwenImage21Tokens(
            grid=grid,
            num_image_tokens=num_image_tokens,
            modulation_split=num_image_tokens,
            segments=list_segments(prefixes),
            rotary=self._rotary.get_table(layout, noisy.device),
            modulation=self.modulation_rows(times),
            time=time,
            dtype=dtype,
            attention=self.attention,
        )
        if overrides.combine_attention is not None:  # there is a second text
            tokens = self._add_second_text(tokens, embedded[1], layout, overrides.combine_attention)
        return Hidden(x, tokens)

    def _add_second_text(
        self,
        tokens: QwenImage21Tokens,
        second: PrefixTokens,
        layout: QwenImage21Layout,
        combine_attention: CombineAttention,
    ) -> QwenImage21Tokens:
        """Return the blocks' inputs with the prefix of a second text, whose tokens come last."""
        # `layout` is that of the image and the first prefix.
        second_layout = layout._replace(prefixes=second.prefixes)
        num_tokens = second.x.shape[1]
        return replace(
            tokens,
            second_text=SecondText(tokens.num_image_tokens, num_tokens, None, combine_attention),
            second_segments=list_segments(second.prefixes),
            second_rotary=self._make_table(second_layout, device=second.x.device),
        )

    def _embed_prefixes(
        self,
        prompts: Sequence[dict[str, Any]],
        slots: Tensor,
        references: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> list[PrefixTokens]:
        """Embed the prefix of each text; a text without slots has its references at `slots`."""
        embedded = []
        for prompt in prompts:
            if prompt["slots"] is None:
                prompt["slots"] = slots
            embedded.append(self.embed_prefix(dtype, **prompt, references=references))
        return embedded

    def embed_prefix(
        self,
        dtype: torch.dtype,
        text: Tensor,
        text_mask: Tensor,
        slots: Tensor,
        references: Sequence[Tensor] = (),
    ) -> PrefixTokens:
        """Return each sample's prefix: text tokens, with tokens of reference images at their slots.

        `text` is B T text_dim, `text_mask` B T; `slots` are the numbers of text tokens before each reference,
        and `references` latents B Z 1 h w. `dtype` is the dtype of the tokens.
        """
        prefixes = order_prefixes(text_mask, slots, references)
        for latents in references:
            self.get_token_grid(latents)  # raises ValueError for latents of another model
        longest = max(prefix.num_text_tokens for prefix in prefixes)
        texts = self.txt_in(text[:, :longest].to(dtype)).to(dtype)
        images = [self.embed_image(latents).to(dtype) for latents in references]
        sample_tokens = []
        for sample, prefix in enumerate(prefixes):
            text_tokens = texts[sample, : prefix.num_text_tokens]
            token_runs = []  # text and reference images in turn
            text_start = 0
            for slot, image in zip(prefix.reference_slots, images, strict=True):
                token_runs += [text_tokens[text_start:slot], image[sample]]
                text_start = slot
            token_runs.append(text_tokens[text_start:])
            sample_tokens.append(torch.cat(token_runs))
        return PrefixTokens(nn.utils.rnn.pad_sequence(sample_tokens, batch_first=True), prefixes)

    def get_token_grid(self, latents: Tensor) -> Grid:
        """Return rows and columns of an image's tokens; raise ValueError if its channels do not match."""
        channels, frames, height, width = latents.shape[1:]
        if channels != self.config.channels or frames != 1:
            raise ValueError(
                f"latents of {tuple(latents.shape[1:])}: {self.config.channels} channels of one image"
            )
        return height, width

    def embed_image(self, latents: Tensor) -> Tensor:
        """Embed an image as tokens, one for each latent pixel: B Z 1 H W to B L C."""
        return run_in_weight_dtype(self.img_in, rearrange(latents, "b z 1 h w -> b (h w) z"))

    def modulation_rows(self, times: Tensor) -> Tensor:
        """Return scale and gate for attention, then for the feed-forward: B S C to B S 4C float32."""
        rows = run_in_weight_dtype(self.modulation[1], functional.silu(times)).float()
        scale, gate, feed_scale, feed_gate = rows.chunk(ROWS, dim=-1)
        return torch.cat([scale, gate.tanh(), feed_scale, feed_gate.tanh()], dim=-1)

    def unembed(self, x: Tensor, tokens: QwenImage21Tokens) -> Tensor:
        """Turn tokens B L+P C into the velocity, B Z 1 H W in float32."""
        rows, columns = tokens.grid
        normed = self.norm_out(x[:, : tokens.num_image_tokens], tokens)
        patches = run_in_weight_dtype(self.proj_out, normed).float()
        return rearrange(patches, "b (h w) z -> b z 1 h w", h=rows, w=columns)

    def _make_table(self, layout: QwenImage21Layout, /, *, device: torch.device) -> Tensor:
        """Return the rotary table, (cosine, sine) pairs L+P 1 D/2 2 float32, or B L+P 1 D/2 2."""
        # It is computed from float64 angles. Each token of the text advances all three positions by one. An
        # image's token is at (time, row, column), with the time that the text has reached, and rows and
        # columns counted from the middle; the text continues after its longer edge.
        tables = {prefix: self._make_sample_table(layout, prefix, device) for prefix in set(layout.prefixes)}
        if len(tables) == 1:
            return tables[layout.prefixes[0]]
        samples = [tables[prefix] for prefix in layout.prefixes]
        return nn.utils.rnn.pad_sequence(samples, batch_first=True)

    def _make_sample_table(self, layout: QwenImage21Layout, prefix: Prefix, device: torch.device) -> Tensor:
        """Return the rotary (cosine, sine) pairs of a sample's tokens, image first, L+P 1 D/2 2."""
        # a text token advances the position by one, an image by its longer edge
        position = 0
        text_start = 0  # text tokens so far
        tables = []
        for slot, grid in zip(prefix.reference_slots, prefix.reference_grids, strict=True):
            num_text = slot - text_start
            tables.append(self._text_rotations(position, num_text, device))
            position += num_text
            text_start = slot
            tables.append(self._image_rotations(grid, position, device))
            position += max(grid)
        num_text = prefix.num_text_tokens - text_start
        tables.append(self._text_rotations(position, num_text, device))
        # the generated image comes after the prefix in time, but first in the sequence
        target = self._image_rotations(layout.grid, position + num_text, device)
        # a cached prefix needs no table, because its keys are rotated already: it only shifts the image
        if not layout.has_prefix:
            tables = []
        return torch.cat([target, *tables]).unsqueeze(1)

    def _text_rotations(self, first: int, size: int, device: torch.device) -> Tensor:
        """Return rotary pairs of consecutive text tokens, whose position is equal on all axes."""
        rotations = partial(consecutive_rotations, theta=self.config.rope_theta, device=device)
        return torch.cat([rotations(first, size, width) for width in self.config.axes], dim=1)

    def _image_rotations(self, grid: Grid, time: int, device: torch.device) -> Tensor:
        """Return rotary pairs of an image's tokens, with rows and columns counted from the middle."""
        rows, columns = grid
        time_width, row_width, column_width = self.config.axes
        rotations = partial(consecutive_rotations, theta=self.config.rope_theta, device=device)
        along_time = rotations(time, 1, time_width)
        along_rows = rotations(rows // 2 - rows, rows, row_width)
        along_columns = rotations(columns // 2 - columns, columns, column_width)
        return spread_over_grid([along_time, along_rows, along_columns])


def list_segments(prefixes: Sequence[Prefix]) -> tuple[tuple[Segment, ...], ...]:
    """Return the segments of each prefix, or of a single one if all prefixes are equal."""
    different = prefixes[:1] if len(set(prefixes)) == 1 else prefixes
    return tuple(tuple(prefix.segments) for prefix in different)


def order_prefixes(text_mask: Tensor, slots: Tensor, references: Sequence[Tensor]) -> tuple[Prefix, ...]:
    """Return the order of text and references in each sample's prefix.

    `text_mask` is B T, true for real tokens; `slots`, B n, are the text tokens before which the n references,
    latents B Z 1 h w, are inserted. Raises ValueError if the slots do not match the references.
    """
    grids = tuple((latents.shape[-2], latents.shape[-1]) for latents in references)
    prefixes = []
    for count, sample_slots in zip(text_mask.sum(dim=1).tolist(), slots.tolist(), strict=True):
        is_rising = sample_slots == sorted(sample_slots) and all(0 <= slot <= count for slot in sample_slots)
        if len(sample_slots) != len(grids) or not is_rising:
            raise ValueError(f"slots {sample_slots} in a text of {count} tokens for {len(grids)} references")
        prefixes.append(Prefix(int(count), tuple(sample_slots), grids))
    return tuple(prefixes)
