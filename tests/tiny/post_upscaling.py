"""Tiny upscalers with the names of the published files, old, middle and new."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from postprocessing.upscaling.rrdb import CompactConfig, CompactNet, RrdbConfig, RRDBNet
from postprocessing.upscaling.swinir import SwinIR, SwinirConfig
from tests.tiny.dit_files import write_tensors

SWINIR = SwinirConfig(
    dim=12,
    heads=(3, 2),
    depths=(2, 1),
    window=4,
    hidden=20,
    convolutions=3,
    upsampler="nearest+conv",
    upsampling_factors=(2, 2),
    features=8,
    pixel_range=1.0,
)
RRDB = RrdbConfig(features=8, growth=6, blocks=2, doublings=2, unshuffle=1, has_shortcuts=False)

COMPACT = CompactConfig(features=8, depth=2, factor=4)


def swinir_weights(config: SwinirConfig = SWINIR) -> dict[str, Tensor]:
    return _random(SwinIR(config), 0.0)


def rrdb_weights(config: RrdbConfig = RRDB) -> dict[str, Tensor]:
    return _random(RRDBNet(config), 0.5)


def compact_weights(config: CompactConfig = COMPACT) -> dict[str, Tensor]:
    return _random(CompactNet(config), 0.0)


def _random(network: torch.nn.Module, brightness: float) -> dict[str, Tensor]:
    """Weights whose result looks like a picture: about 0..1, different everywhere.

    brightness: is added to the result.
    """
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in network.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() < 2:
            weights[name] = (1 if "norm" in name and name.endswith("weight") else 0) + 0.1 * drawn
        else:
            weights[name] = drawn / tensor[0].numel() ** 0.5
    weights |= {name: weights[name] + brightness for name in ("conv_last.bias",) if name in weights}
    return weights


def in_old_names(weights: dict[str, Tensor], config: RrdbConfig = RRDB) -> dict[str, Tensor]:
    """As ESRGAN's first files have them."""
    number = {"conv_first": "0", "conv_body": f"1.sub.{config.blocks}"}
    number |= {f"conv_up{up}": str(3 * up) for up in range(1, config.doublings + 1)}
    number |= {"conv_hr": str(3 * config.doublings + 2), "conv_last": str(3 * config.doublings + 4)}

    def old(name: str) -> str:
        name = re.sub(r"body\.(\d+)\.rdb(\d)\.conv(\d)\.", r"model.1.sub.\1.RDB\2.conv\3.0.", name)
        name = re.sub(r"body\.(\d+)\.rdb(\d)\.", r"model.1.sub.\1.RDB\2.", name)  # conv1x1
        start, _, leaf = name.partition(".")
        return f"model.{number[start]}.{leaf}" if start in number else name

    return {old(name): weight for name, weight in weights.items()}


def in_middle_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the later files of ESRGAN and those of BSRGAN have them."""
    changes = (
        (r"body\.(\d+)\.rdb", r"RRDB_trunk.\1.RDB"),
        (r"conv_body", "trunk_conv"),
        (r"conv_up", "upconv"),
        (r"conv_hr", "HRconv"),
    )
    renamed = {}
    for name, weight in weights.items():
        for pattern, new in changes:
            name = re.sub(rf"^{pattern}", new, name)
        renamed[name] = weight
    return renamed


write = write_tensors


def write_swinir(path: Path, **changes: Any) -> Path:
    return write(path, swinir_weights(replace(SWINIR, **changes)))


def write_rrdb(path: Path, **changes: Any) -> Path:
    return write(path, rrdb_weights(replace(RRDB, **changes)))


def write_compact(path: Path, **changes: Any) -> Path:
    return write(path, compact_weights(replace(COMPACT, **changes)))
