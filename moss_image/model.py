"""The transformer of MOSS-Image: equal blocks over one stream of an image and a refined text.

All blocks share one modulation. Names of modules are the released ones. Source: arXiv 2610.23374, and open
ports of the released pipeline. The embedding of time, modulation, norms and rotary angles are always float32.
References of an edit come first, then the image, then the text; the ports have another order. Attention does
not depend on the order, only on positions. References that attend only to each other, at time 0, are the same
in all steps of a generation: their keys and values are computed once for each text and set of skipped blocks
(`MossImageModel.compute_keys_values`).
"""
# Letters: B batch, R tokens of references, L of the image, T of text, N heads, D head width, C = N * D, F
# width of a feed-forward, S 1, or 2 if there are references: time 0, theirs, comes before the image's

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from krea2.model import Krea2Tokens, attend_rotated
from lumina.blocks import GroupedAttention, Heads, LuminaTokens
from lumina.model import count_real_tokens
from modules.attention.attend import CombineAttention, SampleLengths, SecondText, attend, make_lengths
from modules.layers.half_rope import rotate_halves
from modules.layers.modulation import add_gated, modulate, split_segments
from modules.layers.norms import RMSNorm, activation_dtype, run_float32, run_in_weight_dtype
from modules.layers.rope import GridTable, axis_rotations, sinusoid, spread_over_grid
from modules.speed_options import SDPA, AttentionChoice
from moss_image.configs import AXES, DIT, MossImageConfig
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.kv_cache import compute_keys_values, use_keys_values
from runtime.run_blocks import BlockNetwork, Hidden

MODULATION_ROWS = 6  # that modulate all blocks: shift, scale and gate of attention, then of feed-forward
END_MODULATION_ROWS = 2  # that modulate the final norm: shift and scale
GATE_CAP, VALUE_CAP = 4.0, 25.0  # limits of the two halves of a feed-forward layer, as in training

Grid = tuple[int, int]  # rows and columns of an image's tokens


def situ(value: Tensor, gate: Tensor) -> Tensor:
    """Return gated values, both softly capped: 4 tanh(g/4) sigmoid(g) * 25 tanh(v/25)."""
    gates = GATE_CAP * torch.tanh(gate / GATE_CAP) * torch.sigmoid(gate)
    return gates * (VALUE_CAP * torch.tanh(value / VALUE_CAP))


@dataclass(frozen=True)
class MossImageTokens(Krea2Tokens):
    """Inputs of the blocks besides x, B R+L+T C; `time`, B 8 S C, is six block rows and two final rows."""


class MossImageTextBlock(nn.Module):
    """Self-attention block among a text's tokens, without modulation."""

    def __init__(self, config: MossImageConfig) -> None:
        super().__init__()
        dim = config.dim
        self.head_width = config.head_width
        self.norm1 = RMSNorm(dim, config.eps)
        self.norm2 = RMSNorm(dim, config.eps)
        self.q_norm = RMSNorm(config.head_width, config.eps)
        self.k_norm = RMSNorm(config.head_width, config.eps)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.ffn_gate = nn.Linear(dim, config.ffn_dim)
        self.ffn_up = nn.Linear(dim, config.ffn_dim)
        self.ffn_down = nn.Linear(config.ffn_dim, dim)

    def forward(
        self, x: Tensor, rotary: Tensor, choice: AttentionChoice, lengths: SampleLengths | None
    ) -> Tensor:
        """Apply the block to text tokens x, B T C."""
        # x: B T C
        qkv = run_in_weight_dtype(self.qkv, self.norm1(x)).unflatten(-1, (3, -1, self.head_width))
        query, key, value = qkv.unbind(2)  # each B T N D
        query = rotate_halves(self.q_norm(query), rotary)
        key = rotate_halves(self.k_norm(key), rotary)
        attended = attend(query, key, value, choice, lengths=lengths)
        x = x + run_in_weight_dtype(self.proj, attended.flatten(2))
        h = self.norm2(x)
        hidden = situ(run_in_weight_dtype(self.ffn_up, h), run_in_weight_dtype(self.ffn_gate, h))
        return x + run_in_weight_dtype(self.ffn_down, hidden)


