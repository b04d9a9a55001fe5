"""npz files: arrays of numbers read without trusting the file, and written completely or not at all.

An npz file is a zip archive with one `.npy` member for each array. Nothing is ever unpickled.

The files that this program writes have one more array of bytes, the record. It is JSON with the metadata that
a safetensors cache would have, and the name, dtype and shape of each tensor, so that reading returns the
written tensors bit for bit. The record also has the archive's checksum of each array: if another program
replaces an array, the checksum differs, and the record is ignored.
"""

import contextlib
import io
import json
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from dataset.cache_files import Entry, tensor_key
from modules.atomic_write import atomic_path
from modules.devices import dtype_name
from modules.errors import CacheError
from modules.limits import MAX_ARRAY_BYTES, MAX_ARRAYS
from modules.text_files import parse_json

Array = NDArray[Any]

_MEMBER = ".npy"
_FIRST_TIME = (1980, 1, 1, 0, 0, 0)  # time of all members, so that equal contents give equal bytes
# errors that a damaged file may raise
_ERRORS = (
    zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error,
    OSError, ValueError, KeyError, RuntimeError, NotImplementedError, EOFError, MemoryError,
    SyntaxError, tokenize.TokenError, TypeError, OverflowError, RecursionError,  # of numpy's own parser
)  # fmt: skip

OURS = "reelsmith"  # name of the array with the record
RECORD_VERSION = 1
# dtypes that a tensor may be restored to, by name
_DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (
        torch.bfloat16, torch.float16, torch.float32, torch.float64,
        torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool,
    )
}  # fmt: skip

# (key of a tensor, its array, recorded shape) -> the tensor in that shape
Reshape = Callable[[str, Tensor, tuple[int, ...]], Tensor]


class NpzArray(NamedTuple):
    """An array of an npz file, and the checksum of its member in the zip archive."""

    tensor: Tensor
    crc32: int  # checksum of the archive's member, which was verified by reading it


def read_arrays(path: Path, is_wanted: Callable[[str], bool]) -> dict[str, NpzArray]:
    """Return the arrays of an npz file whose names `is_wanted` accepts.

    Raises:
        CacheError: If the file is missing or damaged, or if an array contains anything other than numbers.
    """
    arrays = {}
    with _open(path) as file:
        for name in filter(is_wanted, _list_names(file)):
            with file.open(name + _MEMBER) as member:
                array = npy.read_array(member, allow_pickle=False)
                # zipfile compares the checksum only at the end of a member: read beyond the array
                if member.read(1):
                    raise ValueError(f"{name} is longer than its header says")
            if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
                raise ValueError(f"{name} is of {array.dtype}, which are not numbers")
            # in the byte order of this machine, which torch needs; `ascontiguousarray` makes a scalar
            # one-dimensional, which `reshape` undoes
            native = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)
            arrays[name] = NpzArray(torch.from_numpy(native), file.getinfo(name + _MEMBER).CRC)
    return arrays


def list_arrays(path: Path) -> list[str]:
    """Return the names of the arrays in an npz file.

    Raises:
        CacheError: If the file is missing or damaged.
    """
    with _open(path) as file:
        return _list_names(file)


def read_members(path: Path) -> dict[str, bytes]:
    """Return the raw bytes of all members of an npz file, by array name.

    Raises:
        CacheError: If the file is missing or damaged.
    """
    members = {}
    with _open(path) as file:
        for name in _list_names(file):
            with file.open(name + _MEMBER) as member:
                members[name] = member.read()
    return members


def write_members(path: Path, members: Mapping[str, bytes]) -> None:
    """Write an npz file, replacing an existing one.

    Equal contents give equal bytes. Raises OutputError if the file cannot be written.
    """
    size_bytes = sum(map(len, members.values()))
    with atomic_path(path, size_bytes) as temporary, zipfile.ZipFile(temporary, "w") as file:
        for name in sorted(members):
            file.writestr(zipfile.ZipInfo(name + _MEMBER, _FIRST_TIME), members[name])


def format_array(array: Array) -> bytes:
    """Return an array as the bytes of a .npy file."""
    stream = io.BytesIO()
    npy.write_array(stream, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
    return stream.getvalue()


def _list_names(file: zipfile.ZipFile) -> list[str]:
    """Return the array names in an npz file. Raises ValueError if they are too many or too large."""
    infos = [info for info in file.infolist() if info.filename.endswith(_MEMBER)]
    if len(infos) > MAX_ARRAYS:
        raise ValueError(f"it has {len(infos)} arrays")
    # zipfile reads no more than these stated sizes, even if a member unpacks to more
    size_bytes = sum(info.file_size for info in infos)
    if size_bytes > MAX_ARRAY_BYTES:
        raise ValueError(f"its arrays have {size_bytes:,} bytes")
    return [info.filename.removesuffix(_MEMBER) for info in infos]


@contextlib.contextmanager
def _open(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an npz cache file."""
    if not path.is_file():
        raise CacheError(f"{path}: no such cache file")
    try:
        with zipfile.ZipFile(path) as file:
            yield file
    except _ERRORS as error:
        raise CacheError(f"{path}: damaged, cannot be read as npz ({error})") from error


def as_array(tensor: Tensor, keep_half: bool) -> Array:
    """Convert a tensor to an array that other trainers can read: bfloat16 and float16 become float32.

    With `keep_half`, float16 stays float16.
    """
    is_kept = tensor.dtype == torch.float64 or (keep_half and tensor.dtype == torch.float16)
    if tensor.is_floating_point() and not is_kept:
        tensor = tensor.float()
    array: Array = tensor.detach().cpu().contiguous().numpy()
    return array


def describe_tensors(
    tensors: Mapping[str, Tensor],
    sources: Mapping[str, str],
    metadata: Mapping[str, str],
    members: Mapping[str, bytes],
) -> Array:
    """Return a JSON description of the cached tensors as a byte array, to be stored in the npz file.

    Args:
        tensors: Tensors by name.
        sources: Array name to the name of the tensor that it contains.
        metadata: Metadata of the cache entry.
        members: Array name to the bytes of its archive member, for the checksum.
    """
    described = {}
    for array, name in sources.items():
        tensor = tensors[name]
        crc32 = zlib.crc32(members[array])
        described[array] = [name, dtype_name(tensor.dtype), list(tensor.shape), crc32]
    content = {"version": RECORD_VERSION, "metadata": dict(metadata), "tensors": described}
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return np.frombuffer(text.encode(), np.uint8)


def open_record(path: Path, arrays: Mapping[str, NpzArray], reshape: Reshape) -> Entry | None:
    """Return the cache entry that this program's record in an npz file describes.

    Returns None if there is no record, because another trainer wrote the file, or if an array has been
    replaced.

    Args:
        path: Path of the file.
        arrays: Arrays of the file, by name.
        reshape: Restores the recorded shape of a tensor.
    """
    record = arrays.get(OURS)  # the array that this program adds
    if record is None:
        return None
    try:
        content = parse_json(record.tensor.to(torch.uint8).numpy().tobytes().decode())
        if content["version"] != RECORD_VERSION:
            return None
        metadata = {str(key): str(value) for key, value in content["metadata"].items()}
        tensors_by_name = {}
        for array, (name, dtype, shape, crc32) in content["tensors"].items():
            if arrays[array].crc32 != crc32:
                return None
            tensor = reshape(tensor_key(name), arrays[array].tensor, tuple(map(int, shape)))
            tensors_by_name[str(name)] = tensor.to(_DTYPES[dtype])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        return None
    return Entry.of(path, metadata, tensors_by_name)
