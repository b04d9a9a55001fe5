"""The HunyuanVideo 1.5 transformer: HunyuanVideo's double blocks, with texts, glyphs and an image as tokens.

Module names follow the published checkpoint, which has queries, keys and values apart. Source: the released
model code, as diffusers has it. `hunyuan_model.blocks` lists the steps in float32.
"""
# Letters: B batch, L video tokens, S image tokens, G glyph tokens, T text tokens, J joined ones, C width

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import gelu as exact_gelu

from hunyuan_image.model import GlyphEmbedding, join_texts
from hunyuan_model.blocks import (
    DoubleStreamBlock,
    EmbeddedText,
    Heads,
    HunyuanModulation,
    HunyuanTokens,
    apply_silu,
    join_tokens,
)
from hunyuan_model.joining import gelu
from hunyuan_model.model import HunyuanFinalLayer, check_sizes, from_patches, real_tokens, rotary_widths
from hunyuan_model.token_refiner import ScalarEmbedding, TokenRefiner
from hunyuan_video_15.configs import HunyuanVideo15Config
from hunyuan_video_15.spec import DIT
from modules.attention.attend import make_lengths
from modules.layers.norms import (
    Float32LayerNorm,
    RMSNorm,
    TwoLayerMlp,
    activation_dtype,
    run_in_weight_dtype,
)
from modules.layers.rope import GridTable, TokenGrid, bind_rotary_table, rotary_table
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.run_blocks import BlockNetwork, Hidden

IMAGE_EPS = 1e-5  # epsilon of the two norms around the image's projection
PATCH = (1, 1, 1)
TEXT_KIND, GLYPH_KIND, IMAGE_KIND = range(3)  # rows of `cond_type_embedding`


