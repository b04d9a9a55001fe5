"""Transformer layers of CLIP-like towers, for texts (CLIP) and for images (SigLIP).

Module names follow Hugging Face's files. Source: Radford et al. 2021, arXiv 2103.00020.
"""
# Letters: B batch, L tokens, N heads, D head width, C = N * D

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.errors import CheckpointError


def quick_gelu(x: Tensor) -> Tensor:
    """Apply OpenAI's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class LayerConfig(Protocol):
    """The part of a tower's configuration that its layers need."""

    @property
    def dim(self) -> int: ...
    @property
    def ffn_dim(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def activation(self) -> str: ...
    @property
    def eps(self) -> float: ...


def check_activation(config: LayerConfig, path: Path, usual: str) -> None:
    """Raise CheckpointError if config.json asks for an unknown activation.

    usual: the value expected in config.json, for the message.
    """
    if config.activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{path}: its config.json asks for the activation {config.activation}; {usual}.", path
        )


class ClipAttention(nn.Module):
    """Attention among all tokens; if `is_causal`, of each token to itself and earlier ones."""

    def __init__(self, config: LayerConfig, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.dim, config.dim)
        self.k_proj = nn.Linear(config.dim, config.dim)
        self.v_proj = nn.Linear(config.dim, config.dim)
        self.out_proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )  # each B N L D
        return self.out_proj(
            F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal).transpose(1, 2).flatten(2)
        )


class ClipFeedForward(nn.Module):
    """Two linear layers with the tower's activation between them."""

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class ClipLayer(nn.Module):
    """Attention and feed-forward, each applied to the normed stream and added to it.

    It needs no `tokens`, which `run_blocks` gives to each block.
    """

    def __init__(self, config: LayerConfig, is_causal: bool) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.dim, config.eps)
        self.self_attn = ClipAttention(config, is_causal)
        self.layer_norm2 = nn.LayerNorm(config.dim, config.eps)
        self.mlp = ClipFeedForward(config)

    def forward(self, x: Tensor, tokens: None = None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipLayers(nn.Module):
    """A stack of layers; nested as in the files."""

    def __init__(self, config: LayerConfig, is_causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipLayer(config, is_causal) for _ in range(config.num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