class MossImageText(nn.Module):
    """Project the language model's states to tokens, and let the tokens attend to each other."""

    def __init__(self, config: MossImageConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.text_dim, config.dim)
        self.blocks = nn.ModuleList(MossImageTextBlock(config) for _ in range(config.refiner_blocks))

    def forward(
        self,
        states: Tensor,
        stream: torch.dtype,
        rotary: Tensor,
        choice: AttentionChoice,
        lengths: SampleLengths | None,
    ) -> Tensor:
        """Refine states, B T text_dim, to text tokens, B T C in the dtype `stream`."""
        # states: B T text_dim. stream: dtype of the result
        x = run_in_weight_dtype(self.proj, states).to(stream)
        for block in self.blocks:
            x = block(x, rotary, choice, lengths)
        return x


class MossImageBlock(GroupedAttention):
    """Block in which all tokens attend to each other; all blocks share the modulation."""

    def __init__(self, config: MossImageConfig) -> None:
        nn.Module.__init__(self)
        dim = config.dim
        self.head_width = config.head_width
        self.norm1 = RMSNorm(dim, config.eps)
        self.norm2 = RMSNorm(dim, config.eps)
        self.q_norm = RMSNorm(config.head_width, config.eps)
        self.k_norm = RMSNorm(config.head_width, config.eps)
        self.proj = nn.ModuleDict({name: nn.Linear(dim, dim, bias=False) for name in "qkvo"})
        self.proj["ffn_up_gate"] = nn.Linear(dim, 2 * config.ffn_dim, bias=False)  # values, then their gates
        self.proj["ffn_down"] = nn.Linear(config.ffn_dim, dim, bias=False)
        # keys and values of the leading references, B R N D; see `runtime/kv_cache.py`
        self.cached_keys_values: Sequence[Tensor] = ()

    def heads(self, x: Tensor) -> Heads:
        """Return heads of modulated tokens B L C: query, key, value, each B L N D; q and k normalized."""
        query, key, value = (
            run_in_weight_dtype(self.proj[name], x).unflatten(-1, (-1, self.head_width)) for name in "qkv"
        )
        return self.q_norm(query), self.k_norm(key), value

    def attend_heads(
        self, heads: Iterable[Tensor], rotary: Tensor, tokens: LuminaTokens, lengths: SampleLengths | None
    ) -> Tensor:
        """Return the attention of tokens, B L N D; isolated references attend only to each other."""
        assert isinstance(tokens, MossImageTokens)
        query, key, value = heads
        rotated = rotate_halves(query, rotary), rotate_halves(key, rotary), value
        return attend_rotated(self, rotated, tokens, lengths)

    def forward(self, x: Tensor, tokens: MossImageTokens) -> Tensor:  # type: ignore[override]
        """Apply the block to tokens x, B R+L+T C."""
        # x: B R+L+T C
        shift, scale, gate, *feed_rows = tokens.time[:, :MODULATION_ROWS].unbind(1)  # each B S C
        h = modulate(self.norm1(x), shift, scale, tokens.dtype, split=tokens.modulation_split)
        branch = run_in_weight_dtype(self.proj["o"], self.attend_tokens(h, tokens))
        x = add_gated(x, gate, branch, tokens.modulation_split)
        # the expensive one last: if it runs in pieces, recomputing the block stops here
        parts = []
        for part, *rows in split_segments(tokens.modulation_split, feed_rows, x):
            # without names: code that computes it in pieces takes arguments by their order
            parts.append(self.feed(part, tokens.dtype, *rows))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def modulated_input(self, x: Tensor, tokens: MossImageTokens) -> Tensor:
        """Return the modulated input of attention for the image tokens of x, B R+L+T C to B L C."""
        shift, scale, *_ = (row[:, -1:] for row in tokens.time.unbind(1))
        image = x[:, tokens.modulation_split : tokens.modulation_split + tokens.image]
        return modulate(self.norm1(image), shift, scale, tokens.dtype)

    def feed(self, x: Tensor, dtype: torch.dtype, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """Add the feed-forward branch to x, B L C; each token is processed independently."""
        h = modulate(self.norm2(x), shift, scale, dtype)
        value, gates = run_in_weight_dtype(self.proj["ffn_up_gate"], h).chunk(2, dim=-1)
        return add_gated(x, gate, run_in_weight_dtype(self.proj["ffn_down"], situ(value, gates)))


class MossImageLayout(NamedTuple):
    """Sizes of images and texts, which determine a rotary table."""

    grid: Grid  # rows and columns of the image's tokens; (0, 0) without an image
    reference_grids: tuple[Grid, ...]
    num_text_tokens: int  # tokens of each text, with padding
    # real tokens of each text, which are the clock of its image and references; one number if all are alike
    text_lengths: tuple[int, ...]


class RefinedText(NamedTuple):
    """A text's tokens after refinement, or its states before it."""

    states: Tensor  # B T C
    counts: tuple[int, ...]  # real tokens of each sample

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """Return the text lengths, which determine the images' time positions; only one if all are equal."""
        return tuple(dict.fromkeys(self.counts)) if len(set(self.counts)) == 1 else self.counts

    def lengths(self, before: int) -> SampleLengths | None:
        """Return sequence lengths: each sample's real tokens plus `before`; None if all tokens are real."""
        if len(self.text_lengths) == 1:  # attention gets no mask
            return None
        return make_lengths([before + count for count in self.counts], self.states.device)


class MossImageModel(BlockNetwork):
    """Predict the velocity of noisy latents of an image from states of Qwen3.5.

    Simplified, without references, a second text and the code around the blocks:

        text = text_embedder.proj(text)                                       # B T C
        for block in text_embedder.blocks:                                    # positions (0, place, 0, 0)
            text = text + block.proj(attention of block.norm1(text) to itself)
            text = text + block.ffn_down(situ(block.ffn_up(h), block.ffn_gate(h)))  # h = block.norm2(text)
        x = cat([video_embedder(noisy), text])                                # B L+T C
        time = time_embedding(timesteps)                                      # B C
        shift, scale, gate, shift2, scale2, gate2 = shared_block_modulation(time)   # of all blocks, B 1 C
        for block in layers:
            x = x + gate * block.proj.o(attention of block.norm1(x) * (1 + scale) + shift)
            value, gates = block.proj.ffn_up_gate(block.norm2(x) * (1 + scale2) + shift2)
            x = x + gate2 * block.proj.ffn_down(situ(value, gates))
        shift, scale = video_head_modulation(time)
        velocity = final_linear_video(final_norm_video(x[:, :L]) * (1 + scale) + shift)   # as B Z 1 H W
    """

    spec = DIT
    compute_dtype_parameter = "layers.0.norm1.weight"

    def __init__(self, config: MossImageConfig, attention: AttentionChoice = SDPA) -> None:
        """Build the network without weights; the blocks share one modulation, computed from the timestep."""
        super().__init__()
        self.config = config
        self.attention = attention
        dim = config.dim
        self.video_embedder = nn.Linear(config.channels, dim)
        self.text_embedder = MossImageText(config)
        self.time_embedding = nn.Sequential(
            # the activation between the two layers has no weights; Identity keeps the released numbering
            nn.Linear(config.freq_dim, dim),
            nn.Identity(),
            nn.Linear(dim, dim),
        )
        self.shared_block_modulation = nn.Linear(dim, MODULATION_ROWS * dim)
        self.layers = nn.ModuleList(MossImageBlock(config) for _ in range(config.num_layers))
        self.final_norm_video = RMSNorm(dim, config.eps)
        self.final_linear_video = nn.Linear(dim, config.channels, bias=False)
        self.video_head_modulation = nn.Linear(dim, END_MODULATION_ROWS * dim)
        self._rotary = GridTable[MossImageLayout](self._make_table)
        self._text_rotary = GridTable[int](self._make_text_table)

    def forward(
        self,
        *inputs: Any,
        overrides: Overrides = NO_OVERRIDES,
        references: Sequence[Tensor] = (),
        isolated: bool = True,
        **named_inputs: Any,
    ) -> Any:
        """Predict the velocity, B Z 1 H W; isolated references are computed only once in a generation.

        If `overrides.section_cache` is set, the keys and values of isolated references are stored in it at
        the first step. Each pass (such as the positive one) has its own, because the positions of references
        depend on the length of its text, and their keys on the blocks that it skips.

        Args:
            inputs: Noisy latents B Z 1 H W, timesteps B, text states B T C and the mask of the text B T, as
                far as they are not in `named_inputs`.
            overrides: Changes to this call, with the cache, and its position: the step and the pass.
            references: Clean latents of reference images, each B Z 1 h w of its own size.
            isolated: Whether references attend only to each other.
            named_inputs: Further inputs by name; with references, the mask of the text is one of them.
        """
        cache = overrides.section_cache if isolated and references else None
        # references are computed in this call without a cache, and with NAG, whose text needs other positions
        if cache is None or overrides.step_position is None or overrides.nag is not None:
            return super().forward(
                *inputs, overrides=overrides, references=references, isolated=isolated, **named_inputs
            )
        # identifies the pass, such as the negative one, in all steps
        pass_key = overrides.step_position.pass_key
        if pass_key not in cache:
            # compute only the references, and keep the keys and values of their tokens
            skips = Overrides(skip_blocks=overrides.skip_blocks)
            cache[pass_key] = self.compute_keys_values(references, named_inputs["text_mask"], skips)
        # the attentions use the stored keys and values, so that the call gets no references
        with use_keys_values(cache[pass_key], self.attentions()):
            return super().forward(*inputs, overrides=overrides, isolated=isolated, **named_inputs)

    def compute_keys_values(
        self, references: Sequence[Tensor], text_mask: Tensor, overrides: Overrides = NO_OVERRIDES
    ) -> dict[MossImageBlock, Sequence[Tensor]]:
        """Run the blocks on the references alone, and return each block's keys and values of their tokens.

        Args:
            references: Clean latents, B Z 1 h w each.
            text_mask: B T; the lengths of the texts shift the rotary positions.
            overrides: Blocks to skip.
        """
        device = references[0].device
        dtype = activation_dtype(device, self.compute_dtype)
        times = torch.zeros(len(references[0]), device=device)  # references are clean
        images = [self.embed_image(latents).to(select_stream(dtype)) for latents in references]
        x = torch.cat(images, dim=1)
        _, counts = count_real_tokens(text_mask)
        text_lengths = RefinedText(x, counts).text_lengths
        layout = MossImageLayout(
            (0, 0), tuple(map(self.get_token_grid, references)), num_text_tokens=0, text_lengths=text_lengths
        )
        tokens = MossImageTokens(
            layout.grid,
            rotary=self._rotary.get_table(layout, device),
            lengths=None,
            time=self.embed_time(times)[:, :, None],
            dtype=dtype,
            attention=self.attention,
            stores_keys_values=True,
        )
        return compute_keys_values(self, Hidden(x, tokens), self.attentions(), overrides)

    def attentions(self) -> list[MossImageBlock]:
        """Return the blocks, which are attention layers themselves."""
        return [block for block in self.layers if isinstance(block, MossImageBlock)]

    def embed(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        text_mask: Tensor,
        overrides: Overrides = NO_OVERRIDES,
        references: Sequence[Tensor] = (),
        isolated: bool = True,
    ) -> Hidden:
        """Embed references, image and text as tokens, B R+L+T C; return them with the blocks' other inputs.

        Args:
            noisy: B Z 1 H W.
            timesteps: B, 0..1000.
            text: States of the language model, B T text_dim.
            text_mask: B T, true or 1 for real tokens, which come first.
            overrides: Changes to this call. For normalized attention guidance (NAG), they contain a second
                `text` and `text_mask`, whose tokens follow the prompt's.
            references: Clean latents of reference images, each B Z 1 h w of its own size.
            isolated: References attend only to each other; all other tokens attend to all.

        Raises:
            ValueError: If sizes do not match.
        """
        if text_mask.shape != text.shape[:2]:
            raise ValueError(f"a text mask of {tuple(text_mask.shape)} for text of {tuple(text.shape)}")
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        stream_dtype = select_stream(dtype)
        reference_grids = tuple(map(self.get_token_grid, references))
        grid = self.get_token_grid(noisy)
        images = [self.embed_image(latents).to(stream_dtype) for latents in (*references, noisy)]
        # of the prompt and, if `overrides` have one, of the second text
        prompts = overrides.text_inputs(len(noisy), text=text, text_mask=text_mask)
        texts = [self._embed_text(prompt, stream_dtype) for prompt in prompts]
        x = torch.cat([*images, *(embedded.states for embedded in texts)], dim=1)
        num_references = sum(math.prod(sides) for sides in reference_grids)
        num_images = num_references + math.prod(grid)
        num_isolated = num_references if isolated else 0  # these do not attend to a text's tokens
        tokens = MossImageTokens(
            grid,
            rotary=self._find_rotary(grid, reference_grids, texts[0]),
            lengths=texts[0].lengths(num_images - num_isolated),  # of the tokens that attend to all
            time=self._embed_times(timesteps, bool(references)),
            dtype=dtype,
            attention=self.attention,
            num_references=num_references,
            modulation_split=num_references,
            num_isolated=num_isolated,
        )
        if overrides.combine_attention is not None:  # there is a second text
            tokens = self._add_second_text(tokens, texts[1], reference_grids, overrides.combine_attention)
        return Hidden(x, tokens)

    def _add_second_text(
        self,
        tokens: MossImageTokens,
        text: RefinedText,
        references: tuple[Grid, ...],
        combine_attention: CombineAttention,
    ) -> MossImageTokens:
        """Return the blocks' inputs with a second text, whose tokens come last."""
        num_images = tokens.num_references + math.prod(tokens.grid)
        num_tokens = text.states.shape[1]
        lengths = text.lengths(num_images - tokens.num_isolated)
        layout = MossImageLayout(tokens.grid, references, num_tokens, text.text_lengths)
        return replace(
            tokens,
            second_text=SecondText(num_images, num_tokens, lengths, combine_attention),
            second_rotary=self._make_table(layout, device=text.states.device),
        )

    def _find_rotary(self, grid: Grid, references: tuple[Grid, ...], text: RefinedText) -> Tensor:
        layout = MossImageLayout(grid, references, text.states.shape[1], text.text_lengths)
        return self._rotary.get_table(layout, text.states.device)

    def _embed_text(self, arguments: Mapping[str, Any], stream: torch.dtype) -> RefinedText:
        """Refine a text's states, `text` in `arguments` with `text_mask`, in the dtype `stream`."""
        longest, counts = count_real_tokens(arguments["text_mask"])
        states = arguments["text"][:, :longest]
        text = RefinedText(states, counts)
        rotary = self._text_rotary.get_table(longest, states.device)
        refined = self.text_embedder(states, stream, rotary, self.attention, text.lengths(0))
        return text._replace(states=refined)

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
        return run_in_weight_dtype(self.video_embedder, rearrange(latents, "b z 1 h w -> b (h w) z"))

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Return the modulation for all blocks, then for the final layer, B to B 8 C float32."""
        first, _, second = self.time_embedding
        waves = sinusoid(timesteps, self.config.freq_dim)
        # no SiLU after the second layer
        time = run_float32(second, functional.silu(run_float32(first, waves)))
        rows = run_float32(self.shared_block_modulation, time).unflatten(1, (MODULATION_ROWS, -1))
        end_rows = run_float32(self.video_head_modulation, time).unflatten(1, (END_MODULATION_ROWS, -1))
        return torch.cat([rows, end_rows], dim=1)

    def _embed_times(self, timesteps: Tensor, has_references: bool) -> Tensor:
        """Return the modulation rows, B 8 S C: at time 0 for references, then at the image's time."""
        rows = self.embed_time(timesteps)[:, :, None]
        if not has_references:
            return rows
        reference_time = self.embed_time(torch.zeros_like(timesteps))[:, :, None]
        return torch.cat([reference_time, rows], dim=2)

    def unembed(self, x: Tensor, tokens: MossImageTokens) -> Tensor:
        """Turn tokens B R+L+T C into the velocity, B Z 1 H W in float32."""
        rows, columns = tokens.grid
        image = x[:, tokens.num_references : tokens.num_references + tokens.image]
        shift, scale = tokens.time[:, MODULATION_ROWS:, -1].chunk(END_MODULATION_ROWS, dim=1)  # each B 1 C
        h = modulate(self.final_norm_video(image), shift, scale, tokens.dtype)
        pixels = run_in_weight_dtype(self.final_linear_video, h).float()
        return rearrange(pixels, "b (h w) z -> b z 1 h w", h=rows, w=columns)

    def _make_table(self, layout: MossImageLayout, /, *, device: torch.device) -> Tensor:
        """Return the rotary table, (cosine, sine) pairs R+L+T 1 D/2 2 float32, or B R+L+T 1 D/2 2."""
        # Positions are (0, text length, row, column) for image tokens, (k, text length, row, column) for
        # tokens of reference k (from 1), and (0, index, 0, 0) for the text. Rows and columns are counted from
        # the middle of their image.
        tables = {
            text_length: self._make_sample_table(layout, text_length, device)
            for text_length in set(layout.text_lengths)
        }
        samples = [tables[text_length] for text_length in layout.text_lengths]
        return samples[0] if len(samples) == 1 else torch.stack(samples)

    def _make_sample_table(self, layout: MossImageLayout, text_length: int, device: torch.device) -> Tensor:
        """Return the rotary pairs of a sample's tokens, R+L+T 1 D/2 2; its text has `text_length` tokens."""
        tables = []
        grids = [*enumerate(layout.reference_grids, 1), (0, layout.grid)]
        for number, (rows, columns) in grids:
            number_and_time = torch.tensor([number, text_length], dtype=torch.float64)
            positions = (*number_and_time.split(1), _centered_positions(rows), _centered_positions(columns))
            tables.append(self._grid_rotations(positions, device))
        tables.append(self._make_text_table(layout.num_text_tokens, device=device))
        return torch.cat(tables)

    def _make_text_table(self, length: int, /, *, device: torch.device) -> Tensor:
        """Return the rotary pairs of a text's tokens, T 1 D/2 2."""
        zero = torch.zeros(1, dtype=torch.float64)
        return self._grid_rotations((zero, torch.arange(length, dtype=torch.float64), zero, zero), device)

    def _grid_rotations(self, positions: Sequence[Tensor], device: torch.device) -> Tensor:
        """Return a grid's rotary pairs, n 1 D/2 2 float32, from float64 positions along each axis."""
        width = self.config.head_width // AXES
        pairs = [axis_rotations(axis, width, self.config.rope_theta, device) for axis in positions]
        return spread_over_grid(pairs).unsqueeze(1)


def select_stream(dtype: torch.dtype) -> torch.dtype:
    """Return the residual stream's dtype: float32 in place of float16, whose range trained values exceed."""
    return torch.float32 if dtype == torch.float16 else dtype


def _centered_positions(size: int) -> Tensor:
    """Return coordinates along an axis relative to its middle, in half steps if `size` is even."""
    return torch.arange(size, dtype=torch.float64) - (size - 1) / 2
