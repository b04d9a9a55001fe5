"""The transformer of Kandinsky 5: blocks for the text alone, then blocks for clips that attend to the text.

Names of modules are the released ones, which are those of diffusers. Source: the maker's code, as diffusers'
`transformer_kandinsky.py` has it. The embedding of time, modulation, norms and angles of positions are always
float32. Everything else, including the residual stream, computes in the dtype of its weights or of autocast.
"""
# Letters: B batch, L tokens of the clip, T of the text, N heads, D head width, C = N * D

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from kandinsky.configs import PATCH, KandinskyConfig, KandinskyStream
from kandinsky.spec import DIT
from modules.attention.attend import CombineAttention, SampleLengths, attend, make_lengths
from modules.devices import send_ahead
from modules.layers.modulation import add_gated, modulate
from modules.layers.norms import (
    Float32LayerNorm,
    RMSNorm,
    TwoLayerMlp,
    activation_dtype,
    run_float32,
    run_in_weight_dtype,
)
from modules.layers.rope import (
    THETA,
    GridTable,
    SlowedFrequency,
    consecutive_rotations,
    cos_and_sin,
    rotate,
    rotation_angles,
    select_rotations,
    sinusoid,
    spread_over_grid,
)
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.offload.context import TokenShard
from runtime.run_blocks import BlockNetwork, Hidden

TEXT_ROWS = 6  # that modulate a block for text: shift, scale and gate of attention, then of feed-forward
VISUAL_ROWS = 9  # of a block for clips: of self-attention, attention to the text, and feed-forward
FINAL_ROWS = 2  # shift and scale
BlockSizes = KandinskyConfig | KandinskyStream  # widths of the blocks of a stream, and epsilons


class ScaledGrid(NamedTuple):
    """A grid of tokens and the scale of its positions; also the key of its cached rotary table."""

    sizes: tuple[int, int, int]  # frames, rows, columns
    scale: float  # positions of rows and columns are divided by it
    slow: SlowedFrequency | None = None  # lowered frequency of the frame axis
    ends_with_image: bool = False  # one more frame follows, with the position of the first


class TextTokens(NamedTuple):
    """The tokens of a text in all samples."""

    states: Tensor  # B T C
    lengths: SampleLengths | None  # real tokens of each sample, which come first; None: all
    rotary: Tensor  # rotations of the T tokens, T 1 D/2 2; only among the text itself


@dataclass(frozen=True)
class KandinskyTokens:
    """Inputs of the blocks in addition to the tokens of the clip; built once per forward pass."""

    grid: tuple[int, int, int]  # tokens along frames, rows, columns; L is their product
    rotary: Tensor  # rotations by position, L 1 D/2 2 float32
    texts: tuple[TextTokens, ...]  # the prompt and, for guidance in the attention, a second text
    time: Tensor  # B time_dim float32, from which every block computes its modulation
    num_clean_frames: int  # of latents; they come first and have no velocity
    dtype: torch.dtype  # dtype of activations between layers
    attention: AttentionChoice
    combine_attention: CombineAttention | None  # merges the attentions to two texts; None: there is one
    shard: TokenShard | None = None  # the tokens that this process has; None: all

    def cut(self, shard: TokenShard) -> "KandinskyTokens":
        """Return the inputs for the tokens of one process."""
        return replace(self, rotary=shard.slice_rotary(self.rotary), shard=shard)

    @property
    def first_noisy_token(self) -> int:
        """Index of the first token of the noisy latents, which is the first token of `grid`."""
        return 0

    def select(self, kept: Tensor, num_left_out: int) -> "KandinskyTokens":
        """Return the inputs for a subset of the tokens.

        `kept` are the ascending indices of the kept tokens, B K; `num_left_out` tokens are missing.
        """
        return replace(self, rotary=select_rotations(self.rotary, kept, num_left_out))


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, also if a training keeps its weights in 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight + bias in float32."""
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.float(), self.weight.float(), self.bias.float())


class KandinskyModulation(nn.Module):
    """Shifts, scales and gates of a block, from the embedded time: a B 1 C float32 for each of `widths`."""

    def __init__(self, time_dim: int, *widths: int) -> None:
        super().__init__()
        self.widths = widths
        self.out_layer = Float32Linear(time_dim, sum(widths))

    def forward(self, time: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of modulation for embedded times, B time_dim."""
        rows: Tensor = self.out_layer(functional.silu(time)).float().unsqueeze(1)
        return rows.split(self.widths, dim=2)


