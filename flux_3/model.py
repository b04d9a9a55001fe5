"""The transformer of FLUX 3: blocks of each kind of tokens alone, then blocks in which all attend to all.

There are three kinds of tokens ("modes"): those of the image, of references, and of a text. All blocks are
parallel: attention and a SwiGLU feed-forward get the same modulated input. Modulations are shared by all
blocks of a kind; there are no biases. Module names follow the released files. Source: the released code (BFL,
flux-3-image-klein). The embedding of time, modulation, norms and rotary angles are always float32. The image
tokens come first, then those of references, then the text's; the released code has the text first. Attention
does not depend on the order, only on positions.
"""
# Letters: B batch, L tokens of the image, R of references, T of a text, T' of a second text, S kinds of
# tokens that are there, N heads, D head width, C = N * D, F width of a feed-forward

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from flux_2.model import PairNorm, PixelFinalLayer, SharedModulation, gate_half, number_embedding
from flux_3.configs import AXES, DIT, Flux3Config
from modules.attention.attend import SampleLengths, SecondText, attend, make_lengths
from modules.devices import send_ahead
from modules.layers.modulation import add_gated, modulate
from modules.layers.norms import Float32LayerNorm, activation_dtype, run_in_weight_dtype
from modules.layers.rope import (
    GridTable,
    cos_and_sin,
    rotate,
    rotation_angles,
    select_rotations,
    sinusoid,
    spread_over_grid,
)
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.run_blocks import BlockNetwork, Hidden

if TYPE_CHECKING:  # loaded only if processes share tokens
    from runtime.offload.context import TokenShard

IMAGE, REFERENCES, TEXT = MODES = ("image", "image_cond", "txt")
CONTENT = (IMAGE, REFERENCES)
SCALE = 0.5  # distance between neighboring rows or columns, as positions
ROWS = 3  # that modulate a block: shift, scale and gate
# rows of a kind of tokens: for its own blocks, for joint blocks, and the embedded time
MODE_ROWS, JOINT_ROWS, TIME_ROW = slice(0, ROWS), slice(ROWS, 2 * ROWS), 2 * ROWS


@dataclass(frozen=True)
class Flux3Tokens:
    """Inputs of the blocks in addition to the tokens x, B L+R+T C; built once per forward pass.

    With a second text x is B L+R+T+T' C, and both texts count as one kind of token.
    """

    grid: tuple[int, int]  # rows, columns of the image's tokens
    modes: tuple[str, ...]  # kinds of tokens that are there, in their order
    counts: tuple[int, ...]  # how many of each this process has
    rotary: Tensor  # rotations of these tokens, L+R+T+T' 1 D/2 2, or with B in front
    vector: Tensor  # B S 7 C float32: rows for each kind of tokens
    dtype: torch.dtype  # dtype of activations between layers
    attention: AttentionChoice
    lengths: SampleLengths | None  # how many of the L+R+T tokens are real; None: all
    text_lengths: SampleLengths | None  # how many of the T tokens of the text are real; None: all
    second_text: SecondText | None = None
    second_lengths: SampleLengths | None = None  # real tokens of the second text alone
    parts: tuple["TokenShard", ...] = ()  # the tokens of each kind that this process has; (): all

    @property
    def stream_lengths(self) -> tuple[int, ...]:
        """Return how many tokens of each modality this process has."""
        return self.counts

    @property
    def first_image(self) -> int:
        """Return the index of the first token of the noisy latents, whose tokens form `grid`."""
        return 0

    @property
    def split(self) -> tuple[int, ...]:
        """Return the indices at which the second and the third modality begin."""
        return tuple(accumulate(self.counts[:-1]))

    def cut(self, *parts: "TokenShard") -> "Flux3Tokens":
        """Return the inputs for one process, which has a part of each modality's tokens."""
        tables = self.rotary.split(self.counts, dim=-4)
        rotary = torch.cat(
            [part.slice_rotary(table) for part, table in zip(parts, tables, strict=True)], dim=-4
        )
        counts = tuple(part.count_among_first(part.length) for part in parts)
        return replace(self, rotary=rotary, counts=counts, parts=parts)

    def select(self, kept: Tensor, num_left_out: int) -> "Flux3Tokens":
        """Return the block inputs for some tokens of x; only tokens of the noisy latents are dropped.

        `kept` holds the ascending indices of the remaining tokens, B K; `num_left_out` tokens are dropped.
        """
        of_image, *others = self.counts
        lengths = None if self.lengths is None else self.lengths.shorten(num_left_out)
        return replace(
            self,
            rotary=select_rotations(self.rotary, kept, num_left_out),
            counts=(of_image - num_left_out, *others),
            lengths=lengths,
        )


