"""Bucket geometry against recorded cases, the known image trainer's, and pictures that differ each time."""

import random
from typing import Any

import numpy as np
import pytest

from dataset.sources.decoding import fit_of
from modules.media.augmenting import Face, change_colours, crop_anywhere, fit_face
from modules.media.buckets import (
    Fit,
    bucket_sizes,
    choose_bucket,
    fit_cover,
    how_to_resize,
    image_bucket_sizes,
    inner_box,
)
from modules.media.reading import fit_frame
from tests.dataset.making import subset_table
from tests.golden_cases import read_case

SELECTORS = read_case("buckets")[0]["selectors"]


def selector_name(selector: dict) -> str:
    flags = "bucketed" if selector["enable_bucket"] else "fixed"
    ending = "-no_upscale" if selector["bucket_no_upscale"] else ""
    return f"{selector['architecture']}-{selector['resolution']}-{flags}{ending}"


@pytest.mark.parametrize("selector", SELECTORS, ids=selector_name)
def test_recorded_pictures_get_their_recorded_bucket_and_fit(selector: dict) -> None:
    width, height = selector["resolution"]
    sizes = bucket_sizes(width, height, 16) if selector["enable_bucket"] else ((width, height),)
    if "all_buckets" in selector:
        assert sizes == tuple(map(tuple, selector["all_buckets"]))
    for case in selector["cases"]:
        no_upscale = selector["bucket_no_upscale"]
        bucket = choose_bucket(tuple(case["image"]), sizes, width * height, 16, no_upscale)
        fit = fit_cover(tuple(case["image"]), bucket)
        expected = Fit(
            tuple(case["resized"]), tuple(case["crop_left_top"]), tuple(case["bucket"]), case["interpolation"]
        )
        assert fit == expected, case["image"]


@pytest.mark.parametrize(
    ("resolution", "image", "bucket", "resized", "crop"),
    [
        ((960, 544), (300, 200), (880, 592), (888, 592), (4, 0)),
        ((960, 544), (500, 2000), (352, 1472), (368, 1472), (8, 0)),
        ((256, 256), (640, 480), (288, 224), (299, 224), (5, 0)),
        ((256, 256), (3000, 1000), (448, 144), (448, 149), (0, 2)),
    ],
)
def test_worked_examples_of_the_format(resolution, image, bucket, resized, crop) -> None:
    sizes = bucket_sizes(*resolution, 16)

    chosen = choose_bucket(image, sizes, resolution[0] * resolution[1], 16, no_upscale=False)

    fit = fit_cover(image, chosen)
    assert (chosen, fit.resized, fit.crop) == (bucket, resized, crop)


def test_every_bucket_is_its_own_nearest_bucket() -> None:
    for resolution in ((960, 544), (256, 256), (64, 48), (32, 32)):
        sizes = bucket_sizes(*resolution, 16)
        area = resolution[0] * resolution[1]
        for no_upscale in (False, True):
            assert [choose_bucket(size, sizes, area, 16, no_upscale) for size in sizes] == list(sizes)


def test_a_single_step_is_the_smallest_area() -> None:
    assert bucket_sizes(16, 16, 16) == ((16, 16),)
    with pytest.raises(ValueError, match="smaller than one 16x16 bucket"):
        bucket_sizes(15, 16, 16)


def test_a_picture_thinner_than_a_step_cannot_keep_its_size() -> None:
    with pytest.raises(ValueError, match="side under 16"):
        choose_bucket((10, 200), bucket_sizes(256, 256, 16), 256 * 256, 16, no_upscale=True)


def test_the_short_side_just_above_the_root_has_its_bucket() -> None:
    """Of most areas it is a long side too; not of this one, whose root is no multiple of the step."""
    wide = ((80, 48), (96, 48), (144, 32))
    assert bucket_sizes(70, 70, 16) == ((32, 144), (48, 80), (48, 96), (64, 64), *wide)


@pytest.mark.parametrize(("size", "bucket"), [((1024, 64), (1024, 64)), ((1040, 64), (512, 128))])
def test_without_enlarging_a_picture_of_exactly_the_area_keeps_its_size(size, bucket) -> None:
    assert choose_bucket(size, bucket_sizes(256, 256, 16), 256 * 256, 16, no_upscale=True) == bucket


CASES = read_case("image_buckets")[0]["cases"]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_buckets_and_fits_are_those_of_the_known_trainer(tmp_path, case: dict[str, Any]) -> None:
    not_keys = {"min_max_used", "buckets", "images", "resolution"}
    keys = {name: value for name, value in case.items() if name not in not_keys}
    table = subset_table(tmp_path, resolution=case["resolution"], **keys)
    rule = table.buckets

    if "min_max_used" in case:
        assert [rule.minimum, rule.maximum] == case["min_max_used"]
    if "buckets" in case:
        sizes = image_bucket_sizes(table.resolution, rule.minimum, rule.maximum, rule.step)
        assert [list(size) for size in sizes] == case["buckets"]
    for size, bucket, resized, crop, interpolation, box in case["images"]:
        fit = fit_of(table, tuple(size), 16)
        assert [list(part) for part in (fit.bucket, fit.resized, fit.crop)] == [bucket, resized, crop], size
        assert fit.interpolation == interpolation, size
        assert list(inner_box(tuple(size), tuple(bucket))) == pytest.approx(box), size


@pytest.mark.parametrize(
    ("resized", "how"), [((64, 48), "none"), ((32, 24), "area"), ((80, 24), "lanczos"), ((32, 60), "lanczos")]
)
def test_a_picture_is_averaged_only_if_both_sides_shrink(resized: tuple[int, int], how: str) -> None:
    assert how_to_resize((64, 48), resized) == how


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
