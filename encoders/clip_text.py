"""The text tower of CLIP-L: turn each prompt into one vector, the state of its end token.

Module names follow Hugging Face's files. Source: Radford et al. 2021, arXiv 2103.00020.
"""
# Letters: B prompts, L tokens, C width

from pathlib import Path

import torch
from torch import Tensor, nn

from encoders.clip_checkpoints import ClipTextConfig, ClipUse, read_clip_text
from encoders.clip_layers import ClipLayers, check_activation
from modules.checkpoints.dialects import load_planned
from modules.checkpoints.opening import open_checkpoint
from modules.contract.family import DitSpec
from modules.contract.generation import NO_TWEAKS
from modules.run_blocks import Hidden, run_blocks


class ClipTextEmbeddings(nn.Module):
    """Sum of token and position embeddings."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.dim)
        self.position_embedding = nn.Embedding(config.positions, config.dim)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class ClipText(nn.Module):
    """The text tower without its projection."""

    spec = DitSpec(block_lists=("encoder.layers",))

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.embeddings = ClipTextEmbeddings(config)
        self.encoder = ClipLayers(config, is_causal=True)
        self.final_layer_norm = nn.LayerNorm(config.dim, config.eps)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.final_layer_norm.weight.device

    def forward(self, ids: Tensor, ends: Tensor) -> Tensor:
        """Return the pooled state B C. ids: B L. ends: B, position of the first end token of each prompt.

        Attention is causal, so padding after the end token changes nothing.
        """
        hidden = Hidden(self.embeddings(ids), None)
        run_blocks(self, hidden, NO_TWEAKS)
        return self.final_layer_norm(hidden.x[torch.arange(len(ids), device=ids.device), ends])


def load_clip_text(path: Path, device: torch.device, dtype: torch.dtype, use: ClipUse) -> ClipText:
    """Load the text tower; fp8 weights are dequantized. use: names it in messages.

    Raises CheckpointError if the file is damaged or holds another model.
    """
    with open_checkpoint(path) as checkpoint:
        plan = read_clip_text(checkpoint, use)
        check_activation(plan.config, path, "CLIP-L has quick_gelu")
        return load_planned(plan, ClipText, device, dtype, f"the CLIP text encoder ({use.option})")
