"""The transformer of Fibo 2.0: Z-Image's blocks over gist tokens of a text, an image, and images to edit.

A Perceiver turns a bundle of the language model's states into gist tokens, which come after the images here
(attention does not depend on the order, only on positions). Some blocks read a bundle of their own by gated
cross-attention. Gist tokens and images to edit are clean: they have time 0. Names of modules are the released
ones, which are those of diffusers. Source: diffusers' BriaFibo2Transformer2DModel. `lumina.blocks` lists the
steps in float32.
"""
# Letters: B batch, L tokens of the image, R of images to edit, G of the gist, T of the text, n states of
# each, W width of a state, D head width, C width of the model, S 2: the time of the image, and time 0

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from fibo_2.configs import DIT, PLACES, Fibo2Config
from lumina.blocks import FeedForward, JointTransformerBlock, LuminaFinalLayer, LuminaTokens, TimeEmbedding
from lumina.model import count_real_tokens
from modules.attention.attend import CombineAttention, SampleLengths, SecondText, attend, make_lengths
from modules.devices import send_ahead
from modules.layers.modulation import add_gated, modulate, split_segments
from modules.layers.norms import RMSNorm, activation_dtype, run_in_weight_dtype
from modules.layers.rope import GridTable, cos_and_sin, rotation_angles, spread_over_grid
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.offload.context import TokenShard
from runtime.run_blocks import BlockNetwork, Hidden
from z_image.model import ZImageAttention

Grid = tuple[int, int]  # rows and columns of an image's tokens


class TextBundle(NamedTuple):
    """Hidden states of a batch of texts, from several layers of the text encoder, for one attention layer."""

    states: Tensor  # B T 3W, side by side
    # real tokens of each sample; None: all. Compiled code that compared them would depend on their numbers
    counts: tuple[int, ...] | None


class TextStates(NamedTuple):
    """Text states of a batch, with their lengths."""

    states: Tensor  # B T n W, without padding after the longest
    counts: tuple[int, ...]  # real tokens of each sample

    def bundle(self, number: int) -> TextBundle:
        """Return the text states of one bundle of layers; `number` is in `configs.BUNDLES`."""
        states = torch.cat([self.states[:, :, place] for place in PLACES[number]], dim=-1)
        has_padding = len(set(self.counts)) > 1
        return TextBundle(states, self.counts if has_padding else None)


@dataclass(frozen=True)
class Fibo2Tokens(LuminaTokens):
    """Inputs of the blocks besides x, B L+R+G C; `time` is B S time_dim, of noisy and of clean tokens."""

    text_states: tuple[TextStates, ...] = ()  # the prompt, and a second text
    bundles: tuple[TextBundle, ...] = ()  # what a block reads of each of `text_states`; empty: nothing
    modulation_split: int = 0  # where the clean tokens begin, among those that this process has

    def cut(self, shard: TokenShard) -> "Fibo2Tokens":
        """Return the inputs for the tokens that one process computes."""
        return replace(super().cut(shard), modulation_split=shard.count_among_first(self.modulation_split))

    def select(self, kept: Tensor, num_left_out: int) -> "Fibo2Tokens":
        """Return the block inputs for the tokens at the ascending indices `kept`, B K.

        Only image tokens are dropped, so the clean tokens after them begin `num_left_out` earlier.
        """
        return replace(
            super().select(kept, num_left_out), modulation_split=self.modulation_split - num_left_out
        )

    def merge_attention(self, attended: Sequence[Tensor]) -> Tensor:
        """Merge the attention outputs for the two texts, B L' ... each, into one output.

        The image steers away from the second text; each text's gist tokens keep the output for their own
        text.
        """
        if self.second_text is None:
            return attended[0]
        first, other = attended
        # in order: the image, clean tokens (references, the first text's gist), the second text's gist
        num_image = self.second_text.num_image_tokens
        num_second_gist = self.second_text.num_text_tokens
        if self.shard is not None:  # of these, the tokens that this process has
            num_image = self.shard.count_among_first(num_image)
            num_second_gist = self.shard.count_among_last(num_second_gist)
        second_start = first.shape[1] - num_second_gist
        steered = self.second_text.combine_attention(first[:, :num_image], other[:, :num_image])
        return torch.cat([steered, first[:, num_image:second_start], other[:, second_start:]], dim=1)


