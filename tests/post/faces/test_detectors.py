"""Detectors told by what their files hold, and files that are none."""

import contextlib
import itertools
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from modules import limits
from modules.errors import CheckpointError
from post.faces.boxes import FoundFace, select_best
from post.faces.detectors import check_detector, load_detector
from post.faces.onnx_header import read_onnx
from post.faces.onnx_sizes import Constant, Node, input_count, output_count
from post.faces.yolo import YoloDetector, YoloLayout
from tests.tiny.onnx_files import _field, _node, _number, write_onnx, write_yolo, write_yunet
from tests.tiny.post_faces import write_red_detector
from tests.tiny.taehv import write_taehv

CPU = torch.device("cpu")


def dotted(height: int, width: int, *centers: tuple[int, int], red: int = 255) -> np.ndarray:
    """A gray picture with red dots of 8 x 8 pixels around x, y."""
    pixels = np.full((height, width, 3), 60, np.uint8)
    for x, y in centers:
        pixels[y - 4 : y + 4, x - 4 : x + 4] = (red, 0, 0)
    return pixels


def surrounds(found: FoundFace, left: float, top: float, right: float, bottom: float) -> bool:
    """Whether a box holds all of another one."""
    box = found.box
    return box[0] <= left and box[1] <= top and box[2] >= right and box[3] >= bottom


def found_in(path: Path, pixels: np.ndarray, least_score: float = 0.5) -> list[FoundFace]:
    check_detector(path)
    return list(load_detector(path, CPU).find(pixels, least_score))


@pytest.mark.parametrize(
    ("is_turned", "height", "width"), [(False, 64, 96), (True, 128, 64), (False, 31, 33)]
)
def test_boxes_of_a_yolo_are_where_the_face_is_in_a_picture_of_any_shape(
    tmp_path: Path, is_turned: bool, height: int, width: int
) -> None:
    path = write_yolo(tmp_path / "yolo.onnx", is_turned=is_turned)
    pixels = np.full((height, width, 3), 60, np.uint8)
    middle, side = (height // 2, width // 2), max(height, width) / 8
    half = round(side / 2)
    pixels[middle[0] - half : middle[0] + half, middle[1] - half : middle[1] + half] = (255, 0, 0)

    found = found_in(path, pixels)

    assert found
    for each in found:
        x, y = (each.box[0] + each.box[2]) / 2, (each.box[1] + each.box[3]) / 2
        assert max(abs(x - middle[1]), abs(y - middle[0])) <= side
        assert each.box[2] - each.box[0] == pytest.approx(2 * side, rel=0.05)
    assert not found_in(path, np.full((height, width, 3), 60, np.uint8))


def test_notes_of_a_yolo_say_how_many_classes_it_has(tmp_path: Path) -> None:
    notes = {"task": "detect", "names": "{0: 'face', 1: 'plate'}"}
    path = write_yolo(tmp_path / "yolo.onnx", notes={"task": "pose", "names": "{0: 'face'}"})
    assert len(found_in(path, dotted(64, 64, (36, 28)))) == 1
    # of two classes the second one has no numbers here: a box, one class, and what is no class
    layout = load_detector(write_yolo(tmp_path / "two.onnx", notes=notes), CPU).layout  # type: ignore[attr-defined]
    assert layout.classes == 2


@pytest.mark.parametrize(("height", "scale"), [(48, 1), (32, 3), (20, 2)])
def test_a_yunet_for_one_size_looks_at_pictures_of_any(tmp_path: Path, height: int, scale: int) -> None:
    pixels = dotted(height, 64, (20, 12)).repeat(scale, axis=0).repeat(scale, axis=1)

    path = write_yunet(tmp_path / "yunet.onnx", (64, 64))
    for side in (None, 640, 64):  # the last: trial pictures must not be reduced to the one size
        assert load_detector(path, CPU, side=side).canvas == (64, 64)  # type: ignore[attr-defined]
    (found,) = found_in(path, pixels)

    assert surrounds(found, 16 * scale, 8 * scale, 24 * scale, 16 * scale)
    assert found.box[2] - found.box[0] == pytest.approx(16 * scale, rel=0.01)
    assert found.landmarks is not None
    assert found.landmarks.shape == (5, 2)


def test_a_yunet_that_this_opencv_cannot_run_is_named(tmp_path: Path) -> None:
    path = write_yunet(tmp_path / "yunet.onnx")
    damaged = path.read_bytes().replace(b"Transpose", b"Transmute")
    path.write_bytes(damaged)

    with pytest.raises(CheckpointError, match=r"cannot run it(.|\n)*2023mar(.|\n)*2026may"):
        load_detector(path, CPU)


def test_overlapping_boxes_give_way_to_the_best() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [0, 5, 10, 15]], np.float32)
    scores = np.array([0.8, 0.9, 0.7, 0.6], np.float32)

    assert select_best(boxes, scores, 0.4) == [1, 2, 3]
    assert select_best(boxes, scores, 0.2) == [1, 2]
    assert select_best(boxes, scores, 0.4, most=1) == [1]
    assert select_best(boxes[:0], scores[:0], 0.4) == []


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_box_that_is_not_finite_neither_hides_another_nor_is_hidden(broken: float) -> None:
    boxes = np.array([[0, 0, 10, 10], [broken, 0, broken, 10], [0, 0, 10, 10.5], [30, 0, 40, 10]], np.float32)

    with np.errstate(invalid="ignore"):
        assert select_best(boxes, np.array([0.9, 0.8, 0.7, 0.6], np.float32), 0.4) == [0, 1, 3]


