from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dataset.config import DatasetConfig
from dataset.debug_views import coloured_text, sheet, show_datasets
from dataset.options import DebugOptions
from modules.media.reading import image_size, read_image, video_frames
from tests.dataset.caching.test_loop import make_config
from tests.dataset.making import frame_numbers, make_clip, make_image, subset_table
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


def test_the_console_shows_as_many_items_as_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, clips=(9, 9, 9), target_frames=(1,))
    show_datasets(ToyFamily(), config, replace(DEBUG, console_num_images=2), workers=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 8
    assert all(line.count("▀") == 16 for line in lines)
    assert not (tmp_path / "cache").exists()


def test_unreadable_clips_are_reported(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    (tmp_path / "clip_0.mp4").write_bytes(b"")
    report = show_datasets(ToyFamily(), config, DEBUG, workers=1)
    assert [failure.stem for failure in report.failures] == ["clip_0"]


def test_text_on_a_background_is_denser_where_it_is_light() -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:, 4:] = 255
    text = coloured_text(picture, 2, "blue")
    assert text == "\033[44;38;2;0;0;0m \033[44;38;2;255;255;255m@\033[0m\n"


def test_a_sheet_takes_frames_evenly() -> None:
    frames = np.arange(81, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    assert list(sheet(frames, most=5)[0, ::2, 0]) == [0, 20, 40, 60, 80]


def test_what_changes_is_shown_as_it_may_be_trained_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    table = subset_table(
        tmp_path, shuffle_caption=True, caption_prefix="photo of", random_crop=True, class_tokens="red, blue"
    )
    (tmp_path / "pics").mkdir()
    make_image(tmp_path / "pics" / "a.png", (96, 64))
    caplog.set_level("INFO")

    show_datasets(ToyFamily(), DatasetConfig(table.config_path, (table,)), DEBUG, workers=1)

    said = caplog.messages[-1]
    assert said.startswith("a, 64x64 from 96x64: ")
    assert said.endswith(("photo of red, blue", "blue, photo of red"))
    assert len(capsys.readouterr().out.splitlines()) == 8
