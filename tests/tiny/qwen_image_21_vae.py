"""A tiny random VAE of Qwen-Image-2.1: the released structure at other widths."""

import json
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from qwen_image_21.vae import DEVIATION, MEAN, QwenImage21Vae, QwenImage21VaeConfig, VaeLevel
from tests.tiny.hunyuan_encoders import save
from tests.tiny.wan_encoders import random_tensors

MULTIPLES = (1, 2, 4, 8, 8)  # of the width, by level, as released
FRAMES = (1, 2, 2, 2)  # that a level's shortcut folds; the last level does not resample


def vae_config(width: int = 4, decoder_width: int = 6, latent_channels: int = 64) -> QwenImage21VaeConfig:
    """The released structure with one block a level, at other widths."""
    numbers = range(latent_channels)
    return QwenImage21VaeConfig(
        latent_channels=latent_channels,
        encoder=_levels([width * factor for factor in (1, *MULTIPLES)], FRAMES, blocks=1),
        decoder=_levels(
            [decoder_width * factor for factor in (MULTIPLES[-1], *MULTIPLES[::-1])], FRAMES[::-1], blocks=2
        ),
        mean=tuple(MEAN[number] for number in numbers),
        deviation=tuple(DEVIATION[number] for number in numbers),
    )


def _levels(widths: list[int], frames: tuple[int, ...], blocks: int) -> tuple[VaeLevel, ...]:
    factors = [*((count, 2, 2) for count in frames), (1, 1, 1)]
    return tuple(
        VaeLevel(width_in, width_out, blocks, factors=level_factors)
        for (width_in, width_out), level_factors in zip(pairwise(widths), factors, strict=True)
    )


def vae_state(config: QwenImage21VaeConfig | None = None, seed: int = 21) -> dict[str, Tensor]:
    """Its tensors with the released names, also those of the layers over time, which pictures never use."""
    config = config or vae_config()
    with torch.device("meta"):
        network = QwenImage21Vae(config)
    state = random_tensors(network, seed)
    state["decoder.conv_out.bias"][3] += 1  # most pixels are nearly opaque: on white others would be pale
    halves = (
        ("encoder.down_blocks", "downsampler", 1, config.encoder),
        ("decoder.up_blocks", "upsampler", 2, config.decoder),
    )
    for start, resampler, factor, levels in halves:
        for index, level in enumerate(levels):
            if level.factors[0] == 2:
                name = f"{start}.{index}.{resampler}.time_conv"
                state[f"{name}.weight"] = torch.zeros(factor * level.width_out, level.width_out, 1, 1)
                state[f"{name}.bias"] = torch.zeros(factor * level.width_out)
    return state


def vae_settings(config: QwenImage21VaeConfig) -> dict[str, object]:
    """The config.json of diffusers' folder."""
    return {
        "_class_name": "AutoencoderKLQwenImage21",
        "base_dim": config.encoder[0].width_in,
        "decoder_base_dim": config.decoder[-1].width_out,
        "z_dim": config.latent_channels,
        "dim_mult": list(MULTIPLES),
        "num_res_blocks": config.encoder[0].blocks,
        "latents_mean": list(config.mean),
        "latents_std": list(config.deviation),
    }


def write_vae(path: Path, config: QwenImage21VaeConfig | None = None, seed: int = 21) -> Path:
    """A single file, as ComfyUI has it; without statistics."""
    return save(path, vae_state(config, seed))


def write_vae_folder(folder: Path, config: QwenImage21VaeConfig | None = None, seed: int = 21) -> Path:
    """The folder `vae` of diffusers."""
    config = config or vae_config()
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / "diffusion_pytorch_model.safetensors", vae_state(config, seed))
    (folder / "config.json").write_text(json.dumps(vae_settings(config)), encoding="utf-8")
    return folder
