"""GIF and WebP in folders, and clips that are read by their times."""

from pathlib import Path

import pytest
from PIL import Image

from dataset.sources.decoding import decode_source, plan_source
from dataset.sources.listing import find_sources
from tests.dataset.making import frame_numbers, make_clip, make_frames, make_image, make_table


def make_animation(path: Path, milliseconds: list[int]) -> Path:
    frames = [Image.new("RGB", (32, 32), (4 * index + 4,) * 3) for index in range(len(milliseconds))]
    more = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, **more)
    return path


def test_animations_are_clips_and_still_ones_are_not(tmp_path: Path) -> None:
    make_animation(tmp_path / "a.gif", [100, 100])
    make_animation(tmp_path / "b.WEBP".lower(), [100, 100])
    make_image(tmp_path / "still.gif")
    make_image(tmp_path / "still2.webp")
    make_clip(tmp_path / "c.mkv", 2)

    assert [source.path.name for source in find_sources(make_table(tmp_path))] == ["a.gif", "b.webp", "c.mkv"]


@pytest.mark.parametrize(
    ("source_fps", "expected"),
    [
        (None, [0, 0, 1, 2, 2]),  # at the model's rate, 10
        ("auto", [0, 0, 1, 2, 2]),
        (20.0, [0, 0, 1, 2, 2]),  # as a clip of 20 frames a second, of which every second one is kept
        (5.0, [0, 1, 2]),  # as a clip of 5 frames a second: slower than the model, so all are kept
    ],
)
def test_an_animation_is_played_by_its_durations(
    tmp_path: Path, source_fps: float | str | None, expected: list[int]
) -> None:
    make_animation(tmp_path / "a.gif", [200, 100, 200])
    keys = {"source_fps": source_fps, "frame_extraction": "full", "resolution": (32, 32)}
    (source,) = find_sources(make_table(tmp_path, **keys))

    decoded = decode_source(source, 10.0)

    assert frame_numbers(decoded.frames) == expected
    assert plan_source(source, 10.0).spans == decoded.spans


def test_auto_reads_the_rate_of_each_clip(tmp_path: Path) -> None:
    make_clip(tmp_path / "a.mkv", 24)  # at 24 frames a second
    make_frames(tmp_path / "frames", 6)
    table = make_table(
        tmp_path, source_fps="auto", frame_extraction="full", max_frames=99, resolution=(32, 32)
    )
    (source,) = find_sources(table)

    at_12, at_24 = (frame_numbers(decode_source(source, fps).frames) for fps in (12.0, 24.0))

    assert at_12 == list(range(0, 24, 2))
    assert at_24 == list(range(24))
    assert len(frame_numbers(decode_source(source, 30.0).frames)) == 30  # some twice: a second is a second


def test_a_gif_may_be_the_control_of_a_clip(tmp_path: Path) -> None:
    make_clip(tmp_path / "a.mkv", 5)
    (tmp_path / "control").mkdir()
    make_animation(tmp_path / "control" / "a.gif", [63] * 5)
    table = make_table(
        tmp_path, control_directory=tmp_path / "control", target_frames=(5,), resolution=(32, 32)
    )
    (source,) = find_sources(table)

    assert source.control[0].name == "a.gif"
    assert decode_source(source, 16.0).control[0].shape == (5, 32, 32, 3)
