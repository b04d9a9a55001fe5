"""A tiny TAEHV with the names of the published files."""

from dataclasses import replace
from pathlib import Path

import torch

from blissful_tuner.taehv import TaehvConfig, TinyDecoder
from tests.tiny.dit_files import write_tensors

CONFIG = TaehvConfig(channels=16, widths=(16, 12, 8, 8), strides=(1, 2, 2))
CONFIG_5B = replace(CONFIG, channels=48, patch=2)  # for the latents of TI2V-5B


def write_taehv(path: Path, config: TaehvConfig = CONFIG) -> Path:
    """Random weights, .pth or .safetensors; with an encoder, as in the published files."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = {name: tensor.half() for name, tensor in TinyDecoder(config).state_dict().items()}
    weights["encoder.0.weight"] = torch.zeros(8, 3, 3, 3, dtype=torch.float16)
    return write_tensors(path, weights)
