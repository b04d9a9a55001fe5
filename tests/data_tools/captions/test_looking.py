"""Which frames of a clip are shown."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.captions.looking import choose_frames, look_at
from modules.errors import MediaError
from modules.media.writing import write_video
from tests.dataset.making import frame_numbers, make_clip, make_frames, make_image


@pytest.mark.parametrize(
    ("num_frames", "wanted", "chosen"),
    [(81, 3, (13, 40, 67)), (4, 8, (0, 1, 2, 3)), (9, 1, (4,)), (10, 5, (1, 3, 5, 7, 9)), (0, 8, ())],
)
def test_frames_are_the_middles_of_equal_parts(num_frames: int, wanted: int, chosen: tuple[int, ...]) -> None:
    assert choose_frames(num_frames, wanted) == chosen


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ""])
def test_clips_of_all_kinds_are_sampled_alike(suffix: str, tmp_path: Path) -> None:
    make = make_clip if suffix else make_frames  # a Matroska header has no count
    path = make(tmp_path / f"clip{suffix}", 12)

    assert frame_numbers(look_at(path, False, 3, 10**6)) == [2, 6, 10]


def test_animations_and_images_are_read_and_large_frames_scaled_down(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (64, 32), (40 * index,) * 3) for index in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)

    (frame,) = look_at(make_image(tmp_path / "b.png", (200, 100)), True, 8, 5000)
    assert frame.shape == (50, 100, 3)
    assert [frame.shape for frame in look_at(tmp_path / "a.gif", False, 2, 10**6)] == [(32, 64, 3)] * 2


def test_what_cannot_be_read_is_a_media_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "clip.mkv"
    write_video(path, (rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(40)), 24)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    with pytest.raises(MediaError, match=r"clip\.mkv"):
        look_at(path, False, 2, 10**6)
