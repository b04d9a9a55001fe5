"""Tiny networks of MOSS-Image with inputs, whose velocities are recorded in `tests/golden/moss_image.json`.

The recorded numbers were computed by another implementation, written from the facts about the released model:
sample by sample, without padding, in float64 and rounded to float32.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moss_image.configs import MossImageConfig
from moss_image.model import MossImageModel
from tests.tiny.dit_files import draw_state, frozen

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "moss_image.json").read_text(encoding="utf-8"))
CONFIG = MossImageConfig(
    dim=64, ffn_dim=96, num_heads=4, num_layers=3, refiner_blocks=2, channels=8, text_dim=40, freq_dim=32
)
TIMES = (643.0, 121.0)  # the first is not a number of 16 bits
LENGTHS = (7, 4)  # real tokens of each text


def tiny_weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    state = draw_state(lambda: MossImageModel(CONFIG), 3, dtype)
    # values of the caps matter only if they are reached
    return {name: 6 * tensor if "ffn_up" in name else tensor for name, tensor in state.items()}


def tiny_model(dtype: torch.dtype = torch.float32) -> MossImageModel:
    return frozen(MossImageModel(CONFIG), tiny_weights(dtype)).to(dtype)


def tiny_inputs() -> dict[str, Any]:
    """Inputs of two samples, whose texts have different lengths."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return {
        "noisy": torch.randn(2, CONFIG.channels, 1, 3, 5, generator=generator),
        "timesteps": torch.tensor(TIMES),
        "text": torch.randn(2, max(LENGTHS), CONFIG.text_dim, generator=generator),
        "text_mask": mask,
    }


def draw_references() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    sizes = ((2, 4), (3, 3))
    return [torch.randn(2, CONFIG.channels, 1, *size, generator=generator) for size in sizes]
