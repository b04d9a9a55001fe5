"""The transformer of Qwen-Image: double blocks alone, over an image and states of a language model.

Names of modules are the released ones, which are those of diffusers. Source: the released code, and Wu et al.
2025, arXiv 2508.02324. `hunyuan_model.blocks` lists the steps in float32, and the order of tokens: the image
first, then the text. The released code has the text first; attention does not depend on the order.
"""
# Letters: B batch, L image tokens, with those of references, T text tokens, N heads, D head width,
# C = N * D

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, Self

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from hunyuan_model import blocks
from hunyuan_model.joining import gelu
from hunyuan_model.model import check_sizes, count_real_tokens, from_patches, rotary_widths
from modules.attention.attend import SampleLengths
from modules.layers.modulation import modulate
from modules.layers.norms import (
    Float32LayerNorm,
    NamedFeedForward,
    RMSNorm,
    activation_dtype,
    run_float32,
    run_in_weight_dtype,
)
from modules.layers.rope import GridTable, consecutive_rotations, sinusoid, spread_over_grid
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from qwen_image.configs import DIT, PATCH, QwenImageConfig
from runtime.offload.context import TokenShard
from runtime.run_blocks import BlockNetwork, Hidden


@dataclass(frozen=True)
class QwenTokens(blocks.TokensWithRotatedText):
    """Inputs of the blocks; `vector` has a second row for clean references, if there are any."""

    # the rows of `rotary` of clean references; compiled code leaves their number open
    clean_reference_rotary: Tensor = field(kw_only=True)

    def cut(self, shard: TokenShard) -> Self:
        """Return the inputs for one process's tokens, with only their rotary rows of clean references."""
        clean_rotary = shard.slice_rotary(
            self.clean_reference_rotary, self.num_video_tokens - self.clean_reference_rotary.shape[-4]
        )
        return replace(super().cut(shard), clean_reference_rotary=clean_rotary)

    @property
    def modulation_vectors(self) -> tuple[Tensor, Tensor]:
        """Return the modulation of image tokens, with a row for clean references, and of text tokens."""
        return self.vector, self.vector[:, :1]

    @property
    def video_modulation_split(self) -> int:
        """Negative index, among the image tokens, of the first clean reference token; NOWHERE without any."""
        return -self.clean_reference_rotary.shape[-4] or blocks.NOWHERE


class QwenLayout(NamedTuple):
    """Sizes of images and texts, which determine a rotary table."""

    # index, rows and columns of each image's tokens, the ones to make first
    image_grids: tuple[tuple[int, int, int], ...]
    text_lengths: tuple[int, ...]  # tokens of each text


class QwenAttention(nn.Module):
    """Layers before and after the joint attention of the image and text streams."""

    def __init__(self, config: QwenImageConfig) -> None:
        super().__init__()
        dim = config.dim
        width = config.dim // config.num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_add_out = nn.Linear(dim, dim)
        self.norm_q, self.norm_k = RMSNorm(width, config.eps), RMSNorm(width, config.eps)
        self.norm_added_q, self.norm_added_k = RMSNorm(width, config.eps), RMSNorm(width, config.eps)

    def heads(self, x: Tensor, is_text: bool) -> blocks.Heads:
        """Return queries, keys and values of a stream's tokens, each B L N D; the first two normalized."""
        if is_text:
            layers = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
            norm_q, norm_k = self.norm_added_q, self.norm_added_k
        else:
            layers = (self.to_q, self.to_k, self.to_v)
            norm_q, norm_k = self.norm_q, self.norm_k
        heads = -1, *norm_q.normalized_shape
        query, key, value = (run_in_weight_dtype(layer, x).unflatten(-1, heads) for layer in layers)
        return norm_q(query), norm_k(key), value