class HunyuanVideo15Block(DoubleStreamBlock):
    """Double-stream block with separate layers for queries, keys and values."""

    def __init__(self, config: HunyuanVideo15Config) -> None:
        """Build the layers without weights, under the names of the released checkpoints."""
        super().__init__(config.dim, config.eps)
        dim, self.num_heads = config.dim, config.num_heads
        head_width = dim // config.num_heads
        self.img_mod = HunyuanModulation(dim, 6)  # two shifts, scales and gates
        self.img_attn_q = nn.Linear(dim, dim)
        self.img_attn_k = nn.Linear(dim, dim)
        self.img_attn_v = nn.Linear(dim, dim)
        self.img_attn_q_norm = RMSNorm(head_width, config.eps)
        self.img_attn_k_norm = RMSNorm(head_width, config.eps)
        self.img_attn_proj = nn.Linear(dim, dim)
        self.img_mlp = TwoLayerMlp("fc1 fc2", (dim, config.ffn_dim, dim), gelu)
        self.txt_mod = HunyuanModulation(dim, 6)  # two shifts, scales and gates
        self.txt_attn_q = nn.Linear(dim, dim)
        self.txt_attn_k = nn.Linear(dim, dim)
        self.txt_attn_v = nn.Linear(dim, dim)
        self.txt_attn_q_norm = RMSNorm(head_width, config.eps)
        self.txt_attn_k_norm = RMSNorm(head_width, config.eps)
        self.txt_attn_proj = nn.Linear(dim, dim)
        self.txt_mlp = TwoLayerMlp("fc1 fc2", (dim, config.ffn_dim, dim), gelu)

    def layers(self, is_text: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Return text or video layers: modulation, attention's output projection, feed-forward."""
        if is_text:
            return self.txt_mod, self.txt_attn_proj, self.txt_mlp
        return self.img_mod, self.img_attn_proj, self.img_mlp

    def heads(self, x: Tensor, is_text: bool) -> Heads:
        """Return query, key and value of text or video tokens B L C; query and key normalized."""
        if is_text:
            projections = self.txt_attn_q, self.txt_attn_k, self.txt_attn_v
            query_norm, key_norm = self.txt_attn_q_norm, self.txt_attn_k_norm
        else:
            projections = self.img_attn_q, self.img_attn_k, self.img_attn_v
            query_norm, key_norm = self.img_attn_q_norm, self.img_attn_k_norm
        query, key, value = (
            run_in_weight_dtype(layer, x).unflatten(-1, (self.num_heads, -1)) for layer in projections
        )
        return query_norm(query), key_norm(key), value


class HunyuanVideo15ImageEmbedding(nn.Module):
    """Project states of the image encoder, B S image_dim, to tokens, B S C."""

    def __init__(self, config: HunyuanVideo15Config) -> None:
        super().__init__()
        image_dim, dim = config.image_dim, config.dim
        self.proj: Any = nn.Sequential(
            Float32LayerNorm(image_dim, IMAGE_EPS, affine=True),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            Float32LayerNorm(dim, IMAGE_EPS, affine=True),
        )

    def forward(self, states: Tensor) -> Tensor:
        """Return image tokens, B S C float32, of the image encoder's states, B S image_dim."""
        first_norm, first, _, second, last_norm = self.proj
        hidden = exact_gelu(run_in_weight_dtype(first, first_norm(states)))
        return last_norm(run_in_weight_dtype(second, hidden))


class HunyuanVideo15Model(BlockNetwork):
    """Predict the velocity of noisy video latents from two texts and, if there is one, a first frame.

    Simplified, without a second text and the code around the blocks:

        video = img_in(cat([noisy, first frame, mask]))                     # B L C
        text = join(vision_in(image), byt5_in(glyphs), txt_in(text))        # B J C, plus a row for each kind
        vector = time_in(timesteps)                                         # B C
        for block in double_blocks:
            rows, text_rows = block.img_mod(vector), block.txt_mod(vector)  # each 6: shifts, scales, gates
            branches = attention of modulated video and text to each other                      # B L+J C
            video, text = each + gate * proj(its branch), then + gate * mlp(modulated)
        velocity = final_layer(video, vector)        # B L out_dim, returned as B out_dim F H W
    """

    spec = DIT
    compute_dtype_parameter = "double_blocks.0.img_attn_proj.bias"

    def __init__(self, config: HunyuanVideo15Config, attention: AttentionChoice = SDPA) -> None:
        """Build the network without weights; its modules are named as in the released file."""
        super().__init__()
        self.config = config
        self.attention = attention
        dim = config.dim
        self.img_in = nn.ModuleDict({"proj": nn.Conv3d(config.in_dim, dim, PATCH)})
        self.txt_in = TokenRefiner(config)
        self.byt5_in = GlyphEmbedding(config.glyph_dim, config.glyph_hidden, dim)
        self.vision_in = HunyuanVideo15ImageEmbedding(config)
        self.cond_type_embedding = nn.Embedding(3, dim)
        self.time_in = ScalarEmbedding(config.freq_dim, dim)
        self.double_blocks = nn.ModuleList(HunyuanVideo15Block(config) for _ in range(config.double_blocks))
        self.final_layer = HunyuanFinalLayer(dim, config.out_dim, config.eps)
        widths = rotary_widths(dim // config.num_heads)
        self._rotary = GridTable(bind_rotary_table(rotary_table, widths, config.rope_theta))

    def embed(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        text_mask: Tensor,
        glyphs: Tensor,
        glyphs_mask: Tensor,
        first_latents: Tensor | None = None,
        image: Tensor | None = None,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Hidden:
        """Return video tokens (L) and text tokens (J), B L+J C, and the other inputs of the blocks.

        Args:
            noisy: B out_dim F H W.
            timesteps: B, 0..1000.
            text: States of the language model, B T text_dim.
            text_mask: B T, true or 1 for real tokens, which come first.
            glyphs: States of ByT5, which reads texts in quotation marks, B G glyph_dim. G may be 0.
            glyphs_mask: B G, like `text_mask`; all 0 for a prompt without quotation marks.
            first_latents: Latents of the first frame, B out_dim 1 H W; None for clips from text alone.
            image: States of the image encoder for this frame, B S image_dim; None without an image.
            overrides: Changes to this call. For normalized attention guidance (NAG), they contain the four
                arguments of texts for a second prompt, whose tokens follow the first one's.

        Raises:
            ValueError: If sizes do not match.
        """
        if noisy.shape[1] != self.config.out_dim:
            raise ValueError(f"{noisy.shape[1]} latent channels, the model takes {self.config.out_dim}")
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        condition = noisy.new_zeros(len(noisy), self.config.in_dim - noisy.shape[1], *noisy.shape[2:])
        if first_latents is not None:
            condition[:, :-1, :1] = first_latents
            condition[:, -1, 0] = 1  # the mask
        x = torch.cat([noisy, condition], dim=1)
        patches = run_in_weight_dtype(self.img_in["proj"], x).to(dtype)  # B C F H W
        grid = (patches.shape[2], patches.shape[3], patches.shape[4])
        rotary = self._rotary.get_table(TokenGrid(grid, overrides.slow_frames), noisy.device)
        vector = apply_silu(self.time_in(timesteps).unsqueeze(1), dtype)
        image_tokens = None
        if image is not None:
            image_tokens = (self.vision_in(image) + self.cond_type_embedding.weight[IMAGE_KIND]).to(dtype)
        texts = []
        for prompt in overrides.text_inputs(
            len(noisy), text=text, text_mask=text_mask, glyphs=glyphs, glyphs_mask=glyphs_mask
        ):
            check_sizes(noisy, PATCH, prompt["text"], prompt["text_mask"])
            check_sizes(noisy, PATCH, prompt["glyphs"], prompt["glyphs_mask"])
            tokens, counts = self._embed_prompt(prompt, timesteps, dtype)
            if image_tokens is not None:
                tokens = torch.cat([image_tokens, tokens], dim=1)
                counts = [image_tokens.shape[1] + count for count in counts]
            lengths = None
            if min(counts) < tokens.shape[1]:
                lengths = make_lengths([len(rotary) + count for count in counts], noisy.device)
            texts.append(EmbeddedText(tokens, lengths, vector))
        return join_tokens(
            [rearrange(patches, "b c f h w -> b (f h w) c")],
            texts,
            overrides.combine_attention,
            grid=grid,
            rotary=rotary,
            dtype=dtype,
            attention=self.attention,
        )

    def _embed_prompt(
        self, prompt: Mapping[str, Tensor], timesteps: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, list[int]]:
        """Return the tokens of a prompt, B J C: glyphs, text, padding; and how many are real in each."""
        # `prompt` has the four arguments of texts of `embed`
        kinds = self.cond_type_embedding.weight
        text, glyphs = prompt["text"], prompt["glyphs"]
        max_text, padded_counts = real_tokens(prompt["text_mask"])
        text_tokens = self.txt_in(
            text[:, :max_text], timesteps, padded_counts, dtype=dtype, attention=self.attention
        )
        text_tokens = (text_tokens + kinds[TEXT_KIND]).to(dtype)
        text_counts = padded_counts or [max_text] * len(text)
        if not prompt["glyphs_mask"].any():
            return text_tokens, text_counts
        max_glyphs, padded_counts = real_tokens(prompt["glyphs_mask"])
        glyph_tokens = (self.byt5_in(glyphs[:, :max_glyphs]) + kinds[GLYPH_KIND]).to(dtype)
        glyph_counts = padded_counts or [max_glyphs] * len(glyphs)
        tokens = join_texts(glyph_tokens, glyph_counts, text_tokens, text_counts)
        return tokens, [sum(counts) for counts in zip(glyph_counts, text_counts, strict=True)]

    def unembed(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        """Project tokens B L+J C to the velocity, B out_dim F H W float32."""
        video = self.final_layer(x[:, : tokens.num_video_tokens], tokens).float()
        return from_patches(video, tokens.grid, PATCH)
