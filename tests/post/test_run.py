"""Runs of tools: one stream from file to file, its order, its memory, its metadata."""

import logging
import tracemalloc
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modules.media.reading import read_image, read_tags, video_frames, video_info
from modules.media.writing import write_png, write_video
from tests.post.stages_here import (
    H264,
    PRORES,
    Larger,
    Same,
    Smoother,
    files_in,
    frames_of,
    kept_frames,
    run_stages,
    write_clip,
)
from tests.tiny.project import moving_square


def test_the_stream_gives_what_the_whole_clip_at_once_gives(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4", frames=7)
    (streamed,) = run_stages([Larger(), Smoother()], clip, form=replace(H264, keep_pngs=True))

    frames = frames_of(clip).repeat(2, 1).repeat(2, 2)
    whole = [frames[0]]
    for before, after in zip(frames, frames[1:], strict=False):
        whole += [((before.astype(np.uint16) + after) // 2).astype(np.uint8), after]

    assert streamed.name == "a_LARGER_SMOOTHER.mp4"
    np.testing.assert_array_equal(kept_frames(tmp_path), whole)
    info = video_info(streamed)
    assert (info.width, info.height, info.frames, info.fps) == (96, 64, 13, 32.0)


def test_a_stage_gets_the_times_of_the_frames(tmp_path: Path) -> None:
    seen: list[tuple[Fraction, Fraction]] = []
    note = Same(seen=lambda picture: seen.append((picture.start, picture.seconds)))

    run_stages([note], write_clip(tmp_path / "a.mp4", frames=4, fps=16))

    assert seen == [(Fraction(index, 16), Fraction(1, 16)) for index in range(4)]


def test_no_more_memory_is_held_for_a_longer_clip(tmp_path: Path) -> None:
    def peak(frames: int, name: int = 0) -> int:
        clip = write_clip(tmp_path / f"{frames} {name}.mp4", frames, 160, 96)
        tracemalloc.start()  # numpy tells it of its arrays
        try:
            run_stages([Larger(), Smoother()], clip, yes=True)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(4)  # what is made once

    # how far the threads come apart differs from run to run
    assert peak(64) <= 1.15 * max(peak(16, name) for name in range(4))


def test_metadata_stay_and_tell_what_was_done(tmp_path: Path) -> None:
    source = tmp_path / "a.mkv"
    write_video(source, moving_square(2, 64, 48, 1), 16, tags={"bt_prompt": "a cät", "post_1": "earlier"})

    (made,) = run_stages([Same()], source)

    tags = read_tags(made)
    assert tags["bt_prompt"] == "a cät"
    assert (tags["post_1"], tags["post_2"]) == ("earlier", "same")


def test_a_picture_gives_a_png_with_its_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frame = moving_square(1, 32, 24, 3)[0]
    write_png(tmp_path / "a.png", frame, {"bt_prompt": "ein Käfer"})

    (made,) = run_stages([Larger()], tmp_path / "a.png", form=PRORES)

    assert made == tmp_path / "a_LARGER.png"
    np.testing.assert_array_equal(read_image(made), frame.repeat(2, 0).repeat(2, 1))
    assert read_tags(made) == {"bt_prompt": "ein Käfer", "post_1": "larger"}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_transparency_of_a_picture_is_dropped_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGBA", (16, 16), (10, 20, 30, 0)).save(tmp_path / "a.png")

    (made,) = run_stages([Same()], tmp_path / "a.png")

    assert read_image(made, alpha=True).shape == (16, 16, 3)
    assert f"{tmp_path / 'a.png'}: its transparency is dropped" in caplog.messages


def test_pngs_are_kept_beside_the_input_under_a_free_name(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "in" / "a.mp4", frames=3)
    (tmp_path / "in" / "frames").mkdir()
    form = replace(H264, keep_pngs=True)

    run_stages([Larger()], clip, f"{tmp_path / 'out'}/", form)

    assert files_in(tmp_path / "in") == {"a.mp4", "frames", "frames_"}
    assert files_in(tmp_path / "out") == {"a_LARGER.mp4"}
    assert files_in(tmp_path / "in" / "frames_") == {f"{index:06d}.png" for index in range(3)}
    larger = [frame.repeat(2, 0).repeat(2, 1) for frame in video_frames(clip)]
    np.testing.assert_array_equal(read_image(tmp_path / "in" / "frames_" / "000002.png"), larger[2])
