"""Read inputs and outputs of an ONNX file, without the onnx package.

Source: github.com/onnx/onnx, onnx.proto (Apache-2.0), and the encoding of protocol buffers: each value comes
with the number of its field; those that are not wanted are skipped.
"""

import math
import mmap
import struct
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from modules import limits
from modules.errors import CheckpointError
from modules.paths import explain_missing
from modules.text_files import read_content, require_regular_file
from modules.varints import read_varint
from post.faces.onnx_sizes import Constant, Node, input_count, output_count

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
# numbers of fields: of a model, a graph, a tensor, a value, its type, its shape, a note
_GRAPH, _NOTES, _FUNCTIONS = 7, 14, 25
_FUNCTION_NODES = 7
_NODES, _INITIALIZERS, _INPUTS, _OUTPUTS = 1, 5, 11, 12
_NODE_INPUTS, _NODE_OUTPUTS, _KIND, _ATTRIBUTES = 1, 2, 4, 5
_SETTING, _NUMBER = 1, 3  # of an attribute: its name, and the number of one
_TENSOR, _INNER_GRAPH, _NUMBERS, _TENSORS, _INNER_GRAPHS = 5, 6, 8, 10, 11  # of an attribute
_DIMS, _DTYPE, _TENSOR_NAME, _RAW, _EXTERNAL, _PLACE = 1, 2, 8, 9, 13, 14
_VALUES = (4, 5, 6, 7, _RAW, 10, 11)  # of a tensor, by its dtype
_MAX_SIZES = 16
# operators whose result may be far larger than what they are given
_GROWING = {"ConstantOfShape", "EyeLike", "Expand", "OneHot", "Pad", "Range", "Resize", "Tile", "Upsample"}
_UNBOUNDED = {"Exp", "Pow"}
_FOLDED = {"Add", "Concat", "Max", "Mul", "Sum", *_UNBOUNDED}  # that may make sizes of sizes
# that hand sizes on, or some of them
_SAME = {"Cast", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}


class _Layout(NamedTuple):
    """How a tensor's values are stored."""

    letter: str  # of `struct`, for values in _RAW
    field_number: int  # of values that are not in _RAW


# the dtypes that sizes may have: float32, int32, int64
_LAYOUTS = {1: _Layout("f", 4), 6: _Layout("i", 5), 7: _Layout("q", 7)}

Shape = tuple[int | None, ...]  # None: any size
_Value = int | memoryview  # of a field
_Parts = defaultdict[int, list[_Value]]  # a message by the numbers of its fields


@dataclass(frozen=True)
class OnnxHeader:
    """Inputs and outputs of an ONNX file by name, and its metadata."""

    inputs: Mapping[str, Shape]  # without those that the file itself fills
    outputs: Mapping[str, Shape]
    notes: Mapping[str, str]


class _RejectedError(Exception):
    """An intact file that must not be run; the message contains the reason."""


