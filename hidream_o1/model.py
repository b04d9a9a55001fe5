"""The network of HiDream-O1-Image: the decoder of Qwen3-VL over a text, its time and patches of pixels.

Names of modules are the released ones. The only place for the time is a token after the text: nothing is
modulated. The text attends to itself, causally; the time and all patches attend to everything. References of
an edit are seen twice: as clean patches, and as images in the text, which are tokens of a vision tower. Here
the image's patches come first, then those of references, the time, and the text. Attention does not depend on
the order, only on positions. Source: the released code and configuration (HiDream-ai/HiDream-O1-Image); the
decoder is that of transformers.
"""
# Letters: B batch, L patches of the image, R patches of references, T text tokens, n of them of references,
# N heads, K heads of keys and values, D head width, C width, P values of a patch

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from encoders.picture_prompts import image_position_ids
from hidream_o1.configs import DIT, HiDreamO1Config
from hidream_o1.texts import REFERENCE_ID
from hidream_o1.vision import HiDreamO1Vision
from lumina.blocks import GroupedAttention, Heads, LuminaTokens, repeat_kv_heads
from lumina.model import count_real_tokens
from modules.attention.attend import (
    CombineAttention,
    SampleLengths,
    SecondText,
    attend,
    attend_causally,
    make_lengths,
)
from modules.devices import send_ahead
from modules.flow.schedule import TRAIN_TIMESTEPS
from modules.layers.half_rope import rotate_halves
from modules.layers.norms import RMSNorm, SwiGlu, TwoLayerMlp, activation_dtype, run_in_weight_dtype
from modules.layers.rope import GridTable, cos_and_sin, sinusoid
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.run_blocks import BlockNetwork, Hidden

FIRST_POSITION = 4096  # of the image on all axes, wherever its text ends

Grid = tuple[int, int]  # rows and columns of an image's patches


@dataclass(frozen=True)
class HiDreamO1Tokens(LuminaTokens):
    """Inputs of the blocks besides x, B L+R+1+T C; no block uses `time`."""

    num_full: int = 0  # number of tokens that attend to all tokens: patches and time, L + R + 1

    def select(self, kept: Tensor, num_left_out: int) -> Self:
        """Return the block inputs for some tokens of x; only patches of the image are dropped."""
        selected = super().select(kept, num_left_out)
        return replace(selected, num_full=self.num_full - num_left_out)


class HiDreamO1Attention(GroupedAttention):
    """Attention in which a text attends causally to itself, and all other tokens to everything."""

    def __init__(self, config: HiDreamO1Config) -> None:
        nn.Module.__init__(self)
        self.head_width = config.head_width
        width = config.num_heads * config.head_width
        kv_width = config.num_kv_heads * config.head_width
        self.q_proj = nn.Linear(config.dim, width, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_width, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_width, config.eps)
        self.k_norm = RMSNorm(config.head_width, config.eps)

    def heads(self, x: Tensor) -> Heads:
        """Return queries (B L N D), keys and values (B L K D) of tokens B L C; the first two normalized."""
        query = run_in_weight_dtype(self.q_proj, x).unflatten(-1, (-1, self.head_width))
        key = run_in_weight_dtype(self.k_proj, x).unflatten(-1, (-1, self.head_width))
        value = run_in_weight_dtype(self.v_proj, x).unflatten(-1, (-1, self.head_width))
        return self.q_norm(query), self.k_norm(key), value

    def attend_heads(
        self, heads: Iterable[Tensor], rotary: Tensor, tokens: LuminaTokens, lengths: SampleLengths | None
    ) -> Tensor:
        """Return the attention of tokens, B L+R+1+T N D, from heads without rotary embedding."""
        assert isinstance(tokens, HiDreamO1Tokens)
        query, key, value = heads
        query, key = rotate_halves(query, rotary), rotate_halves(key, rotary)
        key, value = repeat_kv_heads(query, key, value)
        full = tokens.num_full
        choice = tokens.attention
        # padding follows a text, so that no real token attends to it
        text = attend_causally(query[:, full:], key[:, full:], value[:, full:], choice)
        if lengths is None:
            attended = attend(query[:, :full], key, value, choice)
        else:  # with lengths, all tokens have queries
            attended = attend(query, key, value, choice, lengths=lengths)[:, :full]
        return torch.cat([attended, text], dim=1)

    def project(self, attended: Tensor) -> Tensor:
        """Project the concatenated heads of attention, B L N*D, to the layer's output, B L C."""
        return run_in_weight_dtype(self.o_proj, attended)


