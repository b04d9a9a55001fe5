"""A tiny Krea 2, its inputs, and diffusers' network with the same weights."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor

from krea2.model import Krea2Model
from tests.qwen_image.making import pack
from tests.tiny.krea2 import CONFIG, in_diffusers_names, tiny_state


def in_diffusers(state: Mapping[str, Tensor]) -> Krea2Transformer2DModel:
    """diffusers' network with these weights, of the size of CONFIG."""
    dit = Krea2Transformer2DModel(
        in_channels=4 * CONFIG.channels,
        num_layers=CONFIG.num_layers,
        attention_head_dim=32,
        num_attention_heads=CONFIG.num_heads,
        num_key_value_heads=CONFIG.num_kv_heads,
        intermediate_size=CONFIG.ffn_dim,
        timestep_embed_dim=CONFIG.freq_dim,
        text_hidden_dim=CONFIG.text.dim,
        num_text_layers=CONFIG.states,
        text_num_attention_heads=CONFIG.text.num_heads,
        text_num_key_value_heads=CONFIG.text.num_kv_heads,
        text_intermediate_size=CONFIG.text.ffn_dim,
        axes_dims_rope=(8, 12, 12),
    )
    dit.load_state_dict(in_diffusers_names(state))
    return dit.eval()


def tiny_model(seed: int = 0) -> Krea2Model:
    """Our network with the weights of `tiny_state`."""
    model = Krea2Model(CONFIG)
    model.load_state_dict(tiny_state(seed))
    return model.eval()


def tiny_inputs(batch: int = 2, rows: int = 5, columns: int = 7, text: int = 9) -> dict[str, Tensor]:
    """Inputs of our network; each text is two tokens shorter than the one before it."""
    generator = torch.Generator().manual_seed(7)
    lengths = text - 2 * torch.arange(batch)
    return {
        "noisy": torch.randn(batch, CONFIG.channels, 1, 2 * rows, 2 * columns, generator=generator),
        "timesteps": torch.linspace(900.0, 130.0, batch),
        "text": torch.randn(batch, text, CONFIG.states, CONFIG.text_dim, generator=generator),
        "text_mask": torch.arange(text) < lengths[:, None],
    }


def predict_with(dit: Any, given: Mapping[str, Tensor]) -> Tensor:
    """The velocity B L 4Z that diffusers' network makes of the inputs of ours."""
    noisy, text = given["noisy"], given["text"]
    rows, columns = (side // 2 for side in noisy.shape[-2:])
    found = dit(
        hidden_states=pack(noisy),
        encoder_hidden_states=text,
        timestep=given["timesteps"] / 1000,
        position_ids=Krea2Pipeline.prepare_position_ids(text.shape[1], rows, columns, noisy.device),
        encoder_attention_mask=given["text_mask"],
        return_dict=False,
    )[0]
    assert isinstance(found, Tensor)
    return found