class Fibo2CrossAttention(ZImageAttention):
    """Cross-attention from tokens to a bundle of text states, without position embeddings."""

    def __init__(self, config: Fibo2Config) -> None:
        super().__init__(config)
        self.to_k, self.to_v = (nn.Linear(config.text_dim, config.dim, bias=False) for _ in range(2))

    def attend_text(self, x: Tensor, bundle: TextBundle, choice: AttentionChoice) -> Tensor:
        """Return the cross-attention of tokens x, B L C, to a bundle of text states: B L N D."""
        query, key, value = (
            run_in_weight_dtype(layer, tokens).unflatten(-1, (self.num_heads, -1))
            for layer, tokens in ((self.to_q, x), (self.to_k, bundle.states), (self.to_v, bundle.states))
        )
        query, key = self.norm_q(query), self.norm_k(key)
        if bundle.counts is None:
            return attend(query, key, value, choice)
        samples = []
        for index, count in enumerate(bundle.counts):
            real = slice(index, index + 1), slice(count)  # one text without its padding
            samples.append(attend(query[index, None], key[real], value[real], choice))
        return torch.cat(samples)


class PerceiverLayer(nn.Module):
    """Layer in which gist tokens attend to the text, then to each other, and pass a feed-forward."""

    def __init__(self, config: Fibo2Config) -> None:
        super().__init__()
        self.cross_attn_norm = RMSNorm(config.dim, config.eps)
        self.cross_attention = Fibo2CrossAttention(config)
        self.self_attn_norm = RMSNorm(config.dim, config.eps)
        self.self_attention = ZImageAttention(config)
        self.ffn_norm = RMSNorm(config.dim, config.eps)
        self.ffn = FeedForward(config)

    def forward(
        self, x: Tensor, bundle: TextBundle, lengths: SampleLengths | None, choice: AttentionChoice
    ) -> Tensor:
        """Apply the layer to gist tokens x, B G C: attend to the text, then to each other, then feed forward.

        Args:
            x: Gist tokens.
            bundle: States of the text from several layers, side by side, and numbers of real tokens.
            lengths: Number of gist tokens of each sample; None if no sample is padded.
            choice: Attention to use.
        """
        from_text = self.cross_attention.attend_text(self.cross_attn_norm(x), bundle, choice)
        x = x + self.cross_attention.project(from_text.flatten(2))
        heads = self.self_attention.heads(self.self_attn_norm(x))
        x = x + self.self_attention.project(attend(*heads, choice, lengths).flatten(2))
        output: Tensor = x + self.ffn(self.ffn_norm(x))
        return output


class Perceiver(nn.Module):
    """Compress text states to gist tokens, whose number depends on the text's length."""

    def __init__(self, config: Fibo2Config) -> None:
        super().__init__()
        self.latent_queries = nn.Parameter(torch.empty(config.max_gist, config.dim))
        self.layers = nn.ModuleList(PerceiverLayer(config) for _ in range(config.perceiver_layers))
        self.norm_out = RMSNorm(config.dim, config.eps)

    def forward(
        self,
        text: TextStates,
        gist: int,
        lengths: SampleLengths | None,
        choice: AttentionChoice,
        dtype: torch.dtype,
    ) -> Tensor:
        """Compress the texts' states to gist tokens, B G C.

        Args:
            text: States of the texts.
            gist: G, the largest number of gist tokens of a sample.
            lengths: Each sample's own number of gist tokens; None if all have G.
            choice: Attention to use.
            dtype: Dtype of the tokens.
        """
        # bundle 0: the layer states for the Perceiver, not for a block
        bundle = text.bundle(0)
        x = self.latent_queries[:gist].to(dtype).expand(len(bundle.states), -1, -1)
        for layer in self.layers:
            x = layer(x, bundle, lengths, choice)
        output: Tensor = self.norm_out(x)
        return output


