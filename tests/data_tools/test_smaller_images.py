"""tools/resize_images_to_resolution.py: smaller copies of a folder's images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.faults.messages import assert_one_message, run_here, succeed_here

SCRIPT = "tools/resize_images_to_resolution.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    pixels = np.zeros((80, 160, 4), np.uint8)
    pixels[..., 0] = np.arange(160)
    pixels[..., 3] = 255
    pixels[:40, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "images" / "wide ü.png")
    Image.new("RGB", (20, 30), (0, 200, 0)).save(tmp_path / "images" / "small.jpg")
    (tmp_path / "images" / "wide ü.txt").write_text("a wide one", encoding="utf-8")
    return tmp_path


def resize(folder: Path, *words: object) -> dict[str, tuple[int, int]]:
    """The sizes of the images that are there afterwards."""
    succeed_here(SCRIPT, "images", "made", *words, folder=folder)
    images = [path for path in (folder / "made").iterdir() if path.suffix in {".png", ".jpg"}]
    return {path.name: Image.open(path).size for path in images}


def test_each_size_limits_the_area_and_no_image_grows(folder: Path) -> None:
    sizes = resize(folder, "--max_resolution", "40x40, 64X64,")
    assert sizes == {
        "wide ü+40x40.jpg": (56, 28),
        "wide ü+64x64.jpg": (90, 45),
        "small+40x40.jpg": (20, 30),
        "small+64x64.jpg": (20, 30),
    }
    with Image.open(folder / "made" / "wide ü+64x64.jpg") as image:  # transparent parts are white
        assert image.getpixel((45, 5)) == (255, 255, 255)


def test_sides_are_multiples_and_captions_are_copied(folder: Path) -> None:
    words = ["--divisible_by", 16, "--save_as_png", "--copy_associated_files", "--interpolation", "lanczos4"]
    sizes = resize(folder, "--max_resolution", "64x64", *words)
    assert sizes == {"wide ü+64x64.png": (80, 32), "small+64x64.png": (16, 16)}
    assert (folder / "made" / "wide ü+64x64.txt").read_text(encoding="utf-8") == "a wide one"
    with Image.open(folder / "made" / "wide ü+64x64.png") as image:
        assert image.mode == "RGBA"


def test_copies_that_exist_stay(folder: Path) -> None:
    resize(folder, "--max_resolution", "40x40")
    (folder / "made" / "small+40x40.jpg").unlink()
    (folder / "made" / "wide ü+40x40.jpg").write_bytes(b"of the user")
    said = succeed_here(SCRIPT, "images", "made", "--max_resolution", "40x40", folder=folder)
    assert "1 image, 1 existed before" in said
    assert (folder / "made" / "wide ü+40x40.jpg").read_bytes() == b"of the user"
    assert (folder / "made" / "small+40x40.jpg").exists()


def test_an_image_that_cannot_be_read_is_named_at_the_end(folder: Path) -> None:
    (folder / "images" / "broken.png").write_bytes(b"no image")
    code, said = run_here(SCRIPT, "images", "made", "--max_resolution", "40x40", folder=folder)
    assert_one_message(code, said, "1 of the 3 images", "broken.png")
    assert (folder / "made" / "small+40x40.jpg").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["images"], "DST_IMG_FOLDER is missing"),
        (["images", "images"], "Pass another folder"),
        (["nowhere", "made"], "nowhere"),
        (["empty", "made"], "has no images"),
        (["images", "made", "--max_resolution", "512"], "with an x between"),
        (["images", "made", "--max_resolution", "0x512"], "with an x between"),
        (["images", "made", "--max_resolution", "16x16", "--divisible_by", "64"], "no room"),
        (["images", "made", "--max_resolution", ","], "is empty"),
        (["images", "made", "--interpolation", "magic"], "magic"),
        (["images", "images/small.jpg"], "small.jpg"),
        (["twice", "made"], "Rename"),
    ],
)
def test_mistakes_are_explained(words: list[str], reason: str, folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "twice").mkdir()
    for name in ("a.png", "a.bmp"):
        Image.new("RGB", (4, 4)).save(folder / "twice" / name)
    code, said = run_here(SCRIPT, *words, folder=folder)
    assert_one_message(code, said, reason, remedy=False)
    assert not (folder / "made").exists()