def may_be_onnx(path: Path) -> bool:
    """Return whether a file starts like ONNX, or has its suffix and does not start like another model.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    if path.is_dir():
        return False
    start = _read_bytes(path, 16)
    is_other = start[8:9] == b"{" or start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"
    return not is_other and (start[:1] == b"\x08" or path.suffix.lower() == ".onnx")


def read_onnx(path: Path) -> tuple[OnnxHeader, bytes]:
    """Read an ONNX file, and check that it is safe to run.

    Returns:
        Its inputs and outputs, and its content.

    Raises:
        CheckpointError: If the file is damaged, or if running it would open other files or use unlimited
            memory.
    """
    content = _read_bytes(path)
    try:
        return _parse(content), content
    except _RejectedError as error:
        raise CheckpointError(f"{path} cannot be used: {error}.", path) from None
    except (ValueError, IndexError, struct.error):
        raise CheckpointError(
            f"{path} is no ONNX file, or a damaged one. Download or export it again.", path
        ) from None


def check_operators(path: Path, refused: Container[str]) -> None:
    """Check all operators of an ONNX file of any size, without reading its weights into memory.

    Raises:
        CheckpointError: If the file is damaged, stores tensors in other files, or contains an operator whose
            type is in `refused`.
    """
    try:
        require_regular_file(path)
        with path.open("rb") as file:
            _look_through(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), refused)
    except _RejectedError as error:
        raise CheckpointError(f"{path} cannot be used: {error}.", path) from None
    except (ValueError, IndexError, struct.error):
        raise CheckpointError(
            f"{path} is no ONNX file, or a damaged one. Download or export it again.", path
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.", path) from None


def _look_through(content: memoryview, refused: Container[str]) -> None:
    checks = _Checks()
    model = checks.parts(content)
    # messages to check, each with its depth and the field of its operators
    waiting = [(graph, 0, _NODES) for graph in model[_GRAPH]]
    waiting += [(function, 0, _FUNCTION_NODES) for function in model[_FUNCTIONS]]
    if not model[_GRAPH]:
        raise ValueError("no graph")
    while waiting:
        message, depth, nodes = waiting.pop()
        if depth > limits.MAX_ONNX_DEPTH:
            raise _RejectedError("it has graphs in graphs in graphs")
        graph = checks.parts(message)
        for tensor in graph[_INITIALIZERS] if nodes == _NODES else ():
            _require_inside(checks.parts(tensor))
        for node in map(checks.parts, graph[nodes]):
            kind = _read_first_text(node[_KIND])
            if kind in refused:
                raise _RejectedError(f"it has an operator {kind}, which may have no end")
            for attribute in map(checks.parts, node[_ATTRIBUTES]):
                for tensor in attribute[_TENSOR] + attribute[_TENSORS]:
                    _require_inside(checks.parts(tensor))
                inner = attribute[_INNER_GRAPH] + attribute[_INNER_GRAPHS]
                waiting += [(graph, depth + 1, _NODES) for graph in inner]


def _require_inside(tensor: _Parts) -> None:
    """Raise _RejectedError if a tensor's values are in another file."""
    if tensor[_EXTERNAL] or any(tensor[_PLACE]):
        raise _RejectedError("its numbers are in another file. Export it again as one file")


def _parse(content: bytes) -> OnnxHeader:
    """Return the inputs and outputs of an ONNX file's content.

    Raises _RejectedError if the file is unsafe; ValueError, IndexError or struct.error if it is damaged.
    """
    checks = _Checks()
    model = checks.parts(memoryview(content))
    if not model[_GRAPH]:
        raise ValueError("no graph")
    notes = [dict(_read_fields(note)) for note in model[_NOTES]]
    graph = checks.parts(model[_GRAPH][-1])
    values = [_read_value(value) for value in graph[_INPUTS]]
    for name, shape in values:
        checks.counts[name] = input_count(shape)
    outputs = dict(map(_read_value, graph[_OUTPUTS]))
    if not graph[_NODES] or not outputs:
        raise ValueError("an empty graph")
    checks.graph(graph)
    filled = _list_initializers(graph)
    inputs = {name: shape for name, shape in values if name not in filled}
    _check_inputs(inputs)
    texts = {_read_text(note.get(1)): _read_text(note.get(2)) for note in notes}
    return OnnxHeader(inputs, outputs, texts)


def _list_initializers(graph: _Parts) -> set[str]:
    """Return the names of the inputs whose values are in the file."""
    tensors = [dict(_read_fields(tensor)) for tensor in graph[_INITIALIZERS]]
    return {_read_text(tensor.get(_TENSOR_NAME)) for tensor in tensors}


def _check_inputs(inputs: Mapping[str, Shape]) -> None:
    """Raise _RejectedError if an input is larger than an image."""
    for name, shape in inputs.items():
        if any(size is not None and size > limits.MAX_ONNX_SIDE for size in shape):
            raise _RejectedError(f"its input {name} has the shape {list(shape)}")


def _read_bytes(path: Path, most: int | None = None) -> bytes:
    """Return the content of a file, or its first `most` bytes. Raises CheckpointError."""
    try:
        if most is None:
            return read_content(path, limits.MAX_ONNX_BYTES)
        require_regular_file(path)
        with path.open("rb") as file:
            return file.read(most)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file.{explain_missing(path)}", path) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.", path) from error


