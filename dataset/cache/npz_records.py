"""The record of what we wrote into an npz file: one more array of bytes, which hold JSON.

It has the metadata that a file of ours would have, and the name, dtype and shape of each tensor, so that
what is read is bit for bit what was written. If an array was replaced by another program since, its checksum
differs, and the record does not count.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.cache.files import Entry, Header, tensor_key
from dataset.cache.npz_files import Array
from dataset.cache.records import latent_record, text_records, verify_tensors
from modules.devices import dtype_name
from modules.errors import CacheError
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
    tensors: Mapping[str, Tensor], sources: Mapping[str, str], metadata: Mapping[str, str]
) -> Array:
    """Return the record of tensors as an array. sources: array -> name of its tensor."""
    described = {
        array: [name, dtype_name(tensors[name].dtype), list(tensors[name].shape)]
        for array, name in sources.items()
    }
    content = {"version": VERSION, "metadata": dict(metadata), "tensors": described}
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return np.frombuffer(text.encode(), np.uint8)


def open_record(path: Path, record: Array, arrays: Mapping[str, Array], reshape: Reshape) -> Entry | None:
    """Return the entry that we wrote; None if another program has replaced some of it, or the record."""
    try:
        content = parse_json(record.astype(np.uint8).tobytes().decode())
        if content["version"] != VERSION:
            return None
        metadata = {str(key): str(value) for key, value in content["metadata"].items()}
        named = {}
        for array, (name, dtype, shape) in content["tensors"].items():
            tensor = reshape(tensor_key(name), torch.from_numpy(arrays[array]), tuple(map(int, shape)))
            named[str(name)] = tensor.to(_DTYPES[dtype])
        shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
        entry = Entry(Header(path, metadata, tuple(named), shapes), named)
        _verify(entry)
    except (CacheError, KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        return None
    return entry


def _verify(entry: Entry) -> None:
    """Raise CacheError unless all tensors are what the records of an entry say."""
    if entry.header.grids:
        record = latent_record(entry.header)
        if record is not None:
            verify_tensors(entry, record.crc32)
        return
    for text in text_records(entry.header).values():
        verify_tensors(entry, text.crc32)
