"""Detectors told by what their files hold, and files that are none."""

import contextlib
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from modules import limits, onnx_models
from modules.errors import CheckpointError
from modules.onnx_models import load_onnx
from postprocessing.faces.boxes import FoundFace, select_best
from postprocessing.faces.detectors import check_detector, load_detector
from postprocessing.faces.yolo import YoloDetector, YoloLayout
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
    # of two classes the second one has no numbers here: a box, one class, and what is not a class
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


def test_a_yunet_that_cannot_be_run_is_named(tmp_path: Path) -> None:
    path = write_yunet(tmp_path / "yunet.onnx")
    damaged = path.read_bytes().replace(b"Transpose", b"Transmute")
    path.write_bytes(damaged)

    with pytest.raises(CheckpointError, match="yunet.onnx cannot be run by onnxruntime: .*Transmute"):
        load_detector(path, CPU)


def test_overlapping_boxes_give_way_to_the_best() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [0, 5, 10, 15]], np.float32)
    scores = np.array([0.8, 0.9, 0.7, 0.6], np.float32)

    assert select_best(boxes, scores, 0.4) == [1, 2, 3]
    assert select_best(boxes, scores, 0.2) == [1, 2]
    assert select_best(boxes, scores, 0.4, maximum=1) == [1]
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
    return YoloDetector(Path("yolo.onnx"), None, layout)._decode(result.astype(np.float32), 0.5)


def test_results_of_a_yolo_are_read_in_each_way_in_which_they_are_given() -> None:
    points = np.arange(15.0)
    row = np.array([50, 40, 20, 10, 0.9, *points])
    num_positions = np.zeros((84, 20))  # 8 x 8 + 4 x 4 + 2 x 2
    num_positions[7] = row
    expected = points.reshape(5, 3)[:, :2]

    for classes, landmarks, result in ((None, 0, num_positions), (1, 3, num_positions.T)):
        boxes, scores, found = rows_of(YoloLayout(64, classes, landmarks), result)
        assert boxes.tolist() == [[40, 35, 60, 45]]
        assert scores.tolist() == [pytest.approx(0.9)]
        assert (found[0] == expected).all()
    boxes, scores, found = rows_of(YoloLayout(64, 2, 0), num_positions[:, :6] + np.eye(6)[5] * 0.6)
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
        nodes = [_node("Flatten", ["x"], ["y"])]
        return write_onnx(path, nodes, {}, {"x": [1, 3, 8, 8]}, {"y": [1, 192]}, {})

    for name, write, said in (
        ("taehv.pth", write_taehv, "not a detector of faces"),
        ("text.onnx", lambda path: path.write_text("hello, this is not a model"), "is not an ONNX file"),
        ("empty.onnx", lambda path: path.touch(), "is not an ONNX file"),
        ("page.pth", lambda path: path.write_text("<html><body>log in"), "is a web page"),
        ("gone.onnx", lambda path: path, "there is no such file"),
        ("gone.pth", lambda path: path, "there is no such file"),
        ("other.onnx", write_other, "neither a YuNet nor a YOLO"),
        ("turned.onnx", lambda path: write_yolo(path, notes={"task": "obb"}), "a YOLO for obb"),
    ):
        write(tmp_path / name)
        with pytest.raises(CheckpointError, match=said):
            check_detector(tmp_path / name)


def test_a_broken_off_download_and_a_damaged_archive_are_refused(tmp_path: Path) -> None:
    large = write_yolo(tmp_path / "large.onnx")
    with large.open("r+b") as file:
        file.truncate(1 << 24)  # as a download that was given up
    with pytest.raises(CheckpointError, match="is not an ONNX file"):
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


IMAGE = np.zeros((1, 3, 64, 64), np.float32)
Weights = dict[str, np.ndarray]
ONE = np.ones((1, 1), np.float32)
HUGE = np.array([1 << 15, 1 << 16], np.int64)  # 8 GiB of float32
# graphs whose "y" is far larger than what they are given
HOSTILE: dict[str, tuple[list[bytes], Weights]] = {
    "filled": ([_node("ConstantOfShape", ["s"], ["y"])], {"s": HUGE}),
    "filled beyond any memory": (
        [_node("ConstantOfShape", ["s"], ["y"])],
        {"s": np.array([1 << 20, 1 << 20], np.int64)},
    ),
    "expanded": ([_node("Expand", ["one", "s"], ["y"])], {"one": ONE, "s": HUGE}),
    "expanded from images": (
        [_node("Expand", ["images", "s"], ["y"])],
        {"s": np.array([10**4, 1, 1, 1, 1], np.int64)},
    ),
    "tiled": ([_node("Tile", ["one", "s"], ["y"])], {"one": ONE, "s": HUGE}),
    "multiplied": (
        [_node("MatMul", ["a", "b"], ["y"])],
        {"a": np.ones((1 << 14, 1), np.float32), "b": np.ones((1, 1 << 15), np.float32)},
    ),
    "joined": (
        [_node("Concat", ["images"], ["x0"], axis=1)]
        + [_node("Concat", [f"x{i}", f"x{i}"], [f"x{i + 1}"], axis=1) for i in range(16)]
        + [_node("Identity", ["x16"], ["y"])],
        {},
    ),
    "channels": (
        [_node("Conv", ["images", "w"], ["y"])],
        {"w": np.zeros((90_000, 3, 1, 1), np.float32)},
    ),
}