def test_a_yolo_that_gives_no_numbers_is_an_error_and_not_a_picture_without_a_face(tmp_path: Path) -> None:
    path = write_yolo(tmp_path / "a.onnx", face=np.nan)

    with pytest.raises(CheckpointError, match="a.onnx is NaN"):
        found_in(path, dotted(64, 64))


def rows_of(layout: YoloLayout, result: np.ndarray) -> tuple[np.ndarray, ...]:
    return YoloDetector(Path("yolo.onnx"), None, layout)._read(result.astype(np.float32), 0.5)


def test_results_of_a_yolo_are_read_in_each_way_in_which_they_are_given() -> None:
    points = np.arange(15.0)
    row = np.array([50, 40, 20, 10, 0.9, *points])
    places = np.zeros((84, 20))  # 8 x 8 + 4 x 4 + 2 x 2
    places[7] = row
    expected = points.reshape(5, 3)[:, :2]

    for classes, landmarks, result in ((None, 0, places), (1, 3, places.T)):
        boxes, scores, found = rows_of(YoloLayout(64, classes, landmarks), result)
        assert boxes.tolist() == [[40, 35, 60, 45]]
        assert scores.tolist() == [pytest.approx(0.9)]
        assert (found[0] == expected).all()
    boxes, scores, found = rows_of(YoloLayout(64, 2, 0), places[:, :6] + np.eye(6)[5] * 0.6)
    assert len(boxes) == 84  # the second class, too
    assert found is None
    finished = np.array([[40, 35, 60, 45, 0.9, 0, *points], [1, 1, 2, 2, 0.4, 0, *points]])
    boxes, scores, found = rows_of(YoloLayout(64, 1, 3), finished)
    assert boxes.tolist() == [[40, 35, 60, 45]]
    assert (found[0] == expected).all()


def test_results_of_an_older_yolo_are_refused() -> None:
    with pytest.raises(CheckpointError, match="v5 and v7 are not supported"):
        rows_of(YoloLayout(64, None, 0), np.zeros((3 * 84, 16)))
    with pytest.raises(CheckpointError, match=r"\[300, 38\]"):
        rows_of(YoloLayout(64, 1, 0), np.zeros((300, 38)))


class Yolo:
    """What ultralytics pickles are to a program without it."""

    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("ultralytics.nn.tasks DetectionModel",))


def test_a_pickled_yolo_is_refused_with_the_way_to_export_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "face.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("yolo/data.pkl", pickle.dumps(Yolo()))

    with pytest.raises(CheckpointError, match=r"AGPL-3.0(.|\n)*yolo export model=face.pt format=onnx"):
        check_detector(path)

    assert not capsys.readouterr().out  # nothing of it has run


