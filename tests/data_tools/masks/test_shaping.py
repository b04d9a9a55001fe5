"""From values to masks: each number of the options against a plain account of what it does."""

import numpy as np
import pytest
from numpy.typing import NDArray

from data_tools.masks.shaping import MaskShaping, ScoreMap, combine, median_over_time
from modules.errors import MediaError
from tests.data_tools.masks.making import rectangle


def values_of(*box: int) -> ScoreMap:
    return (rectangle(*box) / 255).astype(np.float32)


def find(
    values: ScoreMap, threshold: float = 0.3, smooth: int = 0, expand: int = 0, feather: int = 0
) -> ScoreMap:
    shape = MaskShaping(threshold, smooth, expand, feather, inverts=False)
    return shape.shape(values, (values.shape[1], values.shape[0]))


@pytest.mark.parametrize("pixels", [0, 1, 7, 15])
def test_expanding_grows_by_exactly_so_many_pixels_on_each_side(pixels: int) -> None:
    found = find(values_of(12, 10, 30, 26), expand=pixels)
    grown = rectangle(12 - pixels, 10 - pixels, 30 + pixels, 26 + pixels)
    np.testing.assert_array_equal(found * 255, grown)


def test_smoothing_is_the_mean_of_a_box_on_the_networks_grid_with_repeated_edges() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((9, 11), np.float32)
    padded = np.pad(values, 2, mode="edge")
    means = np.array([[padded[y : y + 5, x : x + 5].mean() for x in range(11)] for y in range(9)])
    for threshold in (0.4, 0.5, 0.6):
        np.testing.assert_array_equal(find(values, threshold, smooth=2), means > threshold)
    # on the grid: in a picture five times as large, one pixel of the network is five pixels
    dot = np.zeros((9, 11), np.float32)
    dot[4, 5] = 1
    shape = MaskShaping(0.055, smooth_pixels=1, expand_pixels=0, feather_pixels=0, inverts=False)
    rows, columns = np.nonzero(shape.shape(dot, (55, 45)))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (15, 15)


def test_a_value_at_the_threshold_is_not_found() -> None:
    values = np.array([[0.25, 0.5, 0.75]], np.float32)
    np.testing.assert_array_equal(find(values, 0.5), [[0, 0, 1]])


def test_a_feathered_edge_fades_over_so_many_pixels() -> None:
    found = find(values_of(20, 10, 30, 26), feather=3)
    np.testing.assert_allclose(found[18, 15:21], [0, 0, 0.25, 0.5, 0.75, 1], atol=1e-6)
    np.testing.assert_allclose(found[18, 29:35], [1, 0.75, 0.5, 0.25, 0, 0], atol=1e-6)
    assert find(np.zeros((4, 4), np.float32), feather=3).max() == 0


NEW = np.array([[0, 1, 0.5]], np.float32)
OLD = np.array([[0.4, 0.4, 0.8]], np.float32)


@pytest.mark.parametrize(
    ("mode", "old", "expected"),
    [
        ("fill", OLD, [0, 0.5, 0.25]),
        ("replace", OLD, [0, 0.5, 0.25]),
        ("add", OLD, [0.4, 0.9, 1]),
        ("subtract", OLD, [0.4, 0, 0.55]),
        ("blend", OLD, [0.4 / 1.5, 0.9 / 1.5, 1.05 / 1.5]),
        ("add", None, [0, 0.5, 0.25]),
        ("subtract", None, [1, 0.5, 0.75]),
        ("blend", None, [0, 0.5, 0.25]),
    ],
)
def test_modes_join_the_new_mask_with_the_old_one(
    mode: str, old: ScoreMap | None, expected: list[float]
) -> None:
    np.testing.assert_allclose(combine(NEW, old, mode, 0.5), [expected], atol=1e-6)


def test_an_older_mask_of_another_size_is_resized_and_inverting_comes_before_joining() -> None:
    shape = MaskShaping(0.3, 0, 0, 0, inverts=True)
    found = values_of(0, 0, 30, 40)
    old = np.full((20, 30), 255, np.uint8)
    finished = shape.combine_with_previous(found, old, "subtract", 1)
    np.testing.assert_array_equal(finished, rectangle(0, 0, 30, 40))


def plain_median(values: NDArray[np.float32], frames: int) -> list[float]:
    last = len(values) - 1
    near = [[values[min(max(t + d, 0), last)] for d in range(-frames, frames + 1)] for t in range(last + 1)]
    return [float(np.median(each)) for each in near]


@pytest.mark.parametrize("count", [1, 2, 3, 9])
@pytest.mark.parametrize("frames", [0, 1, 2, 4])
def test_a_steady_value_is_the_median_over_neighbouring_frames(count: int, frames: int) -> None:
    values = np.random.default_rng(count).random(count, np.float32)
    clip = [np.full((2, 3), value, np.float32) for value in values]
    steadied = list(median_over_time(iter(clip), frames))
    np.testing.assert_array_equal([each[0, 0] for each in steadied], np.float32(plain_median(values, frames)))


def test_one_frame_that_flickers_leaves_no_trace() -> None:
    clip = [np.full((2, 3), float(number != 4), np.float32) for number in range(9)]
    assert all(frame.min() == 1 for frame in median_over_time(iter(clip), 2))
    with pytest.raises(MediaError, match="the size of its frames changes"):
        list(median_over_time(iter([clip[0], clip[0].T]), 2))
    assert list(median_over_time(iter([]), 2)) == []
