"""Scene cuts: found where the picture changes altogether, not where it moves, brightens or fades."""

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from modules.media.encoding import Pixels
from modules.media.measures import scene_distance, thumbnail

THRESHOLD = 0.25  # the default
HEIGHT, WIDTH = 180, 320


def scene(seed: int, width: int = 3 * WIDTH) -> NDArray[np.float32]:
    """A wide landscape of soft random shapes in the colours of a random palette, 0..1."""
    random = np.random.default_rng(seed)
    layers = []
    for cells in (3, 6, 12, 40):
        small = random.random((cells, cells * width // HEIGHT, 1)).astype(np.float32)
        layers.append(cv2.resize(small, (width, HEIGHT), interpolation=cv2.INTER_CUBIC) * cells**-0.5)
    shade = np.sum(layers, axis=0)
    shade = (shade - shade.min()) / (shade.max() - shade.min())
    dark, light = np.sort(random.random((2, 3)), axis=0)
    return (dark + (light - dark) * shade[..., None]).astype(np.float32)


def shown(picture: NDArray[np.float32], left: int = WIDTH) -> Pixels:
    pixels: Pixels = (picture[:, left : left + WIDTH].clip(0, 1) * 255).round().astype(np.uint8)
    return pixels


def distance(first: Pixels, second: Pixels) -> float:
    return scene_distance(thumbnail(first), thumbnail(second))


def test_cuts_are_found() -> None:
    found = [distance(shown(scene(2 * seed)), shown(scene(2 * seed + 1))) for seed in range(20)]
    assert sum(each >= THRESHOLD for each in found) >= 19
    assert np.median(found) > 1.5 * THRESHOLD


@pytest.mark.parametrize("step", [4, 16, 40, 56])
def test_a_pan_is_no_cut(step: int) -> None:
    """Up to a sixth of the width from one picture to the next."""
    for seed in range(8):
        picture = scene(seed)
        assert distance(shown(picture), shown(picture, WIDTH + step)) < THRESHOLD


def test_a_large_thing_that_moves_fast_is_no_cut() -> None:
    for seed in range(8):
        first, second = scene(seed), scene(seed)
        thing = scene(seed + 100)[:120, :120]
        first[30:150, WIDTH + 20 : WIDTH + 140] = thing
        second[30:150, WIDTH + 120 : WIDTH + 240] = thing
        assert distance(shown(first), shown(second)) < THRESHOLD


@pytest.mark.parametrize("gain", [1.5, 2.0])
def test_a_flash_is_no_cut(gain: float) -> None:
    for seed in range(8):
        picture = scene(seed)
        flash = gain * picture + 0.1
        assert distance(shown(picture), shown(flash)) < THRESHOLD
        assert distance(shown(flash), shown(picture)) < THRESHOLD


def test_a_fade_to_black_and_between_scenes_is_no_cut() -> None:
    for seed in range(4):
        first, second = scene(seed), scene(seed + 50)
        for end in (np.zeros_like(first), second):
            steps = [shown(first + (end - first) * share) for share in np.linspace(0, 1, 13)]
            assert max(map(distance, steps, steps[1:])) < THRESHOLD


def test_noise_and_equal_pictures_are_no_cut() -> None:
    random = np.random.default_rng(0)
    dark = 0.02 * scene(1)
    noisy = [shown(dark + 0.02 * random.standard_normal(dark.shape).astype(np.float32)) for _ in range(2)]
    assert distance(*noisy) < THRESHOLD
    assert distance(noisy[0], noisy[0]) == 0
    grey: Pixels = np.full((9, 300, 3), 90, np.uint8)
    assert distance(grey, grey + np.uint8(4)) < THRESHOLD


def test_the_measure_takes_16_bits_and_narrow_pictures() -> None:
    first, second = shown(scene(1)), shown(scene(2))
    deep = [pixels.astype(np.uint16) * 257 for pixels in (first, second)]
    assert distance(*deep) == distance(first, second)
    assert distance(first[:, :1], second[:, :1]) >= 0
