"""npz files: arrays of numbers read without trusting the file, and written completely or not at all.

An npz file is a zip archive with one `.npy` member for each array. Nothing is ever unpickled. Ours have one
more array of bytes, the record, which holds JSON: the metadata that a file of ours would have, and the name,
dtype and shape of each tensor, so that reading returns the written tensors bit for bit. The checksum of each
array is that of the archive. If another program has replaced an array, it differs: the record does not count.
"""

import contextlib
import io
import json
import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from dataset.cache.files import Entry, Header, tensor_key
from dataset.sources.masks import shrink_mask
from modules.atomic_write import atomic_path
from modules.devices import dtype_name
from modules.errors import CacheError
from modules.text_files import parse_json

Array = NDArray[Any]

MOST_BYTES = 1 << 30  # of one array; latents of 8192 x 8192 pixels take 64 MiB
MOST_ARRAYS = 10_000
MOST_HEADER = 1 << 14  # bytes; numpy reads no longer ones
_MEMBER = ".npy"
_FIRST_TIME = (1980, 1, 1, 0, 0, 0)  # of all members, so that equal contents give equal bytes
_MOST_SIDES = 32  # of a shape; numpy has no more everywhere
_ERRORS = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error),
    *(OSError, ValueError, KeyError, RuntimeError, NotImplementedError, EOFError, MemoryError),
)

OURS = "reelsmith"  # array with the record
RECORD_VERSION = 1
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


def list_arrays(path: Path) -> frozenset[str]:
    """Return the names of the arrays of a file. Raises CacheError if it is missing or damaged."""
    with _open(path) as file:
        return frozenset(_names(file))


def read_arrays(path: Path, names: Collection[str], most_bytes: int = MOST_BYTES) -> dict[str, Array]:
    """Return those of the named arrays that a file has, native in byte order and writable.

    most_bytes: that an array may have.
    Raises CacheError if it is missing or damaged, or if an array holds something else than numbers.
    """
    with _open(path) as file:
        return {
            name: parse_array(_read_member(file, name, most_bytes)) for name in _names(file) if name in names
        }


@dataclass(frozen=True)
class Outline:
    """Facts about an array without reading its values."""

    shape: tuple[int, ...]
    dtype: "np.dtype[Any]"
    crc32: int  # of the whole member; reading it compares them


def read_outlines(path: Path, names: Collection[str]) -> dict[str, Outline]:
    """Return the outlines of those named arrays that a file has. Raises as `read_arrays`."""
    found = {}
    with _open(path) as file:
        for name in set(_names(file)) & set(names):
            member = file.getinfo(name + _MEMBER)
            with file.open(member) as stream:
                header = io.BytesIO(stream.read(MOST_HEADER))
            shape, _, dtype = _read_array_header(header)
            _check_size(shape, dtype, member.file_size - header.tell())
            found[name] = Outline(shape, dtype.newbyteorder("="), member.CRC)
    return found


def read_members(path: Path) -> dict[str, bytes]:
    """Return the bytes of all members by the names of their arrays. Raises CacheError as `read_arrays`."""
    with _open(path) as file:
        return {name: _read_member(file, name) for name in _names(file)}


def write_members(path: Path, members: Mapping[str, bytes]) -> None:
    """Write a file, in place of an existing one. Equal contents give equal bytes. Raises OutputError."""
    size_bytes = sum(map(len, members.values()))
    with atomic_path(path, size_bytes) as temporary, zipfile.ZipFile(temporary, "w") as file:
        for name in sorted(members):
            file.writestr(zipfile.ZipInfo(name + _MEMBER, _FIRST_TIME), members[name])


