"""What is covered, how strongly, and that nothing else changes."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest

from post.blurring.stage import cover
from post.options import BlurOptions, ToolNetworkOptions

OLD = BlurOptions(network=ToolNetworkOptions(model=Path("detector.onnx")), margin=0.0, hold=0, lookback=0)


def noise(height: int, width: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (height, width, 3), dtype, endpoint=True)


def changed(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one != other).any(axis=2)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("method", ["blur", "fill"])
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


@pytest.mark.parametrize("size", [6, 24, 100, 380])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
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
