"""--check of masks: how much of each is learned, and those that teach nothing or fit nothing."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.report.check import check_caching
from dataset.config import load_dataset_config
from tests.dataset.making import make_clip, make_image
from tests.dataset.toy_family import ToyFamily


def draw_mask(path: Path, rows: slice, size: tuple[int, int] = (64, 64)) -> None:
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[rows] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def check(tmp_path: Path, key: str, masks: str, more: str = "") -> list[str]:
    config = tmp_path / "dataset.toml"
    lines = [
        "[[datasets]]",
        f'{key} = "{(tmp_path / "media").as_posix()}"',
        f'mask_directory = "{(tmp_path / masks).as_posix()}"',
        f'cache_directory = "{(tmp_path / "cache").as_posix()}"',
        'caption_extension = ".txt"',
        "resolution = [64, 64]",
        more,
    ]
    config.write_text("\n".join(lines), encoding="utf-8")
    result = check_caching(ToyFamily(), load_dataset_config(config), workers=1, skip_existing=False)
    return [line.strip() for line in result.lines]


def make_images(tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    for name in names:
        make_image(folder / f"{name}.png", size=(64, 64))
        (folder / f"{name}.txt").write_text("a caption", encoding="utf-8")
    return folder


def test_masks_are_measured_in_latents_and_useless_ones_are_named(tmp_path: Path) -> None:
    make_images(tmp_path, "half", "black", "thin", "bare")
    masks = tmp_path / "masks"
    draw_mask(masks / "half.png", slice(0, 32))
    draw_mask(masks / "black.png", slice(0, 0))
    draw_mask(masks / "thin.png", slice(33, 35))  # 2 of the 8 rows of a latent
    draw_mask(masks / "nobody.png", slice(0, 32))

    lines = check(tmp_path, "image_directory", "masks")

    assert "3 of 4 have a mask; the others are used completely" in lines
    (measured,) = [line for line in lines if "measured: on average" in line]
    assert measured.startswith(
        "3 masks measured: on average 17% of the latents are learned (weight above 0.5), the fewest with "
    )
    text = "\n".join(lines)
    assert "1 masks are all black" not in text
    for words, name in (("all black", "black"), ("so thin", "thin"), ("belong to nothing", "nobody")):
        start = next(index for index, line in enumerate(lines) if words in line)
        assert lines[start + 1].endswith(f"{name}.png")


def test_masks_of_clips_are_measured_over_their_frames(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    make_clip(folder / "dance.mp4", 20, size=(64, 64))
    (folder / "dance.txt").write_text("a caption", encoding="utf-8")
    for number in range(20):  # learned in the first half of the time
        draw_mask(tmp_path / "masks" / "dance" / f"{number}.png", slice(0, 64 if number < 10 else 0))
    lines = check(tmp_path, "video_directory", "masks", "target_frames = [9]")
    (measured,) = [line for line in lines if "measured: on average" in line]
    assert measured.startswith("1 mask measured: on average 57%")  # 4 of the 7 frames that are looked at


@pytest.mark.parametrize("masks", ["masks", "media"])
def test_masks_of_onetrainer_are_masks_and_no_pictures(tmp_path: Path, masks: str) -> None:
    make_images(tmp_path, "cat")
    draw_mask(tmp_path / masks / "cat-masklabel.png", slice(0, 64))
    draw_mask(tmp_path / masks / "gone-masklabel.png", slice(0, 64))
    lines = check(tmp_path, "image_directory", masks)
    assert any("1 image, 1 item" in line for line in lines)
    assert any(line.startswith("1 mask measured: on average 100%") for line in lines)
    start = next(index for index, line in enumerate(lines) if "belong to nothing" in line)
    assert lines[start + 1].endswith("gone-masklabel.png")
