"""From files to the frames that a latent cache is made of, written out after the documented rules.

Nothing of ours is imported.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import av
import numpy
from torch import Tensor

from tests.parity.reference import covering, to_pixels

Frames = list[numpy.ndarray]  # H W 3 uint8 each
STEP = 16


def decoded(path: Path) -> Frames:
    """All frames of a video."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def dropped_to(frames: Sequence[numpy.ndarray], source_fps: float, target_fps: float = 16.0) -> Frames:
    """The frames that stay: a running sum, kept wherever its whole part changes (formats.md, section 2)."""
    kept, position, last = [], 0.0, -1
    for frame in frames:
        slot = int(position)
        position += target_fps / source_fps
        if slot != last:
            kept.append(frame)
            last = slot
    return kept


def bucket_for(width: int, height: int, resolution: tuple[int, int]) -> tuple[int, int]:
    """Width and height of the bucket, with enable_bucket."""
    area = resolution[0] * resolution[1]
    side = int(math.sqrt(area))
    sizes = set()
    for short in range(side // 2 // STEP * STEP, side + STEP, STEP):
        if short:
            long = area // short // STEP * STEP
            sizes |= {(short, long), (long, short)}
    return min(sorted(sizes), key=lambda size: abs(size[0] / size[1] - width / height))


def in_bucket(frames: Sequence[numpy.ndarray], bucket: tuple[int, int]) -> Tensor:
    """1 3 F H W in -1..1."""
    return to_pixels([covering(frame, bucket[1], bucket[0]) for frame in frames])


def training_key(name: str) -> str:
    """The name under which the known tuners' training finds a tensor of a cache (formats.md, section 3)."""
    name = name.removeprefix("varlen_")
    if name.endswith("_mask"):
        return name
    name = name[: name.rindex("_")]
    return name[: name.rindex("_")] if name.startswith("latents_") else name
