"""Frames of a video as PNG files. From which step a video is denoised, and with what it begins."""

from pathlib import Path

import numpy as np
import pytest
import torch

from blissful_tuner.video_to_video import first_step, trim_or_pad_frames
from modules.flow.schedule import make_schedule
from modules.media.reading import read_image, video_frames
from protocols.rules import RequestSource
from tests.faults.messages import succeed_here
from tests.postprocessing.stages_here import files_in, write_clip


def source(denoise: float, mode: str = "traditional") -> RequestSource:
    return RequestSource("video_path", Path("x.mp4"), denoise, noise_mode=mode)


@pytest.mark.parametrize(
    ("steps", "denoise", "made"), [(50, 0.8, 40), (10, 0.55, 5), (10, 0.0, 1), (10, 1.0, 10), (1, 0.5, 1)]
)
def test_the_last_steps_are_made(steps: int, denoise: float, made: int) -> None:
    assert (
        first_step(source(denoise), make_schedule("euler", steps, 5.0).timesteps.tolist(), steps)
        == steps - made
    )


@pytest.mark.parametrize(
    ("denoise", "step"),
    # timesteps 1000, 983.05, 956.04, 906.25, 783.78
    [(0.5, 4), (1.0, 0), (0.0, 4), (0.99, 1), (0.995, 0), (0.93, 3), (0.9315, 2), (0.85, 3)],
)
def test_direct_begins_at_the_nearest_noise_level(denoise: float, step: int) -> None:
    assert (
        first_step(source(denoise, "direct"), make_schedule("euler", 5, 14.5).timesteps.tolist(), 5) == step
    )


@pytest.mark.parametrize(
    ("mode", "frames", "expected"),
    [
        ("front", 5, [0, 0, 0, 1, 2]),
        ("end", 5, [0, 1, 2, 2, 2]),
        ("front", 2, [0, 1]),
        ("end", 2, [0, 1]),
        ("front", 3, [0, 1, 2]),
    ],
)
def test_missing_frames_are_copies_and_further_ones_are_cut_off(
    mode: str, frames: int, expected: list[int]
) -> None:
    latents = torch.arange(3.0).view(1, 1, 3, 1, 1).expand(1, 2, 3, 4, 4)
    assert trim_or_pad_frames(latents, frames, mode)[0, 1, :, 0, 0].tolist() == expected


SCRIPT = "blissful_tuner/video_to_png.py"


@pytest.mark.parametrize(("num_frames", "count"), [(None, 6), (2, 2), (99, 6)])
def test_frames_are_numbered_from_zero_and_hold_the_decoded_pixels(
    num_frames: int | None, count: int, tmp_path: Path
) -> None:
    clip = write_clip(tmp_path / "a b.mp4", frames=6)
    more = () if num_frames is None else ("--num_frames", num_frames)

    succeed_here(SCRIPT, "--input", clip.name, *more, folder=tmp_path)

    assert files_in(tmp_path) == {"a b.mp4", "frames"}
    assert files_in(tmp_path / "frames") == {f"{index:06d}.png" for index in range(count)}
    for index, frame in zip(range(count), video_frames(clip), strict=False):
        np.testing.assert_array_equal(read_image(tmp_path / "frames" / f"{index:06d}.png"), frame)
