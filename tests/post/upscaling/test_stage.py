"""The upscaler's stage: what it computes for a stream is what a plain loop computes, to the bit."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from modules.errors import OptionError
from modules.media.encoding import Picture
from modules.media.reading import read_image, video_frames
from post.upscaling.stage import UpscalerStage, bytes_per_pixel, make_upscaler, result_bytes
from tests.faults.messages import succeed_here
from tests.post.upscaling.plain_clips import (
    ALL_WRITERS,
    CPU,
    FRAMES,
    HEIGHT,
    WIDTH,
    WRITERS,
    clip,
    options,
    pictures,
    run,
    whole_clip,
)
from tests.tiny.post_upscaling import write_rrdb


@pytest.mark.parametrize("kind", ALL_WRITERS)
@pytest.mark.parametrize(("scale", "most"), [(4.0, 255), (1.5, 65535), (5.0, 255)])
def test_a_stream_is_the_whole_clip_to_the_bit(tmp_path: Path, kind: str, scale: float, most: int) -> None:
    model = ALL_WRITERS[kind](tmp_path / "x.pth")
    given = pictures(np.uint8 if most == 255 else np.uint16)
    stage = make_upscaler(options(model, scale=scale), CPU)
    of = clip(is_deep=most > 255)

    made = run(stage, given, of)

    expected = whole_clip(model, given, scale, most).numpy()
    assert 0.05 * most < expected.std()  # of something to be seen
    for picture, one, before in zip(made, expected, given, strict=True):
        assert np.array_equal(picture.pixels, one.astype(before.pixels.dtype))
        assert (picture.start, picture.seconds) == (before.start, before.seconds)
    found = stage.result(of)
    assert made[0].pixels.shape == (found.height, found.width, 3) == expected.shape[1:]
    assert (found.width, found.height) == (int(WIDTH * scale), int(HEIGHT * scale))


@pytest.mark.parametrize("kind", WRITERS)
def test_tiles_give_about_the_same_picture(tmp_path: Path, kind: str) -> None:
    model = WRITERS[kind](tmp_path / "x.pth")
    whole, tiled, large = (
        np.stack(
            [each.pixels for each in run(make_upscaler(options(model, tile=tile), CPU), pictures(), clip())]
        )
        for tile in (0, 24, 40)
    )
    difference = np.abs(whole.astype(int) - tiled.astype(int))
    assert 0 < difference.mean() < 1.0
    assert np.array_equal(whole, large)


def test_a_stage_takes_only_the_pictures_that_it_computes(tmp_path: Path) -> None:
    taken: list[int] = []

    def given() -> Iterator[Picture]:
        for index, picture in enumerate(pictures()):
            taken.append(index)
            yield picture

    stage = make_upscaler(options(write_rrdb(tmp_path / "x.pth"), batch_size=3), CPU)
    results = stage.run(given(), clip())
    assert taken == []
    for index in range(4):
        next(results)
        assert len(taken) == 3 + index // 3 * 3


def test_memory_that_ends_is_met_with_tiles_once_a_clip(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    model = write_rrdb(tmp_path / "x.pth")
    stage = make_upscaler(options(model, mode="esrgan"), CPU)
    assert isinstance(stage, UpscalerStage)
    forward = stage.upscaler.network.forward

    def small(images: Tensor) -> Tensor:
        if images.shape[-1] > 70:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(images)

    monkeypatch.setattr(stage.upscaler.network, "forward", small)
    wide = [Picture(np.tile(each.pixels, (3, 3, 1)), each.start, each.seconds) for each in pictures()[:3]]
    caplog.clear()

    made = run(stage, wide, clip(width=3 * WIDTH, height=3 * HEIGHT))

    assert made[0].pixels.shape == (12 * HEIGHT, 12 * WIDTH, 3)
    assert [record.getMessage() for record in caplog.records] == [
        "Memory is full: from now on pictures are cut into tiles of 64 pixels."
    ]


def test_tiles_are_chosen_before_memory_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stage = make_upscaler(options(write_rrdb(tmp_path / "x.pth"), mode="esrgan"), CPU)
    assert isinstance(stage, UpscalerStage)
    config = stage.upscaler.config
    per_pixel = bytes_per_pixel(stage.upscaler.kind, config, torch.float32)
    room = round(80 * 80 * per_pixel) + 100 + result_bytes(config, 100, 90)
    picture = Picture(np.zeros((90, 100, 3), np.uint8), Fraction(0), Fraction(1))
    sizes = []
    stage.upscaler.network.register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[-2:]))

    for free in (room, None, 10**10):
        run(replace(stage, room=lambda _, free=free: free), [picture], clip(width=100, height=90))

    tiles, wholes = sizes[:-2], sizes[-2:]
    assert len(tiles) == 4
    assert all(max(size) <= 80 for size in tiles)
    assert wholes == [(90, 100)] * 2
    assert "they are cut into tiles of 80 pixels" in caplog.text


def test_the_kind_is_told_from_the_file_and_a_wrong_mode_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    make_upscaler(options(write_rrdb(tmp_path / "r.pth"), mode="swinir"), CPU)
    assert "--mode swinir, but r.pth is of another kind: ESRGAN is used." in caplog.text
    caplog.clear()
    make_upscaler(options(tmp_path / "r.pth", mode="esrgan"), CPU)
    assert "--mode" not in caplog.text


@pytest.mark.parametrize("scale", [0.01, 2000.0])
def test_a_size_that_no_picture_can_have_is_refused(tmp_path: Path, scale: float) -> None:
    stage = make_upscaler(options(write_rrdb(tmp_path / "x.pth"), scale=scale), CPU)
    with pytest.raises(OptionError, match=r"--scale \S+ makes \d+ x \d+ pixels of the 37 x 26 of a.mkv"):
        stage.result(clip())


def test_tiles_that_are_mostly_shared_are_refused() -> None:
    with pytest.raises(OptionError, match="--tile_overlap 32 is more than half of --tile 48"):
        options(Path("x.pth"), tile=48, tile_overlap=32)


SCRIPT = "blissful_tuner/upscaler.py"


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    """As in the script's process here, so that sums have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_lossless(path: Path) -> Path:
    """A clip of odd size whose pixels come back as they are."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(24))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "bgr0"
        for picture in pictures():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("kind", "scale"), [("swinir", 3), ("esrgan", 4)])
def test_the_frames_of_a_video_are_those_of_a_plain_loop_to_the_bit(
    tmp_path: Path, kind: str, scale: int
) -> None:
    model, source = WRITERS[kind](tmp_path / "x.pth"), write_lossless(tmp_path / "clip.mkv")
    assert np.array_equal(np.stack(list(video_frames(source))), [each.pixels for each in pictures()])
    words = ["--model", model, "--input", source, "--mode", kind, "--scale", scale, "--device", "cpu"]

    succeed_here(SCRIPT, *words, "--codec", "h264", "--container", "mp4", "--keep_pngs", folder=tmp_path)

    expected = whole_clip(model, pictures(), scale, 255).numpy().astype(np.uint8)
    kept = [read_image(path) for path in sorted((tmp_path / "frames").iterdir())]
    assert np.array_equal(np.stack(kept), expected)
    shown = np.stack(list(video_frames(tmp_path / f"clip_{kind.upper()}.mp4")))
    assert len(shown) == FRAMES
    height, width = shown.shape[1:3]  # 4:2:0 takes even sizes only
    assert (height, width) == (HEIGHT * scale // 2 * 2, WIDTH * scale // 2 * 2)
    # colours are blurred by 4:2:0, brightness is not
    weights = np.array([0.2126, 0.7152, 0.0722])
    assert np.abs(shown @ weights - expected[:, :height, :width] @ weights).mean() < 3
