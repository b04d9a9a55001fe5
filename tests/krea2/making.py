"""A tiny Krea 2, its inputs, and diffusers' network with the same weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from torch import Tensor

from krea2.model import Krea2Model
from tests.qwen_image.making import pack
from tests.tiny.krea2 import CONFIG, in_diffusers_names, tiny_state


def in_diffusers(state: Mapping[str, Tensor], num_layers: int = CONFIG.num_layers) -> Krea2Transformer2DModel:
    """diffusers' network with these weights, of the size of CONFIG but for the number of its blocks."""
    dit = Krea2Transformer2DModel(
        in_channels=4 * CONFIG.channels,
        num_layers=num_layers,
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


def predict_edit(
    dit: Any, noisy: Tensor, time: Tensor, text: Tensor, references: Sequence[Tensor], isolated: bool = False
) -> Tensor:
    """The velocity B L 4Z of diffusers' modules: text, picture, references; these at time 0 and in frames
    of their own. time: B, 0..1.
    """
    images = [noisy, *references]
    tokens = [dit.img_in(pack(one)) for one in images]
    places = [torch.zeros(text.shape[1], 3)]
    for frame, one in enumerate(images):
        rows, columns = torch.arange(one.shape[-2] // 2), torch.arange(one.shape[-1] // 2)
        places.append(torch.cartesian_prod(torch.tensor([frame]), rows, columns).float())
    x = torch.cat([dit.txt_in(dit.text_fusion(text)), *tokens], dim=1)
    clean = sum(one.shape[1] for one in tokens[1:])
    now = dit.time_embed(time, dtype=torch.float32)
    embedded = [now.expand(-1, x.shape[1] - clean, -1)]
    embedded.append(dit.time_embed(torch.zeros_like(time), dtype=torch.float32).expand(-1, clean, -1))
    rows = dit.time_mod_proj(torch.nn.functional.gelu(torch.cat(embedded, dim=1), approximate="tanh"))
    mask = None
    if isolated:
        is_clean = torch.arange(x.shape[1]) >= x.shape[1] - clean
        mask = (~is_clean[:, None] | is_clean)[None, None]
    rotary = dit.rotary_emb(torch.cat(places))
    for block in dit.transformer_blocks:
        x = block(x, rows, rotary, mask)
    found: Tensor = dit.final_layer(x[:, text.shape[1] : x.shape[1] - clean], now)
    return found
