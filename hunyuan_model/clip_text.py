"""The text tower of CLIP-L: prompts to one vector each, the state of the end token.

Module names follow Hugging Face's files. Source: Radford et al. 2021, arXiv 2103.00020.
"""
# Letters: B prompts, L tokens, N heads, D head width, C = N * D

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hunyuan_model.text_checkpoints import ClipTextConfig, read_clip_text
from modules.checkpoint import open_checkpoint
from modules.dialects import load_planned
from modules.errors import CheckpointError


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class ClipTextAttention(nn.Module):
    """Causal attention."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.dim, config.dim)
        self.k_proj = nn.Linear(config.dim, config.dim)
        self.v_proj = nn.Linear(config.dim, config.dim)
        self.out_proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )  # each B N L D
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class ClipFeedForward(nn.Module):
    """Two layers with the tower's activation between them."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1 = nn.Linear(config.dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class ClipTextLayer(nn.Module):
    """Attention and feed-forward, each on the normed stream and added to it."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.dim, config.eps)
        self.self_attn = ClipTextAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.dim, config.eps)
        self.mlp = ClipFeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class ClipTextEmbeddings(nn.Module):
    """Token and position."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.dim)
        self.position_embedding = nn.Embedding(config.positions, config.dim)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class ClipLayers(nn.Module):
    """All layers in a row; nested as in the files."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipTextLayer(config) for _ in range(config.num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ClipText(nn.Module):
    """The text tower without its projection."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.embeddings = ClipTextEmbeddings(config)
        self.encoder = ClipLayers(config)
        self.final_layer_norm = nn.LayerNorm(config.dim, config.eps)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.final_layer_norm.weight.device

    def forward(self, ids: Tensor, ends: Tensor) -> Tensor:
        """The pooled state B C. ids: B L. ends: B, where the first end token of each prompt stands.

        Attention is causal, so what fills a row up behind its end changes nothing.
        """
        states = self.encoder(self.embeddings(ids))
        return self.final_layer_norm(states[torch.arange(len(ids), device=ids.device), ends])


def load_clip_text(path: Path, device: torch.device, dtype: torch.dtype) -> ClipText:
    """Load the text tower; fp8 weights are multiplied out. Raises CheckpointError where the file is damaged or of another model."""
    with open_checkpoint(path) as checkpoint:
        plan = read_clip_text(checkpoint)
        if plan.config.activation not in ACTIVATIONS:
            raise CheckpointError(
                f"{path}: its config.json asks for the activation {plan.config.activation}; CLIP-L has quick_gelu.", path
            )
        return load_planned(plan, ClipText, device, dtype, "the CLIP text encoder (--text_encoder2)")
