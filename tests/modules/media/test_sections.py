"""The sound of a part of a video: exact, as long as the pictures, and silent where there is none."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from modules.media.encoding import Picture
from modules.media.sections import VideoSection
from modules.media.writing import write_shown

RATE = 48_000
CLICKS = (0.7, 2.2, 3.1)  # seconds; in the other parts of a film there is silence


def write_film(path: Path, encoder: str, begin: float = 0.0, seconds: float = 4.0, offset: str = "0") -> Path:
    """A grey film of 4 seconds with clicks. begin, seconds: of its sound."""
    samples = np.zeros((1, round(seconds * RATE)), np.float32)
    for click in CLICKS:
        place = round((click - begin) * RATE)
        if 0 <= place < samples.shape[1]:
            samples[:, place : place + 48] = 0.8
    with av.open(str(path), "w", options={"output_ts_offset": offset}) as target:
        video = target.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        sound = target.add_stream(encoder, rate=RATE, layout="mono")
        for number in range(100):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8), format="rgb24")
            target.mux(video.encode(frame))
        target.mux(video.encode())
        for place in range(0, samples.shape[1], 1024):
            part = av.AudioFrame.from_ndarray(samples[:, place : place + 1024], format="fltp", layout="mono")
            part.sample_rate, part.time_base = RATE, Fraction(1, RATE)
            part.pts = place + round(begin * RATE)
            target.mux(sound.encode(part))
        target.mux(sound.encode())
    return path


def write_part(source: Path, start: Fraction, seconds: Fraction, path: Path, with_sound: bool = True) -> Path:
    pixels = np.zeros((48, 64, 3), np.uint8)
    frames = (Picture(pixels, Fraction(number, 25), Fraction(1, 25)) for number in range(int(seconds * 25)))
    section = VideoSection(source, start, seconds, with_sound)
    write_shown(path, frames, Fraction(25), "h264", preset="ultrafast", section_of=section)
    return path


def sound_of(path: Path) -> NDArray[np.float32]:
    """The samples from time 0 on, as a player plays them."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
        begin = round(frames[0].pts * frames[0].time_base * RATE)
        joined = np.concatenate([frame.to_ndarray()[0] for frame in frames])
    assert begin >= 0 or len(joined) > -begin
    return joined[-begin:] if begin < 0 else np.concatenate([np.zeros(begin, np.float32), joined])


def clicks_in(samples: NDArray[np.float32]) -> list[float]:
    """The seconds at which it becomes loud."""
    loud = np.flatnonzero(np.abs(samples) > 0.3)
    first = [
        place for number, place in enumerate(loud) if number == 0 or place - loud[number - 1] > RATE // 10
    ]
    return [place / RATE for place in first]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    ("name", "encoder", "offset"),
    [
        ("film.mkv", "pcm_s16le", "0"),
        ("film.mp4", "aac", "0"),
        ("film.ts", "mp2", "7"),
        ("film.mkv", "flac", "3"),
    ],
)
def test_sound_is_cut_where_the_pictures_are(
    tmp_path: Path, name: str, encoder: str, offset: str, suffix: str
) -> None:
    source = write_film(tmp_path / name, encoder, offset=offset)

    samples = sound_of(write_part(source, Fraction(2), Fraction(8, 5), tmp_path / f"part{suffix}"))

    # Matroska counts in milliseconds, and MPEG sound is delayed by its encoder
    assert clicks_in(samples) == pytest.approx([0.2, 1.1], abs=0.012 if encoder == "mp2" else 0.002)
    assert abs(len(samples) / RATE - 1.6) < 2 * 1024 / RATE


def test_sound_that_begins_later_or_ends_earlier_is_filled_with_silence(tmp_path: Path) -> None:
    source = write_film(tmp_path / "film.mkv", "pcm_s16le", begin=2.1, seconds=0.5)

    samples = sound_of(write_part(source, Fraction(2), Fraction(8, 5), tmp_path / "part.mp4"))

    assert clicks_in(samples) == pytest.approx([0.2], abs=0.002)
    assert abs(len(samples) / RATE - 1.6) < 2 * 1024 / RATE


def test_no_sound_is_written_on_demand_or_if_there_is_none(tmp_path: Path) -> None:
    source = write_film(tmp_path / "film.mkv", "pcm_s16le")

    part = write_part(source, Fraction(1), Fraction(1), tmp_path / "part.mp4", with_sound=False)
    again = write_part(part, Fraction(0), Fraction(1), tmp_path / "again.mp4")

    for path in (part, again):
        with av.open(str(path)) as container:
            assert not container.streams.audio
