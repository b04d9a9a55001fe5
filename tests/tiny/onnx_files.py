"""Tiny ONNX files, written without the onnx package, to which red pixels are faces."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

STEPS = (8, 16, 32)
Dims = Sequence[int | str]


def write_yolo(
    path: Path,
    side: int = 64,
    is_turned: bool = False,
    notes: Mapping[str, str] | None = None,
    face: float = 16,
) -> Path:
    """A YOLO of one class: each red pixel at a multiple of 8 (+ 4) is a box of `face` pixels around it.

    is_turned: it gives 1 N 5 in place of 1 5 N.
    """
    values, cells = [], []
    for step in STEPS:
        centers = (np.arange(side // step) + 0.5) * step
        y, x = np.meshgrid(centers, centers, indexing="ij")
        cells.append(np.stack([x, y, np.full_like(x, face), np.full_like(x, face)]).reshape(4, -1))
    places = sum(cell.shape[1] for cell in cells)
    boxes = np.concatenate(cells, axis=1)
    constant = np.concatenate([boxes, np.zeros((1, places))])[None].astype(np.float32)
    nodes, weights = [], {"places": constant}
    for step in STEPS:
        taps = np.zeros((5, 3, step, step), np.float32)
        if step == STEPS[0]:
            taps[4, :, step // 2, step // 2] = (1.0, -0.5, -0.5)  # red, green, blue
        count = (side // step) ** 2
        weights |= {f"w{step}": taps, f"s{step}": np.array([1, 5, count], np.int64)}
        nodes.append(
            _node("Conv", ["images", f"w{step}"], [f"c{step}"], kernel_shape=[step] * 2, strides=[step] * 2)
        )
        nodes.append(_node("Reshape", [f"c{step}", f"s{step}"], [f"r{step}"]))
        values.append(f"r{step}")
    nodes.append(_node("Concat", values, ["all"], axis=2))
    last = "added" if is_turned else "output0"
    nodes.append(_node("Add", ["all", "places"], [last]))
    shape: list[int | str] = [1, 5, places]
    if is_turned:
        nodes.append(_node("Transpose", ["added"], ["output0"], perm=[0, 2, 1]))
        shape = [1, places, 5]
    return write_onnx(path, nodes, weights, {"images": [1, 3, side, side]}, {"output0": shape}, notes or {})


def write_yunet(path: Path, sizes: Dims = ("height", "width")) -> Path:
    """A YuNet: each red pixel at a multiple of 8 (+ 4) is a face of 8 e^0.7 (16) pixels around it.

    sizes: height and width of the pictures, with numbers it takes no others.
    """
    nodes: list[bytes] = []
    weights: dict[str, np.ndarray] = {}
    outputs: dict[str, Dims] = {}
    for kind, channels in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
        for step in STEPS:
            name = f"{kind}_{step}"
            taps = np.zeros((channels, 3, step, step), np.float32)
            bias = np.zeros(channels, np.float32)
            if kind in {"cls", "obj"} and step == STEPS[0]:
                taps[0, :, step // 2, step // 2] = np.array([-0.5, -0.5, 1.0]) / 255  # blue, green, red
            if kind == "bbox":
                bias[:] = (0.5, 0.5, 0.7, 0.7)
            fixed = [size // step for size in sizes if isinstance(size, int)]
            rows = np.array([1, int(np.prod(fixed)) if fixed else -1, channels], np.int64)
            weights |= {f"w_{name}": taps, f"b_{name}": bias, f"s_{name}": rows}
            nodes.append(
                _node(
                    "Conv",
                    ["input", f"w_{name}", f"b_{name}"],
                    [f"c_{name}"],
                    kernel_shape=[step] * 2,
                    strides=[step] * 2,
                )
            )
            nodes.append(_node("Transpose", [f"c_{name}"], [f"t_{name}"], perm=[0, 2, 3, 1]))
            nodes.append(_node("Reshape", [f"t_{name}", f"s_{name}"], [name]))
            outputs[name] = [1, f"n{step}", channels]
    return write_onnx(path, nodes, weights, {"input": [1, 3, *sizes]}, outputs, {})


def write_onnx(
    path: Path,
    nodes: Sequence[bytes],
    weights: Mapping[str, np.ndarray],
    inputs: Mapping[str, Dims],
    outputs: Mapping[str, Dims],
    notes: Mapping[str, str],
) -> Path:
    """A model (IR version 7, operators of version 12)."""
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, b"tiny")
    graph += b"".join(_field(5, _tensor(name, values)) for name, values in weights.items())
    graph += b"".join(_field(11, _value(name, dims)) for name, dims in inputs.items())
    graph += b"".join(_field(12, _value(name, dims)) for name, dims in outputs.items())
    model = _number(1, 7) + _field(2, b"tests") + _field(7, graph) + _field(8, _number(2, 12))
    model += b"".join(
        _field(14, _field(1, key.encode()) + _field(2, text.encode())) for key, text in notes.items()
    )
    path.write_bytes(model)
    return path


def _node(
    kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: int | Sequence[int]
) -> bytes:
    content = b"".join(_field(1, name.encode()) for name in inputs)
    content += b"".join(_field(2, name.encode()) for name in outputs)
    content += _field(3, outputs[0].encode()) + _field(4, kind.encode())
    for name, value in attributes.items():
        if isinstance(value, int):
            attribute = _number(3, value) + _number(20, 2)
        else:
            attribute = b"".join(_number(8, each) for each in value) + _number(20, 7)
        content += _field(5, _field(1, name.encode()) + attribute)
    return content


def _tensor(name: str, values: np.ndarray) -> bytes:
    kind = {"float32": 1, "int64": 7}[str(values.dtype)]
    content = b"".join(_number(1, size) for size in values.shape)
    return content + _number(2, kind) + _field(8, name.encode()) + _field(9, values.tobytes())


def _value(name: str, dims: Dims) -> bytes:
    shape = b"".join(
        _field(1, _number(1, size) if isinstance(size, int) else _field(2, size.encode())) for size in dims
    )
    kind = _field(1, _number(1, 1) + _field(2, shape))  # of 32 bit numbers
    return _field(1, name.encode()) + _field(2, kind)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    content = b""
    while value > 127:
        content += struct.pack("B", value & 127 | 128)
        value >>= 7
    return content + struct.pack("B", value)
