"""The Lumina-Image-2.0 transformer (NextDiT). Module names follow the published checkpoints.

Source: the released model code and Qin et al. 2025, arXiv 2503.21758. `blocks.py` lists the steps in float32.
"""
# Letters: B batch, L image tokens, T caption tokens, D head width, C width of the model

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from lumina.blocks import JointTransformerBlock, LuminaFinalLayer, LuminaTokens, TimeEmbedding
from lumina.configs import DIT, LuminaConfig
from modules.attention.attend import SecondText, make_lengths
from modules.layers.norms import RMSNorm, activation_dtype, run_in_weight_dtype
from modules.layers.rope import GridTable, axis_rotations, spread_over_grid
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
    compute_dtype_parameter = "layers.0.attention_norm1.weight"
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
        self.make_outer_layers(config, nn.Linear(config.patch_size**2 * config.in_dim, config.dim))
        self._rotary = GridTable(self._make_table)

    def make_outer_layers(self, config: LuminaConfig, first: nn.Linear) -> None:
        """Build the time embedding and the layers around the blocks; `first` embeds patches as tokens."""
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
            overrides: Changes to this call. For normalized attention guidance (NAG), they contain a second
                `caption` and `caption_mask`, whose tokens follow the first caption's.

        Raises:
            ValueError: If sizes do not match.
        """
        self._check_sizes(noisy, caption, caption_mask)
        patch = self.config.patch_size
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        grid = (noisy.shape[2] // patch, noisy.shape[3] // patch)
        patches = rearrange(noisy, "b c (h ph) (w pw) -> b (h w) (ph pw c)", ph=patch, pw=patch)
        time = self.embed_time(times)
        # tokens of the prompt and, if `overrides` have one, of the second text; each with the blocks' inputs
        prompts = overrides.text_inputs(len(noisy), caption=caption, caption_mask=caption_mask)
        captions = [self._refine_caption(**prompt, grid=grid, time=time, dtype=dtype) for prompt in prompts]
        text, tokens = captions[0]
        image = self._refine_image(self.embed_image(patches, dtype), tokens)
        if len(captions) == 1:
            return Hidden(torch.cat([image, text], dim=1), tokens)
        second_text, second_tokens = captions[1]
        assert overrides.combine_attention is not None  # a second text is always for NAG
        second = SecondText(
            image.shape[1], second_text.shape[1], second_tokens.lengths, overrides.combine_attention
        )
        tokens = replace(tokens, second_text=second, second_rotary=second_tokens.rotary)
        return Hidden(torch.cat([image, text, second_text], dim=1), tokens)

    def _refine_image(self, image: Tensor, tokens: LuminaTokens) -> Tensor:
        """Return image tokens, B L C, after the refiner, which sees the image alone."""
        # image tokens come first in the rotary table of image and caption
        rotary = tokens.rotary[..., : image.shape[1], :, :, :]
        image_inputs = replace(tokens, rotary=rotary, lengths=None)
        for block in self.noise_refiner:
            image = block(image, image_inputs)
        return image

    def _check_sizes(self, noisy: Tensor, caption: Tensor, caption_mask: Tensor) -> None:
        """Raise ValueError if the latents, captions and mask do not match the model or each other."""
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

    def count_padded_tokens(self, real: int) -> int:
        """Return the number of tokens of a text or image; subclasses add padding."""
        return real

    def _refine_caption(
        self,
        caption: Tensor,
        caption_mask: Tensor,
        grid: tuple[int, int],
        time: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, LuminaTokens]:
        """Return refined caption tokens B T C, and the inputs of the blocks for caption and image together.

        The image's position follows the caption, so its rotations depend on the caption's length.
        """
        longest, counts = count_real_tokens(caption_mask)
        padded_counts = tuple(self.count_padded_tokens(count) for count in counts)
        has_equal_lengths = len(set(padded_counts)) == 1
        layout = TokenLayout(
            grid,
            captions=padded_counts[:1] if has_equal_lengths else padded_counts,
            longest=self.count_padded_tokens(longest),
        )
        num_image_tokens = self.count_padded_tokens(grid[0] * grid[1])
        caption_lengths = joint_lengths = None  # with equal lengths no token needs a mask
        if not has_equal_lengths:
            caption_lengths = make_lengths(padded_counts, caption.device)
            joint_counts = [num_image_tokens + count for count in padded_counts]
            joint_lengths = make_lengths(joint_counts, caption.device)
        joint_inputs = LuminaTokens(
            grid,
            rotary=self._rotary.get_table(layout, caption.device),
            lengths=joint_lengths,
            time=time,
            dtype=dtype,
            attention=self.attention,
        )
        # caption tokens come last in the rotary table of image and caption
        caption_rotary = joint_inputs.rotary[..., num_image_tokens:, :, :, :]
        caption_inputs = replace(joint_inputs, rotary=caption_rotary, lengths=caption_lengths)
        text = self.embed_caption(caption[:, :longest], counts, dtype)
        for block in self.context_refiner:
            text = block(text, caption_inputs)
        return text, joint_inputs

    def _make_table(self, layout: TokenLayout, /, *, device: torch.device) -> Tensor:
        """Return the rotary table of image and caption, (cosine, sine) pairs L+T 1 D/2 2 or B L+T 1 D/2 2."""
        # Angles are float64, as trained. With s = first_text_position, a caption's token j is at (s + j, 0,
        # 0), an image's token at (s + number of the caption's tokens, row, column), an image's padding at 0.
        position_width, row_width, column_width = self.config.rotary_widths
        text_start = self.config.first_text_position
        num_rows, num_columns = layout.grid
        rows = self._rotate_axis(range(num_rows), row_width, device)
        columns = self._rotate_axis(range(num_columns), column_width, device)
        num_padding = self.count_padded_tokens(num_rows * num_columns) - num_rows * num_columns
        padding = self._make_line_table([0] * num_padding, device)
        caption = self._make_line_table(range(text_start, text_start + layout.longest), device)
        # only the image's position differs between samples
        after_image = torch.cat([padding, caption])
        tables = []
        for count in layout.captions:
            position = self._rotate_axis([text_start + count], position_width, device)
            tables.append(torch.cat([spread_over_grid([position, rows, columns]), after_image]))
        # the added axis is for heads
        if len(tables) == 1:  # all captions have one length, so the batch shares a table
            return tables[0].unsqueeze(-3)
        return torch.stack(tables).unsqueeze(-3)

    def _make_line_table(self, positions: Sequence[int], device: torch.device) -> Tensor:
        """Return the (cosine, sine) pairs of tokens at these positions, all in row 0 and column 0."""
        coordinates = (positions, [0], [0])
        pairs = []
        for axis, width in zip(coordinates, self.config.rotary_widths, strict=True):
            pairs.append(self._rotate_axis(axis, width, device))
        return spread_over_grid(pairs)

    def _rotate_axis(self, positions: Sequence[int], width: int, device: torch.device) -> Tensor:
        """Return rotary (cosine, sine) pairs for positions on one axis; it has `width` channels of a head."""
        exact = torch.tensor(positions, dtype=torch.float64)
        return axis_rotations(exact, width, self.config.rope_theta, device)


def count_real_tokens(mask: Tensor) -> tuple[int, tuple[int, ...]]:
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
