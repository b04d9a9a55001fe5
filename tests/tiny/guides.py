"""Tiny networks that steer pictures: a whole CLIP as Hugging Face has it, VGG16 as torchvision has it."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tests.tiny.stable_diffusion import vocabulary

SIZE, WIDTH = 28, 32
# torchvision's VGG16: convolutions of each level, with a pooling behind it
VGG_LEVELS = ((4, 4), (6, 6), (8, 8, 8), (10, 10, 10), (10, 10, 10))


def write_clip(folder: Path) -> Any:
    """A folder with model.safetensors and config.json; returns transformers' model of it."""
    torch.manual_seed(8)
    sizes = {"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": "gelu"}
    text = {"vocab_size": vocabulary(), "hidden_size": 48, "eos_token_id": vocabulary() - 1}
    vision = {"hidden_size": 64, "image_size": SIZE, "patch_size": 14}
    model = CLIPModel(
        CLIPConfig(text_config={**sizes, **text}, vision_config={**sizes, **vision}, projection_dim=WIDTH)
    ).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def vgg_state() -> dict[str, Tensor]:
    """All convolutions, with the numbers of torchvision's layers, and a part of the classifier."""
    generator, state, number, channels = torch.Generator().manual_seed(9), {}, 0, 3
    for level in VGG_LEVELS:
        for width in level:
            size = (width, channels, 3, 3)
            weight = torch.randn(size, generator=generator) * (2 / (9 * channels)) ** 0.5
            state[f"features.{number}.weight"] = weight
            state[f"features.{number}.bias"] = torch.randn(width, generator=generator) * 0.1
            number, channels = number + 2, width
        number += 1
    return {**state, "classifier.6.bias": torch.zeros(1000)}


def write_vgg16(path: Path) -> Path:
    """A torch file, as torchvision publishes it, or one of safetensors, as timm does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (save_file if path.suffix == ".safetensors" else torch.save)(vgg_state(), path)
    return path
