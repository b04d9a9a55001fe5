"""Frames and sizes of prepared clips, compared with plain computations."""

import itertools
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data_tools import frames
from data_tools.cogvideox.clips import batches_by_shape, choose_frames, choose_size, read_clip, shape_frame
from data_tools.cogvideox.options import SIDES, ShapeOptions
from modules.errors import MediaError
from modules.media.reading import video_info
from tests.dataset.making import frame_numbers, make_clip, make_frames


def shape(**changes: object) -> ShapeOptions:
    values = {
        "height_buckets": (32, 64),
        "width_buckets": (32, 48),
        "frame_buckets": (4, 8),
        "max_num_frames": 49,
        "target_fps": 8,
        "random_flip": None,
        "video_reshape_mode": None,
        "seed": 42,
    }
    return ShapeOptions(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("available", "buckets", "most", "expected"),
    [
        (16, (16, 24, 32), 49, 16),
        (100, (16, 24, 32, 48, 64, 80), 49, 48),
        (100, (16, 24, 32, 48, 64, 80), 80, 80),
        (20, (16, 24), 49, 16),  # as near as 24
        (23, (16, 24), 49, 16),  # 24 is nearer, but there are not so many
        (56, (49, 64), 60, 49),
        (10, (16,), 49, None),
        (300, (49,), 49, 49),
    ],
)
def test_a_clip_takes_the_nearest_number_of_frames_that_it_has(
    available: int, buckets: tuple[int, ...], most: int, expected: int | None
) -> None:
    assert choose_frames(available, buckets, most) == expected


@pytest.mark.parametrize("size", [(1920, 1080), (300, 200), (1000, 1000), (448, 352), (5000, 10)])
def test_the_size_is_the_nearest_of_all_pairs(size: tuple[int, int]) -> None:
    pairs = list(itertools.product(SIDES, SIDES))
    height, width = min(pairs, key=lambda pair: abs(pair[0] - size[1]) + abs(pair[1] - size[0]))
    assert choose_size(size, SIDES, SIDES) == (width, height)


def picture(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)


def test_without_a_mode_a_frame_is_resized_whatever_its_proportions() -> None:
    frame = picture(50, 30)
    plain = np.array(Image.fromarray(frame).resize((32, 64), Image.Resampling.BICUBIC))

    shaped = shape_frame(frame, (32, 64), shape(), ((0.5, 0.5), False))

    assert np.array_equal(shaped, plain)


@pytest.mark.parametrize(
    ("mode", "place", "left"), [("center", (0.9, 0.9), 10), ("random", (0.99, 0), 21), ("none", (0.0, 0), 0)]
)
def test_with_a_mode_it_is_resized_to_cover_and_cut(mode: str, place: tuple[float, float], left: int) -> None:
    frame = picture(106, 64)  # half of it covers 32 x 32, and 21 columns are too many
    plain = cv2.resize(frame, (53, 32), interpolation=cv2.INTER_AREA)[:, left : left + 32]

    shaped = shape_frame(frame, (32, 32), shape(video_reshape_mode=mode), (place, False))
    flipped = shape_frame(frame, (32, 32), shape(video_reshape_mode=mode), (place, True))

    assert np.array_equal(shaped, plain)
    assert np.array_equal(flipped, plain[:, ::-1])


def test_a_clip_is_read_as_its_chosen_frames_at_its_chosen_size(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a clip.mp4", 17, (40, 72))

    clip = read_clip(path, shape(), "name", threads=1)

    assert clip.shape == (8, 64, 32, 3)
    assert frame_numbers(clip) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert np.array_equal(clip, read_clip(path, shape(), "name", threads=3))
    folder = make_frames(tmp_path / "frames", 5)
    assert frame_numbers(read_clip(folder, shape(), "name", threads=0)) == [0, 1, 2, 3]
    with pytest.raises(MediaError, match=r"has 5 frames, the smallest of --frame_buckets is 6"):
        read_clip(folder, shape(frame_buckets=(6, 8)), "name", threads=0)


@pytest.mark.parametrize(("stated", "step"), [(24, 3), (40, 2)])
def test_a_wrong_header_counts_as_long_as_its_frames_are_there(
    stated: int, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_clip(tmp_path / "clip.mp4", 23, (40, 72))
    info = replace(video_info(path), frames=stated)
    monkeypatch.setattr(frames, "video_info", lambda _: info)

    clip = read_clip(path, shape(), "name", threads=1)

    assert frame_numbers(clip) == list(range(0, 8 * step, step))


def test_batches_are_of_one_shape_full_ones_first_and_the_rest_at_the_end() -> None:
    small, large = (4, 32, 32), (8, 32, 32)
    items = [(small, 1), (large, 2), (small, 3), (small, 4), (large, 5), (small, 6), (large, 7)]

    assert list(batches_by_shape(items, 3)) == [[1, 3, 4], [2, 5, 7], [6]]
    # of two small ones, or one large one, and no more
    assert list(batches_by_shape(items, 3, most_bytes=25_000)) == [[2], [1, 3, 4], [5], [7], [6]]
    assert list(batches_by_shape(items, 1)) == [[number] for _, number in items]
