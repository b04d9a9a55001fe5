"""Tiny Lumina-Image-2.0 transformers, here and in diffusers, and what their forward takes."""

from typing import Any

import torch
from diffusers import Lumina2Transformer2DModel
from torch import Tensor

from lumina.model import LuminaModel
from tests.tiny.dit_files import frozen
from tests.tiny.lumina import CONFIG, diffusers_state, tiny_state

TEXT_ROWS = 12


def tiny_model() -> LuminaModel:
    return frozen(LuminaModel(CONFIG), tiny_state())


def tiny_inputs(lengths: tuple[int, ...] = (5, 11)) -> dict[str, Any]:
    """lengths: real tokens of each sample's caption; what stands in the padding is large, so that a look at
    it shows.
    """
    generator, batch = torch.Generator().manual_seed(7), len(lengths)
    mask = (torch.arange(TEXT_ROWS) < torch.tensor(lengths)[:, None]).long()
    text = torch.randn(batch, TEXT_ROWS, CONFIG.text_dim, generator=generator)
    return {
        "noisy": torch.randn(batch, CONFIG.in_dim, 4, 6, generator=generator),
        "times": torch.linspace(0.1, 0.9, batch),
        "caption": torch.where(mask[:, :, None] == 1, text, 30 * text),
        "caption_mask": mask,
    }


def in_diffusers(state: dict[str, Tensor], layers: int = CONFIG.num_layers) -> Lumina2Transformer2DModel:
    """The same network there; its time embedding is as wide as the model, and its feed-forward 4 times."""
    theirs = Lumina2Transformer2DModel(
        hidden_size=CONFIG.dim,
        num_layers=layers,
        num_refiner_layers=CONFIG.noise_refiner_layers,
        num_attention_heads=CONFIG.num_heads,
        num_kv_heads=CONFIG.num_kv_heads,
        multiple_of=CONFIG.ffn_dim,
        cap_feat_dim=CONFIG.text_dim,
        axes_dim_rope=(CONFIG.head_width // 3,) * 3,
    )
    return frozen(theirs, diffusers_state(state))
