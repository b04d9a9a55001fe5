"""Read what an ONNX file takes and gives, without the onnx package.

Source: github.com/onnx/onnx, onnx.proto (Apache-2.0), and the encoding of protocol buffers: each value comes
with the number of its field; those that are not wanted are skipped.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from modules.errors import CheckpointError
from modules.text_files import require_regular_file
from modules.varints import read_varint

MOST_BYTES = 2**31  # no protocol buffer is larger
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
# numbers of fields: of a model, a graph, a tensor, a value, its type, its shape, a note
_GRAPH, _NOTES = 7, 14
_NODES, _INITIALIZERS, _INPUTS, _OUTPUTS = 1, 5, 11, 12
_TENSOR_NAME = 8

Shape = tuple[int | None, ...]  # None: any size


@dataclass(frozen=True)
class OnnxHeader:
    """What an ONNX file takes and gives, by name, and its notes."""

    inputs: Mapping[str, Shape]  # without those that the file itself fills
    outputs: Mapping[str, Shape]
    notes: Mapping[str, str]


def may_be_onnx(path: Path) -> bool:
    """Return whether a file begins like an ONNX file, or claims to be one and begins like no other model.

    Raises CheckpointError if it cannot be read.
    """
    if path.is_dir():
        return False
    start = _read(path, 16)
    is_other = start[8:9] == b"{" or start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"
    return not is_other and (start[:1] == b"\x08" or path.suffix.lower() == ".onnx")


def read_onnx(path: Path) -> tuple[OnnxHeader, bytes]:
    """Return what the file takes and gives, and its content. Raises CheckpointError if it is damaged."""
    content = _read(path)
    try:
        return _read_model(memoryview(content)), content
    except (ValueError, IndexError, struct.error):
        raise CheckpointError(
            f"{path} is no ONNX file, or a damaged one. Download or export it again.", path
        ) from None


def _read(path: Path, most: int | None = None) -> bytes:
    """Return the content of a file, or its first bytes. Raises CheckpointError."""
    try:
        require_regular_file(path)
        if most is None and path.stat().st_size > MOST_BYTES:
            raise CheckpointError(f"{path} has more than 2 GiB, which no ONNX file has.", path)
        with path.open("rb") as file:
            return file.read(-1 if most is None else most)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file.", path) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.", path) from error


def _read_model(content: memoryview) -> OnnxHeader:
    graph: memoryview | None = None
    notes = {}
    for field, value in _fields(content):
        if field == _GRAPH and isinstance(value, memoryview):
            graph = value
        elif field == _NOTES and isinstance(value, memoryview):
            note = dict(_fields(value))
            notes[_text(note.get(1))] = _text(note.get(2))
    if graph is None:
        raise ValueError("no graph")
    inputs: dict[str, Shape] = {}
    outputs: dict[str, Shape] = {}
    filled = set()
    has_nodes = False
    for field, value in _fields(graph):
        has_nodes |= field == _NODES
        if field == _INITIALIZERS and isinstance(value, memoryview):
            filled.add(_text(next((part for number, part in _fields(value) if number == _TENSOR_NAME), None)))
        elif field in {_INPUTS, _OUTPUTS} and isinstance(value, memoryview):
            name, shape = _read_value(value)
            (inputs if field == _INPUTS else outputs)[name] = shape
    if not has_nodes or not outputs:
        raise ValueError("an empty graph")
    return OnnxHeader({name: shape for name, shape in inputs.items() if name not in filled}, outputs, notes)


def _read_value(content: memoryview) -> tuple[str, Shape]:
    """Return the name of a value, and the sizes in the shape of its type."""
    name, sizes = "", []
    for field, value in _fields(content):
        if field == 1:
            name = _text(value)
    for size in _inside(content, 2, 1, 2, 1):  # type, of a tensor, shape, size
        fixed = dict(_fields(size)).get(1)
        sizes.append(fixed if isinstance(fixed, int) and fixed > 0 else None)
    return name, tuple(sizes)


def _inside(content: memoryview, *path: int) -> Iterator[memoryview]:
    """Yield the values of a field in a field in a field."""
    for field, value in _fields(content):
        if field == path[0] and isinstance(value, memoryview):
            yield from _inside(value, *path[1:]) if len(path) > 1 else [value]


def _fields(content: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the numbers and values of the fields. Raises ValueError or IndexError if they are damaged."""
    position = 0
    while position < len(content):
        key, position = read_varint(content, position)
        field, kind = key >> 3, key & 7
        if field == 0:  # as in the empty rest of a file that was not downloaded whole
            raise ValueError("damaged")
        if kind == _VARINT:
            value, position = read_varint(content, position)
            yield field, value
            continue
        size = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(kind)
        if kind == _LENGTH:
            size, position = read_varint(content, position)
        if size is None or position + size > len(content):
            raise ValueError("damaged")
        yield field, content[position : position + size]
        position += size


def _text(value: int | memoryview | None) -> str:
    return bytes(value).decode("utf-8", errors="replace") if isinstance(value, memoryview) else ""
