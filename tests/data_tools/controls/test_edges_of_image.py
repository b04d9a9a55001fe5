"""tools/canny.py: the edges of one image."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.faults.messages import assert_one_message, run_here, succeed_here

SCRIPT = "tools/canny.py"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:30, 20:40] = (40, 60, 50)  # weak edges
    pixels[5:9, 5:50] = 255
    Image.fromarray(pixels).save(tmp_path / "a ü.png")
    return tmp_path


def test_edges_are_those_of_opencv_at_the_thresholds_of_sd_scripts(folder: Path) -> None:
    succeed_here(SCRIPT, "--input", "a ü.png", "--output", "new/edges.png", folder=folder)
    succeed_here(
        SCRIPT, "--input", "a ü.png", "--output", "few.webp", "--thres1", 900, "--thres2", 500, folder=folder
    )

    gray = np.asarray(Image.open(folder / "a ü.png").convert("L"))
    default = np.asarray(Image.open(folder / "new" / "edges.png"))
    few = np.asarray(Image.open(folder / "few.webp").convert("RGB"))
    np.testing.assert_array_equal(default[..., 0], cv2.Canny(gray, 32, 224))
    np.testing.assert_array_equal(few[..., 1], cv2.Canny(gray, 500, 900))
    assert not np.array_equal(default, few)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--input", "a ü.png"], "--output"),
        (["a ü.png"], "--output"),
        (["--input", "nowhere.png", "--output", "b.png"], "nowhere.png"),
        (["--input", ".", "--output", "b.png"], "folder"),
        (["--input", "a ü.png", "--output", "b.txt"], "ends in .png"),
        (["--input", "a ü.png", "--output", "a ü.png"], "would be lost"),
        (["--input", "a ü.png", "--output", "b.png", "--thres1", "-3"], "from 0 to"),
        (["--input", "notes.png", "--output", "b.png"], "notes.png"),
    ],
)
def test_what_cannot_be_drawn_is_refused(words: list[str], reason: str, folder: Path) -> None:
    (folder / "notes.png").write_text("no image", encoding="utf-8")
    code, said = run_here(SCRIPT, *words, folder=folder)
    assert_one_message(code, said, reason, remedy=False)
    assert not (folder / "b.png").exists()
