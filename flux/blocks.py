"""Blocks in which image and text tokens attend to each other: double (separate weights), single (shared).

HunyuanVideo's blocks follow these; `hunyuan_model/blocks.py` lists the steps in float32, and the order of
tokens: image tokens first, then text, which is not rotated. The released code has the text first; attention
does not depend on the order. Chroma's blocks do not compute their modulation, they take rows of it. Source:
the released code of FLUX.1 and Chroma. Module names follow the published checkpoints.
"""
# Letters: B batch, L image tokens, T text tokens, S 1 or 2 texts, N heads, D head width, C = N * D,
# M modulations

import torch
from torch import Tensor, nn

from flux.configs import FluxConfig
from hunyuan_model.blocks import (
    DoubleStreamBlock,
    Heads,
    HunyuanModulation,
    HunyuanTokens,
    rotate_and_attend,
    split_heads,
)
from hunyuan_model.joining import gelu, join_gelu
from modules.devices import send_ahead
from modules.layers.modulation import add_gated, modulate
from modules.layers.norms import Float32LayerNorm, ScaleNorm, TwoLayerMlp, run_in_weight_dtype


class ModulationRows(nn.Module):
    """Select one block's shifts, scales and gates from the output of Chroma's approximator."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        # a tensor: with a number for each block, each block would be compiled separately. Not on the meta
        # device, on which networks are built
        self.row_indices = torch.arange(first, first + count, device="cpu")

    def move_indices_to(self, device: torch.device) -> None:
        """Copy the row indices to `device`, without synchronizing, unless they are already there."""
        if self.row_indices.device != device:
            self.row_indices = send_ahead(self.row_indices, device)

    def forward(self, vector: Tensor) -> tuple[Tensor, ...]:
        """Select this block's modulation rows, each B S C, from the rows of all blocks, B S M C float32."""
        # vector: B S M C float32 -> count tensors B S C
        return vector.index_select(2, self.row_indices).unbind(2)


def make_modulation(config: FluxConfig, kind: str, block: int = 0) -> HunyuanModulation | ModulationRows:
    """Return a block's modulation module: its own layer, or rows of Chroma's approximator output.

    `kind` is single, image or text (both in double blocks), or final; the approximator's rows follow this
    order, block by block. Source: the released code of Chroma.
    """
    count = {"single": 3, "image": 6, "text": 6, "final": 2}[kind]
    if config.approximator is None:
        return HunyuanModulation(config.dim, count, "lin")
    image = 3 * config.single_blocks
    text = image + 6 * config.double_blocks
    final = text + 6 * config.double_blocks
    first = {"single": 0, "image": image, "text": text, "final": final}[kind]
    return ModulationRows(first + count * block, count)


class QueryKeyNorm(nn.Module):
    """Norms of queries and keys, applied to each head separately."""

    def __init__(self, head_width: int, eps: float) -> None:
        super().__init__()
        self.query_norm = ScaleNorm(head_width, eps)
        self.key_norm = ScaleNorm(head_width, eps)


class JointAttention(nn.Module):
    """Layers before and after the joint attention, for the image or the text tokens."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = QueryKeyNorm(dim // num_heads, eps)
        self.proj = nn.Linear(dim, dim)


class DoubleBlock(DoubleStreamBlock):
    """Block in which image and text have separate weights and share one attention."""

    def __init__(self, config: FluxConfig, index: int) -> None:
        dim = config.dim
        super().__init__(dim, config.eps)
        self.img_mod = make_modulation(config, "image", index)
        self.img_attn = JointAttention(dim, config.num_heads, config.eps)
        sizes = (config.dim, config.ffn_dim, config.dim)
        self.img_mlp = TwoLayerMlp("0 2", sizes, gelu)
        self.txt_mod = make_modulation(config, "text", index)
        self.txt_attn = JointAttention(dim, config.num_heads, config.eps)
        self.txt_mlp = TwoLayerMlp("0 2", sizes, gelu)

    def layers(self, is_text: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Return text or image layers: modulation, attention's output projection, feed-forward."""
        if is_text:
            return self.txt_mod, self.txt_attn.proj, self.txt_mlp
        return self.img_mod, self.img_attn.proj, self.img_mlp

    def heads(self, x: Tensor, is_text: bool) -> Heads:
        """Return text or image query, key and value, each B L N D; query and key normalized."""
        attention = self.txt_attn if is_text else self.img_attn
        norm = attention.norm
        return split_heads(
            x, attention.qkv, attention.num_heads, q_norm=norm.query_norm, k_norm=norm.key_norm
        )


class SingleBlock(nn.Module):
    """Block in which image and text share all weights; attention and feed-forward run in parallel."""

    def __init__(self, config: FluxConfig, index: int) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.widths = (dim, dim, dim, config.ffn_dim)
        self.pre_norm = Float32LayerNorm(dim, config.eps)
        self.modulation = make_modulation(config, "single", index)
        self.linear1 = nn.Linear(dim, 3 * dim + config.ffn_dim)
        self.norm = QueryKeyNorm(dim // config.num_heads, config.eps)
        self.linear2 = nn.Linear(dim + config.ffn_dim, dim)

    def forward(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        """Apply the block to tokens x, B L+T C."""
        # x: B L+T C
        shift, scale, gate = self.modulation(tokens.vector)
        h = modulate(self.pre_norm(x), shift, scale, tokens.dtype, split=tokens.modulation_split)
        # in one split, so that its gradient is written once
        *qkv, hidden = run_in_weight_dtype(self.linear1, h).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in qkv)
        attended = rotate_and_attend(self.norm.query_norm(q), self.norm.key_norm(k), v, tokens)
        return add_gated(
            x, gate, run_in_weight_dtype(self.linear2, join_gelu(attended, hidden)), tokens.modulation_split
        )
