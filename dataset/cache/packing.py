"""The bytes of a cache file in memory, as stores with many entries in a file read them."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, deserialize
from torch import Tensor

from dataset.cache.files import Entry, Header
from modules.checkpoints.containers import MAX_HEADER_BYTES, SAFETENSORS_DTYPES
from modules.errors import CacheError

FIRST_BYTES = 16 * 1024  # holds the header of nearly every entry


def unpack(path: Path, data: bytes) -> Entry:
    """Return the tensors of a cache file's bytes, in the order in which `read_entry` gives them.

    path: for messages. Raises CacheError if they are no safetensors.
    """
    try:
        found = {name: _tensor(content) for name, content in deserialize(data)}
        (length,) = struct.unpack_from("<Q", data)
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _damage_error(path, error) from error
    named = {name: found[name] for name in sorted(found)}
    return Entry(Header(path, metadata, tuple(named)), named)


def unpack_header(path: Path, size: int, read: Callable[[int, int], bytes]) -> Header:
    """Return the metadata and tensor names of a cache file of `size` bytes; its tensors are not read.

    read: returns bytes by offset and count. Raises CacheError if they are no safetensors.
    """
    try:
        start = read(0, min(size, FIRST_BYTES))
        (length,) = struct.unpack_from("<Q", start)
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"its header claims {length} bytes of {size}")
        if length + 8 > len(start):
            start = read(0, length + 8)
        content = json.loads(start[8 : 8 + length])
        metadata = {str(key): str(value) for key, value in (content.pop("__metadata__", None) or {}).items()}
        shapes = {name: tuple(map(int, content[name]["shape"])) for name in sorted(content)}
    except (struct.error, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damage_error(path, error) from error
    return Header(path, metadata, tuple(shapes), shapes)


def _tensor(content: Mapping[str, Any]) -> Tensor:
    dtype = SAFETENSORS_DTYPES[content["dtype"]]
    data, shape = content["data"], content["shape"]
    flat = torch.frombuffer(data, dtype=dtype) if len(data) else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


def _damage_error(path: Path, error: Exception) -> CacheError:
    return CacheError(f"{path}: damaged, cannot be read as safetensors ({error})")