class KandinskyAttention(nn.Module):
    """Attention whose queries and keys are normalized in each head."""

    def __init__(self, sizes: BlockSizes, attended_dim: int | None = None) -> None:
        """Build the layers. `attended_dim` is the width of the attended tokens; None: that of all tokens."""
        super().__init__()
        dim = sizes.dim
        self.head_width = sizes.head_width
        self.to_query = nn.Linear(dim, dim)
        self.to_key, self.to_value = (nn.Linear(attended_dim or dim, dim) for _ in range(2))
        self.query_norm = RMSNorm(sizes.head_width, sizes.head_eps)
        self.key_norm = RMSNorm(sizes.head_width, sizes.head_eps)
        self.out_layer = nn.Linear(dim, dim)

    def query(self, x: Tensor) -> Tensor:
        """Return normalized queries of tokens B L C, B L N D."""
        heads: Tensor = run_in_weight_dtype(self.to_query, x).unflatten(-1, (-1, self.head_width))
        return self.query_norm(heads)

    def key_and_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return normalized keys, and values, of tokens B L C, each B L N D."""
        key, value = (
            run_in_weight_dtype(layer, x).unflatten(-1, (-1, self.head_width))
            for layer in (self.to_key, self.to_value)
        )
        return self.key_norm(key), value

    def project(self, attended: Tensor) -> Tensor:
        """Join the heads of attention, B L N D, in the layer's output, B L C."""
        return run_in_weight_dtype(self.out_layer, attended.flatten(2))


