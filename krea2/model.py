"""The transformer of Krea 2: single-stream blocks over an image and the fused states of a language model.

Names of modules are the released ones. Source: the released code (krea-ai/krea-2). The embedding of time,
modulation, norms and rotary angles are always float32. Attention is Lumina's, gated; references of an edit
come first, then the image, then the text. Attention does not depend on the order, only on positions: those of
all texts are 0, those of references on the first axis 1, 2, ... Source of edits: ai-toolkit's `edit: true`.
References that attend only to each other, at time 0, are the same in all passes of a generation: their keys
and values are computed once (`Krea2Model.compute_keys_values`).
"""
# Letters: B batch, R tokens of references, L of the image, T of text, n states of each, N heads, D head
# width, C = N * D, S 1, or 2 if there are references: time 0, theirs, comes before the image's

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from krea2.configs import DIT, PATCH, Krea2Config, Krea2StreamConfig
from lumina.blocks import GroupedAttention, Heads, LuminaTokens, repeat_kv_heads
from lumina.model import count_real_tokens
from modules.attention.attend import CombineAttention, SampleLengths, SecondText, attend, make_lengths
from modules.layers.modulation import add_gated, modulate, split_segments
from modules.layers.norms import CenteredNorm, SwiGlu, activation_dtype, run_float32, run_in_weight_dtype
from modules.layers.rope import GridTable, TokenGrid, rotary_table, rotate, sinusoid
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.kv_cache import CachesKeysValues, compute_keys_values, use_keys_values
from runtime.offload.context import TokenShard
from runtime.run_blocks import BlockNetwork, Hidden

MODULATION_ROWS = 6  # that modulate a block: scale, shift and gate of attention and of feed-forward


gelu = partial(functional.gelu, approximate="tanh")  # as trained


@dataclass(frozen=True)
class Krea2Tokens(LuminaTokens):
    """Inputs of the blocks besides x, B R+L+T C; `time`, B 7 S C, is six block rows and a final row."""

    num_references: int = 0  # R
    num_isolated: int = 0  # how many of these attend only to each other; `lengths` counts all other tokens
    stores_keys_values: bool = False  # there are references alone, whose keys and values the blocks keep
    # index of the first token after references, among the tokens that this process has
    modulation_split: int = 0

    def cut(self, shard: TokenShard) -> "Krea2Tokens":
        """Return the inputs for the tokens that one process computes."""
        return replace(super().cut(shard), modulation_split=shard.count_among_first(self.num_references))

    @property
    def first_noisy_token(self) -> int:
        """Return the index of the image's first token, which follows the references."""
        return self.num_references


class QueryKeyScales(nn.Module):
    """Norms of queries and keys, applied to each head separately."""

    def __init__(self, config: Krea2StreamConfig) -> None:
        super().__init__()
        self.qnorm = CenteredNorm(config.head_width, config.eps)
        self.knorm = CenteredNorm(config.head_width, config.eps)


