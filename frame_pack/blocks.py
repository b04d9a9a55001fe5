"""HunyuanVideo's blocks as in FramePack's files: separate query, key and value, with diffusers' names.

Computation and dtypes are those of `hunyuan_model.blocks` and `hunyuan_model.token_refiner`, whose parts are
used here. Source: the released model code; Zhang and Agrawala 2025, arXiv 2504.12626.
"""
# Letters: B batch, L latent tokens, T tokens of image and text, N heads, D head width, C = N * D

import torch.nn.functional as functional
from torch import Tensor, nn

from hunyuan_model.blocks import DoubleStreamBlock, Heads, HunyuanModulation, HunyuanTokens, rotate_and_attend
from hunyuan_model.joining import gelu, join_gelu
from modules.attention.attend import SampleLengths, attend
from modules.layers.modulation import add_gated, modulate
from modules.layers.norms import Float32LayerNorm, NamedFeedForward, RMSNorm, run_in_weight_dtype
from modules.speed_options import AttentionChoice


class SingleAttention(nn.Module):
    """Self-attention among all tokens with shared weights; the block projects the result."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_q = RMSNorm(dim // num_heads, eps)
        self.norm_k = RMSNorm(dim // num_heads, eps)
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)

    def forward(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        """Return the joint self-attention of all tokens x, B L+T C."""
        # x: B L+T C
        q = self.norm_q(heads(self.to_q, x, self.num_heads))
        k = self.norm_k(heads(self.to_k, x, self.num_heads))
        return rotate_and_attend(q, k, heads(self.to_v, x, self.num_heads), tokens)


class FramePackAttention(SingleAttention):
    """Joint attention in which latent tokens and the other tokens have separate weights."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__(dim, num_heads, eps)
        self.norm_added_q = RMSNorm(dim // num_heads, eps)
        self.norm_added_k = RMSNorm(dim // num_heads, eps)
        # in the order of the released code, which determines the order of a LoRA's tensors
        self.add_k_proj = nn.Linear(dim, dim)
        self.add_v_proj = nn.Linear(dim, dim)
        self.add_q_proj = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.to_add_out = nn.Linear(dim, dim)

    def heads(self, x: Tensor, is_text: bool) -> Heads:
        """Return queries, keys and values of a stream x, B L C, each B L N D; the first two normalized."""
        if is_text:
            layers, norms = (
                (self.add_q_proj, self.add_k_proj, self.add_v_proj),
                (self.norm_added_q, self.norm_added_k),
            )
        else:
            layers = (self.to_q, self.to_k, self.to_v)
            norms = (self.norm_q, self.norm_k)
        q, k, v = (heads(layer, x, self.num_heads) for layer in layers)
        return norms[0](q), norms[1](k), v


class RefinerAttention(nn.Module):
    """Self-attention among text tokens, without positions."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, lengths: SampleLengths | None, attention: AttentionChoice) -> Tensor:
        """Apply self-attention to text tokens x, B T C."""
        # x: B T C
        q, k, v = (heads(layer, x, self.num_heads) for layer in (self.to_q, self.to_k, self.to_v))
        return run_in_weight_dtype(self.to_out[0], attend(q, k, v, attention, lengths=lengths).flatten(2))


class HunyuanVideoTransformerBlock(DoubleStreamBlock):
    """Block whose video tokens and image-and-text tokens have separate weights but one joint attention."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__(dim, eps)
        self.norm1 = HunyuanModulation(dim, 6)
        self.norm1_context = HunyuanModulation(dim, 6)
        self.attn = FramePackAttention(dim, num_heads, eps)
        self.ff = NamedFeedForward(dim, ffn_dim, gelu)
        self.ff_context = NamedFeedForward(dim, ffn_dim, gelu)

    def layers(self, is_text: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Return text or video layers: modulation, attention's output projection, feed-forward."""
        if is_text:
            return self.norm1_context, self.attn.to_add_out, self.ff_context
        return self.norm1, self.attn.to_out[0], self.ff

    def heads(self, x: Tensor, is_text: bool) -> Heads:
        """Return a stream's query, key and value heads, each from its own matrix."""
        return self.attn.heads(x, is_text)


class HunyuanVideoSingleTransformerBlock(nn.Module):
    """Block in which all tokens share all weights; attention and feed-forward run in parallel."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.layer_norm = Float32LayerNorm(dim, eps)
        self.norm = HunyuanModulation(dim, 3)
        self.attn = SingleAttention(dim, num_heads, eps)
        self.proj_mlp = nn.Linear(dim, ffn_dim)
        self.proj_out = nn.Linear(dim + ffn_dim, dim)

    def forward(self, x: Tensor, tokens: HunyuanTokens) -> Tensor:
        """Apply the block to tokens x, B L+T C."""
        # x: B L+T C
        shift, scale, gate = self.norm(tokens.vector)
        h = modulate(self.layer_norm(x), shift, scale, tokens.dtype, split=tokens.modulation_split)
        joined = join_gelu(self.attn(h, tokens), run_in_weight_dtype(self.proj_mlp, h))
        return add_gated(x, gate, run_in_weight_dtype(self.proj_out, joined), tokens.modulation_split)


class FramePackRefinerBlock(nn.Module):
    """Self-attention and feed-forward among text tokens.

    The timestep and the mean of the text only gate the two branches.
    """

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.norm1 = Float32LayerNorm(dim, eps, affine=True)
        self.attn = RefinerAttention(dim, num_heads)
        self.norm2 = Float32LayerNorm(dim, eps, affine=True)
        self.ff = NamedFeedForward(dim, ffn_dim, functional.silu)
        self.norm_out = HunyuanModulation(dim, 2)

    def forward(
        self, x: Tensor, vector: Tensor, lengths: SampleLengths | None, attention: AttentionChoice
    ) -> Tensor:
        """Apply the block to text tokens x, B T C. `vector` is B C float32."""
        # x: B T C    vector: B C float32
        gate1, gate2 = self.norm_out(functional.silu(vector.unsqueeze(1)))
        x = add_gated(x, gate1, self.attn(self.norm1(x).to(x.dtype), lengths, attention))
        return add_gated(x, gate2, self.ff(self.norm2(x).to(x.dtype)))


def heads(layer: nn.Linear, x: Tensor, num_heads: int) -> Tensor:
    """Apply a linear layer to x, B L C, and split the result into heads, B L N D."""
    return run_in_weight_dtype(layer, x).unflatten(-1, (num_heads, -1))
