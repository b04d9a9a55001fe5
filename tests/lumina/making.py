"""Tiny Lumina-Image-2.0 transformers, here and in diffusers, and what their forward takes."""

from typing import Any

import torch
from diffusers import Lumina2Transformer2DModel
from torch import Tensor

from lumina.configs import LuminaConfig
from lumina.model import LuminaModel
from tests.golden_cases import make_weights, read_case
from tests.tiny.lumina import CONFIG, diffusers_state, tiny_state

TEXT_ROWS = 12


def golden_model() -> LuminaModel:
    """The model of the golden cases."""
    description, _ = read_case("lumina_dit")
    sizes = description["config"]
    config = LuminaConfig(
        dim=sizes["dim"],
        ffn_dim=sizes["ffn_dim"],
        num_heads=sizes["n_heads"],
        num_kv_heads=sizes["n_kv_heads"],
        num_layers=sizes["n_layers"],
        noise_refiner_layers=sizes["n_refiner_layers"],
        context_refiner_layers=sizes["n_refiner_layers"],
        in_dim=sizes["in_channels"],
        text_dim=sizes["cap_feat_dim"],
        time_dim=sizes["time_dim"],
    )
    model = LuminaModel(config)
    weights = make_weights(description["weights_model_key"], description["weights"])
    del weights["norm_final.weight"]  # in the files, but not used
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def tiny_model() -> LuminaModel:
    model = LuminaModel(CONFIG)
    model.load_state_dict(tiny_state())
    return model.eval().requires_grad_(False)


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
    theirs.load_state_dict(diffusers_state(state))
    return theirs.eval().requires_grad_(False)
