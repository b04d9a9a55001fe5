"""Write a safetensors file tensor by tensor, so that only one of them is in memory at a time."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from checkpoints.containers import SAFETENSORS_DTYPES
from modules.atomic_write import atomic_path
from modules.bars import BYTES, track
from modules.errors import OutputError
from modules.limits import MAX_HEADER_BYTES
from protocols.loading import TensorInfo

LATE_BYTES = 2048  # reserved in the header for metadata that is known only after all tensors are written
# returns a dictionary as JSON without spaces
_to_compact_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def stream_tensors(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
    late_metadata: Callable[[], Mapping[str, str]] | None = None,
) -> None:
    """Write a safetensors file, tensor by tensor, completely or not at all.

    Args:
        path: File to write.
        tensors: Dtype and shape of each tensor, for the header.
        read: Returns a tensor by name, on any device. It is called once for each name, in the order of
            the safetensors library: largest element size first, then by name.
        metadata: Metadata of the file.
        late_metadata: Called after all tensors are written; returns more metadata, up to `LATE_BYTES`.

    Raises:
        ValueError: If `read` returns a different dtype or shape.
        OutputError: If the file cannot be written, or if its header would be too large to be read again.
    """
    spare_bytes = 0 if late_metadata is None else LATE_BYTES
    order, header = _make_header(tensors, metadata, path, spare_bytes)
    size_bytes = len(header) + sum(info.size_bytes for info in tensors.values())
    with atomic_path(path, size_bytes) as temporary, temporary.open("wb") as file:
        file.write(header)
        names = track(
            order,
            f"Writing {path.name}",
            total=size_bytes,
            size=lambda name: tensors[name].size_bytes,
            unit=BYTES,
        )
        for name in names:
            tensor = read(name)
            if (tensor.dtype, tuple(tensor.shape)) != (tensors[name].dtype, tensors[name].shape):
                raise ValueError(
                    f"{name} was announced as {tensors[name]}, but is {tensor.dtype} {tuple(tensor.shape)}"
                )
            _write_data(file, tensor)
            del tensor  # before the next tensor is read
        added_metadata = {} if late_metadata is None else late_metadata()
        if added_metadata:  # the header has the same length as before, thanks to the spare bytes
            file.seek(0)
            file.write(_add_metadata(header, added_metadata))


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors that are in memory, on any device, as a safetensors file."""
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    stream_tensors(path, infos, tensors.__getitem__, metadata)


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of the file that `stream_tensors` would write.

    Raises:
        OutputError: If the header would be too large to be read again.
    """
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    order, header = _make_header(infos, metadata, "safetensors")
    file = io.BytesIO()
    file.write(header)
    for name in order:
        _write_data(file, tensors[name])
    return file.getvalue()


def sort_tensor_names(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return tensor names in the order of a safetensors file: by descending element size, then by name."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def _make_header(
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str] | None,
    file_label: Path | str,
    spare_bytes: int = 0,
) -> tuple[list[str], bytes]:
    """Return the tensor names in file order, and the header."""
    # The header is 8 bytes of length, then JSON padded with spaces to a multiple of 8. Source:
    # huggingface.co/docs/safetensors.
    order = sort_tensor_names(tensors)
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        info = tensors[name]
        start = end
        end += info.size_bytes
        entries[name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [start, end],
        }
    text = _to_compact_json(entries).encode("utf-8") + b" " * spare_bytes
    text += b" " * (-len(text) % 8)  # up to the next multiple of 8
    if len(text) > MAX_HEADER_BYTES:
        raise OutputError(
            f"{file_label}: the names of its {len(tensors):,} tensors and its metadata take {len(text):,} "
            f"bytes; safetensors files with more than {MAX_HEADER_BYTES:,} cannot be read. Use shorter "
            "names."
        )
    return order, len(text).to_bytes(8, "little") + text


def _add_metadata(header: bytes, metadata: Mapping[str, str]) -> bytes:
    """Add metadata to a safetensors header without changing its length."""
    entries = json.loads(header[8:])
    metadata = {**entries.pop("__metadata__", {}), **metadata}
    new_entries = {"__metadata__": metadata, **entries}
    text = _to_compact_json(new_entries).encode("utf-8").ljust(len(header) - 8)
    if len(text) > len(header) - 8:
        raise ValueError(f"{len(text)} bytes of metadata and names do not fit into {len(header) - 8}")
    return header[:8] + text


def _write_data(file: BinaryIO, tensor: Tensor) -> None:
    if tensor.numel():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        file.write(memoryview(cast(Any, flat.view(torch.uint8).numpy())))
