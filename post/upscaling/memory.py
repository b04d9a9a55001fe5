"""What enlarging a picture takes, found without a device."""

from functools import lru_cache

import torch

from modules.planning.dry_run import ACCELERATOR, dry_run, largest, place
from post.tiling import round_up
from post.upscaling.files import META, Config, UpscalerKind

SIZES = (32, 64)  # of the pictures that are tried
OUTSIDE = 3 + 3 * 2  # numbers of float32 for a pixel of a result: it, and its copies while it is resized


@lru_cache(maxsize=16)
def bytes_per_pixel(kind: UpscalerKind, config: Config, dtype: torch.dtype) -> float:
    """Return the bytes that enlarging takes for each pixel of the input, without the weights.

    All blocks of a network need the same, so one of each form is run.
    """
    sizes = tuple(round_up(size, config.step) for size in SIZES)
    low, high = (_peak(kind, config.short, dtype, size) for size in sizes)
    return (high - low) / (sizes[1] ** 2 - sizes[0] ** 2)


def result_bytes(config: Config, width: int, height: int) -> int:
    """Return the bytes of a whole result on the device, in float32, with what is made of it there."""
    return 4 * OUTSIDE * width * height * config.factor**2


def _peak(kind: UpscalerKind, config: Config, dtype: torch.dtype, size: int) -> int:
    with META:
        network = kind.build(config).to(dtype)
    with dry_run() as ledger, torch.no_grad():
        place(network, ledger)
        images = torch.empty(1, 3, size, size, dtype=dtype, device=ACCELERATOR)
        network(images.contiguous(memory_format=torch.channels_last))
    return sum(largest(ledger.peaks)[1].values())
