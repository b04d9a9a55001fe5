"""Clips, options and plain computations for tests of the upscaler."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from modules.media.encoding import OutputFrame
from postprocessing.contract import Clip
from postprocessing.options import ToolNetworkOptions, UpscalerOptions
from postprocessing.tiling import pad_to_multiple
from postprocessing.upscaling.files import load_upscaler
from tests.tiny.post_upscaling import write_compact, write_rrdb, write_swinir

CPU = torch.device("cpu")
WIDTH, HEIGHT, FRAMES = 37, 26, 12
ALL_WRITERS = {"swinir": write_swinir, "esrgan": write_rrdb, "compact": write_compact}


def options(model: Path, **changes: Any) -> UpscalerOptions:
    own = {name: changes.pop(name) for name in ("dtype", "compile") if name in changes}
    network = ToolNetworkOptions.from_defaults(model=model, **own)
    return UpscalerOptions.from_defaults(**{"network": network, "scale": 4.0, "tile_overlap": 8, **changes})


def clip(**changes: Any) -> Clip:
    return replace(Clip(Path("a.mkv"), WIDTH, HEIGHT, Fraction(24), FRAMES, False), **changes)


def pictures(dtype: Any = np.uint8) -> list[OutputFrame]:
    """Of smooth and of noisy parts."""
    generator = np.random.default_rng(0)
    maximum = np.iinfo(dtype).max
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    made = []
    for index in range(FRAMES):
        wave = np.sin((rows + columns * (index + 1)) / 9)[..., None] * np.ones(3) / 2 + 0.5
        wave[: HEIGHT // 2] = generator.random((HEIGHT // 2, WIDTH, 3))
        made.append(OutputFrame((wave * maximum).astype(dtype), Fraction(index, 24), Fraction(1, 24)))
    return made


def run(stage: Any, given: list[OutputFrame], of: Clip) -> list[OutputFrame]:
    return list(stage.run(iter(given), of))


def full_clip(model: Path, given: list[OutputFrame], scale: float, maximum: int) -> Tensor:
    """All pictures of a clip at once, in a few plain lines: F H W 3."""
    upscaler = load_upscaler(model, CPU, torch.float32)
    images = torch.stack([torch.from_numpy(each.pixels.astype(np.float32) / maximum) for each in given])
    images = images.permute(0, 3, 1, 2)
    padded = pad_to_multiple(images, upscaler.config.step, upscaler.kind.repeats_edge)
    with torch.no_grad():
        made = torch.cat([upscaler.network(each[None]) for each in padded])
    made = made[..., : HEIGHT * upscaler.config.factor, : WIDTH * upscaler.config.factor]
    if scale != upscaler.config.factor:
        size = (int(HEIGHT * scale), int(WIDTH * scale))
        made = interpolate(made.clamp(0, 1), size, mode="bicubic", antialias=True)
    return (made.clamp(0, 1) * maximum).round().permute(0, 2, 3, 1)