class HiDreamO1Block(nn.Module):
    """Attention and feed-forward, each after a norm."""

    def __init__(self, config: HiDreamO1Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.eps)
        self.self_attn = HiDreamO1Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.eps)
        self.mlp = SwiGlu("gate_proj up_proj down_proj", config.dim, config.ffn_dim)

    def forward(self, x: Tensor, tokens: HiDreamO1Tokens) -> Tensor:
        """Apply the block to tokens x, B L+R+1+T C."""
        x = x + self.self_attn(self.input_layernorm(x), tokens)
        # the expensive one last: if it runs in pieces, recomputing the block stops here
        return self.feed(x)

    def modulated_input(self, x: Tensor, tokens: HiDreamO1Tokens) -> Tensor:
        """Return the normalized input of attention for the image's patches in x, B L+R+1+T C to B L C."""
        normalized: Tensor = self.input_layernorm(x[:, : tokens.image])
        return normalized

    def feed(self, x: Tensor) -> Tensor:
        """Add the feed-forward branch to x, B L C; each token is processed independently."""
        return x + self.mlp(self.post_attention_layernorm(x))


class HiDreamO1Decoder(nn.Module):
    """The language model: embeddings of text tokens, the blocks, and the final norm."""

    def __init__(self, config: HiDreamO1Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.dim)
        self.layers = nn.ModuleList(HiDreamO1Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.eps)


class HiDreamO1Patches(nn.Module):
    """Embed patches of pixels through a narrow layer without an activation: B L P to B L C."""

    def __init__(self, config: HiDreamO1Config) -> None:
        super().__init__()
        self.proj1 = nn.Linear(3 * config.patch_size**2, config.bottleneck, bias=False)
        self.proj2 = nn.Linear(config.bottleneck, config.dim)

    def forward(self, patches: Tensor) -> Tensor:
        """Return the tokens of patches, B L P to B L C."""
        return run_in_weight_dtype(self.proj2, run_in_weight_dtype(self.proj1, patches))


class HiDreamO1TextShape(NamedTuple):
    """What decides the positions of a sample's text."""

    length: int  # real tokens without the time, whose token follows them
    # index of the first token of each reference, and its rows and columns of tokens
    references: tuple[tuple[int, Grid], ...] = ()


class HiDreamO1Layout(NamedTuple):
    """Sizes of images and texts, which determine a rotary table."""

    grid: Grid  # rows and columns of the image's patches
    reference_grids: tuple[Grid, ...]
    num_text_tokens: int  # tokens of each text, with padding
    texts: tuple[HiDreamO1TextShape, ...]  # of each sample; one if all are alike


class HiDreamO1Text(NamedTuple):
    """A batch's texts without their time tokens."""

    embeddings: Tensor  # B T C
    shapes: tuple[HiDreamO1TextShape, ...]  # of each sample
    # added to the results of the first blocks, B T C each, 0 except for tokens of references (DeepStack)
    deep: tuple[Tensor, ...] = ()

    @property
    def distinct_shapes(self) -> tuple[HiDreamO1TextShape, ...]:
        """Return the shape of each sample's text; only one if all are equal."""
        return self.shapes[:1] if len(set(self.shapes)) == 1 else self.shapes

    def get_deep(self, index: int) -> Tensor:
        """Return what is added to the result of a block, B T C; zeros for a text without references."""
        return self.deep[index] if self.deep else torch.zeros_like(self.embeddings)

    def lengths(self, before: int) -> SampleLengths | None:
        """Return each sample's real tokens plus `before`; None if all tokens are real."""
        counts = [shape.length for shape in self.shapes]
        if len(set(counts)) == 1:  # attention gets no mask
            return None
        return make_lengths([before + count for count in counts], self.embeddings.device)


