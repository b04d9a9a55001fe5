"""Made tracks beside the pictures of a video, and as WAV files."""

import wave
from fractions import Fraction
from operator import sub
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from modules.errors import OutputError
from modules.media.encoding import OutputFrame
from modules.media.reading import read_tags
from modules.media.tracks import Track, write_wav
from modules.media.writing import write_timed_video, write_video

FPS, CLICK = 24, 0.5


def clicking(rate: int, channels: int, seconds: float) -> Track:
    """A track with a short beep at half a second, in the last channel half as loud."""
    samples = np.zeros((channels, round(seconds * rate)), np.float32)
    beep = 0.8 * np.sin(2 * np.pi * 500 * np.arange(rate // 50) / rate)
    samples[:, round(CLICK * rate) : round(CLICK * rate) + len(beep)] = beep
    samples[-1] /= 2
    return samples, rate


def frames(count: int) -> Any:
    return (np.full((48, 64, 3), 9 * index % 255, np.uint8) for index in range(count))


def heard(path: Path) -> tuple[np.ndarray[Any, Any], int]:
    with av.open(str(path)) as container:
        found = list(container.decode(audio=0))
    times = [float(frame.pts * frame.time_base) for frame in found]
    assert times[0] == 0
    assert times == sorted(times)
    return np.concatenate([frame.to_ndarray() for frame in found], axis=1), found[0].sample_rate


@pytest.mark.parametrize(
    ("name", "codec", "rate", "channels", "seconds"),
    [
        ("a.mp4", "h264", 48000, 2, 0.75),
        ("a.mp4", "h264", 24000, 2, 3.0),
        ("ä b.mkv", "h264", 24000, 2, 0.75),
        ("a.mov", "prores", 16000, 1, 1.25),
        ("a.mkv", "prores", 22000, 6, 3.0),  # the encoder takes 22050
    ],
)
def test_a_track_lasts_as_long_as_the_pictures(
    tmp_path: Path, name: str, codec: str, rate: int, channels: int, seconds: float
) -> None:
    path, count, track = tmp_path / name, 30, clicking(rate, channels, seconds)

    write_video(path, frames(count), FPS, codec=codec, tags={"title": "t"}, track=track)

    samples, found = heard(path)
    assert (len(samples), abs(found - rate) <= 50) == (channels, True)
    # of the last packet of AAC, 1024 samples, some may be behind the end
    assert -1 / found <= samples.shape[1] / found - count / FPS < 1024 / found
    if path.suffix != ".mkv":
        with av.open(str(path)) as container:
            lengths = [stream.duration * stream.time_base for stream in container.streams]
        assert abs(lengths[0] - lengths[1]) < Fraction(1, FPS)
    loud = np.abs(samples[0]) > 0.2
    assert abs(float(np.argmax(loud)) / found - CLICK) < 0.003  # what AAC smears of a beep's start
    assert 0.4 < np.abs(samples[-1]).max() / np.abs(samples[0]).max() < 0.6 or channels == 1


def test_pictures_of_any_times_have_their_sound_beside_them(tmp_path: Path) -> None:
    times = [Fraction(0), Fraction(1, 10), Fraction(1), Fraction(5, 4)]
    shown = (OutputFrame(*one) for one in zip(frames(3), times, map(sub, times[1:], times), strict=False))

    write_timed_video(tmp_path / "a.mp4", shown, Fraction(20), "h264", track=clicking(24000, 2, 2.0))

    samples, rate = heard(tmp_path / "a.mp4")
    assert 0 <= samples.shape[1] / rate - 1.25 < 1024 / rate


def test_what_is_too_loud_is_cut(tmp_path: Path) -> None:
    track = np.array([[0.0, 2.0, -3.0, 0.5]], np.float32), 8000
    tags = {"bt_prompt": 'a "b\u00e9ll"\\n', "bt_seeds": "3"}
    write_wav(tmp_path / "a.wav", track, tags)

    assert read_tags(tmp_path / "a.wav").items() >= tags.items()
    with wave.open(str(tmp_path / "a.wav"), "rb") as file:
        read = np.frombuffer(file.readframes(4), "<i2")
        assert file.getparams()[:4] == (1, 2, 8000, 4)
    assert read.tolist() == [0, 32767, -32767, 16384]


def test_a_wav_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")

    with pytest.raises(OutputError):
        write_wav(tmp_path / "file" / "a.wav", clicking(8000, 1, 1.0))
