"""The transformer of FLUX.2: double and single blocks over images and the states of a language model.

All blocks of a kind share one modulation; feed-forwards are SwiGLU; there are no biases. Module names follow
the published checkpoints. Source: the released code of FLUX.2. `hunyuan_model.blocks` lists the steps in
float32, and the order of tokens: the image, its references, then the text. The released code has the text
first; attention does not depend on the order.
"""
# Letters: B batch, L image tokens, with those of references, T text tokens, S 1 or 2 texts, N heads, D head
# width, C = N * D, F width of a feed-forward

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from flux_2.configs import AXES, DIT, Flux2Config
from hunyuan_model import blocks
from modules.layers.modulation import add_gated, modulate
from modules.layers.norms import (
    Float32LayerNorm,
    ScaleNorm,
    TwoLayerMlp,
    activation_dtype,
    run_in_weight_dtype,
)
from modules.layers.rope import GridTable, TokenGrid, bind_rotary_table, joined_tables, rotary_table, sinusoid
from modules.speed_options import SDPA, AttentionChoice
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.run_blocks import BlockNetwork, Hidden

GUIDANCE_UNIT = 1000.0  # the model was trained with 1000 times the scale
IMAGE_POSITION_STEP = 10  # places between an image and its references on the first axis
# rows of all modulations: of images and texts in double blocks, of single blocks; then the embedding
IMAGE_ROWS, TEXT_ROWS, SINGLE_ROWS, EMBEDDING_ROW = slice(0, 6), slice(6, 12), slice(12, 15), 15


class SharedModulationRows(nn.Module):
    """Select one block's shifts, scales and gates from the rows of all blocks."""

    def __init__(self, rows: slice) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Select this block's rows, each B S C, from the rows of all blocks, B S 16 C float32."""
        # vector: B S 16 C float32 -> tensors B S C
        return vector[:, :, self.rows].unbind(2)


class SharedModulation(nn.Module):
    """Compute shifts, scales and gates shared by all blocks of a kind, B C to B count C float32."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(dim, count * dim, bias=False)

    def forward(self, vector: Tensor) -> Tensor:
        """Compute modulation rows, B count C float32, from a vector, B C."""
        return run_in_weight_dtype(self.lin, functional.silu(vector)).float().unflatten(-1, (self.count, -1))


class PairNorm(nn.Module):
    """Norms of queries and keys, applied to each head separately."""

    def __init__(self, head_width: int, eps: float) -> None:
        super().__init__()
        self.query_norm = ScaleNorm(head_width, eps)
        self.key_norm = ScaleNorm(head_width, eps)


class StreamAttention(nn.Module):
    """Layers before and after the joint attention, for the image or the text tokens."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.norm = PairNorm(config.dim // config.num_heads, config.eps)
        self.proj = nn.Linear(config.dim, config.dim, bias=False)


def gate_half(hidden: Tensor) -> Tensor:
    """Apply SwiGLU's gate: SiLU(first half) * second half, B L 2F to B L F."""
    gate, value = hidden.chunk(2, dim=-1)
    return functional.silu(gate) * value


