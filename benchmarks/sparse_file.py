"""A model file of any size that takes no room on disk: a safetensors header, then a hole, which reads as zeros."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from modules.checkpoint_files import SAFETENSORS_DTYPES


def write_sparse(path: Path, network: nn.Module, dtype: torch.dtype) -> Path:
    """A file with the tensors of a network (on the meta device will do) in that dtype, all zero. Returns the path."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    header, size = _header(shapes, dtype)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    return path


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> tuple[bytes, int]:
    """The header, padded to whole 8 bytes, and the size of the data behind it."""
    name_of_dtype = next(name for name, known in SAFETENSORS_DTYPES.items() if known == dtype)
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": name_of_dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode("utf-8")
    return text + b" " * (-len(text) % 8), end


@torch.no_grad()
def fill_with_noise(network: nn.Module, seed: int = 0) -> None:
    """Replace all parameters, wherever they lie, by small random numbers: products of zeros run faster than real ones.

    fp8 weights get numbers over much of their range; their scales are set so that the products stay small.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for parameter in network.parameters():
        values = parameter.data
        generator = generators.setdefault(values.device, torch.Generator(values.device).manual_seed(seed))
        if values.dtype.itemsize > 1:
            values.normal_(0, 0.02, generator=generator)
            continue
        for part in values.view(-1).split(1 << 26):
            part.copy_(torch.randn(part.shape, generator=generator, device=part.device).mul_(100))
    for name, buffer in network.named_buffers():
        if name.endswith("scale_weight"):
            buffer.fill_(0.02 / 100)
