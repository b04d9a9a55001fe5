"""Alignment, soft masks, pasting, steady landmarks."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from modules.media.encoding import Pixels
from postprocessing.faces.boxes import TEMPLATE, FoundFace, Matrix, alignment, crop, crops, restorable
from postprocessing.faces.stage import LandmarkSmoother, Restored, enlarge, paste, soften
from tests.golden_cases import read_case

SIZE = 64


def _image(height: int = 80, width: int = 100, dtype: type = np.uint8) -> Pixels:
    """A smooth picture, so that what is resampled twice is nearly as it was."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 17 + c) * np.cos(y / (13 + c)) for c in range(3)]
    return ((np.stack(waves, axis=-1) / 2 + 0.5) * np.iinfo(dtype).max).astype(dtype)


def _points(scale: float = 0.1, shift: tuple[float, float] = (20, 10)) -> NDArray[np.float32]:
    return TEMPLATE * np.float32(scale) + np.float32(shift)


@dataclass(frozen=True)
class _Face:
    """A restored face and how it was cut out."""

    face: NDArray[np.float32]
    mask: NDArray[np.float32]
    matrix: Matrix


def _pasted(pixels: Pixels, faces: Sequence[_Face], upscale: float) -> Pixels:
    restored = (Restored(each.face, each.mask) for each in faces)
    return paste(pixels, [each.matrix for each in faces], restored, SIZE, upscale)


def _face(pixels: Pixels, mask: float | None, points: NDArray[np.float32]) -> _Face:
    """What a network that changes nothing gives; mask: one value everywhere, None: a soft one."""
    matrix = alignment(points, SIZE)
    assert matrix is not None
    face = (crops(pixels, [matrix], SIZE)[0].transpose(1, 2, 0) + 1) / 2
    full = soften(np.ones((SIZE, SIZE), dtype=bool))
    return _Face(face, full if mask is None else np.full((SIZE, SIZE), mask, np.float32), matrix)


def test_alignment_equals_the_reference() -> None:
    _, stored = read_case("retinaface")
    for points, expected in zip(stored["align_landmarks"], stored["align_matrices"], strict=True):
        matrix = alignment(points.numpy(), 512)

        np.testing.assert_allclose(matrix, expected.numpy(), atol=1e-3)


def test_landmarks_that_are_no_face_give_no_alignment() -> None:
    assert alignment(np.zeros((5, 2), np.float32), 512) is None


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_face_at_the_edge_is_filled_up_with_the_known_grey(dtype: type) -> None:
    pixels = _image(dtype=dtype)
    matrix = alignment(_points(0.2, (-50, -50)), SIZE)

    assert matrix is not None
    gray = (132, 133, 135)  # R G B
    assert tuple(crop(pixels, matrix, SIZE)[0, 0]) == tuple(v * np.iinfo(dtype).max // 255 for v in gray)


def test_faces_without_far_enough_eyes_or_landmarks_are_left_out() -> None:
    def found(points: NDArray[np.float32] | None, left: float) -> FoundFace:
        return FoundFace((left, 0, left + 10, 10), 0.99, points)

    good, small, unknown = found(_points(), 0), found(_points(0.03), 20), found(None, 40)
    broken = found(np.full((5, 2), np.nan, np.float32), 60)
    central = found(_points(), 40)

    assert restorable([good, small, unknown, broken, central], (100, 10), False) == [good, central]
    assert restorable([good, small, unknown, broken, central], (100, 10), True) == [central]


def test_the_mask_is_soft_inside_and_free_at_the_edge() -> None:
    is_face = np.zeros((512, 512), dtype=bool)
    is_face[100:400, 100:400] = True
    expected = is_face.astype(np.float64) * 255
    for _ in range(2):
        expected = cv2.GaussianBlur(expected, (101, 101), 11)

    np.testing.assert_allclose(soften(is_face), expected / 255, atol=1e-5)
    everywhere = soften(np.ones((512, 512), dtype=bool))
    assert everywhere[:10].max() == everywhere[:, -10:].max() == 0
    assert everywhere[10:-10, 10:-10].min() > 0.5


@pytest.mark.parametrize("upscale", [1, 1.5, 0.5])
def test_an_unchanged_face_goes_back_to_its_place(upscale: float) -> None:
    pixels = _image()
    enlarged = enlarge(pixels, upscale)

    pasted = _pasted(pixels, [_face(pixels, None, _points())], upscale)

    assert pasted.shape == enlarged.shape == (int(80 * upscale), int(100 * upscale), 3)
    # a face half a pixel off its place would differ by up to 8
    assert np.abs(pasted.astype(int) - enlarged).max() <= 3


def test_only_what_the_mask_covers_changes_and_it_is_rounded_once() -> None:
    pixels = _image(dtype=np.uint16)
    before = pixels.copy()
    face = _face(pixels, None, _points())
    white = _Face(np.ones_like(face.face), face.mask * np.float32(0.5), face.matrix)

    pasted = _pasted(pixels, [white], 1)

    back = cv2.invertAffineTransform(face.matrix)
    mask = cv2.warpAffine(white.mask, back, (100, 80))[..., None]
    assert np.array_equal(pasted[mask[..., 0] == 0], pixels[mask[..., 0] == 0])
    expected = mask.astype(np.float64) * 65535 + (1 - mask.astype(np.float64)) * pixels
    np.testing.assert_allclose(pasted, expected, atol=2)  # places are rounded differently
    assert np.abs(pasted.astype(int) - pixels).max() > 5000
    assert np.array_equal(pixels, before)


def test_faces_that_overlap_are_pasted_one_above_the_other() -> None:
    pixels = np.zeros((80, 100, 3), np.uint8)
    first, second = (_face(pixels, None, _points(0.1, (20 + x, 10))) for x in (0, 9))
    white = _Face(np.ones_like(first.face), first.mask, first.matrix)
    gray = _Face(np.full_like(first.face, 0.5), second.mask, second.matrix)

    both = _pasted(pixels, [white, gray], 1)

    alone = _pasted(pixels, [white], 1).astype(np.float64)
    shown = _pasted(pixels, [_Face(np.ones_like(first.face), gray.mask, gray.matrix)], 1) / 255.0
    np.testing.assert_allclose(both, shown * 127.5 + (1 - shown) * alone, atol=1.6)


def test_trembling_is_damped_and_movement_followed() -> None:
    eyes = float(np.hypot(*(TEMPLATE[0] - TEMPLATE[1])))
    smoother = LandmarkSmoother(0.5)
    smoother.smooth([TEMPLATE])

    (trembled,) = smoother.smooth([TEMPLATE + np.float32([0.01 * eyes, 0])])
    moved = TEMPLATE + np.float32([0.2 * eyes, 0])
    (followed,) = smoother.smooth([moved])

    # at a tenth of the distance at which it counts as movement, nine tenths of the half are kept
    np.testing.assert_allclose(trembled - TEMPLATE, [[0.0055 * eyes, 0]] * 5, atol=1e-3)
    assert np.array_equal(followed, moved)