def format_array(array: Array) -> bytes:
    """Return the bytes of an array as a member of a file."""
    stream = io.BytesIO()
    npy.write_array(stream, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
    return stream.getvalue()


def parse_array(data: bytes) -> Array:
    """Return the array of a member. Raises ValueError if it is damaged, or holds no numbers."""
    stream = io.BytesIO(data)
    shape, is_fortran, dtype = _read_array_header(stream)
    values = memoryview(data)[stream.tell() :]
    _check_size(shape, dtype, len(values))
    array: Array = np.frombuffer(values, dtype).reshape(shape, order="F" if is_fortran else "C")
    return np.array(array, dtype.newbyteorder("="), order="C")


def _read_array_header(stream: io.BytesIO) -> tuple[tuple[int, ...], bool, "np.dtype[Any]"]:
    """Return shape, whether columns come first, and dtype of an array. Raises ValueError as `parse_array`."""
    version = npy.read_magic(stream)
    if version not in {(1, 0), (2, 0)}:
        raise ValueError(f"an array of version {version}")
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    try:
        shape, is_fortran, dtype = read_header(stream)
    except (SyntaxError, tokenize.TokenError, TypeError, RecursionError) as error:  # of numpy's own parser
        raise ValueError(f"an array whose header is no header ({type(error).__name__})") from error
    if dtype.hasobject or dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise ValueError(f"an array of {dtype}, which are no numbers")
    if len(shape) > _MOST_SIDES or any(type(side) is not int or not 0 <= side < MOST_BYTES for side in shape):
        raise ValueError("an array of an impossible shape")
    return shape, is_fortran, dtype


def _check_size(shape: tuple[int, ...], dtype: "np.dtype[Any]", size_bytes: int) -> None:
    """Raise ValueError if an array does not take just so many bytes."""
    if math.prod(shape) * dtype.itemsize != size_bytes:
        raise ValueError(f"an array of shape {shape} in {size_bytes} bytes")


def _names(file: zipfile.ZipFile) -> list[str]:
    names = [name.removesuffix(_MEMBER) for name in file.namelist() if name.endswith(_MEMBER)]
    if len(names) > MOST_ARRAYS:
        raise ValueError(f"it has {len(names)} arrays")
    return names


def _read_member(file: zipfile.ZipFile, name: str, most_bytes: int = MOST_BYTES) -> bytes:
    """Return the bytes of a member, which are compared with their checksum."""
    size_bytes = file.getinfo(name + _MEMBER).file_size
    if size_bytes > most_bytes:
        raise ValueError(f"{name} has {size_bytes} bytes")
    with file.open(name + _MEMBER) as member:
        data = member.read(size_bytes + 1)
    if len(data) != size_bytes:
        raise ValueError(f"{name} has more bytes than the archive says")
    return data


@contextlib.contextmanager
def _open(path: Path) -> Iterator[zipfile.ZipFile]:
    if not path.is_file():
        raise CacheError(f"{path}: no such cache file")
    try:
        with zipfile.ZipFile(path) as file:
            yield file
    except _ERRORS as error:
        raise CacheError(f"{path}: damaged, cannot be read as npz ({error})") from error


def read_tensors(path: Path, outlines: Mapping[str, Outline], is_whole: bool) -> dict[str, Tensor]:
    """Return the arrays of these outlines: read, or as tensors on the meta device."""
    if is_whole:
        return {name: torch.from_numpy(array) for name, array in read_arrays(path, outlines).items()}
    dtypes = {one.dtype: torch.from_numpy(np.empty(0, one.dtype)).dtype for one in outlines.values()}
    return {
        name: torch.empty(one.shape, dtype=dtypes[one.dtype], device="meta") for name, one in outlines.items()
    }


def as_array(tensor: Tensor, keep_half: bool) -> Array:
    """Return a tensor as other programs read it: numbers of less than 32 bits as float32.

    keep_half: float16 stays.
    """
    if tensor.is_floating_point() and not (keep_half and tensor.dtype == torch.float16):
        tensor = tensor.double() if tensor.dtype == torch.float64 else tensor.float()
    found: Array = tensor.detach().cpu().contiguous().numpy()
    return found


def shrink_alpha(path: Path, mask: Tensor, grid: tuple[int, int], stride: tuple[int, int, int]) -> Tensor:
    """Return the mask of the loss, 1 H W of latents, for an alpha mask in pixels or in latent pixels."""
    height, width = grid
    if mask.shape == grid:
        return mask[None].half()
    if mask.shape != (height * stride[1], width * stride[2]):
        raise CacheError(f"{path}: its alpha_mask has the shape {tuple(mask.shape)}, its latents have {grid}")
    return shrink_mask(mask.float()[None] * 255, stride)


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
    content = {"version": RECORD_VERSION, "metadata": dict(metadata), "tensors": described}
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
        if content["version"] != RECORD_VERSION:
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