@dataclass
class _Checks:
    """Check a whole file for anything that would be unsafe to run."""

    fields: int = 0
    constants: dict[str, float] = field(default_factory=dict)  # products of values that may be sizes
    tensors: dict[str, Constant] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)  # about how many numbers a value has

    def graph(self, graph: _Parts, depth: int = 0) -> None:
        """Raise _RejectedError if a graph has tensors in other files or needs more memory than a detector."""
        if depth > limits.MAX_ONNX_DEPTH:
            raise _RejectedError("it has graphs in graphs in graphs")
        for tensor in graph[_INITIALIZERS]:
            self._check_tensor(self.parts(tensor))
        for node in map(self.parts, graph[_NODES]):
            self._check_node(node, depth)

    def _check_node(self, node: _Parts, depth: int) -> None:
        """Check an operator, and record the tensor sizes that it computes for later operators.

        Raises _RejectedError if its result has too many values.
        """
        outputs = list(map(_read_text, node[_NODE_OUTPUTS]))
        settings: dict[str, Sequence[int]] = {}
        for attribute in map(self.parts, node[_ATTRIBUTES]):
            name, numbers = self._check_attribute(attribute, outputs, depth)
            settings[name] = numbers
        kind = _read_first_text(node[_KIND])
        inputs = list(map(_read_text, node[_NODE_INPUTS]))
        # inputs that may be sizes, each as the product of its values
        products = [self.constants[name] for name in inputs if name in self.constants]
        if kind in _GROWING and max(products, default=0) > limits.MAX_ONNX_VALUES:
            raise _RejectedError(f"{_shown(outputs)} makes more numbers than any detector")
        self._count(Node(kind, inputs, settings), outputs)
        # operators that pass sizes on, or compute sizes from sizes, give sizes to later operators
        if products and kind in _SAME and inputs[0] in self.constants:
            self._fold(outputs, products[0])
        elif kind in _FOLDED and inputs and len(products) == len(inputs):
            self._fold(outputs, math.inf if kind in _UNBOUNDED else math.prod(products))

    def _check_attribute(
        self, attribute: _Parts, outputs: Sequence[str], depth: int
    ) -> tuple[str, Sequence[int]]:
        """Check the tensors, graphs and sizes in an attribute; return its name and its integers."""
        for tensor in attribute[_TENSOR] + attribute[_TENSORS]:
            self._check_tensor(self.parts(tensor), outputs)
        for inner in attribute[_INNER_GRAPH] + attribute[_INNER_GRAPHS]:
            self.graph(self.parts(inner), depth + 1)
        numbers = _read_numbers(attribute[_NUMBERS] or attribute[_NUMBER])
        name = _read_first_text(attribute[_SETTING])
        if attribute[_NUMBERS]:
            # old files write 2**31 - 1 for the end of an axis
            sizes = (number for number in numbers if number != 2**31 - 1)
            if _multiply_sizes(sizes) > limits.MAX_ONNX_VALUES:
                raise _RejectedError(f"{_shown(outputs)} asks for sizes that no detector has")
        return name, numbers

    def _fold(self, names: Sequence[str], product: float) -> None:
        """Record the sizes that an operator computes from other sizes, as one product.

        Which size belongs to which axis is not known.
        """
        self.constants |= dict.fromkeys(names, product)
        self.tensors |= dict.fromkeys(names, Constant((2,), (product, 1.0)))

    def _count(self, node: Node, outputs: Sequence[str]) -> None:
        """Add up the values that an operator makes. Raises _RejectedError if there are too many."""
        count = output_count(node, self.counts, self.tensors)
        most = limits.MAX_ONNX_VALUES if node.kind in _GROWING else limits.MAX_ONNX_COUNT
        if not count <= most:  # NaN too
            raise _RejectedError(f"{_shown(outputs)} makes more numbers than any detector")
        self.counts |= dict.fromkeys(outputs, count)

    def _check_tensor(self, tensor: _Parts, names: Sequence[str] = ()) -> None:
        """Check that a tensor's values are in the file; record the product of a small tensor's values."""
        names = [*names, *map(_read_text, tensor[_TENSOR_NAME])]
        _require_inside(tensor)
        dims = _read_numbers(tensor[_DIMS])
        count = math.prod(dims)
        if count > 2 * _measure_stored(tensor):  # the smallest numbers have four bits
            raise _RejectedError(f"its tensor {_shown(names)} of shape {dims[:8]} has not so many numbers")
        self.counts |= dict.fromkeys(names, float(count))
        self.tensors |= dict.fromkeys(names, Constant(tuple(dims)))
        layout = _read_layout(tensor)
        if layout is not None and count <= _MAX_SIZES:
            values = tuple(_read_values(tensor, layout, count))
            self._record_sizes(Constant(tuple(dims), values, is_float=layout.letter == "f"), names)

    def _record_sizes(self, constant: Constant, names: Sequence[str]) -> None:
        """Record a small tensor, whose values may be sizes."""
        product = _multiply_sizes(constant.values)
        if constant.is_float:  # a scale, whose limit is MAX_ONNX_SCALE instead of MAX_ONNX_VALUES
            product *= limits.MAX_ONNX_VALUES / limits.MAX_ONNX_SCALE
        self.tensors |= dict.fromkeys(names, constant)
        self.constants |= dict.fromkeys(names, product)

    def parts(self, message: _Value) -> _Parts:
        """Return the values of a message by field number; all messages together may have MAX_ONNX_FIELDS."""
        parts: _Parts = defaultdict(list)
        for number, value in _read_fields(message):
            self.fields += 1
            if self.fields > limits.MAX_ONNX_FIELDS:
                raise _RejectedError(f"it has more than {limits.MAX_ONNX_FIELDS:,} parts")
            parts[number].append(value)
        return parts


