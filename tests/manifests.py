"""The tensor lists of published checkpoints in tests/data/checkpoints, and files that have such a list but no
data.
"""

import itertools
import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from checkpoints.dialects import LoadPlan, load_planned
from checkpoints.opening import Checkpoint, open_checkpoint

FOLDER = Path(__file__).parent / "data" / "checkpoints"
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "U8": 1}
TensorList = dict[str, tuple[str, tuple[int, ...]]]


def manifest_names(start: str) -> list[str]:
    """Manifests whose name begins so."""
    return sorted(path.stem for path in FOLDER.glob(f"{start}*.json"))


def tensor_list(manifest: str) -> TensorList:
    """Name -> (safetensors dtype, shape); `{a..b}` in a name stands for the numbers from a to b."""
    found: TensorList = {}
    for pattern, (dtype, shape) in json.loads((FOLDER / f"{manifest}.json").read_text(encoding="utf-8"))[
        "tensors"
    ].items():
        texts = re.split(r"\{\d+\.\.\d+\}", pattern)
        ranges = [range(int(low), int(high) + 1) for low, high in re.findall(r"\{(\d+)\.\.(\d+)\}", pattern)]
        for numbers in itertools.product(*ranges):
            name = texts[0] + "".join(
                f"{number}{text}" for number, text in zip(numbers, texts[1:], strict=True)
            )
            found[name] = dtype, tuple(shape)
    return found


def write_hollow(path: Path, tensors: TensorList, prefix: str = "") -> Path:
    """A safetensors file of full size whose data are a hole: it takes no space on disk and is fit for the
    meta device.
    """
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * WIDTHS[dtype]
        header[prefix + name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode("utf-8")
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return path


def fit(path: Path, read: Callable[[Checkpoint], LoadPlan[Any]], build: Callable[[Any], Any]) -> Any:
    """The network of such a file, on the meta device; loading raises for every leftover."""
    with open_checkpoint(path) as checkpoint:
        return load_planned(
            read(checkpoint), build, torch.device("meta"), lambda _, stored: stored, "the option"
        )
