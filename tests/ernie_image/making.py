"""A tiny ERNIE-Image, its inputs, and diffusers' network with the same weights."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ErnieImageTransformer2DModel
from torch import Tensor, nn
from transformers import Ministral3Config, Ministral3Model

from ernie_image.configs import ErnieImageConfig
from ernie_image.model import ErnieImageModel
from tests.tiny.dit_files import frozen
from tests.tiny.ernie_image import CONFIG, tiny_state
from tests.tiny.language_models import MINISTRAL3_CONFIG, ministral3

LENGTHS = (17, 5)  # real tokens of each text


def tiny_model(seed: int = 0) -> ErnieImageModel:
    """Our network with the weights of `tiny_state`."""
    return frozen(ErnieImageModel(CONFIG), tiny_state(seed))


def in_diffusers(
    state: Mapping[str, Tensor], config: ErnieImageConfig = CONFIG
) -> ErnieImageTransformer2DModel:
    """diffusers' network with these weights."""
    dit = ErnieImageTransformer2DModel(
        hidden_size=config.dim,
        num_attention_heads=config.num_heads,
        num_layers=config.num_layers,
        ffn_hidden_size=config.ffn_dim,
        in_channels=config.channels,
        out_channels=config.channels,
        text_in_dim=config.text_dim,
        rope_axes_dim=config.rotary_widths,
    )
    dit.load_state_dict(dict(state))
    return dit.eval()


def tiny_inputs(batch: int = 2, rows: int = 3, columns: int = 5) -> dict[str, Tensor]:
    """Inputs of our network, with texts of unequal lengths."""
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor(LENGTHS[:batch])
    longest = int(lengths.max())
    return {
        "noisy": torch.randn(batch, CONFIG.channels, 1, rows, columns, generator=generator),
        "timesteps": torch.tensor([964.3, 121.7])[:batch],
        "text": torch.randn(batch, longest, CONFIG.text_dim, generator=generator),
        "text_mask": torch.arange(longest) < lengths[:, None],
    }


def text_encoder_there() -> nn.Module:
    """transformers' own class of Ministral 3, which diffusers' pipeline runs, with the tiny weights."""
    rope = {**MINISTRAL3_CONFIG["rope_parameters"], "llama_4_scaling_beta": 0.1}  # type: ignore[dict-item]
    there = Ministral3Model(Ministral3Config(**{**MINISTRAL3_CONFIG, "rope_parameters": rope}))  # type: ignore[arg-type]
    return frozen(there, ministral3().model.state_dict())


def predict_with(dit: Any, given: Mapping[str, Tensor]) -> Tensor:
    """What diffusers' network makes of the inputs of ours, B Z 1 H W."""
    lengths = given["text_mask"].sum(dim=1)
    (velocity,) = dit(
        given["noisy"].squeeze(2), given["timesteps"], given["text"], lengths, return_dict=False
    )
    return velocity.unsqueeze(2)