class QwenBlock(blocks.DoubleStreamBlock):
    """Block in which image and text have separate weights and share one attention."""

    def __init__(self, config: QwenImageConfig) -> None:
        super().__init__(config.dim, config.eps)
        self.attn = QwenAttention(config)
        self.img_mod, self.txt_mod = (blocks.HunyuanModulation(config.dim, 6, "1") for _ in range(2))
        self.img_mlp, self.txt_mlp = (NamedFeedForward(config.dim, config.ffn_dim, gelu) for _ in range(2))

    def layers(self, is_text: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Return text or image layers: modulation, attention's output projection, feed-forward."""
        if is_text:
            return self.txt_mod, self.attn.to_add_out, self.txt_mlp
        return self.img_mod, self.attn.to_out[0], self.img_mlp

    def heads(self, x: Tensor, is_text: bool) -> blocks.Heads:
        """Return text or image query, key and value, each B L N D; query and key normalized."""
        return self.attn.heads(x, is_text)


class QwenTimeEmbedding(nn.Module):
    """Embed timesteps, 0..1000, as B 1 C float32."""

    def __init__(self, config: QwenImageConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.timestep_embedder = nn.ModuleDict(
            {
                "linear_1": nn.Linear(config.freq_dim, config.dim),
                "linear_2": nn.Linear(config.dim, config.dim),
            }
        )
        # a row for images with alpha, and one for those without, which no release uses
        self.addition_t_embedding = nn.Embedding(2, config.dim) if config.has_layers else None

    def forward(self, timesteps: Tensor) -> Tensor:
        """Return embeddings, B 1 C float32, of timesteps, B."""
        # float32 angles, as in training
        waves = sinusoid(timesteps, self.freq_dim, torch.float32)
        hidden = functional.silu(run_float32(self.timestep_embedder["linear_1"], waves))
        rows = run_float32(self.timestep_embedder["linear_2"], hidden)
        if self.addition_t_embedding is not None:
            rows = rows + self.addition_t_embedding.weight[0].float()
        return rows.unsqueeze(1)


class LastNorm(nn.Module):
    """Final norm, modulated by the timestep."""

    def __init__(self, config: QwenImageConfig) -> None:
        super().__init__()
        self.norm = Float32LayerNorm(config.dim, config.eps)
        self.linear = nn.Linear(config.dim, 2 * config.dim)

    def forward(self, x: Tensor, tokens: blocks.TokensWithRotatedText) -> Tensor:
        """Return the modulated norm of tokens x, B L C."""
        rows = run_in_weight_dtype(self.linear, tokens.vector[:, :1]).float()
        scale, shift = rows.chunk(2, dim=-1)
        return modulate(self.norm(x), shift, scale, tokens.dtype)


class QwenImageModel(BlockNetwork):
    """Predict the velocity of noisy latents of an image from states of Qwen2.5-VL.

    Simplified, without references, a second text and the code around the blocks:

        image = img_in(patches of noisy)                                  # B L C
        text = txt_in(txt_norm(text))                                       # B T C
        vector = time_text_embed(timesteps)                                 # B C
        for block in transformer_blocks:
            rows, text_rows = block.img_mod(vector), block.txt_mod(vector)  # each 6: shifts, scales, gates
            branches = attention of modulated image and text to each other                      # B L+T C
            image, text = each + gate * proj(its branch), then + gate * mlp(modulated)
        velocity = proj_out(norm_out(image, vector))                      # B L Z*4, returned as B Z F H W
    """

    spec = DIT
    compute_dtype_parameter = "transformer_blocks.0.attn.to_q.bias"

    def __init__(self, config: QwenImageConfig, attention: AttentionChoice = SDPA) -> None:
        """Build the network without weights. `attention` is passed to `modules.attention.attend`."""
        super().__init__()
        self.config = config
        self.attention = attention
        numbers = config.channels * PATCH**2
        self.time_text_embed = QwenTimeEmbedding(config)
        self.txt_norm = RMSNorm(config.text_dim, config.eps)
        self.img_in = nn.Linear(numbers, config.dim)
        self.txt_in = nn.Linear(config.text_dim, config.dim)
        self.transformer_blocks = nn.ModuleList(QwenBlock(config) for _ in range(config.num_layers))
        self.norm_out = LastNorm(config)
        self.proj_out = nn.Linear(config.dim, numbers)
        self._rotary = GridTable[QwenLayout](self._make_table)

    def embed(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        text_mask: Tensor,
        overrides: Overrides = NO_OVERRIDES,
        references: Sequence[Tensor] = (),
        clean_references: bool = False,
    ) -> Hidden:
        """Embed images and text as tokens, B L+T C; return them with the blocks' other inputs.

        References follow the image; a second text, for guidance, follows the prompt.

        Args:
            noisy: B Z F H W; F > 1 if the model generates layers.
            timesteps: B, 0..1000.
            text: States of the language model, B T text_dim.
            text_mask: B T, true or 1 for real tokens, which come first.
            overrides: Changes to this call. For normalized attention guidance (NAG), they contain a second
                `text` and `text_mask`.
            references: Clean latents of images to edit, each B Z 1 h w of its own size.
            clean_references: Modulate the tokens of references with time 0 instead of the image's time.

        Raises:
            ValueError: If sizes do not match.
        """
        images = (noisy, *references)
        for latents in images:
            if latents.shape[1] != self.config.channels:
                raise ValueError(f"{latents.shape[1]} input channels, the model takes {self.config.channels}")
            check_sizes(latents, (1, PATCH, PATCH), text, text_mask)
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        embedded = [run_in_weight_dtype(self.img_in, cut_patches(latents)).to(dtype) for latents in images]
        grids = self._make_image_grids(noisy, references)
        num_image_tokens = sum(tokens.shape[1] for tokens in embedded)
        has_clean_tokens = clean_references and bool(references)
        vector = blocks.apply_silu(self._embed_times(timesteps, has_clean_tokens), dtype)
        # references, which follow the image, may have a second modulation
        first_clean = embedded[0].shape[1] if has_clean_tokens else num_image_tokens
        texts = []  # of the prompt and, if `overrides` have one, of the second text
        for prompt in overrides.text_inputs(len(noisy), text=text, text_mask=text_mask):
            text_tokens, lengths = self._embed_text(**prompt, num_image_tokens=num_image_tokens, dtype=dtype)
            texts.append(blocks.EmbeddedText(text_tokens, lengths, vector))
        layout = QwenLayout(tuple(grids), tuple(embedded_text.tokens.shape[1] for embedded_text in texts))
        rotary = self._rotary.get_table(layout, noisy.device)
        return blocks.join_tokens(
            embedded,
            texts,
            overrides.combine_attention,
            QwenTokens,
            grid=(noisy.shape[2], *grids[0][1:]),
            dtype=dtype,
            attention=self.attention,
            rotary=rotary,
            image_token_rotary=rotary[:num_image_tokens],
            clean_reference_rotary=rotary[first_clean:num_image_tokens],
        )

    def _embed_times(self, timesteps: Tensor, has_clean_tokens: bool) -> Tensor:
        """Return the time embedding, B 1 C float32; `has_clean_tokens` appends that of time 0: B 2 C."""
        image_time: Tensor = self.time_text_embed(timesteps)
        if not has_clean_tokens:
            return image_time
        return torch.cat([image_time, self.time_text_embed(torch.zeros_like(timesteps))], dim=1)

    def _embed_text(
        self, text: Tensor, text_mask: Tensor, num_image_tokens: int, dtype: torch.dtype
    ) -> tuple[Tensor, SampleLengths | None]:
        """Return text tokens, B T C, and sequence lengths including the image tokens in front."""
        longest, _, lengths = count_real_tokens(text_mask, num_image_tokens, text.device)
        states = self.txt_norm(text[:, :longest].to(dtype))
        return run_in_weight_dtype(self.txt_in, states).to(dtype), lengths

    def _make_image_grids(self, noisy: Tensor, references: Sequence[Tensor]) -> list[tuple[int, int, int]]:
        """Return (index, rows, columns) of each image's tokens: the generated images, then references."""
        # The input image of a model of layers has the index -1.
        grids: list[tuple[int, int, int]] = []
        for latents in (noisy, *references):
            rows, columns = latents.shape[-2] // PATCH, latents.shape[-1] // PATCH
            first = -1 if self.config.has_layers and grids else len(grids)
            grids += [(first + frame, rows, columns) for frame in range(latents.shape[2])]
        return grids

    def unembed(self, x: Tensor, tokens: blocks.TokensWithRotatedText) -> Tensor:
        """Turn tokens B L+T C into the velocity, B Z F H W in float32."""
        num_tokens = math.prod(tokens.grid)
        patches = run_in_weight_dtype(self.proj_out, self.norm_out(x[:, :num_tokens], tokens)).float()
        return from_patches(patches, tokens.grid, (1, PATCH, PATCH))

    def _make_table(self, layout: QwenLayout, /, *, device: torch.device) -> Tensor:
        """Return (cosine, sine) pairs of all tokens, L+T 1 D/2 2 float32, from float64 angles."""
        # An image's token is at (index of the image, row, column), with rows and columns counted from the
        # middle. A text's token j is at j + start on all three axes, where start is half the longest edge of
        # all images, or with layers at least their number.
        widths = rotary_widths(self.config.dim // self.config.num_heads)
        index_width, row_width, column_width = widths  # channels of each axis
        rotations = partial(consecutive_rotations, theta=self.config.rope_theta, device=device)
        tables = []
        for index, rows, columns in layout.image_grids:
            image = rotations(index, 1, index_width)
            # rows and columns are counted from the middle of the image
            along_rows = rotations(rows // 2 - rows, rows, row_width)
            along_columns = rotations(columns // 2 - columns, columns, column_width)
            tables.append(spread_over_grid([image, along_rows, along_columns]))
        start = max(max(rows // 2, columns // 2) for _, rows, columns in layout.image_grids)
        if self.config.has_layers:
            start = max(start, *(index + 1 for index, _, _ in layout.image_grids))
        for count in layout.text_lengths:
            tables.append(torch.cat([rotations(start, count, width) for width in widths], dim=1))
        return torch.cat(tables).unsqueeze(1)


def cut_patches(latents: Tensor) -> Tensor:
    """Cut latents, B Z F H W, into the tokens of 2 x 2 latent pixels: B L (Z ph pw)."""
    return rearrange(latents, "b z f (h ph) (w pw) -> b (f h w) (z ph pw)", ph=PATCH, pw=PATCH)
