"""Tools for finished videos, and gen_img.py: a device's pictures are the CPU's."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from modules.media.reading import Frame, read_image
from post.contract import Clip
from post.interpolation.stage import make_interpolation
from post.upscaling.stage import make_upscaler
from tests.gpu.runs.project import CPU, ON_GPU, run
from tests.post.interpolation import test_stage as interpolating
from tests.post.upscaling import plain_clips
from tests.tiny.post_interpolation import write_gimm_r

pytestmark = ON_GPU


def assert_near(ours: list[Frame], theirs: list[Frame], levels: int) -> None:
    """No pixel differs by more levels of 255."""
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert np.abs(mine.astype(int) - other.astype(int)).max() <= levels


@pytest.mark.parametrize("kind", plain_clips.ALL_WRITERS)
def test_pictures_are_enlarged_as_on_the_cpu(kind: str, device: torch.device, tmp_path: Path) -> None:
    model = plain_clips.ALL_WRITERS[kind](tmp_path / "x.pth")
    made = []
    for where in (device, CPU):
        stage = make_upscaler(plain_clips.options(model), where)
        pictures = plain_clips.run(stage, plain_clips.pictures(), plain_clips.clip())
        made.append([picture.pixels for picture in pictures])
    assert_near(*made, levels=1)


def test_pictures_between_are_those_of_the_cpu(device: torch.device, tmp_path: Path) -> None:
    folder, frames = write_gimm_r(tmp_path), interpolating.moving(3)
    starts = [Fraction(index, 24) for index in range(3)]
    clip = Clip(tmp_path / "clip.mkv", 130, 128, Fraction(24), 3, False)
    made = []
    for where in (device, CPU):
        stage = make_interpolation(interpolating.options(folder), where)
        made.append([picture.pixels for picture in stage.run(interpolating.stream(frames, starts), clip)])
    assert len(made[0]) == 5
    assert_near(*made, levels=2)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_pictures_of_stable_diffusion_are_those_of_the_cpu(
    kind: str, device: torch.device, tmp_path: Path
) -> None:
    pytest.importorskip("diffusers")
    from tests.tiny.stable_diffusion import tokenizer_folder, write_sd1, write_sdxl

    model = (write_sd1 if kind == "sd1" else write_sdxl)(tmp_path)
    words = ("--ckpt", model, "--tokenizer_cache_dir", tokenizer_folder(tmp_path / "t"), "--W", 64, "--H", 64)
    asked = (
        "--prompt",
        "a cat",
        "--seed",
        7,
        "--steps",
        4,
        "--images_per_prompt",
        2,
        "--sequential_file_name",
    )
    made = []
    for name, where in (("ours", device), ("theirs", CPU)):
        run(
            tmp_path,
            where,
            "gen_img.py",
            *words,
            *asked,
            "--outdir",
            name,
            "--sequential_file_name",
            "--device",
            where,
        )
        made.append([read_image(path) for path in sorted((tmp_path / name).glob("*.png"))])
    assert_near(*made, levels=2)
