"""What enlarging a picture takes, found without a device."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from modules.planning.dry_run import ACCELERATOR, dry_run, largest, place
from post.upscaling.files import META, Kind
from post.upscaling.rrdb import RrdbConfig
from post.upscaling.swinir import SwinirConfig

STEPS = (8, 16)  # sizes of the pictures that are tried, in steps of the network
OUTSIDE = 3 + 3 * 2  # numbers of float32 for a pixel of a result: it, and its copies while it is resized


@lru_cache(maxsize=16)
def bytes_per_pixel(kind: Kind, config: SwinirConfig | RrdbConfig, dtype: torch.dtype) -> float:
    """Return the bytes that enlarging takes for each pixel of the input, without the weights.

    All blocks of a network need the same, so one of each form is run.
    """
    short: Any
    if isinstance(config, SwinirConfig):
        short = replace(config, heads=config.heads[:1], depths=(1,))
    else:
        short = replace(config, blocks=1)
    low, high = (_peak(kind, short, dtype, steps * config.step) for steps in STEPS)
    return (high - low) / ((STEPS[1] ** 2 - STEPS[0] ** 2) * config.step**2)


def result_bytes(config: SwinirConfig | RrdbConfig, width: int, height: int) -> int:
    """Return the bytes of a whole result on the device, in float32, with what is made of it there."""
    return 4 * OUTSIDE * width * height * config.factor**2


def _peak(kind: Kind, config: Any, dtype: torch.dtype, size: int) -> int:
    with META:
        network = kind.build(config).to(dtype)
    with dry_run() as ledger, torch.no_grad():
        place(network, ledger)
        images = torch.empty(1, 3, size, size, dtype=dtype, device=ACCELERATOR)
        network(images.contiguous(memory_format=torch.channels_last))
    return sum(largest(ledger.peaks)[1].values())
