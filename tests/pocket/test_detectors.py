"""The detectors on drawn clips, with noise and blur, and on clips of noise."""

import cv2
import numpy as np
import pytest

from pocket import drawing
from tests.pocket.detectors import look

CLIPS = 100


@pytest.mark.parametrize(("noise", "blur"), [(0, 0.0), (16, 0.0), (0, 1.2), (10, 1.0)])
def test_what_was_drawn_is_seen(noise: int, blur: float) -> None:
    random = np.random.default_rng(5)
    wrong = []
    for number in range(CLIPS):
        scene = drawing.scene(random)
        clip = drawing.draw(scene)
        if blur:
            clip = np.stack([cv2.GaussianBlur(frame, (0, 0), blur) for frame in clip])
        clip = np.clip(clip + noise * random.standard_normal(clip.shape), 0, 255).astype(np.uint8)
        thing, verdict = scene.things[0], look(clip)
        told, seen = (
            (thing.shape, thing.colour, thing.direction),
            (verdict.shape, verdict.colour, verdict.direction),
        )
        if told != seen:
            wrong.append((number, told, seen))
    assert len(wrong) <= CLIPS // 100, wrong


@pytest.mark.parametrize("strength", [5, 30, 120])
def test_noise_shows_nothing(strength: int) -> None:
    random = np.random.default_rng(6)
    for blur in (0.0, 1.0, 4.0):
        for _ in range(10):
            clip = np.clip(110 + strength * random.standard_normal((17, 64, 64, 3)), 0, 255).astype(np.uint8)
            if blur:
                clip = np.stack([cv2.GaussianBlur(frame, (0, 0), blur) for frame in clip])
            assert look(clip).is_empty


def test_plain_ground_shows_nothing() -> None:
    assert look(np.full((17, 64, 64, 3), 60, np.uint8)).is_empty


def test_forms_that_captions_do_not_know_are_no_circle_square_or_triangle() -> None:
    random = np.random.default_rng(7)
    for form in ("ring", "cross", "star"):
        clip = drawing.draw(
            drawing.Scene((drawing.draw_thing(random, shape=form, width="large"),), "black", (10, 10, 10))
        )
        assert look(clip).shape is None
        assert look(clip, (*drawing.SHAPES, form)).shape == form


def test_a_thing_that_changes_its_colour_is_seen_to() -> None:
    random = np.random.default_rng(8)
    red = drawing.draw_thing(random, colour="red", direction="left")
    clip = drawing.draw(drawing.Scene((red,), "black", (10, 10, 10)))
    clip[12:] = clip[12:, :, :, ::-1]
    verdict = look(clip)
    assert verdict.colour == "red"
    assert not verdict.keeps_colour
