"""Read what an ONNX file takes and gives, without the onnx package.

Source: github.com/onnx/onnx, onnx.proto (Apache-2.0), and the encoding of protocol buffers: each value comes
with the number of its field; those that are not wanted are skipped.
"""

import itertools
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modules.errors import CheckpointError
from modules.text_files import require_regular_file
from modules.varints import read_varint

MOST_BYTES = 1 << 29  # the largest YOLOs have some 400 MB
MOST_FIELDS = 1 << 20  # of all that is looked at; of a detector some ten thousand
MOST_DEPTH = 4  # of graphs in graphs
MOST_SIDE = 1 << 12  # pixels of the pictures that a file takes
MOST_VALUES = 1 << 26  # that an operator makes of constants
MOST_TIMES = 1 << 8  # that one enlarges by constants
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
# numbers of fields: of a model, a graph, a tensor, a value, its type, its shape, a note
_GRAPH, _NOTES = 7, 14
_NODES, _INITIALIZERS, _INPUTS, _OUTPUTS = 1, 5, 11, 12
_NODE_INPUTS, _NODE_OUTPUTS, _KIND, _ATTRIBUTES = 1, 2, 4, 5
_TENSOR, _INNER_GRAPH, _NUMBERS, _TENSORS, _INNER_GRAPHS = 5, 6, 8, 10, 11  # of an attribute
_DIMS, _DTYPE, _TENSOR_NAME, _RAW, _EXTERNAL, _PLACE = 1, 2, 8, 9, 13, 14
_VALUES = (4, 5, 6, 7, _RAW, 10, 11)  # of a tensor, by its dtype
_DTYPES = {1: ("f", 4), 6: ("i", 4), 7: ("q", 8)}  # those that may be sizes: float32, int32, int64
_MOST_SIZES = 16
# operators whose result may be far larger than what they are given
_GROWING = {"ConstantOfShape", "EyeLike", "Expand", "OneHot", "Pad", "Range", "Resize", "Tile", "Upsample"}
_FOLDED = {"Add", "Concat", "Mul"}  # that may make sizes of sizes

Shape = tuple[int | None, ...]  # None: any size


@dataclass(frozen=True)
class OnnxHeader:
    """What an ONNX file takes and gives, by name, and its notes."""

    inputs: Mapping[str, Shape]  # without those that the file itself fills
    outputs: Mapping[str, Shape]
    notes: Mapping[str, str]


class _RefusedError(Exception):
    """A file that is whole and must not be run; the text says why."""


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
    """Return what the file takes and gives, and its content. Raises CheckpointError if it is damaged, or not
    to be run: if a reader would open other files for it, or take memory without bound.
    """
    content = _read(path)
    try:
        return _read_model(memoryview(content)), content
    except _RefusedError as error:
        raise CheckpointError(f"{path} cannot be used: {error}.", path) from None
    except (ValueError, IndexError, struct.error):
        raise CheckpointError(
            f"{path} is no ONNX file, or a damaged one. Download or export it again.", path
        ) from None


def _read(path: Path, most: int | None = None) -> bytes:
    """Return the content of a file, or its first bytes. Raises CheckpointError."""
    try:
        require_regular_file(path)
        if most is None and path.stat().st_size > MOST_BYTES:
            raise CheckpointError(
                f"{path} has more than {MOST_BYTES >> 20} MiB, which no detector has.", path
            )
        with path.open("rb") as file:
            return file.read(-1 if most is None else most)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file.", path) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.", path) from error


def _read_model(content: memoryview) -> OnnxHeader:
    graph: memoryview | None = None
    notes = {}
    for number, value in _fields(content):
        if number == _GRAPH and isinstance(value, memoryview):
            graph = value
        elif number == _NOTES and isinstance(value, memoryview):
            note = dict(_fields(value))
            notes[_text(note.get(1))] = _text(note.get(2))
    if graph is None:
        raise ValueError("no graph")
    inputs: dict[str, Shape] = {}
    outputs: dict[str, Shape] = {}
    filled = set()
    has_nodes = False
    for number, value in _fields(graph):
        has_nodes |= number == _NODES
        if number == _INITIALIZERS and isinstance(value, memoryview):
            filled.add(_text(next((part for number, part in _fields(value) if number == _TENSOR_NAME), None)))
        elif number in {_INPUTS, _OUTPUTS} and isinstance(value, memoryview):
            name, shape = _read_value(value)
            (inputs if number == _INPUTS else outputs)[name] = shape
    if not has_nodes or not outputs:
        raise ValueError("an empty graph")
    _Checks().graph(graph)
    taken = {name: shape for name, shape in inputs.items() if name not in filled}
    for name, shape in taken.items():
        if any(size is not None and size > MOST_SIDE for size in shape):
            raise _RefusedError(f"its input {name} has the shape {list(shape)}")
    return OnnxHeader(taken, outputs, notes)


