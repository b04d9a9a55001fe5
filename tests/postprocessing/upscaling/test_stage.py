"""The upscaler's stage: what it computes for a stream is what a plain loop computes, to the bit."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from modules.errors import OptionError
from modules.media.encoding import OutputFrame
from postprocessing.upscaling.stage import UpscalerStage, bytes_per_pixel, make_upscaler, result_bytes
from tests.postprocessing.upscaling.plain_clips import (
    ALL_WRITERS,
    CPU,
    HEIGHT,
    WIDTH,
    clip,
    full_clip,
    options,
    pictures,
    run,
)
from tests.tiny.post_upscaling import write_rrdb


@pytest.mark.slow_cases("swinir-1.5-65535", "swinir-4.0-255")
@pytest.mark.parametrize(
    ("kind", "scale", "maximum"),
    [("swinir", 4.0, 255), ("swinir", 1.5, 65535), ("esrgan", 5.0, 255), ("compact", 4.0, 65535)],
)
def test_a_stream_is_the_whole_clip_to_the_bit(tmp_path: Path, kind: str, scale: float, maximum: int) -> None:
    model = ALL_WRITERS[kind](tmp_path / "x.pth")
    given = pictures(np.uint8 if maximum == 255 else np.uint16)
    stage = make_upscaler(options(model, scale=scale), CPU)
    of = clip(is_deep=maximum > 255)

    made = run(stage, given, of)

    expected = full_clip(model, given, scale, maximum).numpy()
    assert 0.05 * maximum < expected.std()  # of something to be seen
    for image, one, before in zip(made, expected, given, strict=True):
        assert np.array_equal(image.pixels, one.astype(before.pixels.dtype))
        assert (image.start, image.seconds) == (before.start, before.seconds)
    found = stage.plan_output(of)
    assert made[0].pixels.shape == (found.height, found.width, 3) == expected.shape[1:]
    assert (found.width, found.height) == (int(WIDTH * scale), int(HEIGHT * scale))


def test_tiles_give_about_the_same_picture(tmp_path: Path) -> None:
    model = write_rrdb(tmp_path / "x.pth")
    full, tiled, large = (
        np.stack(
            [each.pixels for each in run(make_upscaler(options(model, tile=tile), CPU), pictures(), clip())]
        )
        for tile in (0, 24, 40)
    )
    difference = np.abs(full.astype(int) - tiled.astype(int))
    assert 0 < difference.mean() < 1.0
    assert np.array_equal(full, large)


def test_a_stage_takes_only_the_pictures_that_it_computes(tmp_path: Path) -> None:
    taken: list[int] = []

    def given() -> Iterator[OutputFrame]:
        for index, image in enumerate(pictures()):
            taken.append(index)
            yield image

    stage = make_upscaler(options(write_rrdb(tmp_path / "x.pth"), batch_size=3), CPU)
    results = stage.run(given(), clip())
    assert taken == []
    for index in range(4):
        next(results)
        assert len(taken) == 3 + index // 3 * 3


def test_tiles_are_chosen_before_memory_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stage = make_upscaler(options(write_rrdb(tmp_path / "x.pth"), mode="esrgan"), CPU)
    assert isinstance(stage, UpscalerStage)
    config = stage.upscaler.config
    per_pixel = bytes_per_pixel(stage.upscaler.kind, config, torch.float32)
    get_usable_bytes = round(80 * 80 * per_pixel) + 100 + result_bytes(config, 100, 90)
    image = OutputFrame(np.zeros((90, 100, 3), np.uint8), Fraction(0), Fraction(1))
    sizes = []
    stage.upscaler.network.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[-2:]))

    for free in (get_usable_bytes, None, 10**10):
        run(replace(stage, get_usable_bytes=lambda _, free=free: free), [image], clip(width=100, height=90))

    tiles, wholes = sizes[:-2], sizes[-2:]
    assert len(tiles) == 4
    assert all(max(size) <= 80 for size in tiles)
    assert wholes == [(90, 100)] * 2
    assert "they are split into tiles of 80 pixels" in caplog.text


def test_the_kind_is_told_from_the_file_and_a_wrong_mode_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    make_upscaler(options(write_rrdb(tmp_path / "r.pth"), mode="swinir"), CPU)
    assert "--mode swinir, but r.pth has a different architecture: ESRGAN is used." in caplog.text
    caplog.clear()
    make_upscaler(options(tmp_path / "r.pth", mode="esrgan"), CPU)
    assert "--mode" not in caplog.text


@pytest.mark.parametrize("scale", [0.01, 2000.0])
def test_a_size_that_no_picture_can_have_is_refused(tmp_path: Path, scale: float) -> None:
    stage = make_upscaler(options(write_rrdb(tmp_path / "x.pth"), scale=scale), CPU)
    with pytest.raises(OptionError, match=r"--scale \S+ makes \d+ x \d+ pixels of the 37 x 26 of a.mkv"):
        stage.plan_output(clip())
