"""blissful_tuner/video_to_png.py: the frames of a video as PNG files, in one stream."""

from pathlib import Path

import numpy as np
import pytest

from modules.media.reading import read_image, video_frames
from tests.faults.messages import run_here
from tests.post.stages_here import files_in, write_clip

SCRIPT = "blissful_tuner/video_to_png.py"


@pytest.mark.parametrize(("num_frames", "count"), [(None, 6), (2, 2), (99, 6)])
def test_frames_are_numbered_from_zero_and_hold_the_decoded_pixels(
    num_frames: int | None, count: int, tmp_path: Path
) -> None:
    clip = write_clip(tmp_path / "a b.mp4", frames=6)
    more = () if num_frames is None else ("--num_frames", num_frames)

    code, said = run_here(SCRIPT, "--input", clip.name, *more, folder=tmp_path)

    assert code == 0, said
    assert files_in(tmp_path) == {"a b.mp4", "frames"}
    assert files_in(tmp_path / "frames") == {f"{index:06d}.png" for index in range(count)}
    for index, frame in zip(range(count), video_frames(clip), strict=False):
        np.testing.assert_array_equal(read_image(tmp_path / "frames" / f"{index:06d}.png"), frame)
