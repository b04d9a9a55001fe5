"""The Lumina-Image-2.0 transformer (NextDiT). Module names follow the published checkpoints.

Source: the released model code and Qin et al. 2025, arXiv 2503.21758. `blocks.py` lists the steps in float32.
"""
# Letters: B batch, L image tokens, T caption tokens, D head width, C width of the model

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from lumina.blocks import JointTransformerBlock, LuminaFinalLayer, LuminaTokens, TimeEmbedding
from lumina.configs import DIT, LuminaConfig
from modules.attention.attend import SampleLengths, SecondText, make_lengths
from modules.devices import send_ahead
from modules.layers.norms import RMSNorm, activation_dtype, run_in_weight_dtype
from modules.layers.rope import GridTable, cos_and_sin, rotation_angles, spread_over_grid
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.run_blocks import BlockNetwork, Hidden


class TokenLayout(NamedTuple):
    """Image grid and text lengths, which determine the rotary embedding of a batch."""

    grid: tuple[int, int]  # rows, columns of image tokens
    captions: tuple[int, ...]  # tokens of each sample's caption; one number where all are equal
    longest: int  # tokens of the longest caption


class LuminaModel(BlockNetwork):
    """Predict the direction from noise to data of noisy latents of images, from a caption's states.

    Simplified, without a second caption and the code around the blocks:

        time = t_embedder(times)                                            # B time_dim
        text = cap_embedder(caption)                                        # B T C
        for block in context_refiner:
            text = block(text)                                              # without modulation
        image = x_embedder(patches of noisy)                                # B L C
        for block in noise_refiner:
            image = block(image, time)
        x = cat([image, text])                                              # B L+T C
        for block in layers:
            scale, gate, scale2, gate2 = block.adaLN_modulation(time)       # each B 1 C, gates through tanh
            x = x + gate * attention_norm2(attention(attention_norm1(x) * (1 + scale)))
            x = x + gate2 * ffn_norm2(feed_forward(ffn_norm1(x) * (1 + scale2)))
        direction = final_layer(x[:, :L], time)      # B L 4*in_dim, returned as B in_dim H W
    """

    spec = DIT
    dtype_of = "layers.0.attention_norm1.weight"
    block_class: ClassVar[type[JointTransformerBlock]] = JointTransformerBlock

    def __init__(self, config: LuminaConfig, attention: AttentionChoice = SDPA) -> None:
        """Build the network without weights."""
        super().__init__()
        self.config = config
        self.attention = attention
        block = self.block_class
        self.noise_refiner = nn.ModuleList(block(config) for _ in range(config.noise_refiner_layers))
        self.context_refiner = nn.ModuleList(
            block(config, is_modulated=False) for _ in range(config.context_refiner_layers)
        )
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.text_dim, config.eps), nn.Linear(config.text_dim, config.dim)
        )
        self.layers = nn.ModuleList(block(config) for _ in range(config.num_layers))
        self.make_ends(config, nn.Linear(config.patch_size**2 * config.in_dim, config.dim))
        self._rotary = GridTable(self._make_table)

    def make_ends(self, config: LuminaConfig, first: nn.Linear) -> None:
        """Build the time embedding and the layers around the blocks.

        `first` is the layer from patches to tokens.
        """
        self.t_embedder = TimeEmbedding(config)
        self.x_embedder = first
        self.final_layer = LuminaFinalLayer(config)

    @property
    def last(self) -> LuminaFinalLayer:
        """Return the final layer, which projects tokens to patches."""
        return self.final_layer

    def embed(
        self,
        noisy: Tensor,
        times: Tensor,
        caption: Tensor,
        caption_mask: Tensor,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Hidden:
        """Embed and refine image and caption tokens, B L+T C; return them with the blocks' other inputs.

        Args:
            noisy: B in_dim H W.
            times: B, 0 (noise) to 1 (image).
            caption: States of the language model, B T text_dim.
            caption_mask: B T, true or 1 for real tokens, which come first.
            overrides: Changes to this call; their second text, for negative attention, has arguments named
                caption and caption_mask, and its tokens follow those of the first text.

        Raises:
            ValueError: If sizes do not match.
        """
        self._check_sizes(noisy, caption, caption_mask)
        patch = self.config.patch_size
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        grid = (noisy.shape[2] // patch, noisy.shape[3] // patch)
        patches = rearrange(noisy, "b c (h ph) (w pw) -> b (h w) (ph pw c)", ph=patch, pw=patch)
        time = self.embed_time(times)
        tokens_of = partial(
            LuminaTokens,
            grid=grid,
            time=time,
            dtype=dtype,
            attention=self.attention,
        )
        captions = []
        for prompt in overrides.texts(len(noisy), caption=caption, caption_mask=caption_mask):
            captions.append(self._read_caption(**prompt, grid=grid, tokens_of=tokens_of))
        text, tokens = captions[0]

        image = self.embed_image(patches, dtype)
        # the refiner sees the image alone: the first rows of the joint rotary table
        image_tokens = tokens_of(rotary=tokens.rotary[..., : image.shape[1], :, :, :], lengths=None)
        for block in self.noise_refiner:
            image = block(image, image_tokens)
        if len(captions) == 1:
            return Hidden(torch.cat([image, text], dim=1), tokens)
        second_text, second_tokens = captions[1]
        assert overrides.steer is not None  # it comes with a second text
        second = SecondText(
            image.shape[1],
            second_text.shape[1],
            second_tokens.lengths,
            overrides.steer,
        )
        tokens = replace(tokens, second_text=second, second_rotary=second_tokens.rotary)
        return Hidden(torch.cat([image, text, second_text], dim=1), tokens)

    def _check_sizes(self, noisy: Tensor, caption: Tensor, caption_mask: Tensor) -> None:
        """Raise ValueError if the sizes do not match the model or each other."""
        if noisy.shape[1] != self.config.in_dim:
            raise ValueError(f"{noisy.shape[1]} input channels, the model takes {self.config.in_dim}")
        if any(size % self.config.patch_size for size in noisy.shape[2:]):
            raise ValueError(
                f"latents of {tuple(noisy.shape[2:])} cannot be cut into patches of {self.config.patch_size}"
            )
        if caption_mask.shape != caption.shape[:2]:
            raise ValueError(
                f"a text mask of {tuple(caption_mask.shape)} for text of {tuple(caption.shape[:2])}"
            )

    def unembed(self, x: Tensor, tokens: LuminaTokens) -> Tensor:
        """Project tokens B L+T C to the predicted direction, B in_dim H W float32."""
        rows, columns = tokens.grid
        patch = self.config.patch_size
        patches = self.last(x[:, : tokens.image], tokens).float()
        return rearrange(
            patches, "b (h w) (ph pw c) -> b c (h ph) (w pw)", h=rows, w=columns, ph=patch, pw=patch
        )

    def embed_time(self, times: Tensor) -> Tensor:
        """Return the time embedding of `times`: B to B time_dim float32."""
        time: Tensor = self.t_embedder(times)
        return time

    def embed_image(self, patches: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed patches, B L P, as image tokens, B L C."""
        return run_in_weight_dtype(self.x_embedder, patches).to(dtype)

    def embed_caption(self, caption: Tensor, counts: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Embed text states, B T text_dim, as tokens, B T C; `counts` are the numbers of real states."""
        text = self.cap_embedder[0](caption.to(dtype))
        return run_in_weight_dtype(self.cap_embedder[1], text).to(dtype)

    def count_tokens(self, real: int) -> int:
        """Return the number of tokens of a text or image; subclasses add padding."""
        return real

    def _read_caption(
        self,
        caption: Tensor,
        caption_mask: Tensor,
        grid: tuple[int, int],
        tokens_of: Callable[..., LuminaTokens],
    ) -> tuple[Tensor, LuminaTokens]:
        """Return refined caption tokens B T C, and the inputs of the blocks for caption and image together.

        The image's position follows the caption, so its rotations depend on the caption's length. `tokens_of`
        makes the inputs of blocks from rotations and lengths.
        """
        longest_rows, rows = real_tokens(caption_mask)
        counts = tuple(self.count_tokens(number) for number in rows)
        longest = self.count_tokens(longest_rows)
        has_equal_lengths = len(set(counts)) == 1
        layout = TokenLayout(grid, counts[:1] if has_equal_lengths else counts, longest)
        rotary = self._rotary.get_table(layout, caption.device)

        # lengths of captions that follow `before` tokens
        def lengths_behind(before: int) -> SampleLengths | None:
            if has_equal_lengths:  # then no token is padding, and attention needs no lengths
                return None
            return make_lengths([before + count for count in counts], caption.device)

        # the table is of image, then caption: the refiner takes only the caption's end
        num_image_tokens = self.count_tokens(grid[0] * grid[1])
        joint_inputs = tokens_of(rotary=rotary, lengths=lengths_behind(num_image_tokens))
        caption_inputs = tokens_of(rotary=rotary[..., num_image_tokens:, :, :, :], lengths=lengths_behind(0))
        text = self.embed_caption(caption[:, :longest_rows], rows, joint_inputs.dtype)
        for block in self.context_refiner:
            text = block(text, caption_inputs)
        return text, joint_inputs

    def _make_table(self, layout: TokenLayout, /, *, device: torch.device) -> Tensor:
        """Return the rotary table of image and caption, (cosine, sine) pairs L+T 1 D/2 2 or B L+T 1 D/2 2.

        Angles are float64, as trained. A caption's token j is at (first_place + j, 0, 0), an image's token at
        (first_place + number of the caption's tokens, row, column), an image's padding at 0.
        """
        position_width, row_width, column_width = self.config.rotary_widths

        def axis(positions: Sequence[int], width: int) -> Tensor:
            """Return the (cosine, sine) pairs of one axis's channels."""
            exact = torch.tensor(positions, dtype=torch.float64)
            pairs = cos_and_sin(rotation_angles(exact, width, self.config.rope_theta))
            return send_ahead(pairs.float(), device)

        num_rows, num_columns = layout.grid
        rows = axis(range(num_rows), row_width)
        columns = axis(range(num_columns), column_width)
        first_row = axis([0], row_width)
        first_column = axis([0], column_width)
        num_padding = self.count_tokens(num_rows * num_columns) - num_rows * num_columns
        padding = spread_over_grid([axis([0] * num_padding, position_width), first_row, first_column])
        begin = self.config.first_place
        caption_positions = axis(range(begin, begin + layout.longest), position_width)
        caption = spread_over_grid([caption_positions, first_row, first_column])
        # the same for all samples: padding is at position 0, the caption starts at first_place
        after_image = torch.cat([padding, caption])
        tables = []
        for count in layout.captions:
            image = spread_over_grid([axis([begin + count], position_width), rows, columns])
            tables.append(torch.cat([image, after_image]))
        # the added axis is for heads
        if len(tables) == 1:  # all captions have one length, so the batch shares a table
            return tables[0].unsqueeze(-3)
        return torch.stack(tables).unsqueeze(-3)


def real_tokens(mask: Tensor) -> tuple[int, tuple[int, ...]]:
    """Return the number of real rows of the longest caption and of each caption, at least 1.

    `mask` is B T. Padding after the longest caption is cut off. An empty caption keeps one row, because
    attention needs at least one. Raises ValueError if padding comes before a real token.
    """
    real = mask != 0
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    counts, ends = torch.stack([real.sum(dim=1), (real * positions).amax(dim=1)]).tolist()
    if counts != ends:
        raise ValueError(f"a text mask has padding before real tokens: {counts} real tokens end at {ends}")
    at_least_one = tuple(max(1, count) for count in counts)
    return max(at_least_one), at_least_one