class KandinskyFeedForward(nn.Module):
    """Two layers without bias around the exact GELU."""

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.in_layer = nn.Linear(sizes.dim, sizes.ffn_dim, bias=False)
        self.out_layer = nn.Linear(sizes.ffn_dim, sizes.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward to x, B L C."""
        return run_in_weight_dtype(self.out_layer, functional.gelu(run_in_weight_dtype(self.in_layer, x)))


class KandinskyTextBlock(nn.Module):
    """Self-attention and feed-forward of a text, modulated by the time: the text changes in every step."""

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.text_modulation = KandinskyModulation(sizes.time_dim, *[sizes.dim] * TEXT_ROWS)
        self.self_attention_norm = Float32LayerNorm(sizes.dim, sizes.eps)
        self.self_attention = KandinskyAttention(sizes)
        self.feed_forward_norm = Float32LayerNorm(sizes.dim, sizes.eps)
        self.feed_forward = KandinskyFeedForward(sizes)

    def forward(
        self, text: TextTokens, time: Tensor, dtype: torch.dtype, attention: AttentionChoice
    ) -> TextTokens:
        """Return the text with new states, from embedded times, B time_dim."""
        x = text.states
        shift, scale, gate, feed_shift, feed_scale, feed_gate = self.text_modulation(time)
        h = modulate(self.self_attention_norm(x), shift, scale, dtype)
        layer = self.self_attention
        key, value = layer.key_and_value(h)
        query, key = rotate(layer.query(h), text.rotary), rotate(key, text.rotary)
        x = add_gated(x, gate, layer.project(attend(query, key, value, attention, text.lengths)))
        h = modulate(self.feed_forward_norm(x), feed_shift, feed_scale, dtype)
        return text._replace(states=add_gated(x, feed_gate, self.feed_forward(h)))


class AttendedTokens(NamedTuple):
    """The tokens of a block after its attention, and what the rest of the block takes."""

    x: Tensor  # B L C
    text_input: Tensor  # B L C: normalized and modulated tokens that attended to the text
    feed_rows: list[Tensor]  # shift, scale and gate of the feed-forward


class KandinskyVisualBlock(nn.Module):
    """Self-attention, attention to the text and feed-forward, each modulated by the time."""

    def __init__(self, sizes: BlockSizes) -> None:
        super().__init__()
        self.visual_modulation = KandinskyModulation(sizes.time_dim, *[sizes.dim] * VISUAL_ROWS)
        self.self_attention_norm = Float32LayerNorm(sizes.dim, sizes.eps)
        self.self_attention = KandinskyAttention(sizes)
        self.cross_attention_norm = Float32LayerNorm(sizes.dim, sizes.eps)
        self.cross_attention = KandinskyAttention(sizes)
        self.feed_forward_norm = Float32LayerNorm(sizes.dim, sizes.eps)
        self.feed_forward = KandinskyFeedForward(sizes)

    def forward(self, x: Tensor, tokens: KandinskyTokens) -> Tensor:
        """Apply the block to tokens x, B L C."""
        attended = self.attend(x, tokens)
        return self.feed(attended.x, tokens.dtype, *attended.feed_rows)

    def attend(self, x: Tensor, tokens: KandinskyTokens) -> AttendedTokens:
        """Apply self-attention and the attention to the text to tokens x, B L C."""
        rows = self.visual_modulation(tokens.time)
        shift, scale, gate, cross_shift, cross_scale, cross_gate, *feed_rows = rows
        h = modulate(self.self_attention_norm(x), shift, scale, tokens.dtype)
        x = add_gated(x, gate, self._attend_to_clip(h, tokens))
        h = modulate(self.cross_attention_norm(x), cross_shift, cross_scale, tokens.dtype)
        return AttendedTokens(add_gated(x, cross_gate, self._attend_to_text(h, tokens)), h, feed_rows)

    def modulated_input(self, x: Tensor, tokens: KandinskyTokens) -> Tensor:
        """Return the block's input x, B L C, normalized and modulated as self-attention takes it."""
        shift, scale, *_ = self.visual_modulation(tokens.time)
        return modulate(self.self_attention_norm(x), shift, scale, tokens.dtype)

    def feed(self, x: Tensor, dtype: torch.dtype, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Add the feed-forward branch to x, B L C; each token is processed independently."""
        return add_gated(x, gate, self.feed_forward(modulate(self.feed_forward_norm(x), shift, scale, dtype)))

    def _attend_to_clip(self, h: Tensor, tokens: KandinskyTokens) -> Tensor:
        layer, shard = self.self_attention, tokens.shard
        key, value = layer.key_and_value(h)
        query, key = rotate(layer.query(h), tokens.rotary), rotate(key, tokens.rotary)
        if shard is not None:
            query, key, value = shard.gather_tokens(query, key, value)
        attended = attend(query, key, value, tokens.attention)
        return layer.project(attended if shard is None else shard.gather_heads(attended))

    def _attend_to_text(self, h: Tensor, tokens: KandinskyTokens) -> Tensor:
        layer = self.cross_attention
        query = layer.query(h)
        attended = []
        for text in tokens.texts:
            # a view: gradients of key and value are added here, then those of all blocks, in the same order
            # whether or not a block is split over processes
            key, value = layer.key_and_value(text.states.view_as(text.states))
            attended.append(_attend_to_real_tokens(query, key, value, text.lengths, tokens.attention))
        if tokens.combine_attention is None:
            return layer.project(attended[0])
        return layer.project(tokens.combine_attention(*attended))


def _attend_to_real_tokens(
    query: Tensor, key: Tensor, value: Tensor, lengths: SampleLengths | None, attention: AttentionChoice
) -> Tensor:
    """Return the attention of a clip's tokens, B L N D, to the real tokens of each sample's text."""
    if lengths is None:
        return attend(query, key, value, attention)
    samples = zip(query.split(1), key.split(1), value.split(1), lengths.counts, strict=True)
    return torch.cat([attend(q, k[:, :count], v[:, :count], attention) for q, k, v, count in samples])


class KandinskyTextEmbedding(nn.Module):
    """Project states of a text encoder, ... in_dim to ... out_dim float32."""

    def __init__(self, in_dim: int, out_dim: int, eps: float, in_float32: bool = False) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, out_dim)
        self.norm = Float32LayerNorm(out_dim, eps, affine=True)
        self._run = run_float32 if in_float32 else run_in_weight_dtype

    def forward(self, states: Tensor) -> Tensor:
        """Return normalized projections in float32."""
        return self.norm(self._run(self.in_layer, states))


class KandinskyFinalLayer(nn.Module):
    """Norm that the time modulates, and projection to patches."""

    def __init__(self, sizes: BlockSizes, out_channels: int) -> None:
        super().__init__()
        self.modulation = KandinskyModulation(sizes.time_dim, *[sizes.dim] * FINAL_ROWS)
        self.norm = Float32LayerNorm(sizes.dim, sizes.eps)
        self.out_layer = nn.Linear(sizes.dim, out_channels)

    def forward(self, x: Tensor, tokens: KandinskyTokens) -> Tensor:
        """Return the patches of the velocity for tokens x, B L C to B L out_channels float32."""
        shift, scale = self.modulation(tokens.time)
        return run_in_weight_dtype(self.out_layer, modulate(self.norm(x), shift, scale, tokens.dtype)).float()


class KandinskyModel(BlockNetwork):
    """Predict the velocity of noisy latents from states of Qwen2.5-VL and the pooled state of CLIP-L.

    Simplified, without a second text and the code around the blocks:

        time = time_embeddings(sinusoid(timesteps)) + pooled_text_embeddings(pooled)     # B time_dim
        text = text_embeddings(text)                                                     # B T C
        for block in text_transformer_blocks:
            text = block(text, time)
        x = visual_embeddings(cat([noisy, zeros, mask]))                                 # B L C
        for block in visual_transformer_blocks:
            x = x + gate * self_attention(norm(x) * (1 + scale) + shift)
            x = x + gate2 * cross_attention(norm(x) * (1 + scale2) + shift2, text)
            x = x + gate3 * feed_forward(norm(x) * (1 + scale3) + shift3)
        velocity = out_layer(x, time)                              # B L 4*16, returned as B 16 F H W
    """

    spec = DIT
    compute_dtype_parameter = "visual_transformer_blocks.0.self_attention.query_norm.weight"

    def __init__(self, config: KandinskyConfig, attention: AttentionChoice = SDPA) -> None:
        """Build the network without weights."""
        super().__init__()
        self.config = config
        self.attention = attention
        dim, time_dim = config.dim, config.time_dim
        self.time_embeddings = TwoLayerMlp("in_layer out_layer", (dim, time_dim, time_dim), in_float32=True)
        self.text_embeddings = KandinskyTextEmbedding(config.text_dim, dim, config.eps)
        self.pooled_text_embeddings = KandinskyTextEmbedding(
            config.pooled_dim, time_dim, config.eps, in_float32=True
        )
        self.visual_embeddings = nn.ModuleDict({"in_layer": nn.Linear(PATCH**2 * config.in_channels, dim)})
        self.text_transformer_blocks = nn.ModuleList(
            KandinskyTextBlock(config) for _ in range(config.text_layers)
        )
        self.visual_transformer_blocks = nn.ModuleList(
            KandinskyVisualBlock(config) for _ in range(config.num_layers)
        )
        self.out_layer = KandinskyFinalLayer(config, PATCH**2 * config.out_channels)
        self._rotary = GridTable[ScaledGrid](self._make_table)
        self._text_rotary = GridTable[int](self._make_text_table)

    def embed(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        text_mask: Tensor,
        pooled: Tensor,
        position_scale: float = 1.0,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Hidden:
        """Embed latents as tokens, B L C; return them with the blocks' other inputs.

        A first frame that is given is part of `noisy`, clean, and its mask is 1; the channels of the
        condition are always zero.

        Args:
            noisy: Latents, B 16 F H W.
            timesteps: B, 0..1000.
            text: States of the language model, B T text_dim.
            text_mask: B T, true for real tokens, which come first.
            pooled: Pooled state of CLIP, B pooled_dim.
            position_scale: Number by which the positions of rows and columns are divided.
            overrides: Changes to this call. For normalized attention guidance (NAG), they contain a second
                `text` and `text_mask`.

        Raises:
            ValueError: If sizes do not match.
        """
        config = self.config
        batch, channels, frames, height, width = noisy.shape
        if channels != config.out_channels or height % PATCH or width % PATCH:
            raise ValueError(
                f"latents of {tuple(noisy.shape[1:])}: {config.out_channels} channels and even sides"
            )
        if text_mask.shape != text.shape[:2]:
            raise ValueError(f"a text mask of {tuple(text_mask.shape)} for text of {tuple(text.shape)}")
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        num_clean_frames = overrides.num_clean_frames
        if config.has_condition:
            condition = noisy.new_zeros(batch, config.in_channels - channels, frames, height, width)
            condition[:, -1, :num_clean_frames] = 1  # the mask
            noisy = torch.cat([noisy, condition], dim=1)
        patches = rearrange(noisy, "b c f (h p) (w q) -> b (f h w) (p q c)", p=PATCH, q=PATCH)
        # clone: of a view, the first block would be compiled apart from the others
        x = run_in_weight_dtype(self.visual_embeddings["in_layer"], patches).to(dtype).clone()
        time = self.time_embeddings(sinusoid(timesteps, config.dim, torch.float32))
        time = time + self.pooled_text_embeddings(pooled)
        grid = (frames, height // PATCH, width // PATCH)
        texts = [
            encode_text(
                prompt["text"],
                prompt["text_mask"],
                self.text_embeddings,
                self.text_transformer_blocks,
                self._text_rotary,
                time=time,
                dtype=dtype,
                attention=self.attention,
            )
            for prompt in overrides.text_inputs(batch, text=text, text_mask=text_mask)
        ]
        tokens = KandinskyTokens(
            grid,
            rotary=self._rotary.get_table(
                ScaledGrid(grid, position_scale, overrides.slow_frames), noisy.device
            ),
            texts=tuple(texts),
            time=time,
            num_clean_frames=num_clean_frames,
            dtype=dtype,
            attention=self.attention,
            combine_attention=overrides.combine_attention,
        )
        return Hidden(x, tokens)

    def unembed(self, x: Tensor, tokens: KandinskyTokens) -> Tensor:
        """Turn tokens B L C into the velocity, B 16 F H W float32; 0 for clean input frames."""
        frames, rows, columns = tokens.grid
        # patches of the output have their channels first, unlike those of the input
        velocity = rearrange(
            self.out_layer(x, tokens),
            "b (f h w) (c p q) -> b c f (h p) (w q)",
            f=frames,
            h=rows,
            w=columns,
            p=PATCH,
            q=PATCH,
        )
        count = tokens.num_clean_frames
        if not count:
            return velocity
        return torch.cat([torch.zeros_like(velocity[:, :, :count]), velocity[:, :, count:]], dim=2)

    def _make_table(self, grid: ScaledGrid, /, *, device: torch.device) -> Tensor:
        return make_clip_table(self.config.rotary_widths, grid, device)

    def _make_text_table(self, length: int, /, *, device: torch.device) -> Tensor:
        """Return cosines and sines of the positions of a text's tokens, T 1 D/2 2 float32."""
        return consecutive_rotations(0, length, self.config.head_width, THETA, device).unsqueeze(1)


def encode_text(
    states: Tensor,
    mask: Tensor,
    embeddings: nn.Module,
    blocks: Iterable[nn.Module],
    table: GridTable[int],
    *,
    time: Tensor,
    dtype: torch.dtype,
    attention: AttentionChoice,
) -> TextTokens:
    """Run the blocks for text over the states of a language model.

    Args:
        states: B T text_dim.
        mask: B T, true for real tokens, which come first.
        embeddings: Layer that projects the states to the width of the blocks.
        blocks: The blocks.
        table: Makes the rotations of a text of a given length.
        time: Embedded times, B time_dim.
        dtype: Dtype of activations between layers.
        attention: How attention is computed.
    """
    counts = tuple(int(count) for count in mask.sum(dim=1))  # the mask is on the host
    longest = max(counts)
    embedded = embeddings(states[:, :longest]).to(dtype)
    lengths = make_lengths(counts, states.device) if min(counts) < longest else None
    text = TextTokens(embedded, lengths, table.get_table(longest, states.device))
    for block in blocks:
        text = block(text, time, dtype, attention)
    return text


def make_clip_table(widths: tuple[int, int, int], grid: ScaledGrid, device: torch.device) -> Tensor:
    """Return cosines and sines of the angles of a clip's tokens, L 1 D/2 2 float32.

    Args:
        widths: Channels of a head for frames, rows and columns.
        grid: Sizes and scale of the positions.
        device: Device of the table.
    """
    scales = (1.0, grid.scale, grid.scale)
    slowed = (grid.slow, None, None)
    axes: list[Tensor] = []
    for size, width, scale, slow in zip(grid.sizes, widths, scales, slowed, strict=True):
        positions = torch.arange(size, dtype=torch.float64) / scale
        if grid.ends_with_image and not axes:
            positions = torch.cat([positions, positions[:1]])
        angles = cos_and_sin(rotation_angles(positions, width, THETA, slow))
        axes.append(send_ahead(angles.float(), device))
    return spread_over_grid(axes).unsqueeze(1)