def test_files_that_are_no_detectors_are_named_as_what_they_are(tmp_path: Path) -> None:
    def write_other(path: Path) -> Path:
        return write_onnx(path, [b""], {}, {"x": [1, 3, 8, 8]}, {"y": [1, 8]}, {})

    for name, write, said in (
        ("taehv.pth", write_taehv, "not a detector of faces"),
        ("text.onnx", lambda path: path.write_text("hello, this is no model"), "is no ONNX file"),
        ("empty.onnx", lambda path: path.touch(), "is no ONNX file"),
        ("page.pth", lambda path: path.write_text("<html><body>log in"), "is a web page"),
        ("gone.onnx", lambda path: path, "there is no such file"),
        ("gone.pth", lambda path: path, "there is no such file"),
        ("other.onnx", write_other, "neither a YuNet nor a YOLO"),
        ("turned.onnx", lambda path: write_yolo(path, notes={"task": "obb"}), "a YOLO for obb"),
    ):
        write(tmp_path / name)
        with pytest.raises(CheckpointError, match=said):
            check_detector(tmp_path / name)


def test_a_file_too_large_for_onnx_and_a_damaged_archive_are_refused(tmp_path: Path) -> None:
    large = write_yolo(tmp_path / "large.onnx")
    with large.open("r+b") as file:
        file.truncate(2**29 + 1)  # a hole: it takes no space
    with pytest.raises(CheckpointError, match="larger than 512 MiB"):
        check_detector(large)

    with large.open("r+b") as file:
        file.truncate(1 << 24)  # as a download that was given up
    with pytest.raises(CheckpointError, match="is no ONNX file"):
        check_detector(large)

    packed = tmp_path / "a.pt"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"0123456789" * 99)
    content = bytearray(packed.read_bytes())
    content[42:48] = b"\xff" * 6  # of what is packed
    packed.write_bytes(content)
    with pytest.raises(CheckpointError):
        check_detector(packed)


def test_a_file_is_told_by_what_it_holds_not_by_its_name(tmp_path: Path) -> None:
    pixels = dotted(64, 96, (40, 32))
    torch_file = write_red_detector(tmp_path / "red.pth").rename(tmp_path / "red.onnx")
    yunet_file = write_yunet(tmp_path / "yunet.onnx").rename(tmp_path / "yunet.bin")

    assert len(found_in(torch_file, pixels)) == len(found_in(yunet_file, pixels)) == 1


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
        (_node("Mul", ["a", "b"], ["big"]), {"a": np.array([1, 900, 900]), "b": np.array([1, 90, 90])}),
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


MANY = np.array([10**4, 10, 1, 1], np.int64)
GROWING: dict[str, tuple[list[bytes], Weights]] = {
    "tiled": ([_node("Tile", ["images", "s"], ["y"])], {"s": MANY}),
    "tiled twice": (
        [_node("Tile", ["images", "s"], ["x"]), _node("Tile", ["x", "s"], ["y"])],
        {"s": np.array([1, 1, 64, 64], np.int64)},
    ),
    "by sizes of sizes": (
        [
            _node("Cast", ["s"], ["t"], to=7),
            _node("Identity", ["t"], ["u"]),
            _node("Tile", ["images", "u"], ["y"]),
        ],
        {"s": MANY},
    ),
    "by a power": (
        [_node("Pow", ["s", "s"], ["t"]), _node("Tile", ["images", "t"], ["y"])],
        {"s": np.array([9, 9, 9, 9], np.int64)},
    ),
    "expanded": (
        [_node("Expand", ["images", "s"], ["y"])],
        {"s": np.array([10**4, 1, 1, 1, 1], np.int64)},
    ),
    "joined": (
        [_node("Concat", ["images"], ["x0"], axis=0)]
        + [_node("Concat", [f"x{i}", f"x{i}"], [f"x{i + 1}"], axis=0) for i in range(20)],
        {},
    ),
    "one hot": (
        [_node("OneHot", ["images", "d", "v"], ["y"])],
        {"d": np.array([10**6], np.int64), "v": np.array([0, 1], np.float32)},
    ),
    "enlarged": (
        [_node("Resize", ["images", "", "f"], ["x"]), _node("Resize", ["x", "", "f"], ["y"])],
        {"f": np.array([1, 1, 16, 16], np.float32)},
    ),
    "channels": (
        [_node("Conv", ["images", "w"], ["x"]), _node("Conv", ["x", "v"], ["y"])],
        {"w": np.zeros((90_000, 3, 1, 1), np.float32), "v": np.zeros((3, 90_000, 1, 1), np.float32)},
    ),
}


