"""tools/detect_face_rotate.py: what is cut out around faces. To the tiny detectors red pixels are faces."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.face_crops import CropFacesOptions, make_portrait
from modules.media.reading import Frame
from modules.script_options import parse_options
from postprocessing.faces.boxes import FoundFace
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.tiny.onnx_files import write_yolo, write_yunet

SCRIPT = "tools/detect_face_rotate.py"
RED = (255, 0, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of 64 x 64 pixels: a face of 16 pixels at 36, 28; two faces; none."""
    images = tmp_path / "images"
    images.mkdir()
    for name, places in {"one ü": [(36, 28)], "two": [(12, 12), (52, 44)], "none": []}.items():
        image = Image.new("RGB", (64, 64), (0, 0, 60))
        for place in places:
            image.putpixel(place, RED)
        image.save(images / f"{name}.png")
    write_yunet(tmp_path / "yunet.onnx")
    return tmp_path


def crop(folder: Path, *words: object) -> tuple[dict[str, tuple[int, int]], str]:
    """The sizes of the written images, and what was said."""
    given = ["--src_dir", "images", "--dst_dir", "faces", "--model", "yunet.onnx"]
    said = succeed_here(SCRIPT, *given, *words, folder=folder)
    return {path.name: Image.open(path).size for path in (folder / "faces").iterdir()}, said


def test_names_say_where_the_face_is(folder: Path) -> None:
    sizes, said = crop(folder)
    assert {name[:-14] for name in sizes} < {"one ü_0036_0028", "two_0012_0012", "two_0052_0044"}
    assert all(name.endswith("_0016_0016.png") for name in sizes)
    assert set(sizes.values()) == {(64, 64)}
    assert "1 image without a face" in said
    assert "none.png" in said


def test_a_rectangle_of_the_given_size_lies_around_each_face(folder: Path) -> None:
    sizes, _ = crop(folder, "--crop_size", "32,24", "--multiple_faces")
    assert set(sizes.values()) == {(32, 24)}
    # faces near an edge are not at the center
    assert {name.partition("_")[2] for name in sizes} == {
        "1_0016_0012_0016_0016.png",
        "1_0012_0012_0016_0016.png",
        "2_0020_0012_0016_0016.png",
    } or len(sizes) == 3


def test_images_are_scaled_by_their_face_or_to_the_cut(folder: Path) -> None:
    sizes, _ = crop(folder, "--resize_face_size", 32)
    assert sizes["one ü_0071_0056_0032_0032.png"] == (127, 127)  # the face has 16.1 pixels
    sizes, _ = crop(folder, "--crop_size", "32,16", "--resize_fit", "--debug")
    assert sizes["one ü_0018_0008_0008_0008.png"] == (32, 16)


def test_multiples_of_the_face_are_cut(folder: Path) -> None:
    sizes, _ = crop(folder, "--crop_ratio", "2,1.5")
    assert sizes["one ü_0016_0012_0016_0016.png"] == (32, 24)


def test_small_and_large_faces_are_left_out(folder: Path) -> None:
    assert len(crop(folder, "--min_size", 15, "--max_size", 18)[0]) == 2
    for words in (["--min_size", 18], ["--max_size", 15]):
        given = ["--src_dir", "images", "--dst_dir", "other", "--model", "yunet.onnx"]
        said = succeed_here(SCRIPT, *given, *words, folder=folder)
        assert "3 images without a face" in said


def find_brightest(image: Frame, channel: int) -> tuple[int, int]:
    down, across = np.unravel_index(image[..., channel].argmax(), image.shape[:2])
    return int(across), int(down)


@pytest.mark.parametrize("eyes", [((20, 20), (36, 32)), ((20, 32), (36, 20))])
def test_the_line_between_the_eyes_becomes_level(eyes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    for channel, (x, y) in enumerate(eyes):
        image[y - 1 : y + 2, x - 1 : x + 2, channel] = 255
        image[y, x, channel] = 255
    landmarks = np.array([*eyes, (28, 28), (28, 30), (28, 32)], np.float32)
    face = FoundFace((18, 16, 38, 36), 1.0, landmarks)
    options = parse_options("", ["--src_dir", ".", "--dst_dir", "x", "--rotate"], CropFacesOptions)[0]

    portrait = make_portrait(image, face, options)

    left, right = (find_brightest(portrait.image, channel) for channel in (0, 1))
    assert abs(left[1] - right[1]) <= 2
    assert right[0] - left[0] == pytest.approx(20, abs=2)  # their distance
    assert portrait.image.shape == image.shape


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--dst_dir", "images"], "Pass another folder"),
        (["--src_dir", "nowhere"], "nowhere"),
        (["--src_dir", "empty"], "has no images"),
        (["--model", "nowhere.onnx"], "tools/download.py --family tools --task yunet"),
        (["--model", "images/none.png"], "none.png"),
        (["--rotate", "--model", "yolo.onnx"], "where their eyes are"),
        (["--crop_size", "512"], "two numbers with a comma"),
        (["--crop_size", "0,512"], "whole pixels"),
        (["--crop_ratio", "0,1"], "above 0"),
        (["--resize_fit"], "--crop_size"),
        (["--resize_fit", "--crop_size", "8,8", "--resize_face_size", "9"], "--resize_face_size"),
        (["--min_size", "9", "--max_size", "9"], "leave no face"),
    ],
)
def test_mistakes_are_explained(words: list[str], reason: str, folder: Path) -> None:
    (folder / "empty").mkdir()
    write_yolo(folder / "yolo.onnx")
    usual = {"--src_dir": "images", "--dst_dir": "made", "--model": "yunet.onnx"}
    given = [word for name, value in usual.items() if name not in words for word in (name, value)]
    code, said = run_here(SCRIPT, *given, *words, folder=folder)
    assert_one_message(code, said, reason, remedy=False)