class GatedMlp(nn.Sequential):
    """Gated MLP of two layers; the first computes values and their gates."""

    def __init__(self, config: Flux2Config) -> None:
        first = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        super().__init__(first, nn.Identity(), nn.Linear(config.ffn_dim, config.dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the two layers to x, B L C."""
        first, _, second = self
        return run_in_weight_dtype(second, gate_half(run_in_weight_dtype(first, x)))


class Flux2DoubleBlock(blocks.DoubleStreamBlock):
    """Block in which image and text have separate weights and share one attention."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__(config.dim, config.eps)
        self.img_attn, self.txt_attn = StreamAttention(config), StreamAttention(config)
        self.img_mlp, self.txt_mlp = GatedMlp(config), GatedMlp(config)
        self.img_rows, self.txt_rows = SharedModulationRows(IMAGE_ROWS), SharedModulationRows(TEXT_ROWS)

    def layers(self, is_text: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Return text or image layers: modulation, attention's output projection, feed-forward."""
        if is_text:
            return self.txt_rows, self.txt_attn.proj, self.txt_mlp
        return self.img_rows, self.img_attn.proj, self.img_mlp

    def heads(self, x: Tensor, is_text: bool) -> blocks.Heads:
        """Return text or image query, key and value, each B L N D; query and key normalized."""
        attention = self.txt_attn if is_text else self.img_attn
        norm = attention.norm
        return blocks.split_heads(
            x, attention.qkv, attention.num_heads, q_norm=norm.query_norm, k_norm=norm.key_norm
        )


class Flux2SingleBlock(nn.Module):
    """Block in which image and text share all weights; attention and feed-forward run in parallel."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.widths = (dim, dim, dim, 2 * config.ffn_dim)
        self.pre_norm = Float32LayerNorm(dim, config.eps)
        self.modulation = SharedModulationRows(SINGLE_ROWS)
        self.linear1 = nn.Linear(dim, sum(self.widths), bias=False)
        self.norm = PairNorm(config.dim // config.num_heads, config.eps)
        self.linear2 = nn.Linear(dim + config.ffn_dim, dim, bias=False)

    def forward(self, x: Tensor, tokens: blocks.HunyuanTokens) -> Tensor:
        """Apply the block to tokens x, B L+T C."""
        # x: B L+T C
        shift, scale, gate = self.modulation(tokens.vector)
        h = modulate(self.pre_norm(x), shift, scale, tokens.dtype, split=tokens.modulation_split)
        # in one split, so that its gradient is written once
        *qkv, hidden = run_in_weight_dtype(self.linear1, h).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in qkv)
        attended = blocks.rotate_and_attend(self.norm.query_norm(q), self.norm.key_norm(k), v, tokens)
        branch = run_in_weight_dtype(self.linear2, torch.cat([attended, gate_half(hidden)], dim=-1))
        return add_gated(x, gate, branch, tokens.modulation_split)


class PixelFinalLayer(nn.Module):
    """Final norm, modulated by an embedding, and projection to the channels of a latent pixel."""

    def __init__(self, dim: int, channels: int, eps: float) -> None:
        super().__init__()
        self.norm_final = Float32LayerNorm(dim, eps)
        self.linear = nn.Linear(dim, channels, bias=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim, bias=False))

    def forward(self, x: Tensor, embedding: Tensor, dtype: torch.dtype) -> Tensor:
        """Project tokens x, B L C, to latent pixels, B L Z.

        `embedding` is B 1 C; `dtype` is the dtype of activations between layers.
        """
        vector = functional.silu(embedding)
        shift, scale = run_in_weight_dtype(self.adaLN_modulation[1], vector).float().chunk(2, dim=-1)
        return run_in_weight_dtype(self.linear, modulate(self.norm_final(x), shift, scale, dtype))


def number_embedding(freq_dim: int, dim: int) -> TwoLayerMlp:
    """Return the layers that embed a number's sinusoids, B freq_dim to B dim float32."""
    return TwoLayerMlp("in_layer out_layer", (freq_dim, dim, dim), bias=False, in_float32=True)


class Flux2Model(BlockNetwork):
    """Predict the velocity of noisy latents of an image from states of a language model.

    Simplified, without references, a second text and the code around the blocks:

        image = img_in(pixels of noisy)                                   # B L C
        text = txt_in(text)                                                 # B T C
        embedding = time_in(timesteps) + guidance_in(guidance)              # B C
        rows, text_rows, single_rows = the three modulations of embedding   # shared by all blocks of a kind
        for block in double_blocks:
            branches = attention of modulated image and text to each other                      # B L+T C
            image, text = each + gate * proj(its branch), then + gate * mlp(modulated)
        x = cat([image, text])
        for block in single_blocks:                  # attention and feed-forward in parallel
            x = x + gate * linear2(attention and gated values of linear1(modulated x))
        velocity = final_layer(x[:, :L], embedding)  # B L Z, returned as B Z 1 H W
    """

    spec = DIT
    compute_dtype_parameter = "double_blocks.0.img_attn.norm.query_norm.scale"

    def __init__(self, config: Flux2Config, attention: AttentionChoice = SDPA) -> None:
        """Build the network without weights; double blocks share a modulation, as do single blocks."""
        super().__init__()
        self.config = config
        self.attention = attention
        dim = config.dim
        self.img_in = nn.Linear(config.channels, dim, bias=False)
        self.txt_in = nn.Linear(config.text_dim, dim, bias=False)
        self.time_in = number_embedding(config.freq_dim, dim)
        if config.has_guidance:
            self.guidance_in = number_embedding(config.freq_dim, dim)
        self.double_stream_modulation_img = SharedModulation(dim, 6)
        self.double_stream_modulation_txt = SharedModulation(dim, 6)
        self.single_stream_modulation = SharedModulation(dim, 3)
        self.double_blocks = nn.ModuleList(Flux2DoubleBlock(config) for _ in range(config.double_blocks))
        self.single_blocks = nn.ModuleList(Flux2SingleBlock(config) for _ in range(config.single_blocks))
        self.final_layer = PixelFinalLayer(dim, config.channels, config.eps)
        widths = (dim // config.num_heads // AXES,) * AXES
        self._rotary = GridTable(joined_tables(bind_rotary_table(rotary_table, widths, config.rope_theta)))

    def embed(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        guidance: Tensor | None = None,
        overrides: Overrides = NO_OVERRIDES,
        references: Sequence[Tensor] = (),
    ) -> Hidden:
        """Embed images and text as tokens, B L+T C; return them with the blocks' other inputs.

        References follow the image; a second text, for guidance, follows the prompt.

        Args:
            noisy: B Z 1 H W.
            timesteps: B, 0..1000.
            text: States of the language model, B T text_dim, including padding.
            guidance: B, not scaled; None leaves it out. Ignored by a model without guidance.
            overrides: Changes to this call. For normalized attention guidance (NAG), they contain a second
                `text`.
            references: Clean latents of reference images, each B Z 1 h w of its own size.

        Raises:
            ValueError: If sizes do not match.
        """
        images = (noisy, *references)
        dtype = activation_dtype(noisy.device, self.compute_dtype)
        image_tokens = [self._embed_image(latents).to(dtype) for latents in images]
        vector = self._embed_vector(timesteps, guidance if overrides.embedded_guidance else None)
        texts = []  # of the prompt and, if `overrides` have one, of the second text
        for prompt in overrides.text_inputs(len(noisy), text=text):
            text_tokens = run_in_weight_dtype(self.txt_in, prompt["text"]).to(dtype)
            texts.append(blocks.EmbeddedText(text_tokens, None, vector))
        grids = [*_locate_images(images), *_locate_texts(texts)]
        rotary = self._rotary.get_table(tuple(grids), noisy.device)
        num_image_tokens = sum(tokens.shape[1] for tokens in image_tokens)
        return blocks.join_tokens(
            image_tokens,
            texts,
            overrides.combine_attention,
            blocks.TokensWithRotatedText,
            grid=(1, *noisy.shape[-2:]),
            dtype=dtype,
            attention=self.attention,
            rotary=rotary,
            image_token_rotary=rotary[:num_image_tokens],
        )

    def _embed_image(self, latents: Tensor) -> Tensor:
        """Embed an image or a reference, B Z 1 H W, as tokens B L C. Raises ValueError for other shapes."""
        if latents.shape[1] != self.config.channels or latents.shape[2] != 1:
            raise ValueError(
                f"latents of {tuple(latents.shape[1:3])}: {self.config.channels} channels, 1 frame"
            )
        pixels = latents.flatten(2).transpose(1, 2)  # B L Z
        return run_in_weight_dtype(self.img_in, pixels)

    def _embed_vector(self, timesteps: Tensor, guidance: Tensor | None) -> Tensor:
        """Return the modulation that all blocks share and the time embedding, B 1 16 C float32."""
        # The rows are 6 for images and 6 for text in double blocks, 3 in single blocks, and the embedding.
        # `guidance` is B; None leaves it out.
        # angles in float32, as in training, although they are rounded for a large guidance
        embedding = self.time_in(sinusoid(timesteps, self.config.freq_dim, torch.float32))
        if self.config.has_guidance and guidance is not None:
            scaled = sinusoid(GUIDANCE_UNIT * guidance, self.config.freq_dim, torch.float32)
            embedding = embedding + self.guidance_in(scaled)
        rows = [
            self.double_stream_modulation_img(embedding),
            self.double_stream_modulation_txt(embedding),
            self.single_stream_modulation(embedding),
            embedding.unsqueeze(1),
        ]
        return torch.cat(rows, dim=1).unsqueeze(1)

    def unembed(self, x: Tensor, tokens: blocks.HunyuanTokens) -> Tensor:
        """Turn tokens B L+T C into the velocity, B Z 1 H W in float32."""
        _, rows, columns = tokens.grid
        embedding = tokens.vector[:, :1, EMBEDDING_ROW]
        pixels = self.final_layer(x[:, : rows * columns], embedding, tokens.dtype).float()
        return pixels.transpose(1, 2).unflatten(2, (1, rows, columns))


def _locate_images(images: Sequence[Tensor]) -> list[TokenGrid]:
    """Return positions of tokens by image: (IMAGE_POSITION_STEP * index of the image, row, column, 0)."""
    grids = []
    for index, latents in enumerate(images):
        rows, columns = latents.shape[-2:]
        grids.append(TokenGrid((1, rows, columns, 1), first_position=IMAGE_POSITION_STEP * index))
    return grids


def _locate_texts(texts: Sequence[blocks.EmbeddedText]) -> list[TokenGrid]:
    """Return positions of tokens by text: (0, 0, 0, index of the token)."""
    return [TokenGrid((1, 1, 1, text.tokens.shape[1])) for text in texts]