class GatedAttention(GroupedAttention):
    """Self-attention whose output is multiplied by gates computed from the tokens."""

    def __init__(self, config: Krea2StreamConfig) -> None:
        nn.Module.__init__(self)
        dim = config.dim
        rows = config.num_kv_heads * config.head_width
        self.wq = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, rows, bias=False)
        self.wv = nn.Linear(dim, rows, bias=False)
        self.qknorm = QueryKeyScales(config)
        self.head_width = config.head_width
        # keys and values of the leading references, 1 R K D; see `runtime/kv_cache.py`
        self.cached_keys_values: Sequence[Tensor] = ()

    def heads(self, x: Tensor) -> Heads:
        """Return queries (B L N D), keys and values (B L K D) of tokens B L C; the first two normalized."""
        query = run_in_weight_dtype(self.wq, x).unflatten(-1, (-1, self.head_width))
        key = run_in_weight_dtype(self.wk, x).unflatten(-1, (-1, self.head_width))
        value = run_in_weight_dtype(self.wv, x).unflatten(-1, (-1, self.head_width))
        return self.qknorm.qnorm(query), self.qknorm.knorm(key), value

    def forward(self, x: Tensor, tokens: LuminaTokens) -> Tensor:
        """Return the attention output, B L C, of tokens x multiplied by learned gates."""
        return self.gated(x, self.attend_tokens(x, tokens))

    def attend_heads(
        self, heads: Iterable[Tensor], rotary: Tensor, tokens: LuminaTokens, lengths: SampleLengths | None
    ) -> Tensor:
        """Return the attention of tokens, B L N D; isolated references attend only to each other."""
        assert isinstance(tokens, Krea2Tokens)
        query, key, value = heads
        rotated = rotate(query, rotary), rotate(key, rotary), value
        return attend_rotated(self, rotated, tokens, lengths)

    def attend_text(self, x: Tensor, choice: AttentionChoice, lengths: SampleLengths | None) -> Tensor:
        """Return the self-attention of text tokens x, B T C, without positions."""
        query, key, value = self.heads(x)
        return self.gated(x, attend(query, *repeat_kv_heads(query, key, value), choice, lengths).flatten(2))

    def gated(self, x: Tensor, attended: Tensor) -> Tensor:
        """Multiply the attention output by gates computed from tokens x, and project it; all B L C."""
        return run_in_weight_dtype(self.wo, attended * run_in_weight_dtype(self.gate, x).sigmoid())


def attend_rotated(
    attention: CachesKeysValues, heads: Heads, tokens: Krea2Tokens, lengths: SampleLengths | None
) -> Tensor:
    """Return the attention of tokens, B L N D, in which isolated references attend only to each other.

    Args:
        attention: Layer whose memory stores, or provides, the keys and values of references.
        heads: Query, key and value, the first two rotated.
        tokens: Inputs of the blocks.
        lengths: Numbers of real tokens, not counting isolated references.
    """
    query, key, value = heads
    if tokens.stores_keys_values:
        attention.cached_keys_values = key, value
    elif attention.cached_keys_values:
        cached_key, cached_value = attention.cached_keys_values
        key = _put_in_front(cached_key, key)
        value = _put_in_front(cached_value, value)
    key, value = repeat_kv_heads(query, key, value)
    isolated = tokens.num_isolated
    choice = tokens.attention
    attended = attend(query[:, isolated:], key, value, choice, lengths=lengths)
    if not isolated:
        return attended
    # isolated references attend only to each other
    references = attend(query[:, :isolated], key[:, :isolated], value[:, :isolated], choice)
    return torch.cat([references, attended], dim=1)


def _put_in_front(references: Tensor, heads: Tensor) -> Tensor:
    """Prepend the keys or values of references, B R K D (R may be shared: 1 R K D), to heads B L K D."""
    return torch.cat([references.expand(len(heads), -1, -1, -1), heads], dim=1)


class StreamBlock(nn.Module):
    """Attention and feed-forward, each after a norm."""

    def __init__(self, config: Krea2StreamConfig) -> None:
        super().__init__()
        self.prenorm = CenteredNorm(config.dim, config.eps)
        self.postnorm = CenteredNorm(config.dim, config.eps)
        self.attn = GatedAttention(config)
        self.mlp = SwiGlu("gate up down", config.dim, config.ffn_dim)


class TextBlock(StreamBlock):
    """Block over a language model's states, without positions or time."""

    def forward(self, x: Tensor, choice: AttentionChoice, lengths: SampleLengths | None = None) -> Tensor:
        """Apply the block to states x, B T C."""
        x = x + self.attn.attend_text(self.prenorm(x), choice, lengths)
        output: Tensor = x + self.mlp(self.postnorm(x))
        return output