@pytest.mark.parametrize(("nodes", "weights"), GROWING.values(), ids=GROWING)
def test_what_an_operator_multiplies_counts_too(tmp_path: Path, nodes: list[bytes], weights: Weights) -> None:
    path = write_onnx(tmp_path / "x.onnx", nodes, weights, {"images": [1, 3, 64, 64]}, {"y": [1, 5, 84]}, {})
    with pytest.raises(CheckpointError, match="makes more numbers than any detector"):
        check_detector(path)


def test_an_input_of_many_large_axes_is_refused(tmp_path: Path) -> None:
    """Their product is no float any more."""
    nodes = [_node("MaxPool", ["images"], ["y"], strides=[(1 << 63) - 1] * 20)]
    path = write_onnx(tmp_path / "x.onnx", nodes, {}, {"images": [4000] * 100}, {"y": [1, 5, 84]}, {})
    with pytest.raises(CheckpointError, match="makes more numbers than any detector"):
        check_detector(path)


def test_the_sizes_of_a_usual_detector_are_no_reason_to_refuse_it() -> None:
    """A U-Net of 640 pixels with 64 to 1024 channels, and boxes for 8400 places."""
    counts, constants = {"x0": input_count([None, 3, None, None])}, dict[str, Constant]()
    channels, most = [3, 64, 128, 256, 512, 1024], 0.0
    for index, (taken, made) in enumerate(itertools.pairwise(channels)):
        constants[f"w{index}"] = Constant((made, taken, 3, 3))
        node = Node("Conv", [f"x{index}", f"w{index}"], {"strides": [2, 2]})
        counts[f"x{index + 1}"] = output_count(node, counts, constants)
    assert counts["x5"] == 1024 * 20 * 20
    constants["twice"] = Constant((4,), (1.0, 1.0, 2.0, 2.0), is_float=True)
    for index in range(5, 1, -1):
        counts["up"] = output_count(Node("Resize", [f"x{index}", "", "twice"], {}), counts, constants)
        most = max(most, output_count(Node("Concat", ["up", f"x{index - 1}"], {}), counts, constants))
    assert most < limits.MAX_ONNX_VALUES
    counts["row"], constants["s"] = 8400.0, Constant((3,), (1.0, 4.0, 8400.0))
    assert output_count(Node("Expand", ["row", "s"], {}), counts, constants) == 4 * 8400


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
def test_tensors_without_their_numbers(tmp_path: Path, tensor: bytes, said: str) -> None:
    constant = _field(2, b"y") + _field(4, b"Constant") + _field(5, _field(5, tensor))
    for graph in (_field(1, b"") + _field(5, tensor), _field(1, constant)):
        path = tmp_path / "x.onnx"
        path.write_bytes(_number(1, 7) + _field(7, graph + _field(12, b"")))
        with pytest.raises(CheckpointError, match=said):
            check_detector(path)


def test_pictures_larger_than_any_detector_takes(tmp_path: Path) -> None:
    path = write_onnx(
        tmp_path / "x.onnx", [b""], {}, {"images": [1, 3, 100_000, 100_000]}, {"y": [1, 5, 84]}, {}
    )
    with pytest.raises(CheckpointError, match="its input images has the shape"):
        check_detector(path)


@pytest.mark.long
@pytest.mark.slow
def test_graphs_in_graphs_and_a_million_parts_end(tmp_path: Path) -> None:
    inner = b""
    for _ in range(60):
        inner = _field(1, _field(5, _field(6, inner)))
    many = _field(1, _field(1, b"") * 1_048_577)
    for graph, said in ((inner, "graphs in graphs"), (many, "more than 1,048,576 parts")):
        path = tmp_path / "x.onnx"
        path.write_bytes(_number(1, 7) + _field(7, graph + _field(12, b"")))
        with pytest.raises(CheckpointError, match=said):
            check_detector(path)


@pytest.mark.long
def test_damage_anywhere_is_one_message(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0)
    for write in (write_yolo, write_yunet):
        path = write(tmp_path / "x.onnx")  # type: ignore[operator]
        content = path.read_bytes()
        for _ in range(50):
            damaged = bytearray(content)
            for place in numbers.integers(0, len(content), 3):
                damaged[place] = numbers.integers(0, 256)
            path.write_bytes(bytes(damaged))
            with contextlib.suppress(CheckpointError):
                read_onnx(path)
