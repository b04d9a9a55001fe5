"""A tiny Kandinsky 5, its inputs, and diffusers' network with the same weights."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as functional
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Transformer3DModel
from torch import Tensor

from kandinsky.configs import KandinskyConfig
from kandinsky.model import KandinskyModel
from tests.tiny.dit_files import frozen
from tests.tiny.kandinsky import CONFIG, IMAGE_CONFIG, tiny_state

LENGTHS = (17, 5)  # real tokens of each text
SCALE = 2.0


class ExactAttention:
    """The attention of diffusers' processor, without its rounding of queries and keys to bfloat16."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: Any = None,
    ) -> Tensor:
        attended = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(-1, (attn.num_heads, -1))
            for layer, x in (
                (attn.to_query, hidden_states),
                (attn.to_key, attended),
                (attn.to_value, attended),
            )
        )
        query, key = attn.query_norm(query), attn.key_norm(key)
        if rotary_emb is not None:
            query, key = (
                (rotary_emb * x.unflatten(-1, (-1, 1, 2))).sum(dim=-1).flatten(-2) for x in (query, key)
            )
        heads = (x.transpose(1, 2) for x in (query, key, value))
        return attn.out_layer(functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def tiny_model(seed: int = 0, config: KandinskyConfig = CONFIG) -> KandinskyModel:
    """Our network with the weights of `tiny_state`."""
    kind = "video" if config.has_condition else "image"
    return frozen(KandinskyModel(config), tiny_state(kind, seed))


def in_diffusers(
    state: Mapping[str, Tensor], config: KandinskyConfig = CONFIG
) -> Kandinsky5Transformer3DModel:
    """diffusers' network with these weights."""
    dit = Kandinsky5Transformer3DModel(
        in_visual_dim=config.out_channels,
        in_text_dim=config.text_dim,
        in_text_dim2=config.pooled_dim,
        time_dim=config.time_dim,
        out_visual_dim=config.out_channels,
        model_dim=config.dim,
        ff_dim=config.ffn_dim,
        num_text_blocks=config.text_layers,
        num_visual_blocks=config.num_layers,
        axes_dims=config.rotary_widths,
        visual_cond=config.has_condition,
    )
    dit.load_state_dict(dict(state))
    for module in dit.modules():
        if hasattr(module, "set_processor") and hasattr(module, "to_query"):
            module.set_processor(ExactAttention())
    return dit.eval()


def network_of(tensors: Mapping[str, Tensor]) -> Kandinsky5Transformer3DModel:
    """diffusers' network with the weights of a tiny file, whose input shows what it makes."""
    has_condition = tensors["visual_embeddings.in_layer.weight"].shape[1] == 4 * CONFIG.in_channels
    config = CONFIG if has_condition else IMAGE_CONFIG
    layers, text_layers = (
        len({name.split(".")[1] for name in tensors if name.startswith(f"{kind}_transformer_blocks.")})
        for kind in ("visual", "text")
    )
    return in_diffusers(tensors, replace(config, num_layers=layers, text_layers=text_layers))


def tiny_inputs(batch: int = 2, frames: int = 3, rows: int = 4, columns: int = 6) -> dict[str, Tensor]:
    """Inputs of our network, with texts of unequal lengths."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor(LENGTHS[:batch])
    longest = int(lengths.max())
    return {
        "noisy": torch.randn(batch, CONFIG.out_channels, frames, rows, columns, generator=generator),
        "timesteps": torch.tensor([964.3, 121.7])[:batch],
        "text": torch.randn(batch, longest, CONFIG.text_dim, generator=generator),
        "text_mask": torch.arange(longest) < lengths[:, None],
        "pooled": torch.randn(batch, CONFIG.pooled_dim, generator=generator),
    }


def predict_with(
    dit: Kandinsky5Transformer3DModel,
    inputs: Mapping[str, Tensor],
    scale: float = SCALE,
    num_clean_frames: int = 0,
) -> Tensor:
    """What diffusers' network makes of the inputs of ours, B Z F H W; a text at a time, without padding."""
    velocities = []
    for index, noisy in enumerate(inputs["noisy"]):
        count = int(inputs["text_mask"][index].sum())
        x = noisy.permute(1, 2, 3, 0)[None]
        if dit.visual_cond:
            mask = torch.zeros_like(x[..., :1])
            mask[:, :num_clean_frames] = 1
            x = torch.cat([x, torch.zeros_like(x), mask], dim=-1)
        frames, rows, columns = x.shape[1:4]
        velocity = dit(
            hidden_states=x,
            encoder_hidden_states=inputs["text"][index, None, :count],
            timestep=inputs["timesteps"][index, None],
            pooled_projections=inputs["pooled"][index, None],
            visual_rope_pos=[torch.arange(frames), torch.arange(rows // 2), torch.arange(columns // 2)],
            text_rope_pos=torch.arange(count),
            scale_factor=(1.0, scale, scale),
            return_dict=False,
        )
        velocities.append(velocity.permute(0, 4, 1, 2, 3))
    return torch.cat(velocities)
