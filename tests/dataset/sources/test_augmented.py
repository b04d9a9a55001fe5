"""A picture decoded as it is trained this time, with its mask."""

import random
from pathlib import Path

import numpy as np
from PIL import Image

from dataset.sources.decoding import decode_source
from dataset.sources.listing import find_sources
from tests.dataset.making import subset_table


def test_a_mask_is_cropped_and_mirrored_as_its_picture(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    (tmp_path / "masks").mkdir()
    grey = np.random.default_rng(0).integers(0, 256, (64, 96), np.uint8)
    for folder in ("pics", "masks"):
        Image.fromarray(np.repeat(grey[..., None], 3, axis=2)).save(tmp_path / folder / "a.png")
    masks = str(tmp_path / "masks")
    table = subset_table(tmp_path, random_crop=True, flip_aug=True, mask_directory=masks)
    (source,) = find_sources(table, captions=False)

    drawn = [decode_source(source, 1.0, numbers=random.Random(seed)) for seed in range(40)]
    plain = decode_source(source, 1.0)

    for one in (plain, *drawn):
        np.testing.assert_array_equal(one.frames[0, ..., 0], one.mask[0])
    np.testing.assert_array_equal(plain.frames[0, ..., 0], grey[:, 16:80])
    found = {one.frames.tobytes() for one in drawn}
    assert len(found) > 20
    assert found == {decode_source(source, 1.0, numbers=random.Random(n)).frames.tobytes() for n in range(40)}
    sides = [
        any(np.array_equal(one.frames[0, ..., 0], grey[:, left : left + 64]) for left in range(33))
        for one in drawn
    ]
    assert 10 < sum(sides) < 30  # the others are mirrored
