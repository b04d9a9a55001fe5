"""What is covered in pictures in which nothing was found."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from post.blurring.stage import cover
from post.blurring.tracks import Box, Tracks
from post.options import BlurOptions, ToolNetworkOptions

HOLD, LOOKBACK = 6, 4


def at(x: float, y: float = 50, size: float = 20) -> Box:
    return x - size / 2, y - size / 2, x + size / 2, y + size / 2


def followed(found: Mapping[int, Sequence[Box]], pictures: int) -> tuple[list[list[Box]], Tracks]:
    """What is covered in each picture, asked for as late as the stage does."""
    tracks, covered = Tracks(HOLD, LOOKBACK), []
    delay = max(HOLD, LOOKBACK)
    for index in range(pictures + delay):
        if index < pictures:
            tracks.see(index, found.get(index, []))
        if index >= delay:
            covered.append(tracks.boxes(index - delay))
            tracks.forget(index - delay)
    return covered, tracks


def holds(boxes: Sequence[Box], box: Box) -> bool:
    """Whether one of the boxes covers all of a box."""
    left, top, right, bottom = np.array(boxes).reshape(-1, 4).T
    is_around = (left <= box[0] + 1e-6) & (top <= box[1] + 1e-6)
    return bool((is_around & (right >= box[2] - 1e-6) & (bottom >= box[3] - 1e-6)).any())


def test_something_that_stands_still_is_covered_before_and_after_it_is_found() -> None:
    covered, _ = followed({10: [at(50)], 11: [at(50)]}, 30)

    held = [index for index, boxes in enumerate(covered) if boxes]
    assert held == list(range(10 - LOOKBACK, 11 + HOLD + 1))
    assert all(holds(boxes, at(50)) for boxes in covered if boxes)


def test_something_that_moves_is_expected_to_move_on() -> None:
    path = {index: at(100 + 5 * index) for index in range(30)}

    covered, _ = followed({index: [path[index]] for index in range(10, 15)}, 30)

    for index in range(10 - LOOKBACK, 15 + HOLD):
        assert holds(covered[index], path[index])


def test_a_jump_without_overlap_covers_where_it_was_and_the_way_from_there() -> None:
    covered, tracks = followed({5: [at(50)], 8: [at(75)]}, 20)

    assert holds(covered[6], at(50))
    assert holds(covered[6], at(50 + 25 / 3))
    assert holds(covered[5 + HOLD], at(50))  # it may have been another one
    assert tracks.started == 1


def test_things_that_are_far_apart_are_not_one() -> None:
    covered, tracks = followed({5: [at(50)], 7: [at(150)]}, 30)

    assert tracks.started == 2
    assert tracks.longest_gap == 0
    assert holds(covered[5 + HOLD], at(50))
    assert holds(covered[7 + HOLD], at(150))


def test_what_is_covered_grows_with_the_time_since_something_was_seen() -> None:
    covered, _ = followed({10: [at(50)]}, 30)

    for index in (10 - LOOKBACK, 10 + HOLD):
        grown = 20 * (1 + 2 * 0.02 * abs(index - 10))
        assert holds(covered[index], at(50, size=grown))
    assert covered[10] == [at(50)]


OLD = BlurOptions(network=ToolNetworkOptions(model=Path("detector.onnx")), margin=0.0, hold=0, lookback=0)


def noise(height: int, width: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (height, width, 3), dtype, endpoint=True)


def changed(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one != other).any(axis=2)


@pytest.mark.parametrize(("dtype", "method"), [(np.uint8, "blur"), (np.uint16, "blur"), (np.uint8, "fill")])
def test_pixels_outside_are_the_same_to_the_bit(dtype: type, method: str) -> None:
    pixels = noise(80, 120, dtype)
    before = pixels.copy()

    result = cover(pixels, [(30.4, 20.2, 69.5, 59.8)], dataclasses.replace(OLD, method=method))

    assert (pixels == before).all()
    assert result.dtype == dtype
    inside = np.zeros((80, 120), bool)
    inside[20:60, 30:70] = True
    assert not changed(result, pixels)[~inside].any()
    assert changed(result, pixels)[inside].mean() > 0.9


def test_a_box_of_usual_size_gets_the_blur_that_was_asked_for_mixed_with_its_surroundings() -> None:
    pixels = noise(200, 200)

    result = cover(pixels, [(60, 60, 140, 140)], OLD)

    expected = cv2.GaussianBlur(pixels, (51, 51), 40)
    assert (result[60:140, 60:140] == expected[60:140, 60:140]).all()


@pytest.mark.parametrize(("size", "dtype"), [(6, np.uint8), (24, np.uint16), (380, np.uint8)])
def test_detail_is_gone_whatever_the_size_of_the_box(size: int, dtype: type) -> None:
    """A pattern of eight squares across the box, about as coarse as an eye in a face."""
    side = 400
    cells = (np.arange(side) * 8 // size) % 2
    board = (cells[:, None] ^ cells[None]).astype(dtype) * np.iinfo(dtype).max
    pixels = board[..., None].repeat(3, axis=2)
    low = (side - size) // 2
    box = (low, low, low + size, low + size)

    result = cover(pixels, [box], OLD)[low : low + size, low : low + size].astype(float)

    assert np.ptp(result) / np.iinfo(dtype).max < (0.6 if size == 6 else 0.3)


def test_a_soft_edge_is_outside_of_the_box() -> None:
    pixels = np.full((100, 100, 3), 200, np.uint8)

    result = cover(pixels, [(30, 30, 70, 70)], dataclasses.replace(OLD, feather=0.1, method="fill"))

    assert (result[30:70, 30:70] == 0).all()
    row = result[50, 25:31, 0].astype(int)
    assert row[0] == 200
    assert (np.diff(row) < 0).all()
    assert (result[:, :26] == 200).all()


def test_an_ellipse_leaves_the_corners() -> None:
    pixels = noise(100, 100)

    result = cover(pixels, [(30, 40, 70, 60)], dataclasses.replace(OLD, ellipse=True, method="fill"))

    touched = changed(result, pixels)
    assert touched[40:60, 30:70].mean() == pytest.approx(np.pi / 4, abs=0.03)
    assert not touched[41, 31]
    assert touched[50, 30:70].all()
