"""ONNX files that would open others, or take memory without bound, are refused before anything runs them."""

import contextlib
from pathlib import Path

import numpy as np
import pytest

from modules.errors import CheckpointError
from post.faces.detectors import check_detector
from post.faces.onnx_header import read_onnx
from tests.tiny.onnx_files import _field, _node, _number, write_onnx, write_yolo, write_yunet

BIG = np.array([1, 60_000, 60_000], np.int64)
ONE = np.ones(3, np.float32)
Weights = dict[str, np.ndarray]


@pytest.mark.parametrize(
    ("node", "weights"),
    [
        (_node("ConstantOfShape", ["big"], ["y"]), {"big": BIG}),
        (_node("Expand", ["one", "big"], ["y"]), {"big": BIG, "one": ONE}),
        (_node("Tile", ["images", "big"], ["y"]), {"big": BIG}),
        (_node("Range", ["one", "big", "one"], ["y"]), {"big": np.array(1 << 40), "one": np.array(1)}),
        (_node("Resize", ["images", "one", "big"], ["y"]), {"big": np.array([1, 1, 99, 99], np.float32)}),
        (
            _node("Conv", ["images", "one"], ["y"], pads=[30_000] * 4),
            {"one": np.ones((1, 3, 1, 1), np.float32)},
        ),
        (
            _node("Mul", ["a", "b"], ["big"]),
            {"a": np.array([1, 900, 900]), "b": np.array([1, 90, 90])},
        ),
    ],
    ids=["filled", "expanded", "tiled", "counted", "enlarged", "padded", "multiplied"],
)
def test_operators_that_make_far_more_than_they_are_given(
    tmp_path: Path, node: bytes, weights: Weights
) -> None:
    nodes = [node, _node("Expand", ["images", "big"], ["z"])]
    path = write_onnx(tmp_path / "x.onnx", nodes, weights, {"images": [1, 3, 64, 64]}, {"z": [1, 5, 84]}, {})
    with pytest.raises(CheckpointError, match=r"cannot be used: '[yz]' (makes more numbers|asks for sizes)"):
        check_detector(path)


def tensor_of(*dims: int, more: bytes = b"") -> bytes:
    """A tensor that says a shape, and holds nothing but `more`."""
    return b"".join(_number(1, size) for size in dims) + _number(2, 1) + _field(8, b"w") + more


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (tensor_of(60_000, 60_000), "has not so many numbers"),
        (tensor_of(1 << 62, 1 << 62, more=_field(9, b"abcd")), "has not so many numbers"),
        (tensor_of(1, more=_field(13, _field(1, b"location") + _field(2, b"pipe"))), "in another file"),
        (tensor_of(1, more=_number(14, 1)), "in another file"),
    ],
)
@pytest.mark.parametrize("is_constant", [False, True])
def test_tensors_without_their_numbers(tmp_path: Path, tensor: bytes, said: str, is_constant: bool) -> None:
    path, graph = tmp_path / "x.onnx", _field(5, tensor)
    if is_constant:
        graph = _field(1, _field(2, b"y") + _field(4, b"Constant") + _field(5, _field(5, tensor)))
    whole = write_yolo(path).read_bytes()
    start = whole.index(_field(2, b"tests")) + len(_field(2, b"tests"))
    inner, end = graph_at(whole, start)
    path.write_bytes(whole[:start] + _field(7, inner + graph) + whole[end:])
    with pytest.raises(CheckpointError, match=said):
        check_detector(path)


def graph_at(content: bytes, start: int) -> tuple[bytes, int]:
    """The graph whose field begins there, and where it ends."""
    size = place = 0
    start += 1
    while True:
        size |= (content[start] & 127) << (7 * place)
        start, place = start + 1, place + 1
        if content[start - 1] < 128:
            return content[start : start + size], start + size


def test_pictures_larger_than_any_detector_takes(tmp_path: Path) -> None:
    path = write_onnx(
        tmp_path / "x.onnx", [b""], {}, {"images": [1, 3, 100_000, 100_000]}, {"y": [1, 5, 84]}, {}
    )
    with pytest.raises(CheckpointError, match="its input images has the shape"):
        check_detector(path)


def test_graphs_in_graphs_and_a_million_parts_end(tmp_path: Path) -> None:
    inner = b""
    for _ in range(60):
        inner = _field(1, _field(5, _field(6, inner)))
    many = _field(1, _field(1, b"") * 2_000_000)
    for graph, said in ((inner, "graphs in graphs"), (many, "more than 1,048,576 parts")):
        path = tmp_path / "x.onnx"
        path.write_bytes(_number(1, 7) + _field(7, graph + _field(12, b"")))
        with pytest.raises(CheckpointError, match=said):
            check_detector(path)


def test_damage_anywhere_is_one_message(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0)
    for write in (write_yolo, write_yunet):
        path = write(tmp_path / "x.onnx")  # type: ignore[operator]
        content = path.read_bytes()
        for _ in range(100):
            damaged = bytearray(content)
            for place in numbers.integers(0, len(content), 3):
                damaged[place] = numbers.integers(0, 256)
            path.write_bytes(bytes(damaged))
            with contextlib.suppress(CheckpointError):
                read_onnx(path)
