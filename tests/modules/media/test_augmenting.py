"""Pictures that differ each time: drawn by the generator alone."""

import random

import numpy as np
import pytest

from modules.media.augmenting import Face, change_colours, crop_anywhere, fit_face
from modules.media.buckets import fit_cover
from modules.media.reading import fit_frame

PICTURE = np.random.default_rng(1).integers(0, 256, (24, 40, 3), np.uint8)


def test_a_third_of_the_pictures_change_their_colours_a_little() -> None:
    changed = [change_colours(PICTURE, random.Random(seed)) for seed in range(300)]

    different = [one for one in changed if not np.array_equal(one, PICTURE)]
    assert 70 < len(different) < 130
    assert {one.shape for one in changed} == {PICTURE.shape}
    brightness = [abs(float(one.mean()) - PICTURE.mean()) for one in different]
    assert max(brightness) < 8


def test_gamma_keeps_black_and_white_and_hue_keeps_grey() -> None:
    grey = np.repeat(np.array([[[0], [255], [90]]], np.uint8), 3, axis=2)

    changed = [change_colours(grey, random.Random(seed))[0, :, 0] for seed in range(60)]

    assert all(one[0] == 0 and one[1] == 255 for one in changed)
    assert {int(one[2]) for one in changed} > {90}
    assert all(85 <= one[2] <= 95 for one in changed)


def test_a_crop_is_anywhere_in_the_picture() -> None:
    fit = fit_cover((40, 24), (24, 24))

    lefts = {crop_anywhere(fit, random.Random(seed)).crop for seed in range(300)}

    assert lefts == {(left, 0) for left in range(17)}
    np.testing.assert_array_equal(fit_frame(PICTURE, crop_anywhere(fit, random.Random(0))).shape, (24, 24, 3))


@pytest.mark.parametrize("anywhere", [False, True])
def test_a_crop_around_a_face_holds_it(anywhere: bool) -> None:
    face = Face(300, 120, 40, 50)

    for seed in range(50):
        fit = fit_face((640, 480), (128, 128), face, (2.0, 4.0), random.Random(seed), anywhere)
        scale = fit.resized[0] / 640
        left, top = (start / scale for start in fit.crop)
        assert 2.0 <= 128 / (50 * scale) <= 4.01 or scale == pytest.approx(128 / 480, abs=0.01)
        for start, middle, half in ((left, 300, 20), (top, 120, 25)):
            assert start <= middle - half + 1
            assert start + 128 / scale >= middle + half - 1
        assert all(
            0 <= start <= whole - part
            for start, whole, part in zip(fit.crop, fit.resized, fit.bucket, strict=True)
        )
