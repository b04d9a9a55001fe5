"""The record of our arrays in an npz file: one more array of bytes, which hold JSON.

It has the metadata that a file of ours would have, and the name, dtype and shape of each tensor, so that
reading returns the written tensors bit for bit. The checksum of each array is that of the archive. If another
program has replaced an array since, it differs, and the record does not count.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.cache.files import Entry, Header, tensor_key
from dataset.cache.npz_files import Array, Outline
from modules.devices import dtype_name
from modules.text_files import parse_json

OURS = "reelsmith"  # array with the record
VERSION = 1
# what a tensor may be restored to
_DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (
        *(torch.bfloat16, torch.float16, torch.float32, torch.float64),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
    )
}

# key, tensor of an array, shape that it had -> the tensor in that shape
Reshape = Callable[[str, Tensor, tuple[int, ...]], Tensor]


def describe_tensors(
    tensors: Mapping[str, Tensor],
    sources: Mapping[str, str],
    metadata: Mapping[str, str],
    members: Mapping[str, bytes],
) -> Array:
    """Return the record of tensors as an array. sources: array -> name of its tensor. members: the bytes of
    the arrays.
    """
    described = {
        array: [name, dtype_name(tensors[name].dtype), list(tensors[name].shape), zlib.crc32(members[array])]
        for array, name in sources.items()
    }
    content = {"version": VERSION, "metadata": dict(metadata), "tensors": described}
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return np.frombuffer(text.encode(), np.uint8)


def open_record(
    path: Path,
    record: Array,
    arrays: Mapping[str, Tensor],
    outlines: Mapping[str, Outline],
    reshape: Reshape,
) -> Entry | None:
    """Return the entry that we wrote; None if another program has replaced some of it, or the record.

    arrays: may be on the meta device, and then the entry's tensors are.
    """
    try:
        content = parse_json(record.astype(np.uint8).tobytes().decode())
        if content["version"] != VERSION:
            return None
        metadata = {str(key): str(value) for key, value in content["metadata"].items()}
        named = {}
        for array, (name, dtype, shape, crc32) in content["tensors"].items():
            if outlines[array].crc32 != crc32:
                return None
            tensor = reshape(tensor_key(name), arrays[array], tuple(map(int, shape)))
            named[str(name)] = tensor.to(_DTYPES[dtype])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    return Entry(Header(path, metadata, tuple(named), shapes), named)
