"""Pictures of a family whose pixels have alpha: it is resized, cropped and mirrored with the colors."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_tools.report.views import side_by_side
from dataset.config import DatasetTable
from dataset.listing import find_sources
from dataset.sources.colors import find_colors
from dataset.sources.decoding import DecodedMedia, decode_source
from dataset.table import Augmentation
from modules.media.reading import add_alpha, join_alpha, split_alpha
from tests.dataset.edit_sets import make_set
from tests.dataset.making import make_image, make_table

SIDE = 32


def write_random(path: Path, width: int, height: int, channels: int = 4) -> NDArray[np.uint8]:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, channels), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def decode(table: DatasetTable, **asked: Any) -> DecodedMedia:
    (source,) = find_sources(table)
    return decode_source(source, 1.0, step=16, has_alpha=True, **asked)


def image_table(folder: Path, **keys: Any) -> DatasetTable:
    return make_table(folder, "image_directory", resolution=(SIDE, SIDE), **keys)


def test_a_picture_keeps_its_alpha_at_its_own_size_and_gets_one_if_it_has_none(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    clear = write_random(tmp_path / "a" / "clear.png", SIDE, SIDE)
    plain = write_random(tmp_path / "b" / "plain.png", SIDE, SIDE, channels=3)

    decoded = decode(image_table(tmp_path / "a"))

    np.testing.assert_array_equal(decoded.frames[0], clear)
    assert decoded.alpha is None  # which would mask the latents
    np.testing.assert_array_equal(decode(image_table(tmp_path / "b")).frames[0], add_alpha(plain))


def test_an_enlarged_picture_is_that_of_pillow(tmp_path: Path) -> None:
    """Pillow weighs colors by their alpha: what is transparent does not bleed into what is not."""
    clear = write_random(tmp_path / "clear.png", 16, 16)

    decoded = decode(image_table(tmp_path))

    expected = Image.fromarray(clear).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(decoded.frames[0], np.asarray(expected))


def test_a_reduced_and_cropped_picture_has_alpha_like_a_fourth_colour(tmp_path: Path) -> None:
    clear = write_random(tmp_path / "clear.png", 80, 64)

    decoded = decode(image_table(tmp_path, enable_bucket=True))

    assert decoded.frames.shape[-1] == 4
    channels = []
    for number in range(4):
        gray = np.repeat(clear[..., number : number + 1], 3, axis=2)
        Image.fromarray(gray).save(tmp_path / "clear.png")
        channels.append(decode(image_table(tmp_path, enable_bucket=True)).frames[0, ..., 0])
    np.testing.assert_array_equal(decoded.frames[0], np.stack(channels, axis=-1))


def test_what_is_mirrored_and_recoloured_keeps_its_alpha_in_place(tmp_path: Path) -> None:
    pixels = np.full((SIDE, SIDE, 4), 90, np.uint8)
    pixels[:, : SIDE // 2, 3] = 10
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    table = image_table(tmp_path, augmentation=Augmentation(flip=True, color=True))

    sides = set()
    for seed in range(8):
        alpha = decode(table, rng=random.Random(seed)).frames[0, ..., 3]
        assert {int(alpha[0, 0]), int(alpha[0, -1])} == {10, 90}
        sides.add(int(alpha[0, 0]))
    assert sides == {10, 90}


def test_alpha_that_is_the_mask_of_the_loss_is_no_transparency(tmp_path: Path) -> None:
    clear = write_random(tmp_path / "clear.png", SIDE, SIDE)

    decoded = decode(image_table(tmp_path, alpha_mask=True))

    np.testing.assert_array_equal(decoded.frames[0], add_alpha(clear[..., :3]))
    assert decoded.mask is not None
    np.testing.assert_array_equal(decoded.mask[0], clear[..., 3])


def test_references_keep_their_alpha_in_their_own_size_and_in_that_of_the_picture(tmp_path: Path) -> None:
    config = make_set(tmp_path, {"a": ((48, 32), (64, 48))})
    clear = write_random(tmp_path / "refs" / "a_0.png", 48, 32)
    make_image(tmp_path / "refs" / "a_1.png", (64, 48))
    (table,) = config.datasets

    fitted = decode(table)
    config = make_set(tmp_path, {"a": ((48, 32), (64, 48))}, keys="no_resize_control = true")
    kept = decode(config.datasets[0])

    assert [frames.shape for frames in fitted.control] == [(1, 48, 64, 4), (1, 48, 64, 4)]
    np.testing.assert_array_equal(kept.control[0][0], clear)
    assert (fitted.control[1][..., 3] == 255).all()


def test_without_it_pictures_and_references_are_on_white_as_ever(tmp_path: Path) -> None:
    config = make_set(tmp_path, {"a": ((64, 48),)})
    write_random(tmp_path / "refs" / "a_0.png", 64, 48)
    write_random(tmp_path / "pics" / "a.png", 64, 48)
    (source,) = find_sources(config.datasets[0])

    decoded = decode_source(source, 1.0)

    for frames, folder in ((decoded.frames, "pics/a"), (decoded.control[0], "refs/a_0")):
        image = Image.open(tmp_path / f"{folder}.png")
        on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        assert frames.shape[-1] == 3
        # rounded in another way
        assert abs(frames[0].astype(int) - np.asarray(on_white, int)).max() <= 1


def test_reports_show_transparency_and_do_not_call_it_filled(tmp_path: Path) -> None:
    write_random(tmp_path / "clear.png", SIDE, SIDE)
    table = image_table(tmp_path)
    sources = find_sources(table)

    assert side_by_side(decode(table)).shape == (1, SIDE, SIDE, 3)
    assert "filled with white" in str(find_colors(sources))
    assert find_colors(sources, keeps_alpha=True) == []


@pytest.mark.parametrize("size", [(16, 24), (8, 12)])
def test_alpha_is_split_off_and_joined_again(size: tuple[int, int]) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (24, 16, 4), np.uint8)

    colors, alpha = split_alpha(frame)

    assert alpha is not None
    resized = np.asarray(Image.fromarray(colors).resize(size))
    joined = join_alpha(resized, alpha)
    np.testing.assert_array_equal(joined[..., :3], resized)
    if size == (16, 24):
        np.testing.assert_array_equal(joined, frame)
    assert split_alpha(colors)[1] is None
    assert join_alpha(colors, None) is colors


def test_both_pictures_of_a_pair_have_alpha(tmp_path: Path) -> None:
    write_random(tmp_path / "better" / "a.png", SIDE, SIDE)
    rejected = write_random(tmp_path / "worse" / "a.png", SIDE, SIDE)
    table = image_table(tmp_path / "better", worse_directory=tmp_path / "worse")

    decoded = decode(table)

    assert decoded.rejected is not None
    np.testing.assert_array_equal(decoded.rejected[0], rejected)
    assert decoded.frames.shape == decoded.rejected.shape
