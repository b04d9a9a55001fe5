from dataclasses import replace
from pathlib import Path

import pytest

from data_tools.report.views import show_datasets
from dataset.options import DebugOptions
from modules.media.reading import image_size, read_image, video_frames
from tests.dataset.caching.test_loop import make_config
from tests.dataset.making import frame_numbers, make_clip
from tests.dataset.toy_family import ToyFamily

DEBUG = DebugOptions(debug_mode="console", console_width=16, console_back=None, console_num_images=None)


def test_pictures_show_frames_from_the_first_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    config = make_config(tmp_path, clips=(9,), target_frames=(5,))
    show_datasets(ToyFamily(), config, replace(DEBUG, debug_mode="image"), workers=1)
    path = tmp_path / "debug_views" / "0_clip_0_00000-005.png"
    assert image_size(path) == (5 * 32, 32)
    assert frame_numbers([read_image(path)[:, 32 * place : 32 * place + 32] for place in range(5)]) == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_clips_show_the_control_beside_the_frames(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    make_clip(tmp_path / "control" / "clip_0.mp4", 9)
    config = make_config(tmp_path, clips=(9,), control_directory=tmp_path / "control")
    show_datasets(ToyFamily(), config, replace(DEBUG, debug_mode="video"), workers=1)
    frames = list(video_frames(tmp_path / "debug_views" / "0_clip_0_00000-005.mp4"))
    assert len(frames) == 5
    assert frames[0].shape == (32, 64, 3)


def test_unreadable_clips_are_reported(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    (tmp_path / "clip_0.mp4").write_bytes(b"")
    report = show_datasets(ToyFamily(), config, DEBUG, workers=1)
    assert [failure.stem for failure in report.failures] == ["clip_0"]
