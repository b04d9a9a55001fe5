"""The transformer of FLUX 3: blocks of each modality alone, then blocks in which all tokens attend to all.

There are three modalities of tokens: those of the image, of references, and of a text. All blocks are
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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flux_2.model import PairNorm, PixelFinalLayer, SharedModulation, gate_half, number_embedding
from flux_3.configs import AXES, DIT, Flux3Config
from modules.attention.attend import CombineAttention, SampleLengths, SecondText, attend, make_lengths
from modules.layers.modulation import add_gated, modulate
from modules.layers.norms import Float32LayerNorm, activation_dtype, run_in_weight_dtype
from modules.layers.rope import (
    GridTable,
    axis_rotations,
    rotate,
    select_rotations,
    sinusoid,
    spread_over_grid,
)
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.offload.context import TokenShard
from runtime.run_blocks import BlockNetwork, Hidden

IMAGE, REFERENCES, TEXT = MODALITIES = ("image", "image_cond", "txt")
IMAGE_MODALITIES = (IMAGE, REFERENCES)
POSITION_STEP = 0.5  # distance between neighboring rows or columns, as positions
NUM_MODULATION_ROWS = 3  # that modulate a block: shift, scale and gate
# rows of a modality's `vector`: for its own blocks, for joint blocks, and the embedded time
OWN_BLOCK_ROWS = slice(0, NUM_MODULATION_ROWS)
JOINT_BLOCK_ROWS = slice(NUM_MODULATION_ROWS, 2 * NUM_MODULATION_ROWS)
TIME_ROW = 2 * NUM_MODULATION_ROWS


@dataclass(frozen=True)
class Flux3Tokens:
    """Inputs of the blocks in addition to the tokens x, B L+R+T C; built once per forward pass.

    With a second text x is B L+R+T+T' C, and both texts count as one kind of token.
    """

    grid: tuple[int, int]  # rows, columns of the image's tokens
    modalities: tuple[str, ...]  # modalities that are there, in the order of their tokens
    counts: tuple[int, ...]  # number of this process's tokens, by modality
    rotary: Tensor  # rotations of these tokens, L+R+T+T' 1 D/2 2, or with a leading B
    vector: Tensor  # B S 7 C float32: modulation rows of each modality, and its embedded time
    dtype: torch.dtype  # dtype of activations between layers
    attention: AttentionChoice
    lengths: SampleLengths | None  # how many of the L+R+T tokens are real; None: all
    text_lengths: SampleLengths | None  # how many of the T tokens of the text are real; None: all
    second_text: SecondText | None = None
    second_lengths: SampleLengths | None = None  # real tokens of the second text alone
    shards: tuple[TokenShard, ...] = ()  # the tokens of each kind that this process has; (): all

    @property
    def stream_lengths(self) -> tuple[int, ...]:
        """Return how many tokens of each modality this process computes."""
        return self.counts

    @property
    def first_noisy_token(self) -> int:
        """Return the index of the first token of the noisy latents, whose tokens form `grid`."""
        return 0

    @property
    def split(self) -> tuple[int, ...]:
        """Return the indices at which the second and the third modality begin."""
        return tuple(accumulate(self.counts[:-1]))

    def cut(self, *parts: TokenShard) -> "Flux3Tokens":
        """Return the inputs for one process, which has a part of each modality's tokens."""
        tables = self.rotary.split(self.counts, dim=-4)
        rotary = torch.cat(
            [part.slice_rotary(table) for part, table in zip(parts, tables, strict=True)], dim=-4
        )
        counts = tuple(part.count_among_first(part.length) for part in parts)
        return replace(self, rotary=rotary, counts=counts, shards=parts)

    def select(self, kept: Tensor, num_left_out: int) -> "Flux3Tokens":
        """Return the block inputs for some tokens of x; only tokens of the noisy latents are dropped.

        `kept` are the ascending indices of the remaining tokens, B K; `num_left_out` tokens are dropped.
        """
        num_image_tokens, *others = self.counts
        lengths = None if self.lengths is None else self.lengths.shorten(num_left_out)
        return replace(
            self,
            rotary=select_rotations(self.rotary, kept, num_left_out),
            counts=(num_image_tokens - num_left_out, *others),
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
        """Return the block's output before its gate, B L C.

        `h` is its input after modulation, B L C; `attended` is the output of its attention, B L N D.
        """
        output: Tensor = run_in_weight_dtype(self.attn_out, attended.flatten(2)) + self.feed_forward(h)
        return output

    def feed_forward(self, h: Tensor) -> Tensor:
        """Apply the feed-forward to modulated tokens, B L C; each token is processed independently."""
        return run_in_weight_dtype(self.mlp_out, gate_half(run_in_weight_dtype(self.mlp_in, h)))


class ModalityBlock(ParallelBlock):
    """Block in which tokens of one modality attend to each other, while other tokens pass unchanged."""

    def __init__(self, config: Flux3Config, modality: str) -> None:
        super().__init__(config)
        self.modality = modality

    def forward(self, x: Tensor, tokens: Flux3Tokens) -> Tensor:
        """Apply the block to the tokens of its modality in x, B L+R+T C."""
        if self.modality not in tokens.modalities:
            return x
        index = tokens.modalities.index(self.modality)
        shift, scale, gate = tokens.vector[:, index : index + 1, OWN_BLOCK_ROWS].unbind(2)
        streams = list(x.split(tokens.counts, dim=1))
        rotary = tokens.rotary.split(tokens.counts, dim=-4)[index]
        h = modulate(self.pre_norm(streams[index]), shift, scale, tokens.dtype)
        attended = _attend_within(self.heads(h, rotary), tokens, index)
        streams[index] = add_gated(streams[index], gate, self.branch(h, attended))
        return torch.cat(streams, dim=1)

    def modulated_input(self, x: Tensor, tokens: Flux3Tokens) -> Tensor:
        """Return the modulated input of attention for the image tokens of x, B L+R+T C to B L C."""
        shift, scale, _ = tokens.vector[:, :1, OWN_BLOCK_ROWS].unbind(2)
        return modulate(self.pre_norm(x[:, : tokens.counts[0]]), shift, scale, tokens.dtype)


class JointBlock(ParallelBlock):
    """Block in which all tokens attend to each other and share one set of weights."""

    def forward(self, x: Tensor, tokens: Flux3Tokens) -> Tensor:
        """Apply the block to tokens x, B L+R+T C."""
        shift, scale, gate = tokens.vector[:, :, JOINT_BLOCK_ROWS].unbind(2)
        h = modulate(self.pre_norm(x), shift, scale, tokens.dtype, split=tokens.split)
        attended = _attend_jointly(self.heads(h, tokens.rotary), tokens)
        return add_gated(x, gate, self.branch(h, attended), tokens.split)


def _attend_within(heads: Sequence[Tensor], tokens: Flux3Tokens, modality_index: int) -> Tensor:
    """Return the attention, B L N D, of the tokens of one modality (image, references or text) to each other.

    `heads` are query, key and value. `modality_index` is the modality's index in `tokens.modalities`.
    """
    is_text = tokens.modalities[modality_index] == TEXT
    attend_modality = _attend_within_texts if is_text else _attend_unpadded
    if not tokens.shards:
        return attend_modality(heads, tokens)
    # with several processes, each has a part of the tokens: gather them for whole heads
    token_part = tokens.shards[modality_index]
    return token_part.gather_heads(attend_modality(token_part.gather_tokens(*heads), tokens))


def _attend_unpadded(heads: Sequence[Tensor], tokens: Flux3Tokens) -> Tensor:
    """Return the attention of tokens that are all real, such as image tokens, to each other."""
    return _attend(heads, tokens, None)


def _attend_within_texts(heads: Sequence[Tensor], tokens: Flux3Tokens) -> Tensor:
    """Return the attention within each text; with two texts, the second one's tokens are at the end."""
    if tokens.second_text is None:
        return _attend(heads, tokens, tokens.text_lengths)
    num_second = tokens.second_text.num_text_tokens
    first_heads = [tensor[:, :-num_second] for tensor in heads]
    second_heads = [tensor[:, -num_second:] for tensor in heads]
    first = _attend(first_heads, tokens, tokens.text_lengths)
    second = _attend(second_heads, tokens, tokens.second_lengths)
    return torch.cat([first, second], dim=1)


def _attend(heads: Sequence[Tensor], tokens: Flux3Tokens, lengths: SampleLengths | None) -> Tensor:
    """Return the self-attention of heads, B L N D; `lengths` count each sample's real tokens among the L."""
    query, key, value = heads
    return attend(query, key, value, tokens.attention, lengths=lengths)


def _attend_jointly(heads: Sequence[Tensor], tokens: Flux3Tokens) -> Tensor:
    """Return the attention of all tokens to each other, B L+R+T N D, from query, key and value."""
    # With several processes (`tokens.shards`), each computes some heads for all tokens.
    parts = tokens.shards
    if parts:
        heads = _gather_tokens(heads, tokens)
    if tokens.second_text is not None:
        return _attend_with_two_texts(heads, tokens, tokens.second_text)
    attended = _attend(heads, tokens, tokens.lengths)
    return _return_tokens(attended, parts) if parts else attended


def _attend_with_two_texts(heads: Sequence[Tensor], tokens: Flux3Tokens, second: SecondText) -> Tensor:
    """Return the attention of images to each of two texts, combined for the images, as with NAG."""
    # 1. Images and the first text attend to each other, then images and the second text.
    # 2. `second.combine_attention` makes one result of the images' two.
    # 3. The texts keep their results.
    with_first = _attend([second.drop_second_text(tensor) for tensor in heads], tokens, tokens.lengths)
    with_second = _attend([second.drop_first_text(tensor) for tensor in heads], tokens, second.lengths)
    if not tokens.shards:
        return second.combine(with_first, with_second)
    # with several processes, each has some heads of all tokens; combining needs all heads of a token,
    # so image tokens are returned to their processes first
    *image_parts, text_part = tokens.shards
    num_images = second.num_image_tokens
    images = second.combine_attention(
        _return_tokens(with_first[:, :num_images], image_parts),
        _return_tokens(with_second[:, :num_images], image_parts),
    )
    texts = torch.cat([with_first[:, num_images:], with_second[:, num_images:]], dim=1)
    return torch.cat([images, text_part.gather_heads(texts)], dim=1)


def _gather_tokens(heads: Sequence[Tensor], tokens: Flux3Tokens) -> list[Tensor]:
    """All-to-all of heads: give each process all tokens, B L+R+T n D, for its share of the heads."""
    # by modality: query, key and value of its tokens
    by_modality = zip(*(tensor.split(tokens.counts, dim=1) for tensor in heads), strict=True)
    gathered = [part.gather_tokens(*qkv) for part, qkv in zip(tokens.shards, by_modality, strict=True)]
    return [torch.cat(tensors, dim=1) for tensors in zip(*gathered, strict=True)]


def _return_tokens(attended: Tensor, parts: Sequence[TokenShard]) -> Tensor:
    """Exchange all tokens of this process's heads for all heads of its tokens, modality by modality."""
    # Undoes `_gather_tokens` after attention, in sequence parallelism.
    by_modality = attended.split([part.length for part in parts], dim=1)
    pairs = zip(parts, by_modality, strict=True)
    return torch.cat([part.gather_heads(all_tokens) for part, all_tokens in pairs], dim=1)


class Flux3Layout(NamedTuple):
    """Sizes of images and texts, which determine a rotary table."""

    grid: tuple[int, int]  # rows, columns of the image's tokens
    references: tuple[tuple[int, int], ...]  # rows, columns of each reference's tokens
    text_lengths: tuple[int, ...]  # tokens of each text


class Flux3Text(NamedTuple):
    """A text's embedded tokens, with their lengths."""

    states: Tensor  # B T C
    counts: tuple[int, ...]  # real tokens of each sample
    is_unpadded: bool  # all tokens are real

    def lengths_after(self, num_images: int) -> SampleLengths | None:
        """Return each sample's number of real tokens plus `num_images`; None (no mask) without padding."""
        if self.is_unpadded:
            return None
        return make_lengths([num_images + count for count in self.counts], self.states.device)


def _make_modulations(config: Flux3Config) -> nn.ModuleDict:
    return nn.ModuleDict(
        {modality: SharedModulation(config.dim, NUM_MODULATION_ROWS) for modality in MODALITIES}
    )


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
    compute_dtype_parameter = "single_blocks.0.norm.query_norm.scale"

    def __init__(self, config: Flux3Config, attention: AttentionChoice = SDPA) -> None:
        """Build the network without weights; each modality (image, references, text) has its own blocks."""
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
            {modality: nn.Linear(config.channels, config.dim, bias=False) for modality in IMAGE_MODALITIES}
        )
        self.txt_in = nn.Linear(config.text_dim, config.dim, bias=False)
        self.content_mode_blocks = nn.ModuleDict(
            {modality: _make_modality_blocks(config, modality) for modality in IMAGE_MODALITIES}
        )
        self.txt_mode_blocks = _make_modality_blocks(config, TEXT)
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
        """Embed image, references and text as tokens, B L+R+T C; return them with the blocks' other inputs.

        The tokens of a second text, for guidance, come last.

        Args:
            noisy: B Z 1 H W.
            timesteps: B, 0..1000.
            text: States of the language model, B T text_dim, with padding to a multiple of 80.
            text_mask: B T, true or 1 for these states; the others only align the batch.
            next_timesteps: B, where the step ends; only for a distilled model, which requires it.
            overrides: Changes to this call. For normalized attention guidance (NAG), they contain a second
                `text` and `text_mask`.
            references: Clean latents of reference images, each B Z 1 h w of its own size.

        Raises:
            ValueError: If sizes do not match, or `next_timesteps` is missing or not supported.
        """
        self._check_inputs((noisy, *references), text, text_mask, next_timesteps)
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        images = [self._embed_image(IMAGE, noisy).to(dtype)]
        images += [self._embed_image(REFERENCES, latents).to(dtype) for latents in references]
        # of the prompt and, if `overrides` have one, of the second text
        prompts = overrides.text_inputs(len(noisy), text=text, text_mask=text_mask)
        texts = [self._embed_text(prompt, dtype) for prompt in prompts]
        text_lengths = tuple(embedded.states.shape[1] for embedded in texts)
        num_images = sum(image.shape[1] for image in images)
        # number of tokens by modality, in the order of the tokens
        counts = {IMAGE: images[0].shape[1]}
        if references:
            counts[REFERENCES] = num_images - counts[IMAGE]
        counts[TEXT] = sum(text_lengths)
        layout = Flux3Layout(
            grid=_measure_grid(noisy),
            references=tuple(_measure_grid(latents) for latents in references),
            text_lengths=text_lengths,
        )
        tokens = Flux3Tokens(
            layout.grid,
            modalities=tuple(counts),
            counts=tuple(counts.values()),
            rotary=self._rotary.get_table(layout, noisy.device),
            vector=self._embed_times(timesteps, next_timesteps, tuple(counts)),
            dtype=dtype,
            attention=self.attention,
            lengths=texts[0].lengths_after(num_images),
            text_lengths=texts[0].lengths_after(0),
        )
        if len(texts) > 1:
            assert overrides.combine_attention is not None  # a second text is always for NAG
            tokens = _add_second_text(tokens, texts[1], num_images, overrides.combine_attention)
        x = torch.cat([*images, *(embedded.states for embedded in texts)], dim=1)
        return Hidden(x, tokens)

    def _check_inputs(
        self, images: Sequence[Tensor], text: Tensor, text_mask: Tensor, next_timesteps: Tensor | None
    ) -> None:
        """Raise ValueError if sizes do not match, or if `next_timesteps` does not belong to the model."""
        for latents in images:
            if latents.shape[1] != self.config.channels or latents.shape[2] != 1:
                raise ValueError(
                    f"latents of {tuple(latents.shape[1:3])}: {self.config.channels} channels, 1 frame"
                )
        if text_mask.shape != text.shape[:2]:
            raise ValueError(f"a text mask of {tuple(text_mask.shape)} for text of {tuple(text.shape)}")
        if (next_timesteps is not None) != self.config.is_flow_map:
            raise ValueError("a distilled transformer, and no other, takes the times at which steps end")

    def _embed_image(self, modality: str, latents: Tensor) -> Tensor:
        """Embed an image or a reference as tokens: B Z 1 H W to B L C."""
        pixels = latents.flatten(2).transpose(1, 2)  # B L Z
        return run_in_weight_dtype(self.emb_in[modality], pixels)

    def _embed_text(self, arguments: Mapping[str, Any], dtype: torch.dtype) -> Flux3Text:
        """Embed a text; `arguments` are its states as `text`, and `text_mask`, true for real tokens."""
        counts = tuple(arguments["text_mask"].sum(dim=1).tolist())
        states = arguments["text"][:, : max(counts)]
        is_unpadded = len(set(counts)) == 1
        return Flux3Text(run_in_weight_dtype(self.txt_in, states).to(dtype), counts, is_unpadded)

    def _embed_times(
        self, timesteps: Tensor, next_timesteps: Tensor | None, modalities: Sequence[str]
    ) -> Tensor:
        """Return modulation (6 rows) and time embedding of each of S modalities, B S 7 C."""
        # references and texts are clean: time 0
        noisy_time = self.time_in(self._embed_sinusoids(timesteps))
        clean_time = self.time_in(self._embed_sinusoids(torch.zeros_like(timesteps)))
        if next_timesteps is not None:  # the distilled model jumps from one noise level to the next
            step_end = self.ref_time_in(self._embed_sinusoids(next_timesteps))
            noisy_time = noisy_time + step_end
            clean_time = clean_time + step_end
        rows = []
        for modality in modalities:
            embedded = noisy_time if modality == IMAGE else clean_time
            early = self.early_stream_modulations[modality](embedded)
            joint = self.single_stream_modulations[modality](embedded)
            rows.append(torch.cat([early, joint, embedded.unsqueeze(1)], dim=1))
        return torch.stack(rows, dim=1)

    def _embed_sinusoids(self, timesteps: Tensor) -> Tensor:
        return sinusoid(timesteps, self.config.freq_dim, torch.float32)

    def unembed(self, x: Tensor, tokens: Flux3Tokens) -> Tensor:
        """Turn tokens B L+R+T C into the velocity, B Z 1 H W in float32."""
        image = x[:, : math.prod(tokens.grid)]
        embedding = tokens.vector[:, :1, TIME_ROW]
        pixels = self.final_layer[IMAGE](image, embedding, tokens.dtype).float()
        return pixels.transpose(1, 2).unflatten(2, (1, *tokens.grid))

    def _make_table(self, layout: Flux3Layout, /, *, device: torch.device) -> Tensor:
        """Return the rotary table, (cosine, sine) pairs L+R+T 1 D/2 2 float32, from float64 angles."""
        # Positions are (0, row / 2, column / 2, 0) for image tokens, (0, row / 2, column / 2, -k) for tokens
        # of reference k (from 1), and (0, 0, 0, index) for the text.
        zero = torch.zeros(1, dtype=torch.float64)
        tables = []
        for number, (rows, columns) in enumerate((layout.grid, *layout.references)):  # 0: the image
            axes = (POSITION_STEP * torch.arange(side, dtype=torch.float64) for side in (rows, columns))
            tables.append(self._make_grid_table((zero, *axes, zero - number), device))
        for length in layout.text_lengths:
            positions = torch.arange(length, dtype=torch.float64)
            tables.append(self._make_grid_table((zero, zero, zero, positions), device))
        return torch.cat(tables)

    def _make_grid_table(self, positions: Sequence[Tensor], device: torch.device) -> Tensor:
        """Return a grid's rotary pairs from the positions along each axis, float64 on the CPU."""
        width = self.config.head_width // AXES
        pairs = [axis_rotations(axis, width, self.config.rope_theta, device) for axis in positions]
        return spread_over_grid(pairs).unsqueeze(1)


def _add_second_text(
    tokens: Flux3Tokens, text: Flux3Text, num_images: int, combine_attention: CombineAttention
) -> Flux3Tokens:
    """Return the block inputs with the text of normalized attention guidance; its tokens come last."""
    second = SecondText(
        num_image_tokens=num_images,
        num_text_tokens=text.states.shape[1],
        lengths=text.lengths_after(num_images),
        combine_attention=combine_attention,
    )
    return replace(tokens, second_text=second, second_lengths=text.lengths_after(0))


def _make_modality_blocks(config: Flux3Config, modality: str) -> nn.ModuleList:
    return nn.ModuleList(ModalityBlock(config, modality) for _ in range(config.mode_blocks))


def _measure_grid(latents: Tensor) -> tuple[int, int]:
    """Return rows and columns of an image's tokens, one token for each latent pixel."""
    return latents.shape[-2], latents.shape[-1]