@dataclass
class _Checks:
    """Looks through all that a reader of the file would do."""

    fields: int = 0
    constants: dict[str, float] = field(default_factory=dict)  # products of values that may be sizes

    def graph(self, graph: memoryview, depth: int = 0) -> None:
        """Raise _RefusedError if a graph has tensors elsewhere, or asks for more memory than a detector."""
        if depth > MOST_DEPTH:
            raise _RefusedError("it has graphs in graphs in graphs")
        parts = self._list(graph)
        for number, value in parts:
            if number == _INITIALIZERS and isinstance(value, memoryview):
                self._tensor(value)
        for number, value in parts:
            if number == _NODES and isinstance(value, memoryview):
                self._node(value, depth)

    def _node(self, node: memoryview, depth: int) -> None:
        parts = self._list(node)
        outputs = [_text(value) for number, value in parts if number == _NODE_OUTPUTS]
        for number, attribute in parts:
            if number == _ATTRIBUTES and isinstance(attribute, memoryview):
                self._attribute(attribute, outputs, depth)
        kind = next((_text(value) for number, value in parts if number == _KIND), "")
        inputs = [_text(value) for number, value in parts if number == _NODE_INPUTS]
        known = [self.constants[name] for name in inputs if name in self.constants]
        if kind in _GROWING and max(known, default=0) > MOST_VALUES:
            raise _RefusedError(f"{_shown(outputs)} makes more numbers than any detector")
        if kind in _FOLDED and inputs and len(known) == len(inputs):
            self.constants |= dict.fromkeys(outputs, math.prod(known))

    def _attribute(self, attribute: memoryview, outputs: Sequence[str], depth: int) -> None:
        sizes: list[int] = []
        for number, value in self._list(attribute):
            if number in {_TENSOR, _TENSORS} and isinstance(value, memoryview):
                self._tensor(value, outputs)
            elif number in {_INNER_GRAPH, _INNER_GRAPHS} and isinstance(value, memoryview):
                self.graph(value, depth + 1)
            elif number == _NUMBERS:
                sizes += [one for one in _varints(value) if one != 2**31 - 1]  # the end, of old files
        if _product(sizes) > MOST_VALUES:
            raise _RefusedError(f"{_shown(outputs)} asks for sizes that no detector has")

    def _tensor(self, tensor: memoryview, names: Sequence[str] = ()) -> None:
        """Check that a tensor's values are in the file; note the product of a few."""
        dims: list[int] = []
        found, size, dtype = b"", 0, 0
        for number, value in self._list(tensor):
            if number in {_EXTERNAL, _PLACE} and value != 0:
                raise _RefusedError("its numbers are in another file. Export it again as one file")
            if number == _DIMS:
                dims += _varints(value)
            elif number == _DTYPE and isinstance(value, int):
                dtype = value
            elif number == _TENSOR_NAME:
                names = [*names, _text(value)]
            elif number in _VALUES:
                size += len(value) if isinstance(value, memoryview) else 1
                found = bytes(value[:256]) if number == _RAW and isinstance(value, memoryview) else found
        count = math.prod(dims)
        if count > 2 * size:  # the smallest numbers have four bits
            raise _RefusedError(f"its tensor {_shown(names)} of shape {dims[:8]} has not so many numbers")
        if dtype in _DTYPES and count <= _MOST_SIZES and len(found) == count * _DTYPES[dtype][1]:
            letter, _ = _DTYPES[dtype]
            product = _product(struct.unpack(f"<{count}{letter}", found))
            product *= MOST_VALUES / MOST_TIMES if letter == "f" else 1
            self.constants |= dict.fromkeys(names, product)

    def _list(self, content: memoryview) -> list[tuple[int, int | memoryview]]:
        """Return the fields of a message; all files together may have MOST_FIELDS."""
        found = list(itertools.islice(_fields(content), MOST_FIELDS - self.fields + 1))
        self.fields += len(found)
        if self.fields > MOST_FIELDS:
            raise _RefusedError(f"it has more than {MOST_FIELDS:,} parts")
        return found


def _read_value(content: memoryview) -> tuple[str, Shape]:
    """Return the name of a value, and the sizes in the shape of its type."""
    name, sizes = "", []
    for number, value in _fields(content):
        if number == 1:
            name = _text(value)
    for size in _inside(content, 2, 1, 2, 1):  # type, of a tensor, shape, size
        fixed = dict(_fields(size)).get(1)
        sizes.append(fixed if isinstance(fixed, int) and fixed > 0 else None)
    return name, tuple(sizes)


def _inside(content: memoryview, *path: int) -> Iterator[memoryview]:
    """Yield the values of a field in a field in a field."""
    for number, value in _fields(content):
        if number == path[0] and isinstance(value, memoryview):
            yield from _inside(value, *path[1:]) if len(path) > 1 else [value]


def _fields(content: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the numbers and values of the fields. Raises ValueError or IndexError if they are damaged."""
    position = 0
    while position < len(content):
        key, position = read_varint(content, position)
        number, kind = key >> 3, key & 7
        if number == 0:  # as in the empty rest of a file that was not downloaded whole
            raise ValueError("damaged")
        if kind == _VARINT:
            value, position = read_varint(content, position)
            yield number, value
            continue
        size = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(kind)
        if kind == _LENGTH:
            size, position = read_varint(content, position)
        if size is None or position + size > len(content):
            raise ValueError("damaged")
        yield number, content[position : position + size]
        position += size


def _varints(value: int | memoryview) -> list[int]:
    """Return the numbers of a field that may have several."""
    if isinstance(value, int):
        return [value]
    numbers, position = [], 0
    while position < len(value):
        number, position = read_varint(value, position)
        numbers.append(number)
        if len(numbers) > MOST_SIDE:
            raise ValueError("damaged")
    return numbers


def _product(sizes: Iterable[float]) -> float:
    """Multiply sizes; those that mean the end of an axis, or count from there, are left out."""
    return math.prod(max(1, one) for one in sizes if one < 2**63 - 1)


def _shown(names: Sequence[str]) -> str:
    return repr(", ".join(names)[:80])


def _text(value: int | memoryview | None) -> str:
    return bytes(value).decode("utf-8") if isinstance(value, memoryview) else ""
