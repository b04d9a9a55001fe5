"""Buckets of image trainers, against those of the known one."""

from typing import Any

import pytest

from dataset.sources.decoding import fit_of
from modules.media.buckets import how_to_resize, image_bucket_sizes, inner_box
from tests.dataset.making import subset_table
from tests.golden_cases import read_case

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
