"""Codecs and containers of outputs, and that metadata read back from all of them with other libraries too."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from generation.outputs import save_pixels
from modules.media.reading import read_tags, video_frames
from tests.generation.saving import output_options

STREAMS = {"h264": ("h264", "yuv420p"), "h265": ("hevc", "yuv420p"), "prores": ("prores", "yuv422p10le")}
PROMPT = 'käfer 漢字 🐞 "quoted" = a; b # c\\d ' + "long " * 1000
METADATA = {"bt_prompt": PROMPT + "\nsecond line", "bt_seeds": "7", "bt_cfg_schedule": "1-3, e~2"}
AS_ONE_LINE = {**METADATA, "bt_prompt": PROMPT + "\\nsecond line"}


def save(
    folder: Path, codec: str, container: str, width: int = 96, height: int = 64, frames: int = 5
) -> Path:
    pixels = torch.linspace(-1, 1, frames).view(1, 1, -1, 1, 1).expand(1, 3, frames, height, width)
    asked = output_options(folder, codec=codec, container=container)
    return save_pixels(asked, "a", iter([pixels]), 16.0, METADATA)


def tags_by_av(path: Path) -> dict[str, str]:
    with av.open(str(path)) as container:
        return {name.lower(): text for name, text in container.metadata.items()}


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize("codec", STREAMS)
def test_every_codec_and_container_keeps_frames_and_metadata(
    codec: str, container: str, tmp_path: Path
) -> None:
    path = save(tmp_path, codec, container)
    assert path.suffix == (".mkv" if codec == "prores" else f".{container}")
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == STREAMS[codec]
        assert stream.average_rate == 16
    grey = np.stack(list(video_frames(path))).astype(int)
    assert grey.shape == (5, 64, 96, 3)
    assert abs(grey.mean((1, 2, 3)) - [0, 64, 128, 191, 255]).max() < 3
    assert np.ptp(grey, axis=3).max() <= 3  # no colour
    for found in (read_tags(path), tags_by_av(path)):
        assert {key: found[key] for key in METADATA} == AS_ONE_LINE


@pytest.mark.parametrize("codec", STREAMS)
@pytest.mark.parametrize(("width", "height"), [(97, 65), (96, 65), (97, 64)])
def test_the_last_row_or_column_of_an_odd_size_is_cropped(
    codec: str, width: int, height: int, tmp_path: Path
) -> None:
    path = save(tmp_path, codec, "mkv", width, height)
    assert next(video_frames(path)).shape == (64, 96, 3)


@pytest.mark.parametrize(("width", "height", "codec"), [(48, 32, "h264"), (62, 64, "h264"), (64, 48, "hevc")])
def test_pictures_too_small_for_h265_are_written_as_h264(
    width: int, height: int, codec: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, "h265", "mkv", width, height)
    with av.open(str(path)) as file:
        assert file.streams.video[0].codec_context.name == codec
    assert ("--codec h265 is written as h264" in caplog.text) == (codec == "h264")
    assert {key: read_tags(path)[key] for key in METADATA} == AS_ONE_LINE