class ParallelBlock(nn.Module):
    """Layers of a block whose attention and feed-forward run in parallel."""

    def __init__(self, config: Flux3Config) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.pre_norm = Float32LayerNorm(dim, config.eps)  # has no weights
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.norm = PairNorm(config.head_width, config.eps)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.mlp_in = nn.Linear(dim, 2 * config.ffn_dim, bias=False)
        self.mlp_out = nn.Linear(config.ffn_dim, dim, bias=False)

    def heads(self, h: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries and keys, and values, of modulated tokens B L C: each B L N D."""
        value = self._split(self.v_proj, h)
        # float32 from the norms to the rotated heads, rounded once, as released
        query = self.norm.query_norm(self._split(self.q_proj, h).float())
        key = self.norm.key_norm(self._split(self.k_proj, h).float())
        return rotate(query, rotary).to(value.dtype), rotate(key, rotary).to(value.dtype), value

    def _split(self, projection: nn.Module, h: Tensor) -> Tensor:
        return run_in_weight_dtype(projection, h).unflatten(-1, (self.num_heads, -1))

    def branch(self, h: Tensor, attended: Tensor) -> Tensor:
        """Return the block's output, B L C, before its gate.

        `h` is the block's modulated input, B L C; `attended` is its attention, B L N D.
        """
        output: Tensor = run_in_weight_dtype(self.attn_out, attended.flatten(2)) + self.feed_forward(h)
        return output

    def feed_forward(self, h: Tensor) -> Tensor:
        """Apply the feed-forward to modulated tokens, B L C; each token is processed independently."""
        return run_in_weight_dtype(self.mlp_out, gate_half(run_in_weight_dtype(self.mlp_in, h)))


class ModeBlock(ParallelBlock):
    """Block in which tokens of one modality attend to each other, while other tokens pass unchanged."""

    def __init__(self, config: Flux3Config, mode: str) -> None:
        super().__init__(config)
        self.mode = mode

    def forward(self, x: Tensor, tokens: Flux3Tokens) -> Tensor:
        """Apply the block to the tokens of its modality in x, B L+R+T C."""
        # x: B L+R+T C
        if self.mode not in tokens.modes:
            return x
        place = tokens.modes.index(self.mode)
        shift, scale, gate = tokens.vector[:, place : place + 1, MODE_ROWS].unbind(2)
        streams = list(x.split(tokens.counts, dim=1))
        rotary = tokens.rotary.split(tokens.counts, dim=-4)[place]
        h = modulate(self.pre_norm(streams[place]), shift, scale, tokens.dtype)
        attended = _attend_within(self.heads(h, rotary), tokens, place)
        streams[place] = add_gated(streams[place], gate, self.branch(h, attended))
        return torch.cat(streams, dim=1)

    def modulated_input(self, x: Tensor, tokens: Flux3Tokens) -> Tensor:
        """Return the modulated input of attention for the image tokens of x, B L+R+T C to B L C."""
        shift, scale, _ = tokens.vector[:, :1, MODE_ROWS].unbind(2)
        return modulate(self.pre_norm(x[:, : tokens.counts[0]]), shift, scale, tokens.dtype)


class JointBlock(ParallelBlock):
    """Block in which all tokens attend to each other and share one set of weights."""

    def forward(self, x: Tensor, tokens: Flux3Tokens) -> Tensor:
        """Apply the block to tokens x, B L+R+T C."""
        # x: B L+R+T C
        shift, scale, gate = tokens.vector[:, :, JOINT_ROWS].unbind(2)
        h = modulate(self.pre_norm(x), shift, scale, tokens.dtype, split=tokens.split)
        attended = _attend_jointly(self.heads(h, tokens.rotary), tokens)
        return add_gated(x, gate, self.branch(h, attended), tokens.split)


def _attend_within(heads: Sequence[Tensor], tokens: Flux3Tokens, mode_index: int) -> Tensor:
    """Return the attention, B L N D, of the tokens of one modality (image, references or text) to each other.

    `heads` are query, key and value. `mode_index` is the modality's index in `tokens.modes`.
    """
    # with several processes, each has a part of the tokens: gather them for whole heads
    token_part = tokens.parts[mode_index] if tokens.parts else None
    if token_part is not None:
        heads = token_part.gather_tokens(*heads)
    if tokens.modes[mode_index] != TEXT:
        attended = _attend(heads, tokens, None)
    elif tokens.second_text is None:
        attended = _attend(heads, tokens, tokens.text_lengths)
    else:
        # the tokens of a second text come last; the two texts do not see each other
        num_second = tokens.second_text.num_text_tokens
        firsts = [tensor[:, :-num_second] for tensor in heads]
        seconds = [tensor[:, -num_second:] for tensor in heads]
        attended_first = _attend(firsts, tokens, tokens.text_lengths)
        attended_second = _attend(seconds, tokens, tokens.second_lengths)
        attended = torch.cat([attended_first, attended_second], dim=1)
    return attended if token_part is None else token_part.gather_heads(attended)


def _attend(heads: Sequence[Tensor], tokens: Flux3Tokens, lengths: SampleLengths | None) -> Tensor:
    """Return the self-attention of heads, B L N D; `lengths` count each sample's real tokens among the L."""
    query, key, value = heads
    return attend(query, key, value, tokens.attention, lengths=lengths)


def _attend_jointly(heads: Sequence[Tensor], tokens: Flux3Tokens) -> Tensor:
    """Return the attention of all tokens to each other, B L+R+T N D, from query, key and value.

    With several processes (`parts`), each computes some heads for all tokens.
    """
    second, parts = tokens.second_text, tokens.parts
    if parts:
        heads = _gather_streams(heads, tokens)
    if second is None:
        attended = _attend(heads, tokens, tokens.lengths)
        return _give_back(attended, parts) if parts else attended
    # two passes over the image tokens: one with the first text, one with the second
    with_first = _attend([second.drop_second_text(tensor) for tensor in heads], tokens, tokens.lengths)
    with_second = _attend([second.drop_first_text(tensor) for tensor in heads], tokens, second.lengths)
    if not parts:
        return second.combine(with_first, with_second)
    # The images of both passes are combined by `steer`, which needs all heads of a token; text tokens are
    # distributed again afterwards.
    before = second.num_image_tokens  # index of the first text token
    texts = torch.cat([with_first[:, before:], with_second[:, before:]], dim=1)
    steered = second.combine_attention(
        _give_back(with_first[:, :before], parts[:-1]), _give_back(with_second[:, :before], parts[:-1])
    )
    return torch.cat([steered, parts[-1].gather_heads(texts)], dim=1)


def _gather_streams(heads: Sequence[Tensor], tokens: Flux3Tokens) -> list[Tensor]:
    """All-to-all of heads: give each process all tokens, B L+R+T n D, for its share of the heads."""
    streams = zip(*(tensor.split(tokens.counts, dim=1) for tensor in heads), strict=True)
    gathered = [shard.gather_tokens(*stream) for shard, stream in zip(tokens.parts, streams, strict=True)]
    return [torch.cat(tensors, dim=1) for tensors in zip(*gathered, strict=True)]


def _give_back(attended: Tensor, parts: Sequence["TokenShard"]) -> Tensor:
    """Exchange all tokens of this process's heads for all heads of its tokens, stream by stream.

    Undoes `_gather_streams` after attention, in sequence parallelism.
    """
    streams = attended.split([part.length for part in parts], dim=1)
    pairs = zip(parts, streams, strict=True)
    return torch.cat([shard.gather_heads(stream) for shard, stream in pairs], dim=1)


class Flux3Layout(NamedTuple):
    """Sizes of images and texts, which determine a rotary table."""

    grid: tuple[int, int]  # rows, columns of the image's tokens
    references: tuple[tuple[int, int], ...]  # rows, columns of each reference's tokens
    texts: tuple[int, ...]  # tokens of each text


class Flux3Text(NamedTuple):
    """A text's embedded tokens, with their lengths."""

    states: Tensor  # B T C
    counts: tuple[int, ...]  # real tokens of each sample
    is_even: bool  # all tokens are real

    def lengths(self, before: int) -> SampleLengths | None:
        """Return each sample's number of real tokens plus `before`; None without padding."""
        if self.is_even:  # attention gets no mask
            return None
        return make_lengths([before + count for count in self.counts], self.states.device)


def _make_modulations(config: Flux3Config) -> nn.ModuleDict:
    return nn.ModuleDict({mode: SharedModulation(config.dim, ROWS) for mode in MODES})


class Flux3Model(BlockNetwork):
    """Predict the velocity of noisy latents of an image from states of a language model.

    Simplified, without references, a second text and the code around the blocks:

        image = emb_in.image(pixels of noisy)                                       # B L C
        text = txt_in(text)                                                           # B T C
        time, zero = time_in(timesteps), time_in(0)                                   # B C
        time, zero = each + ref_time_in(next timesteps)                               # of the distilled model
        for block in content_mode_blocks.image:                                       # likewise the text's
            shift, scale, gate = early_stream_modulations.image(time)
            h = norm(image) * (1 + scale) + shift
            image = image + gate * (attention of h + mlp_out(gated values of mlp_in(h)))
        x = cat([image, text])
        for block in single_blocks:
            shift, scale, gate = single_stream_modulations of time for the image, of zero for the text
            h = norm(x) * (1 + scale) + shift
            x = x + gate * (attention of h + mlp_out(gated values of mlp_in(h)))
        velocity = final_layer.image(x[:, :L], time)   # B L Z, returned as B Z 1 H W
    """

    spec = DIT
    dtype_of = "single_blocks.0.norm.query_norm.scale"

    def __init__(self, config: Flux3Config, attention: AttentionChoice = SDPA) -> None:
        """Build the network without weights; images, references and text have embeddings and blocks each."""
        super().__init__()
        self.config = config
        self.attention = attention
        self.time_in = number_embedding(config.freq_dim, config.dim)
        if config.is_flow_map:
            self.ref_time_in = number_embedding(config.freq_dim, config.dim)
        self.early_stream_modulations = _make_modulations(config)
        self.single_stream_modulations = _make_modulations(config)
        # first blocks of each modality alone, then blocks for all tokens
        self.emb_in = nn.ModuleDict(
            {mode: nn.Linear(config.channels, config.dim, bias=False) for mode in CONTENT}
        )
        self.txt_in = nn.Linear(config.text_dim, config.dim, bias=False)
        self.content_mode_blocks = nn.ModuleDict({mode: _make_mode_blocks(config, mode) for mode in CONTENT})
        self.txt_mode_blocks = _make_mode_blocks(config, TEXT)
        self.single_blocks = nn.ModuleList(JointBlock(config) for _ in range(config.joint_blocks))
        self.final_layer = nn.ModuleDict({IMAGE: PixelFinalLayer(config.dim, config.channels, config.eps)})
        self._rotary = GridTable[Flux3Layout](self._make_table)

    def embed(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        text_mask: Tensor,
        next_timesteps: Tensor | None = None,
        overrides: Overrides = NO_OVERRIDES,
        references: Sequence[Tensor] = (),
    ) -> Hidden:
        """Return the tokens of image, references and text, B L+R+T C, and the other inputs of the blocks.

        A second text, for negative attention, is embedded too, and its tokens come last.

        Args:
            noisy: B Z 1 H W.
            timesteps: B, 0..1000.
            text: States of the language model, B T text_dim, including those of padding to a multiple of 80.
            text_mask: B T, true or 1 for these states; further ones fill up the batch.
            next_timesteps: B, where the step ends; required by a distilled model, and by no other.
            overrides: Changes to this call; their second text has arguments named text and text_mask.
            references: Clean latents of reference images, each B Z 1 h w of its own size.

        Raises:
            ValueError: If sizes do not match, or `next_timesteps` is missing or not taken by the model.
        """
        for latents in (noisy, *references):
            if latents.shape[1] != self.config.channels or latents.shape[2] != 1:
                raise ValueError(
                    f"latents of {tuple(latents.shape[1:3])}: {self.config.channels} channels, 1 frame"
                )
        if text_mask.shape != text.shape[:2]:
            raise ValueError(f"a text mask of {tuple(text_mask.shape)} for text of {tuple(text.shape)}")
        if (next_timesteps is not None) != self.config.is_flow_map:
            raise ValueError("a distilled transformer, and no other, takes the times at which steps end")
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        images = [self._embed_image(IMAGE, noisy)]
        images += [self._embed_image(REFERENCES, latents) for latents in references]
        texts = []
        for arguments in overrides.texts(len(noisy), text=text, text_mask=text_mask):
            texts.append(self._embed_text(arguments, dtype))
        x = torch.cat(
            [*(tokens.to(dtype) for tokens in images), *(embedded.states for embedded in texts)], dim=1
        )
        num_image = images[0].shape[1]
        num_images = sum(tokens.shape[1] for tokens in images)
        # token counts by modality, in the order of the tokens in `x`
        counts = {IMAGE: num_image, TEXT: x.shape[1] - num_images}
        if references:
            counts = {IMAGE: num_image, REFERENCES: num_images - num_image, TEXT: counts[TEXT]}
        layout = Flux3Layout(
            grid=_measure_grid(noisy),
            references=tuple(_measure_grid(latents) for latents in references),
            texts=tuple(embedded.states.shape[1] for embedded in texts),
        )
        first, *seconds = texts
        tokens = Flux3Tokens(
            layout.grid,
            modes=tuple(counts),
            counts=tuple(counts.values()),
            rotary=self._rotary.get_table(layout, noisy.device),
            vector=self._embed_times(timesteps, next_timesteps, tuple(counts)),
            dtype=dtype,
            attention=self.attention,
            lengths=first.lengths(num_images),
            text_lengths=first.lengths(0),
        )
        for second in seconds:  # at most one
            assert overrides.steer is not None  # it comes with a second text
            second_text = SecondText(
                num_images, second.states.shape[1], second.lengths(num_images), overrides.steer
            )
            tokens = replace(tokens, second_text=second_text, second_lengths=second.lengths(0))
        return Hidden(x, tokens)

    def _embed_image(self, mode: str, latents: Tensor) -> Tensor:
        """Embed an image or a reference as tokens: B Z 1 H W to B L C."""
        pixels = latents.flatten(2).transpose(1, 2)  # B L Z
        return run_in_weight_dtype(self.emb_in[mode], pixels)

    def _embed_text(self, arguments: Mapping[str, Any], dtype: torch.dtype) -> Flux3Text:
        """Embed a text; `arguments` are its states as `text`, and `text_mask`, true for real tokens."""
        counts = tuple(arguments["text_mask"].sum(dim=1).tolist())
        states = arguments["text"][:, : max(counts)]
        is_even = len(set(counts)) == 1
        return Flux3Text(run_in_weight_dtype(self.txt_in, states).to(dtype), counts, is_even)

    def _embed_times(self, timesteps: Tensor, next_timesteps: Tensor | None, modes: Sequence[str]) -> Tensor:
        """Return modulation (6 rows) and time embedding of each of S modalities, B S 7 C."""
        # references and texts are clean: time 0
        time = self.time_in(self._embed_waves(timesteps))
        zero = self.time_in(self._embed_waves(torch.zeros_like(timesteps)))
        if next_timesteps is not None:  # the distilled model jumps from one noise level to the next
            step_end = self.ref_time_in(self._embed_waves(next_timesteps))
            time = time + step_end
            zero = zero + step_end
        rows = []
        for mode in modes:
            embedded = time if mode == IMAGE else zero
            early = self.early_stream_modulations[mode](embedded)
            joint = self.single_stream_modulations[mode](embedded)
            rows.append(torch.cat([early, joint, embedded.unsqueeze(1)], dim=1))
        return torch.stack(rows, dim=1)

    def _embed_waves(self, timesteps: Tensor) -> Tensor:
        return sinusoid(timesteps, self.config.freq_dim, torch.float32)

    def unembed(self, x: Tensor, tokens: Flux3Tokens) -> Tensor:
        """Turn tokens B L+R+T C into the velocity, B Z 1 H W in float32."""
        image = x[:, : math.prod(tokens.grid)]
        embedding = tokens.vector[:, :1, TIME_ROW]
        pixels = self.final_layer[IMAGE](image, embedding, tokens.dtype).float()
        return pixels.transpose(1, 2).unflatten(2, (1, *tokens.grid))

    def _make_table(self, layout: Flux3Layout, /, *, device: torch.device) -> Tensor:
        """Return the rotary table, (cosine, sine) pairs L+R+T 1 D/2 2 float32, from float64 angles.

        Positions are (0, row / 2, column / 2, 0) for image tokens, (0, row / 2, column / 2, -k) for those of
        reference k (from 1), and (0, 0, 0, index) for the text.
        """
        zero = torch.zeros(1, dtype=torch.float64)
        tables = []
        for number, (rows, columns) in enumerate((layout.grid, *layout.references)):  # 0: the image
            axes = (SCALE * torch.arange(side, dtype=torch.float64) for side in (rows, columns))
            tables.append(self._make_grid_table((zero, *axes, zero - number), device))
        for length in layout.texts:
            positions = torch.arange(length, dtype=torch.float64)
            tables.append(self._make_grid_table((zero, zero, zero, positions), device))
        return torch.cat(tables)

    def _make_grid_table(self, positions: Sequence[Tensor], device: torch.device) -> Tensor:
        """Return a grid's rotary pairs from the positions along each axis, float64 on the CPU."""
        width = self.config.head_width // AXES
        pairs = []
        for axis in positions:
            pair = cos_and_sin(rotation_angles(axis, width, self.config.rope_theta)).float()
            pairs.append(send_ahead(pair, device))
        return spread_over_grid(pairs).unsqueeze(1)


def _make_mode_blocks(config: Flux3Config, mode: str) -> nn.ModuleList:
    return nn.ModuleList(ModeBlock(config, mode) for _ in range(config.mode_blocks))


def _measure_grid(latents: Tensor) -> tuple[int, int]:
    """Return rows and columns of an image's tokens, one token for each latent pixel."""
    return latents.shape[-2], latents.shape[-1]