class Fibo2Block(JointTransformerBlock):
    """Z-Image's block with separate noisy and clean times; some blocks also attend to text states."""

    attention_class = ZImageAttention
    activates_time = False

    def __init__(self, config: Fibo2Config, bundle: int | None = None) -> None:
        """Build a block that attends to the text states with index `bundle`, or without any for None."""
        super().__init__(config)
        self.bundle = bundle
        if bundle is not None:
            self.cross_attn_norm1 = RMSNorm(config.dim, config.eps)
            self.cross_attention = Fibo2CrossAttention(config)
            self.cross_attn_norm2 = RMSNorm(config.dim, config.eps)
            self.cross_attn_gate = nn.Parameter(torch.zeros(1))
            # before `forward`, which may be compiled: with the number in it, each block would be compiled
            self.register_forward_pre_hook(_add_text_bundles)

    def modulation(self, time: Tensor) -> tuple[Tensor, ...]:
        """Return scale and gate for attention and for the feed-forward, each B S C float32."""
        rows = run_in_weight_dtype(self.adaLN_modulation[-1], time).float()
        scale1, gate1, scale2, gate2 = rows.chunk(4, dim=-1)
        return scale1, gate1.tanh(), scale2, gate2.tanh()

    def forward(self, x: Tensor, tokens: Fibo2Tokens) -> Tensor:  # type: ignore[override]
        """Apply the block to tokens x, B L+R+G C."""
        # x: B L+R+G C
        scale1, gate1, *feed_rows = self.modulation(tokens.time)
        h = modulate(self.attention_norm1(x), None, scale1, tokens.dtype, split=tokens.modulation_split)
        x = add_gated(x, gate1, self.attention_norm2(self.attention(h, tokens)), tokens.modulation_split)
        if tokens.bundles:
            x = x + self.cross_attn_gate.tanh().to(x.dtype) * self.attend_bundles(x, tokens)
        # the expensive one last: if it runs in pieces, recomputing the block stops here
        parts = []
        for part, scale, gate in split_segments(tokens.modulation_split, feed_rows, x):
            parts.append(self.feed(part, scale, gate, tokens.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def attend_bundles(self, x: Tensor, tokens: Fibo2Tokens) -> Tensor:
        """Attend from tokens x to the text states for this block, and normalize the output: B L' C."""
        h = self.cross_attn_norm1(x)
        attended = [
            self.cross_attention.attend_text(h, bundle, tokens.attention) for bundle in tokens.bundles
        ]
        output: Tensor = self.cross_attn_norm2(
            self.cross_attention.project(tokens.merge_attention(attended).flatten(2))
        )
        return output

    def modulated_input(self, x: Tensor, tokens: LuminaTokens) -> Tensor:
        """Return the modulated input of attention for the image tokens of x, B L+R+G C to B L C."""
        scale, *_ = self.modulation(tokens.time[:, :1])
        return modulate(self.attention_norm1(x[:, : tokens.image]), None, scale, tokens.dtype)


def _add_text_bundles(block: nn.Module, inputs: tuple[Tensor, Fibo2Tokens]) -> tuple[Tensor, Fibo2Tokens]:
    """Add the text states that a block reads, one bundle of layers of each text, to its inputs."""
    # It is a forward pre-hook: what it returns replaces the block's inputs.
    assert isinstance(block, Fibo2Block)
    assert block.bundle is not None
    x, tokens = inputs
    bundles = tuple(text.bundle(block.bundle) for text in tokens.text_states)
    return x, replace(tokens, bundles=bundles)


class Fibo2Layout(NamedTuple):
    """Image sizes, reference sizes and number of gist tokens, which determine a rotary table."""

    grids: tuple[Grid, ...]  # grid of the image, then of each image to edit
    num_gist_tokens: int


class Fibo2Model(BlockNetwork):
    """Predict the velocity of noisy latents of an image from states of Qwen3-VL.

    Simplified, without a second text and the code around the blocks:

        time = t_embedder([timestep, 0])                                    # B S time_dim
        image = x_embedder(cat([noisy, *references]))                       # B L+R C
        for block in noise_refiner:
            image = block(image, time)
        gist = perceiver(bundle 0)                                          # B G C
        x = cat([image, gist])
        for block in layers:                                                # the image has the first time
            scale, gate, scale2, gate2 = block.adaLN_modulation(time)       # gates through tanh
            x = x + gate * attention_norm2(attention(attention_norm1(x) * (1 + scale)))
            if block reads bundle n:
                read = cross_attn_norm2(cross_attention(cross_attn_norm1(x), bundle n))
                x = x + tanh(cross_attn_gate) * read
            x = x + gate2 * ffn_norm2(feed_forward(ffn_norm1(x) * (1 + scale2)))
        velocity = final_layer(x[:, :L], time of the image)               # returned as B Z 1 H W
    """

    spec = DIT
    compute_dtype_parameter = "layers.0.attention_norm1.weight"

    def __init__(self, config: Fibo2Config, attention: AttentionChoice = SDPA) -> None:
        """Build the network without weights."""
        super().__init__()
        self.config = config
        self.attention = attention
        self.x_embedder = nn.Linear(config.in_dim, config.dim)
        self.t_embedder = TimeEmbedding(config, config.time_hidden)
        self.noise_refiner = nn.ModuleList(Fibo2Block(config) for _ in range(config.noise_refiner_layers))
        self.perceiver = Perceiver(config)
        # a bundle is the text states that one attention layer reads; the Perceiver reads bundle 0
        bundles = {block: number for number, block in enumerate(config.injections, 1)}
        self.layers = nn.ModuleList(
            Fibo2Block(config, bundles.get(number)) for number in range(config.num_layers)
        )
        self.final_layer = LuminaFinalLayer(config)
        self._rotary = GridTable[Fibo2Layout](self._make_table)

    def embed(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        text_mask: Tensor,
        overrides: Overrides = NO_OVERRIDES,
        references: Sequence[Tensor] = (),
    ) -> Hidden:
        """Embed image, references and gist as tokens, B L+R+G C; return them with the blocks' other inputs.

        The gist is a short sequence of tokens into which the network condenses the text.

        Args:
            noisy: Packed latents, B Z 1 H W.
            timesteps: B, 0..1000.
            text: States of the language model, B T n W.
            text_mask: B T, true or 1 for real tokens, which come first.
            overrides: Changes to this call. For normalized attention guidance (NAG), they contain a second
                `text` and `text_mask`; its gist follows the prompt's.
            references: Clean latents of images to edit, each B Z 1 h w of its own size.

        Raises:
            ValueError: If sizes do not match.
        """
        if text_mask.shape != text.shape[:2]:
            raise ValueError(f"a text mask of {tuple(text_mask.shape)} for text of {tuple(text.shape)}")
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        images = (noisy, *references)
        grids = tuple(map(self.get_token_grid, images))
        patches = [rearrange(latents, "b z 1 h w -> b (h w) z") for latents in images]
        image = run_in_weight_dtype(self.x_embedder, torch.cat(patches, dim=1)).to(dtype)
        # of the prompt and, if `overrides` have one, of the second text
        prompts = overrides.text_inputs(len(noisy), text=text, text_mask=text_mask)
        texts = [_read_states(prompt) for prompt in prompts]
        gists = [self._make_gist(text_states, image.shape[1], dtype) for text_states in texts]
        tokens = Fibo2Tokens(
            grids[0],
            rotary=self._rotary.get_table(Fibo2Layout(grids, gists[0].tokens.shape[1]), image.device),
            lengths=gists[0].lengths,
            time=self.embed_times(timesteps),
            dtype=dtype,
            attention=self.attention,
            text_states=tuple(texts),
            modulation_split=math.prod(grids[0]),
        )
        image = self._refine(image, tokens)
        if overrides.combine_attention is not None:  # there is a second text
            tokens = self._add_second_text(tokens, gists[1], grids, overrides.combine_attention)
        return Hidden(torch.cat([image, *(gist.tokens for gist in gists)], dim=1), tokens)

    def _add_second_text(
        self,
        tokens: Fibo2Tokens,
        gist: "Gist",
        grids: tuple[Grid, ...],
        combine_attention: CombineAttention,
    ) -> Fibo2Tokens:
        """Return the blocks' inputs with the gist of a second text, whose tokens come last."""
        # `grids` are those of the image and its references.
        num_images = sum(map(math.prod, grids))
        num_gist = gist.tokens.shape[1]
        return replace(
            tokens,
            second_text=SecondText(num_images, num_gist, gist.lengths, combine_attention),
            second_rotary=self._make_table(Fibo2Layout(grids, num_gist), device=gist.tokens.device),
        )

    def get_token_grid(self, latents: Tensor) -> Grid:
        """Return rows and columns of an image's tokens. Raises ValueError if its channels do not match."""
        channels, frames, height, width = latents.shape[1:]
        if channels != self.config.in_dim or frames != 1:
            raise ValueError(
                f"latents of {tuple(latents.shape[1:])}: {self.config.in_dim} channels of one image"
            )
        return height, width

    def embed_times(self, timesteps: Tensor) -> Tensor:
        """Return time embeddings, B S time_dim float32: of the image, and of time 0 for clean tokens."""
        both = torch.stack([timesteps, torch.zeros_like(timesteps)], dim=1)
        time: Tensor = self.t_embedder(both.flatten()).unflatten(0, both.shape)
        return time

    def _refine(self, image: Tensor, tokens: Fibo2Tokens) -> Tensor:
        """Apply the refiner of noisy latents: self-attention among image and reference tokens, B L+R C."""
        count = image.shape[1]
        alone = replace(tokens, rotary=tokens.rotary[:count], lengths=None, text_states=())
        if count == tokens.modulation_split:  # no references: one row of modulation serves all
            alone = replace(alone, time=tokens.time[:, :1])
        for block in self.noise_refiner:
            image = block(image, alone)
        return image

    def _make_gist(self, text: TextStates, num_image_tokens: int, dtype: torch.dtype) -> "Gist":
        """Return the texts' gist tokens; their lengths include the image tokens before them."""
        counts = [self.config.count_gist(count) for count in text.counts]
        device = text.states.device
        gist_lengths = lengths = None
        if len(set(counts)) > 1:  # else there is no padding
            gist_lengths = make_lengths(counts, device)
            lengths = make_lengths([num_image_tokens + count for count in counts], device)
        tokens = self.perceiver(text, max(counts), gist_lengths, self.attention, dtype)
        return Gist(tokens, lengths)

    def unembed(self, x: Tensor, tokens: Fibo2Tokens) -> Tensor:
        """Turn tokens B L+R+G C into the velocity, B Z 1 H W in float32."""
        rows, columns = tokens.grid
        at_time = replace(tokens, time=tokens.time[:, 0])
        patches = self.final_layer(x[:, : tokens.image], at_time).float()
        return rearrange(patches, "b (h w) z -> b z 1 h w", h=rows, w=columns)

    def _make_table(self, layout: Fibo2Layout, /, *, device: torch.device) -> Tensor:
        """Return the rotary table, (cosine, sine) pairs L+R+G 1 D/2 2 float32."""
        # Positions are (i, 0, 0) for gist token i (from 1), (maximum of gist tokens + 1, row, column) for the
        # image, and k planes after it for reference k (from 1). Angles are float64, rounded to float32, as
        # trained.
        tables = []
        for plane, (rows, columns) in enumerate(layout.grids, self.config.max_gist + 1):
            tables.append(self._grid_rotations(range(plane, plane + 1), range(rows), range(columns), device))
        gist_positions = range(1, 1 + layout.num_gist_tokens)
        tables.append(self._grid_rotations(gist_positions, range(1), range(1), device))
        return torch.cat(tables).unsqueeze(-3)

    def _grid_rotations(self, planes: range, rows: range, columns: range, device: torch.device) -> Tensor:
        """Return rotary pairs, n D/2 2 float32, of tokens on a grid with these positions along its axes."""
        axes = []
        for positions, width in zip((planes, rows, columns), self.config.rotary_widths, strict=True):
            positions_float64 = torch.tensor([*positions], dtype=torch.float64)
            angles = rotation_angles(positions_float64, width, self.config.rope_theta)
            axes.append(send_ahead(cos_and_sin(angles.float()), device))
        return spread_over_grid(axes)


class Gist(NamedTuple):
    """Gist tokens of a batch of texts, with their lengths."""

    tokens: Tensor  # B G C
    lengths: SampleLengths | None  # real tokens of image, references and gist together; None: all


def _read_states(arguments: Mapping[str, Any]) -> TextStates:
    """Return a batch's text states from text and text_mask, the arguments of `Fibo2Model.embed`."""
    longest, counts = count_real_tokens(arguments["text_mask"])
    return TextStates(arguments["text"][:, :longest], counts)
