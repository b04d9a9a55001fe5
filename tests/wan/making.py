"""Tiny Wan2.1 transformers, here and in diffusers, and what their forward takes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.golden_cases import make_input, make_weights, read_case
from tests.tiny.wan_dit import CONFIGS, diffusers_state, tiny_state
from wan.configs import WanConfig
from wan.model import WanModel


def golden_model(case: str, rope: str = "default") -> tuple[WanModel, dict[str, Any], dict[str, Tensor]]:
    """The model of a golden case, the inputs of its forward pass, and its stored tensors."""
    description, tensors = read_case(case)
    fields = {field.name for field in dataclasses.fields(WanConfig)}
    sizes = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in description["config"].items()
        if key in fields
    }
    config = WanConfig(
        **sizes, has_image=case != "wan_dit_t2v", image_positions=514 if case == "wan_dit_flf2v" else 0
    )
    model = WanModel(config, rope=rope)
    model.load_state_dict(make_weights(description["weights_model_key"], description["weights"]))
    inputs = {
        "noisy": torch.cat([tensors[name] for name in ("x", "y") if name in tensors], dim=1),
        "timesteps": tensors["t"],
        "text": [tensors["context_0"], tensors["context_1"]],
    }
    for name, rule in description["inputs_by_rule"].items():
        inputs["image_embeds"] = make_input(case, name, rule["shape"], rule["scale"]).reshape(2, -1, 1280)
    return model.eval().requires_grad_(False), inputs, tensors | {"tolerance": description["tolerance"]}


def tiny_model(kind: str, **options: str) -> WanModel:
    model = WanModel(CONFIGS[kind], **options)
    model.load_state_dict(tiny_state(kind))
    return model.requires_grad_(False)


def tiny_inputs(kind: str, batch: int = 2, frames: int = 3) -> dict[str, Any]:
    config, generator = CONFIGS[kind], torch.Generator().manual_seed(7)
    inputs: dict[str, Any] = {
        "noisy": torch.randn(batch, config.in_dim, frames, 4, 6, generator=generator),
        "timesteps": torch.linspace(900.0, 100.0, batch),
        "text": [
            torch.randn(5 + 40 * sample, config.text_dim, generator=generator) for sample in range(batch)
        ],
    }
    if config.has_image:
        tokens = config.image_positions or 257
        inputs["image_embeds"] = torch.randn(batch, tokens, config.image_dim, generator=generator)
    return inputs


def in_diffusers(config: WanConfig, state: Mapping[str, Tensor]) -> nn.Module:
    """The same network there. state: its weights under the published names."""
    from diffusers import WanTransformer3DModel  # checks on a GPU need no diffusers

    theirs: nn.Module = WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        in_channels=config.in_dim,
        out_channels=config.out_dim,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        image_dim=config.image_dim if config.has_image else None,
        added_kv_proj_dim=config.dim if config.has_image else None,
        pos_embed_seq_len=config.image_positions or None,
    )
    theirs.load_state_dict(diffusers_state(state))
    return theirs.eval()
