"""The HunyuanImage-2.1 transformer: HunyuanVideo's blocks over the pixels of a latent image.

Module names follow the published checkpoint. Two texts are joined: the prompt's states of a language model,
and those of a glyph encoder for words to render in the image. Source: the released model code.
`hunyuan_model.blocks` lists the steps in float32.
"""
# Letters: B batch, L image tokens, G glyph tokens, T text tokens, J joined ones, N heads, C width

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from hunyuan_image.configs import DIT, HunyuanImageConfig
from hunyuan_model.blocks import (
    EmbeddedText,
    HunyuanTokens,
    MMDoubleStreamBlock,
    MMSingleStreamBlock,
    apply_silu,
    join_tokens,
)
from hunyuan_model.model import HunyuanFinalLayer, real_tokens
from hunyuan_model.token_refiner import ScalarEmbedding, TokenRefiner
from modules.attention.attend import make_lengths
from modules.layers.norms import Float32LayerNorm, activation_dtype, run_in_weight_dtype
from modules.layers.rope import GridTable, TokenGrid, bind_rotary_table, rotary_table
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.run_blocks import BlockNetwork, Hidden

GLYPH_EPS = 1e-5  # epsilon of the norm before the glyph layers


class GlyphEmbedding(nn.Module):
    """Project the glyph encoder's states, B G glyph_dim, to text tokens, B G C."""

    def __init__(self, glyph_dim: int, hidden: tuple[int, int], dim: int) -> None:
        """Create the layers; `hidden` are the widths between them, and `dim` is that of the tokens."""
        super().__init__()
        self.layernorm = Float32LayerNorm(glyph_dim, GLYPH_EPS, affine=True)
        first, second = hidden
        self.fc1 = nn.Linear(glyph_dim, first)
        self.fc2 = nn.Linear(first, second)
        self.fc3 = nn.Linear(second, dim)

    def forward(self, states: Tensor) -> Tensor:
        """Return text tokens, B G C, from the glyph encoder's states, B G glyph_dim."""
        hidden = functional.gelu(run_in_weight_dtype(self.fc1, self.layernorm(states)))
        return run_in_weight_dtype(self.fc3, functional.gelu(run_in_weight_dtype(self.fc2, hidden)))