def _measure_stored(tensor: _Parts) -> int:
    """Return the byte size of a tensor's stored values; a value in a field of its own counts as one byte."""
    size = 0
    for field_number in _VALUES:
        for value in tensor[field_number]:
            size += 1 if isinstance(value, int) else len(value)
    return size


def _read_layout(tensor: _Parts) -> _Layout | None:
    """Return how a tensor's values are stored; None if they cannot be sizes."""
    dtype = next((number for number in tensor[_DTYPE] if isinstance(number, int)), 0)
    return _LAYOUTS.get(dtype)


def _read_values(tensor: _Parts, layout: _Layout, count: int) -> Sequence[float]:
    """Return the values of a small tensor."""
    stored = tensor[_RAW][-1:] or tensor[layout.field_number]
    if layout.letter != "f" and not tensor[_RAW]:
        return _read_numbers(stored)
    content = b"".join(value for value in stored if not isinstance(value, int))
    return struct.unpack(f"<{count}{layout.letter}", content)


def _read_value(content: _Value) -> tuple[str, Shape]:
    """Return the name of a value, and the sizes in its shape."""
    sizes = []
    for size in _open_message(content, (2, 1, 2, 1)):  # type, of a tensor, shape, size
        fixed = dict(_read_fields(size)).get(1)
        sizes.append(fixed if isinstance(fixed, int) and fixed > 0 else None)
    return _read_text(dict(_read_fields(content)).get(1)), tuple(sizes)


def _open_message(content: _Value, path: Sequence[int]) -> Iterator[_Value]:
    for number, value in _read_fields(content):
        if number == path[0]:
            yield from _open_message(value, path[1:]) if len(path) > 1 else [value]


def _read_fields(content: _Value) -> Iterator[tuple[int, _Value]]:
    """Yield the number and the value of each field. Raises ValueError or IndexError if they are damaged."""
    if isinstance(content, int):
        raise ValueError("a number in place of a message")
    position = 0
    while position < len(content):
        # protobuf: the key of a field holds its number and, in the lowest three bits, its wire type
        key, position = read_varint(content, position)
        number = key >> 3
        kind = key & 7
        if number == 0:  # as in the zeros at the end of an incomplete download
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


def _read_numbers(values: Iterable[_Value]) -> list[int]:
    """Return the integers in a repeated field."""
    numbers: list[int] = []
    for value in values:
        if isinstance(value, int):
            numbers.append(value)
            continue
        position = 0
        while position < len(value):
            number, position = read_varint(value, position)
            numbers.append(number)
            if len(numbers) > limits.MAX_ONNX_SIDE:
                raise ValueError("damaged")
    return numbers


def _multiply_sizes(sizes: Iterable[float]) -> float:
    """Multiply sizes, except special values for the end of an axis or positions counted from the end."""
    return math.prod(max(1, size) for size in sizes if size < 2**63 - 1)


def _shown(names: Sequence[str]) -> str:
    return repr(", ".join(names)[:80])


def _read_first_text(values: Iterable[_Value]) -> str:
    return next(map(_read_text, values), "")


def _read_text(value: _Value | None) -> str:
    return bytes(value).decode("utf-8") if isinstance(value, memoryview) else ""