class HiDreamO1Model(BlockNetwork):
    """Predict the clean pixels of a noisy image from the tokens of a text.

    Simplified, without references, a second text and the code around the blocks:

        time = t_embedder1(1000 - timesteps)                   # from 0 for noise to 1000 for a clean image
        x = cat([x_embedder(patches), time, embed_tokens(text)])                       # B L+1+T C
        for block in language_model.layers:
            x = x + block.self_attn(block.input_layernorm(x))  # the text causally, the others to everything
            x = x + block.mlp(block.post_attention_layernorm(x))
        clean = final_layer2.linear(language_model.norm(x[:, :L]))                     # as B 3 1 H W
    """

    spec = DIT
    compute_dtype_parameter = "language_model.layers.0.input_layernorm.weight"

    def __init__(
        self, config: HiDreamO1Config, attention: AttentionChoice = SDPA, has_tower: bool = True
    ) -> None:
        """Build the network without weights; with `has_tower`, also the vision tower if the file has one."""
        super().__init__()
        self.config = config
        self.attention = attention
        dim, patch_values = config.dim, 3 * config.patch_size**2
        self.language_model = HiDreamO1Decoder(config)
        self.t_embedder1 = nn.ModuleDict(
            {"mlp": TwoLayerMlp("0 2", (config.freq_dim, dim, dim), in_float32=True)}
        )
        self.x_embedder = HiDreamO1Patches(config)
        self.final_layer2 = nn.ModuleDict({"linear": nn.Linear(dim, patch_values)})
        if has_tower and config.vision is not None:
            self.visual = HiDreamO1Vision(config.vision)
        self._rotary = GridTable[HiDreamO1Layout](self._make_table)

    def embed(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        text_mask: Tensor,
        overrides: Overrides = NO_OVERRIDES,
        references: Sequence[Tensor] = (),
        shown: Tensor | None = None,
        grids: Tensor | None = None,
    ) -> Hidden:
        """Embed images, time and text as tokens, B L+R+1+T C; return them with other inputs of the blocks.

        Args:
            noisy: Noisy pixels B 3 1 H W, (1 - sigma) clean + sigma scale noise, with clean pixels in -1..1.
            timesteps: B, 0..1000.
            text: Ids of text tokens, B T+1, on the host. The last real token of a text stands for the time,
                REFERENCE_ID for a token of a reference.
            text_mask: B T+1, true or 1 for real tokens, which come first; on the host.
            overrides: Changes to this call. For normalized attention guidance (NAG), they contain a second
                `text`, `text_mask`, `shown` and `grids`, whose tokens follow the prompt's.
            references: Clean pixels of images to edit, each B 3 1 h w of its own size.
            shown: Pixels of small copies of the references, B n K uint8, on the host; None without any.
            grids: Rows and columns of tokens of each of them, B references 2, equal for all samples; on the
                host.

        Raises:
            ValueError: If sizes do not match.
        """
        grid = self._get_grid(noisy)
        reference_grids = tuple(self._get_grid(pixels) for pixels in references)
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        stream_dtype = torch.float32 if dtype == torch.float16 else dtype  # trained values exceed its range
        times = self.t_embedder1["mlp"](sinusoid(TRAIN_TIMESTEPS - timesteps, self.config.freq_dim))
        patches = torch.cat([self._cut_patches(pixels) for pixels in (noisy, *references)], dim=1)
        # of the prompt and, if `overrides` have one, of the second text
        prompts = overrides.text_inputs(len(noisy), text=text, text_mask=text_mask, shown=shown, grids=grids)
        texts = [self._embed_text(prompt, noisy.device) for prompt in prompts]
        parts = [self.x_embedder(patches), times[:, None], *(embedded.embeddings for embedded in texts)]
        x = torch.cat([part.to(stream_dtype) for part in parts], dim=1)
        num_full = patches.shape[1] + 1
        layouts = [self._make_layout(grid, reference_grids, embedded) for embedded in texts]
        tokens = HiDreamO1Tokens(
            grid,
            rotary=self._rotary.get_table(layouts[0], noisy.device),
            lengths=texts[0].lengths(num_full),
            time=timesteps,
            dtype=dtype,
            attention=self.attention,
            num_full=num_full,
        )
        if overrides.combine_attention is not None:  # there is a second text
            tokens = self._add_second_text(tokens, texts[1], layouts[1], overrides.combine_attention)
        # of each of the first blocks, for the texts, which come last
        num_deep = max(len(embedded.deep) for embedded in texts)
        deep = [
            torch.cat([embedded.get_deep(index) for embedded in texts], dim=1) for index in range(num_deep)
        ]
        return Hidden(x, tokens, text_residuals=deep)

    def _add_second_text(
        self,
        tokens: HiDreamO1Tokens,
        text: HiDreamO1Text,
        layout: HiDreamO1Layout,
        combine_attention: CombineAttention,
    ) -> HiDreamO1Tokens:
        """Return the blocks' inputs with a second text, whose tokens come last."""
        num_full = tokens.num_full
        second_text = SecondText(num_full, layout.num_text_tokens, text.lengths(num_full), combine_attention)
        table = self._make_table(layout, device=text.embeddings.device)
        return replace(tokens, second_text=second_text, second_rotary=table)

    def unembed(self, x: Tensor, tokens: HiDreamO1Tokens) -> Tensor:
        """Turn tokens B L+R+1+T C into clean pixels, B 3 1 H W in float32."""
        rows, columns = tokens.grid
        normalized = self.language_model.norm(x[:, : tokens.image])
        patches = run_in_weight_dtype(self.final_layer2["linear"], normalized).float()
        size = self.config.patch_size
        return rearrange(
            patches, "b (h w) (c p q) -> b c 1 (h p) (w q)", h=rows, w=columns, c=3, p=size, q=size
        )

    def _get_grid(self, pixels: Tensor) -> Grid:
        """Return rows and columns of an image's patches."""
        channels, frames, height, width = pixels.shape[1:]
        size = self.config.patch_size
        if channels != 3 or frames != 1 or height % size or width % size:
            raise ValueError(
                f"pixels of {tuple(pixels.shape[1:])}: 3 1 H W with multiples of {size} are needed"
            )
        return height // size, width // size

    def _cut_patches(self, pixels: Tensor) -> Tensor:
        size = self.config.patch_size
        return rearrange(pixels.float(), "b c 1 (h p) (w q) -> b (h w) (c p q)", p=size, q=size)

    def _embed_text(self, arguments: Mapping[str, Any], device: torch.device) -> HiDreamO1Text:
        """Embed a text without its time token; `arguments` are those of `embed` about a text."""
        ids, mask, shown = arguments["text"], arguments["text_mask"], arguments["shown"]
        if mask.shape != ids.shape:
            raise ValueError(f"a text mask of {tuple(mask.shape)} for text of {tuple(ids.shape)}")
        longest, counts = count_real_tokens(mask)
        ids = ids[:, : longest - 1]
        embeddings = self.language_model.embed_tokens(send_ahead(ids.clamp(min=0), device))
        if shown is None or not shown.shape[1]:
            return HiDreamO1Text(embeddings, tuple(HiDreamO1TextShape(count - 1) for count in counts))
        is_reference = ids == REFERENCE_ID  # B T
        grids = _read_grids(arguments["grids"], is_reference)
        last, *deep = self._look(send_ahead(shown, device), grids)
        places = send_ahead(is_reference, device)[..., None]
        shapes = [
            HiDreamO1TextShape(count - 1, _find_references(row, grids))
            for count, row in zip(counts, is_reference, strict=True)
        ]
        return HiDreamO1Text(
            embeddings.masked_scatter(places, last.to(embeddings)),
            tuple(shapes),
            tuple(
                torch.zeros_like(embeddings).masked_scatter(places, layer.to(embeddings)) for layer in deep
            ),
        )

    def _look(self, shown: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
        """Return the features of all references' tokens, B n C, then those for the first blocks."""
        parts = shown.split([rows * columns for rows, columns in grids], dim=1)
        features = [self.visual(pixels, grid) for pixels, grid in zip(parts, grids, strict=True)]
        return [torch.cat(layer, dim=1) for layer in zip(*features, strict=True)]

    def _make_layout(
        self, grid: Grid, reference_grids: tuple[Grid, ...], text: HiDreamO1Text
    ) -> HiDreamO1Layout:
        return HiDreamO1Layout(grid, reference_grids, text.embeddings.shape[1], text.distinct_shapes)

    def _make_table(self, layout: HiDreamO1Layout, /, *, device: torch.device) -> Tensor:
        """Return the rotary table, (cosine, sine) pairs L+R+1+T 1 D/2 2 float32, or B L+R+1+T 1 D/2 2."""
        tables = [self._make_sample_table(layout, shape, device) for shape in layout.texts]
        return tables[0] if len(tables) == 1 else torch.stack(tables)

    def _make_sample_table(
        self, layout: HiDreamO1Layout, shape: HiDreamO1TextShape, device: torch.device
    ) -> Tensor:
        """Return the rotary pairs of a sample's tokens."""
        positions = _find_positions(layout, shape)
        width = self.config.head_width
        # float32, as released: at position 4096 it is seen
        frequencies = 1 / self.config.rope_theta ** (torch.arange(0, width, 2).float() / width)
        # the axes take turns until rows and columns have all their frequencies; the rest is the first axis's
        axes = torch.zeros(width // 2, dtype=torch.int64)
        last = 3 * self.config.row_frequencies
        axes[1:last:3] = 1
        axes[2:last:3] = 2
        pairs = cos_and_sin(positions[axes].T.float() * frequencies)
        return send_ahead(pairs, device).unsqueeze(1)


def _read_grids(grids: Tensor, is_reference: Tensor) -> list[Grid]:
    """Return rows and columns of tokens of each reference, from `grids`, B references 2.

    `is_reference` marks their tokens in the texts, B T. Raises ValueError if samples differ or tokens are
    missing.
    """
    token_grids = [(rows, columns) for rows, columns in grids[0].tolist()]
    num_tokens = sum(rows * columns for rows, columns in token_grids)
    if not (grids == grids[:1]).all() or not (is_reference.sum(dim=1) == num_tokens).all():
        raise ValueError(f"texts for other references than {token_grids} tokens")
    return token_grids


def _find_references(is_reference: Tensor, grids: Sequence[Grid]) -> tuple[tuple[int, Grid], ...]:
    """Return where a text's references begin, with their grids; `is_reference` marks their tokens, T."""
    indices = is_reference.nonzero().flatten().tolist()
    found = []
    for rows, columns in grids:
        found.append((indices[0], (rows, columns)))
        indices = indices[rows * columns :]
    return tuple(found)


def _find_positions(layout: HiDreamO1Layout, shape: HiDreamO1TextShape) -> Tensor:
    """Return the positions of a sample's tokens on three axes, 3 L+R+1+T int64."""
    # a patch has (0, row, column), counted from FIRST_POSITION for the image, and for each reference from the
    # number after the largest so far
    start = FIRST_POSITION
    patches = []
    for rows, columns in (layout.grid, *layout.reference_grids):
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        patches.append(torch.stack([torch.zeros_like(row), row, column]).flatten(1) + start)
        start += max(rows, columns)
    # as Qwen3-VL, a text counts its tokens on all axes alike, and a reference in it is such a grid. The time
    # follows the text, and padding the time
    kinds = [0] * layout.num_text_tokens
    for first, (rows, columns) in shape.references:
        kinds[first : first + rows * columns] = [REFERENCE_ID] * (rows * columns)
    grids = [token_grid for _, token_grid in shape.references]
    text = image_position_ids([*kinds, 0], grids, REFERENCE_ID)
    return torch.cat([*patches, text[:, shape.length, None], text[:, :-1]], dim=1)