class HunyuanImageModel(BlockNetwork):
    """Predict the velocity of a noisy latent image from the states of its two texts.

    Simplified, without a second text and the code around the blocks:

        image = img_in(noisy)                                             # B L C
        text = join(byt5_in(glyphs), txt_in(text))                          # B J C
        vector = time_in(timesteps)                                         # B C
        for block in double_blocks:
            rows, text_rows = block.img_mod(vector), block.txt_mod(vector)  # each 6: shifts, scales, gates
            branches = attention of modulated image and text to each other                      # B L+J C
            image, text = each + gate * proj(its branch), then + gate * mlp(modulated)
        x = cat([image, text])
        for block in single_blocks:                  # attention and feed-forward in parallel
            x = x + gate * linear2(attention and gelu of linear1(modulated x))
        velocity = final_layer(x[:, :L], vector)     # B L out_dim, returned as B out_dim H W
    """

    spec = DIT
    compute_dtype_parameter = "double_blocks.0.img_attn_proj.bias"

    def __init__(self, config: HunyuanImageConfig, attention: AttentionChoice = SDPA) -> None:
        """Build the network without weights; its modules are named as in the released file."""
        super().__init__()
        self.config = config
        self.attention = attention
        dim = config.dim
        self.byt5_in = GlyphEmbedding(config.glyph_dim, config.glyph_hidden, dim)
        self.img_in = nn.ModuleDict({"proj": nn.Conv2d(config.in_dim, dim, 1)})
        self.txt_in = TokenRefiner(config)
        self.time_in = ScalarEmbedding(config.freq_dim, dim)
        sizes = (dim, config.ffn_dim, config.num_heads, config.eps)
        self.double_blocks = nn.ModuleList(MMDoubleStreamBlock(*sizes) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(MMSingleStreamBlock(*sizes) for _ in range(config.single_blocks))
        self.final_layer = HunyuanFinalLayer(dim, config.out_dim, config.eps)
        side = dim // config.num_heads // 2  # rows and columns each rotate half of a head's channels
        self._rotary = GridTable(bind_rotary_table(rotary_table, (side, side), config.rope_theta))

    def embed(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        text_mask: Tensor,
        glyphs: Tensor,
        glyph_mask: Tensor,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Hidden:
        """Return image tokens (L) and text tokens (J), B L+J C, and the other inputs of the blocks.

        Glyphs are texts in quotation marks, which byT5 encodes.

        Args:
            noisy: B in_dim H W.
            timesteps: B, 0..1000.
            text: States of the language model, B T text_dim.
            text_mask: B T, true or 1 for real tokens, which come first.
            glyphs: States of the glyph encoder, B G glyph_dim.
            glyph_mask: B G, like `text_mask`; all 0 for an image without glyphs.
            overrides: Changes to this call. For normalized attention guidance (NAG), they contain these four
                arguments for a second text, whose tokens follow the prompt's.

        Raises:
            ValueError: If sizes do not match.
        """
        if noisy.shape[1] != self.config.in_dim:
            raise ValueError(f"{noisy.shape[1]} input channels, the model takes {self.config.in_dim}")
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        pixels = run_in_weight_dtype(self.img_in["proj"], noisy).to(dtype)  # B C H W
        rows, columns = pixels.shape[2:]
        num_pixels = rows * columns
        rotary = self._rotary.get_table(TokenGrid((rows, columns)), noisy.device)
        vector = apply_silu(self.time_in(timesteps).unsqueeze(1), dtype)
        texts = []
        for prompt in overrides.text_inputs(
            len(noisy), text=text, text_mask=text_mask, glyphs=glyphs, glyph_mask=glyph_mask
        ):
            tokens, real_counts = self._embed_prompt(prompt, timesteps, dtype)
            is_padded = min(real_counts) < tokens.shape[1]
            joint_counts = [num_pixels + count for count in real_counts]
            lengths = make_lengths(joint_counts, noisy.device) if is_padded else None
            texts.append(EmbeddedText(tokens, lengths, vector))
        return join_tokens(
            [rearrange(pixels, "b c h w -> b (h w) c")],
            texts,
            overrides.combine_attention,
            grid=(1, rows, columns),
            rotary=rotary,
            dtype=dtype,
            attention=self.attention,
        )

    def _embed_prompt(
        self, prompt: Mapping[str, Tensor], timesteps: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, list[int]]:
        """Return the tokens of glyphs and text, B J C, and how many are real in each sample."""
        # In each sample the glyphs come first, then the text, then padding. `prompt` has text (states of the
        # language model), glyphs (states of byT5, which reads quoted text), and text_mask and glyph_mask,
        # true for real tokens.
        text, glyphs = prompt["text"], prompt["glyphs"]
        _check_mask(text, prompt["text_mask"])
        _check_mask(glyphs, prompt["glyph_mask"])
        max_text, padded_text_counts = real_tokens(prompt["text_mask"])
        text_tokens = self.txt_in(
            text[:, :max_text], timesteps, padded_text_counts, dtype=dtype, attention=self.attention
        )
        max_glyphs, padded_glyph_counts = real_tokens(prompt["glyph_mask"])
        # `real_tokens` returns None for counts if there is no padding
        text_counts = padded_text_counts or [max_text] * len(text)
        glyph_counts = padded_glyph_counts or [max_glyphs] * len(glyphs)
        if not any(glyph_counts):
            return text_tokens, list(text_counts)
        glyph_tokens = self.byt5_in(glyphs[:, :max_glyphs]).to(dtype)
        tokens = join_texts(glyph_tokens, glyph_counts, text_tokens, text_counts)
        return tokens, [sum(counts) for counts in zip(glyph_counts, text_counts, strict=True)]

    def unembed(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        """Project tokens B L+J C to the velocity, B out_dim H W float32."""
        pixels = self.final_layer(x[:, : tokens.num_video_tokens], tokens).float()
        return rearrange(pixels, "b (h w) c -> b c h w", h=tokens.grid[1])


def _check_mask(states: Tensor, mask: Tensor) -> None:
    if mask.shape != states.shape[:2]:
        raise ValueError(f"a mask of {tuple(mask.shape)} for a text of {tuple(states.shape[:2])}")


def join_texts(
    first: Tensor, first_counts: Sequence[int], second: Tensor, second_counts: Sequence[int]
) -> Tensor:
    """Join the real tokens of two texts, B G C and B T C, to B J C; zeros fill up shorter samples."""
    pieces = []
    for sample, (first_count, second_count) in enumerate(zip(first_counts, second_counts, strict=True)):
        pieces.append(torch.cat([first[sample, :first_count], second[sample, :second_count]]))
    return nn.utils.rnn.pad_sequence(pieces, batch_first=True)