def peak_bytes() -> int:
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize(("nodes", "weights"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("has_system_bound", [True, False])
def test_a_small_file_cannot_take_unbounded_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[bytes],
    weights: Weights,
    has_system_bound: bool,
) -> None:
    if not has_system_bound:  # as on Windows and macOS
        monkeypatch.setattr(onnx_models, "limited_memory", contextlib.nullcontext)
    monkeypatch.setattr(limits, "MAX_ONNX_MEMORY", 1 << 28)
    end = [_node("ReduceMax", ["y"], ["m"], keepdims=0), _node("Add", ["images", "m"], ["z"])]
    shape = [1, 3, 64, 64]
    path = write_onnx(tmp_path / "x.onnx", [*nodes, *end], weights, {"images": shape}, {"z": shape}, {})
    before = 0 if sys.platform == "win32" else peak_bytes()
    with pytest.raises(CheckpointError, match="x.onnx cannot be run by onnxruntime: "):
        load_onnx(path).run(IMAGE)
    if before:
        assert peak_bytes() - before < 1 << 29


def write_loop(path: Path, count: int) -> Path:
    """An image, to which a loop of so many rounds adds nothing."""

    def value(name: str, kind: int, *dims: int) -> bytes:
        shape = b"".join(_field(1, _number(1, size)) for size in dims)
        return _field(1, name.encode()) + _field(2, _field(1, _number(1, kind) + _field(2, shape)))

    body = _field(1, _node("Identity", ["goes_on"], ["more"])) + _field(1, _node("Identity", ["x"], ["same"]))
    body += _field(2, b"body")
    body += b"".join(_field(11, one) for one in (value("i", 7), value("goes_on", 9), value("x", 1, 1)))
    body += b"".join(_field(12, one) for one in (value("more", 9), value("same", 1, 1)))
    loop = b"".join(_field(1, name) for name in (b"count", b"", b"start"))
    loop += (
        _field(2, b"y")
        + _field(4, b"Loop")
        + _field(5, _field(1, b"body") + _field(6, body) + _number(20, 5))
    )
    weights = {"count": np.array(count), "start": np.zeros(1, np.float32)}
    nodes = [loop, _node("Add", ["images", "y"], ["z"])]
    return write_onnx(path, nodes, weights, {"images": [1, 3, 64, 64]}, {"z": [1, 3, 64, 64]}, {})


def test_a_loop_without_an_end_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (same,) = load_onnx(write_loop(tmp_path / "short.onnx", 3)).run(IMAGE + 2)
    np.testing.assert_array_equal(same, IMAGE + 2)
    monkeypatch.setattr(limits, "MAX_ONNX_SECONDS", 0.2)
    with pytest.raises(CheckpointError, match="endless.onnx cannot be run by onnxruntime: "):
        load_onnx(write_loop(tmp_path / "endless.onnx", 1 << 62)).run(IMAGE)


def tensor_of(*dims: int, more: bytes = b"") -> bytes:
    """A tensor that says a shape, and holds nothing but `more`."""
    return b"".join(_number(1, size) for size in dims) + _number(2, 1) + _field(8, b"w") + more


@pytest.mark.parametrize(
    "tensor",
    [
        tensor_of(60_000, 60_000),
        tensor_of(1 << 62, 1 << 62, more=_field(9, b"abcd")),
        tensor_of(1, more=_field(13, _field(1, b"location") + _field(2, b"../secret")) + _number(14, 1)),
        tensor_of(1, more=_field(13, _field(1, b"location") + _field(2, b"/dev/zero")) + _number(14, 1)),
    ],
)
def test_tensors_without_their_numbers_or_with_those_of_another_file(tmp_path: Path, tensor: bytes) -> None:
    (tmp_path / "secret").write_bytes(b"abcd")
    folder = tmp_path / "model"
    folder.mkdir()
    shape = [1, 3, 64, 64]
    path = write_onnx(
        folder / "x.onnx", [_node("Add", ["images", "w"], ["z"])], {}, {"images": shape}, {"z": shape}, {}
    )
    path.write_bytes(
        path.read_bytes() + _field(7, _field(5, tensor))
    )  # a second part of the graph, which is merged
    with pytest.raises(CheckpointError, match="x.onnx"):
        load_onnx(path)


def test_pictures_larger_than_any_detector_takes(tmp_path: Path) -> None:
    shape = [1, 3, 100_000, 100_000]
    nodes = [_node("Identity", ["images"], ["y"])]
    path = write_onnx(tmp_path / "x.onnx", nodes, {}, {"images": shape}, {"y": shape}, {})
    with pytest.raises(CheckpointError, match="its input images has the shape"):
        check_detector(path)


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
                load_detector(path, CPU)