class TextFusion(nn.Module):
    """Merge each token's several states into one, then let the tokens attend to each other."""

    def __init__(self, config: Krea2Config) -> None:
        super().__init__()
        self.layerwise_blocks = nn.ModuleList(TextBlock(config.text) for _ in range(config.layerwise_blocks))
        self.projector = nn.Linear(config.states, 1, bias=False)
        self.refiner_blocks = nn.ModuleList(TextBlock(config.text) for _ in range(config.refiner_blocks))

    def forward(self, states: Tensor, choice: AttentionChoice, lengths: SampleLengths | None) -> Tensor:
        """Fuse the states of n layers of the language model for each token, B T n C, to B T C."""
        # states: B T n C -> B T C
        x = states.flatten(0, 1)
        for block in self.layerwise_blocks:
            x = block(x, replace(choice, split=False))
        x = run_in_weight_dtype(self.projector, x.transpose(1, 2)).squeeze(-1).unflatten(0, states.shape[:2])
        for block in self.refiner_blocks:
            x = block(x, choice, lengths)
        return x


class ModulationOffset(nn.Module):
    """A layer's learned offset to the modulation that all layers share."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.lin = nn.Parameter(torch.zeros(shape))


class Krea2Block(StreamBlock):
    """Block with joint attention of image and text tokens, modulated by the timestep."""

    def __init__(self, config: Krea2Config) -> None:
        super().__init__(config)
        self.mod = ModulationOffset(MODULATION_ROWS * config.dim)

    def modulation(self, tokens: Krea2Tokens) -> tuple[Tensor, ...]:
        """Return scale, shift and gate for attention and for the feed-forward, each B S C float32."""
        table = self.mod.lin.unflatten(0, (MODULATION_ROWS, 1, -1))  # added in float32, as the time
        return (tokens.time[:, :MODULATION_ROWS] + table).unbind(1)

    def forward(self, x: Tensor, tokens: Krea2Tokens) -> Tensor:
        """Apply the block to tokens x, B R+L+T C."""
        # x: B R+L+T C
        scale, shift, gate, *feed_forward_modulation = self.modulation(tokens)
        h = modulate(self.prenorm.in_float32(x), shift, scale, tokens.dtype, split=tokens.modulation_split)
        x = add_gated(x, gate, self.attn(h, tokens), tokens.modulation_split)
        # the expensive one last: if it runs in pieces, recomputing the block stops here
        parts = []
        for part, *rows in split_segments(tokens.modulation_split, feed_forward_modulation, x):
            # without names: code that computes it in pieces takes arguments by their order
            parts.append(self.feed(part, tokens.dtype, *rows))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def modulated_input(self, x: Tensor, tokens: Krea2Tokens) -> Tensor:
        """Return the modulated input of attention for the image tokens of x, B R+L+T C to B L C."""
        scale, shift, *_ = (each[:, -1:] for each in self.modulation(tokens))
        image = x[:, tokens.modulation_split : tokens.modulation_split + tokens.image]
        return modulate(self.prenorm.in_float32(image), shift, scale, tokens.dtype)

    def feed(self, x: Tensor, dtype: torch.dtype, scale: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
        """Add the feed-forward branch to x, B L C; each token is processed independently."""
        h = modulate(self.postnorm.in_float32(x), shift, scale, dtype)
        return add_gated(x, gate, self.mlp(h))


class LastLayer(nn.Module):
    """Final norm, modulated by the time embedding itself, and projection to patches."""

    def __init__(self, config: Krea2Config) -> None:
        super().__init__()
        self.norm = CenteredNorm(config.dim, config.eps)
        self.linear = nn.Linear(config.dim, config.channels * PATCH**2)
        self.modulation = ModulationOffset(2, config.dim)

    def forward(self, x: Tensor, tokens: Krea2Tokens) -> Tensor:
        """Project image tokens x, B L C, to patches of the velocity."""
        scale, shift = (tokens.time[:, MODULATION_ROWS:, -1] + self.modulation.lin).chunk(2, dim=1)
        return run_in_weight_dtype(self.linear, modulate(self.norm.in_float32(x), shift, scale, tokens.dtype))


class Krea2Layout(NamedTuple):
    """Grid and text lengths that determine a rotary table."""

    grid: tuple[int, int]  # rows, columns of the image's tokens
    num_text_tokens: int  # tokens of the texts
    reference_grids: tuple[tuple[int, int], ...] = ()  # as the grid, of each reference


class Krea2Text(NamedTuple):
    """An embedded text, with its lengths."""

    states: Tensor  # B T C
    # how many of the tokens that attend to all are real, with this text last; None for all
    lengths: SampleLengths | None


class Krea2Model(BlockNetwork):
    """Predict the velocity of noisy latents of an image from several states of Qwen3-VL for each token.

    Simplified, without references, a second text and the code around the blocks:

        x = cat([first(patches of noisy), txtmlp(txtfusion(text))])        # B L+T C
        time = tmlp(sinusoid(timesteps))                                   # B C
        rows = tproj(gelu(time))                                           # B 6 C
        for block in blocks:
            scale, shift, gate, scale2, shift2, gate2 = rows + block.mod   # each B 1 C
            x = x + gate * attn(prenorm(x) * (1 + scale) + shift)
            x = x + gate2 * mlp(postnorm(x) * (1 + scale2) + shift2)
        scale, shift = time + last.modulation                              # each B 1 C
        velocity = last.linear(last.norm(x[:, :L]) * (1 + scale) + shift)  # B L Z*4, returned as B Z 1 H W
    """

    spec = DIT
    compute_dtype_parameter = "blocks.0.mod.lin"

    def __init__(self, config: Krea2Config, attention: AttentionChoice = SDPA) -> None:
        """Build the network without weights; its modules are named as in the released file."""
        super().__init__()
        self.config = config
        self.attention = attention
        dim, text_dim = config.dim, config.text_dim
        self.first = nn.Linear(config.channels * PATCH**2, dim)
        # the Identity takes GELU's place, so that layers keep their numbers in the file
        self.tmlp = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.Identity(), nn.Linear(dim, dim))
        self.tproj = nn.Sequential(nn.Identity(), nn.Linear(dim, MODULATION_ROWS * dim))
        self.txtfusion = TextFusion(config)
        self.txtmlp = nn.Sequential(
            CenteredNorm(text_dim, config.eps),
            nn.Linear(text_dim, dim),
            nn.Identity(),
            nn.Linear(dim, dim),
        )
        self.blocks = nn.ModuleList(Krea2Block(config) for _ in range(config.num_layers))
        self.last = LastLayer(config)
        self._rotary = GridTable[Krea2Layout](self._make_table)

    def forward(
        self,
        *inputs: Any,
        overrides: Overrides = NO_OVERRIDES,
        references: Sequence[Tensor] = (),
        isolated: bool = False,
        **named_inputs: Any,
    ) -> Any:
        """Predict the velocity from the arguments of `embed`, with or without cached references.

        With `overrides.section_cache`, the keys and values of isolated references are computed only in the
        first step; other steps read them from the cache.
        """
        # only isolated references do not depend on the image, so only they can be cached
        kv_cache = overrides.section_cache if isolated and references else None
        if kv_cache is not None and not kv_cache:
            # the first pass fills the cache; references are equal for all samples
            kv_cache.update(self.compute_keys_values([latents[:1] for latents in references]))
        # a perturbed pass, such as one that skips blocks, computes the references itself
        if kv_cache is None or overrides.is_perturbed:
            kv_cache = {}
        else:
            # the cached keys and values stand in for the references
            references = ()
        with use_keys_values(kv_cache, self.attentions()):
            return super().forward(
                *inputs,
                overrides=overrides,
                references=references,
                isolated=isolated,
                **named_inputs,
            )

    def compute_keys_values(self, references: Sequence[Tensor]) -> dict[GatedAttention, Sequence[Tensor]]:
        """Return each block's keys and values of isolated references, 1 Z 1 h w each, for use in all steps.

        References are clean: time 0.
        """
        device = references[0].device
        dtype = activation_dtype(device, self.compute_dtype)
        times = torch.zeros(1, device=device)
        images = [self.embed_image(latents).to(dtype) for latents in references]
        x = torch.cat(images, dim=1)
        grids = tuple(self.get_token_grid(latents) for latents in references)
        layout = Krea2Layout(grid=(0, 0), num_text_tokens=0, reference_grids=grids)  # no image and no text
        tokens = Krea2Tokens(
            layout.grid,
            rotary=self._rotary.get_table(layout, device),
            lengths=None,
            time=self.embed_time(times)[:, :, None],
            dtype=dtype,
            attention=self.attention,
            stores_keys_values=True,
        )
        return compute_keys_values(self, Hidden(x, tokens), self.attentions())

    def attentions(self) -> list[GatedAttention]:
        """Return the attention layer of each block."""
        return [block.attn for block in self.blocks if isinstance(block, Krea2Block)]

    def embed(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        text_mask: Tensor,
        overrides: Overrides = NO_OVERRIDES,
        references: Sequence[Tensor] = (),
        isolated: bool = False,
    ) -> Hidden:
        """Embed references, image and text as tokens, B R+L+T C; return them with the blocks' other inputs.

        Args:
            noisy: B Z 1 H W.
            timesteps: B, 0..1000.
            text: States of the language model, B T n text_dim.
            text_mask: B T, true or 1 for real tokens, which come first.
            overrides: Changes to this call. For normalized attention guidance (NAG), they contain a second
                `text` and `text_mask`, whose tokens follow the prompt's.
            references: Clean latents of images to edit, each B Z 1 h w of its own size.
            isolated: Whether references attend only to each other.

        Raises:
            ValueError: If sizes do not match.
        """
        if text_mask.shape != text.shape[:2]:
            raise ValueError(f"a text mask of {tuple(text_mask.shape)} for text of {tuple(text.shape)}")
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        reference_grids = tuple(self.get_token_grid(latents) for latents in references)
        grid = self.get_token_grid(noisy)
        images = [self.embed_image(latents).to(dtype) for latents in (*references, noisy)]
        image = images[0] if not references else torch.cat(images, dim=1)
        num_images = image.shape[1]  # tokens of references and image, R + L
        num_references = num_images - math.prod(grid)
        num_isolated = num_references if isolated else 0
        # of the prompt and, if `overrides` have one, of the second text
        prompts = overrides.text_inputs(len(noisy), text=text, text_mask=text_mask)
        texts = [self._embed_prompt(prompt, num_images - num_isolated, dtype) for prompt in prompts]
        x = torch.cat([image, *(embedded.states for embedded in texts)], dim=1)
        layout = Krea2Layout(grid, x.shape[1] - num_images, reference_grids)
        rotary = self._rotary.get_table(layout, noisy.device)
        tokens = Krea2Tokens(
            grid,
            # the table is long enough for both texts, so each uses the beginning
            rotary=rotary[: num_images + texts[0].states.shape[1]],
            lengths=texts[0].lengths,
            time=self._embed_times(timesteps, bool(references)),
            dtype=dtype,
            attention=self.attention,
            num_references=num_references,
            modulation_split=num_references,
            num_isolated=num_isolated,
        )
        if overrides.combine_attention is not None:  # there is a second text
            tokens = self._add_second_text(tokens, texts[1], num_images, rotary, overrides.combine_attention)
        return Hidden(x, tokens)

    def _add_second_text(
        self,
        tokens: Krea2Tokens,
        text: Krea2Text,
        num_images: int,
        rotary: Tensor,
        combine_attention: CombineAttention,
    ) -> Krea2Tokens:
        """Return the blocks' inputs with a second text, whose tokens come last."""
        # `num_images` counts the tokens of references and image; `rotary` is long enough for either text.
        num_tokens = text.states.shape[1]
        second_text = SecondText(num_images, num_tokens, text.lengths, combine_attention)
        return replace(tokens, second_text=second_text, second_rotary=rotary[: num_images + num_tokens])

    def _embed_prompt(
        self, arguments: Mapping[str, Any], num_image_tokens: int, dtype: torch.dtype
    ) -> Krea2Text:
        """Embed a text; `arguments` are its states `text`, and `text_mask`, true for real tokens."""
        # `num_image_tokens` counts the tokens before the text that attend to all.
        longest, counts = count_real_tokens(arguments["text_mask"])
        states = arguments["text"][:, :longest]
        text_lengths = lengths = None
        if len(set(counts)) > 1:  # else there is no padding, and attention gets no mask
            text_lengths = make_lengths(counts, states.device)
            lengths = make_lengths([num_image_tokens + count for count in counts], states.device)
        return Krea2Text(self.embed_text(states.to(dtype), text_lengths).to(dtype), lengths)

    def _embed_times(self, timesteps: Tensor, has_references: bool) -> Tensor:
        """Return the embedded times, B 7 S C: time 0 for references, then the image's time."""
        time = self.embed_time(timesteps)[:, :, None]
        if not has_references:
            return time
        reference_time = self.embed_time(torch.zeros_like(timesteps))[:, :, None]
        return torch.cat([reference_time, time], dim=2)

    def get_token_grid(self, latents: Tensor) -> tuple[int, int]:
        """Return rows and columns of an image's tokens. Raises ValueError if its sizes do not match."""
        channels, _, height, width = latents.shape[1:]
        if channels != self.config.channels or height % PATCH or width % PATCH:
            raise ValueError(
                f"latents of {tuple(latents.shape[1:])}: {self.config.channels} channels, even sides"
            )
        return height // PATCH, width // PATCH

    def embed_image(self, latents: Tensor) -> Tensor:
        """Embed an image as tokens: B Z 1 H W to B L C."""
        patches = rearrange(latents, "b z 1 (h ph) (w pw) -> b (h w) (z ph pw)", ph=PATCH, pw=PATCH)
        return run_in_weight_dtype(self.first, patches)

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Return all blocks' modulation and then the time embedding, B to B 7 C float32."""
        waves = sinusoid(timesteps, self.config.freq_dim, torch.float32)
        time = run_float32(self.tmlp[2], gelu(run_float32(self.tmlp[0], waves)))
        rows = run_in_weight_dtype(self.tproj[1], gelu(time)).float()
        return torch.cat([rows, time], dim=1).unflatten(1, (MODULATION_ROWS + 1, -1))

    def embed_text(self, states: Tensor, lengths: SampleLengths | None) -> Tensor:
        """Embed a language model's states, B T n text_dim, as text tokens B T C."""
        norm, first, _, second = self.txtmlp
        fused = self.txtfusion(states, self.attention, lengths)
        return run_in_weight_dtype(second, gelu(run_in_weight_dtype(first, norm(fused))))

    def unembed(self, x: Tensor, tokens: Krea2Tokens) -> Tensor:
        """Turn tokens B R+L+T C into the velocity, B Z 1 H W in float32."""
        rows, columns = tokens.grid
        image = x[:, tokens.num_references : tokens.num_references + tokens.image]
        patches = self.last(image, tokens).float()
        return rearrange(
            patches, "b (h w) (z ph pw) -> b z 1 (h ph) (w pw)", h=rows, w=columns, ph=PATCH, pw=PATCH
        )

    def _make_table(self, layout: Krea2Layout, /, *, device: torch.device) -> Tensor:
        """Return the rotary table, (cosine, sine) pairs R+L+T 1 D/2 2 float32, from float64 angles."""
        # Positions are (0, row, column) for image tokens, (k, row, column) for tokens of reference k (from
        # 1), and (0, 0, 0) for texts.
        widths, theta = self.config.rotary_widths, self.config.rope_theta
        grids = [
            TokenGrid((1, *grid), first_position=number)
            for number, grid in enumerate(layout.reference_grids, 1)
        ]
        grids.append(TokenGrid((1, *layout.grid), first_position=0))
        images = [rotary_table(grid, widths, theta, device) for grid in grids]
        text = rotary_table(TokenGrid((1, 1, 1), first_position=0), widths, theta, device)
        return torch.cat([*images, text.expand(layout.num_text_tokens, -1, -1, -1)])
