"""Tensors of every dtype, and files that hold them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.uint8,
    torch.bool,
)


def tensors() -> dict[str, Tensor]:
    numbers = torch.arange(12.0).reshape(3, 4)
    found = {
        f"block.{index}.{str(dtype).removeprefix('torch.')}": numbers.to(dtype)
        for index, dtype in enumerate(DTYPES)
    }
    return found | {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}


def write(path: Path, content: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(content, path, **options)
    else:
        torch.save(content, path, **options)
    return path
