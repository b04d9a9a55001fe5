"""A tiny tagger as an ONNX file, written field by field, and pictures whose tags are known."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SIDE = 4
ROWS = (
    ("general", 9),
    ("sensitive", 9),
    ("1girl", 0),
    ("blue_eyes", 0),
    ("^_^", 0),
    ("red", 0),
    ("miku_(vocaloid)", 4),
    ("saber_(fate)", 4),
)


def write_tagger(folder: Path, weights: NDArray[np.float32], batch: int | str = "N") -> Path:
    """Write a tagger of `SIDE`: probabilities = numbers of the picture @ weights.

    weights: of SIDE * SIDE * 3 rows (BGR of the first pixel first) and a column for each of `ROWS`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(make_model((batch, SIDE, SIDE, 3), weights))
    lines = [f"{number},{name},{category},9" for number, (name, category) in enumerate(ROWS)]
    table = "\n".join(["tag_id,name,category,count", *lines])
    (folder / "selected_tags.csv").write_text(f"{table}\n", encoding="utf-8")
    return folder


def first_pixel_weights(**columns: tuple[float, float, float]) -> NDArray[np.float32]:
    """Return weights that look at the first pixel alone. columns: factors of B, G and R by tag."""
    weights = np.zeros((SIDE * SIDE * 3, len(ROWS)), np.float32)
    names = [name.partition("_(")[0] for name, _ in ROWS]
    for name, factors in columns.items():
        weights[:3, names.index(name)] = factors
    return weights


def make_model(
    shape: Sequence[int | str],
    weights: NDArray[np.float32],
    kind: str = "MatMul",
    is_outside: bool = False,
    further: bytes = b"",
) -> bytes:
    """Return an ONNX file of two nodes: Reshape to (batch, rest), MatMul with the weights.

    kind: of the operator in place of MatMul. is_outside: the weights name another file. further: fields of
    the graph.

    Source: onnx.proto3 of ONNX's IR version 8, operator set 13; the numbers of fields are from there.
    """
    target = _tensor("target", 7, (2,), np.array([-1, weights.shape[0]], np.int64).tobytes())
    matrix = _tensor("weights", 1, weights.shape, weights.astype("<f4").tobytes())
    if is_outside:
        matrix += _field(13, _field(1, b"location") + _field(2, b"../secret")) + _number(14, 1)
    result = "products" if further else "probabilities"
    graph = b"".join(
        [
            _field(1, _node("Reshape", ("picture", "target"), "flat")),
            _field(1, _node(kind, ("flat", "weights"), result)),
            further,
            _field(2, b"tags"),
            _field(5, target),
            _field(5, matrix),
            _field(11, _value("picture", shape)),
            _field(12, _value("probabilities", (shape[0], weights.shape[1]))),
        ]
    )
    operators = _field(1, b"") + _number(2, 13)
    return _number(1, 8) + _field(7, graph) + _field(8, operators)


def make_growing_model(weights: NDArray[np.float32], count: int) -> bytes:
    """Return such a file that makes so many zeros besides, and adds their sum."""
    further = b"".join(
        [
            _field(5, _tensor("count", 7, (1,), np.array([count], np.int64).tobytes())),
            _field(1, _node("ConstantOfShape", ("count",), "zeros")),
            _field(1, _node("ReduceSum", ("zeros",), "sum")),
            _field(1, _node("Add", ("products", "sum"), "probabilities")),
        ]
    )
    return make_model((1, SIDE, SIDE, 3), weights, further=further)


def _node(kind: str, inputs: Sequence[str], output: str) -> bytes:
    names = b"".join(_field(1, name.encode()) for name in inputs)
    return names + _field(2, output.encode()) + _field(4, kind.encode())


def _tensor(name: str, kind: int, shape: Sequence[int], content: bytes) -> bytes:
    sizes = b"".join(_number(1, size) for size in shape)
    return sizes + _number(2, kind) + _field(8, name.encode()) + _field(9, content)


def _value(name: str, shape: Sequence[int | str]) -> bytes:
    sizes = [_field(2, size.encode()) if isinstance(size, str) else _number(1, size) for size in shape]
    tensor = _number(1, 1) + _field(2, b"".join(_field(1, size) for size in sizes))
    return _field(1, name.encode()) + _field(2, _field(1, tensor))


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes(parts) + struct.pack("B", value)
