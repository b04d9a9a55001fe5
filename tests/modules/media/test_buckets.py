"""Bucket geometry against the recorded cases and the table of the format."""

import pytest

from modules.media.buckets import Fit, bucket_sizes, choose_bucket, fit_cover
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
