"""The sound of a part of a file: which track, which samples, and what a damaged or silent file gives."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from modules.errors import MediaError
from modules.media.samples import read_track, track_info
from tests.sound_media import LOUD, Track, clicks_in, write_media

RATE = 16000


@pytest.mark.parametrize(
    ("name", "track", "off"),
    [
        ("a.mp4", Track((0.5, 1.5), rate=44100), 1),
        ("a.mkv", Track((0.5, 1.5), rate=44100, codec="flac"), RATE // 1000),  # its times are milliseconds
        ("a.wav", Track((0.5, 1.5), rate=44100, codec="pcm_s16le"), 1),
        ("a.mp3", Track((0.5, 1.5), rate=44100, codec="libmp3lame"), 1),
        ("ä b.m4a", Track((0.5, 1.5), layout="mono"), 1),
        ("a.ogg", Track((0.5, 1.5), codec="libopus"), 1),
    ],
)
@pytest.mark.parametrize("start", [Fraction(0), Fraction(13, 10)])
def test_a_click_is_where_it_was(tmp_path: Path, name: str, track: Track, off: int, start: Fraction) -> None:
    path = write_media(tmp_path / name, track, frames=50 if name[-3:] in ("mp4", "mkv") else 0)

    found = read_track(path, start, 12000, RATE, 2)

    assert found is not None
    assert (found.shape, found.dtype) == ((2, 12000), np.float32)
    for row in found:
        (place,) = clicks_in(row)
        assert abs(place - round((1.5 if start else 0.5) * RATE) + round(start * RATE)) <= off
        # of the loudness, codecs change a little
        assert abs(np.abs(row).max() - LOUD) < 0.05


def test_rate_and_channels_are_converted_and_loudness_is_left_alone(tmp_path: Path) -> None:
    six = Track((0.5,), layout="5.1", codec="flac", channel=2)  # the one in the middle
    left = Track((0.5,), codec="flac", channel=0)

    middle = read_track(write_media(tmp_path / "six.mkv", six), Fraction(0), RATE, RATE, 2)
    mono = read_track(write_media(tmp_path / "left.mkv", left), Fraction(0), RATE, RATE, 1)

    assert middle is not None
    assert mono is not None
    # by FFmpeg's table: the middle goes to both sides, 3 dB softer, a side to the middle too
    assert np.abs(middle).max(1) == pytest.approx([LOUD * 0.5**0.5] * 2, abs=0.01)
    assert np.abs(mono).max(1) == pytest.approx([LOUD * 0.5**0.5], abs=0.01)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_is_aligned_with_the_first_picture_and_filled_with_silence(tmp_path: Path, suffix: str) -> None:
    """A track that starts late and ends early; pictures that start later than the file."""
    path = write_media(tmp_path / f"late{suffix}", Track((0.25,), seconds=0.5, start=0.4))
    film = write_media(tmp_path / f"film{suffix}", Track((1.0,)), first=Fraction(2, 5))

    late, ahead = (read_track(one, Fraction(0), 2 * RATE, RATE, 1) for one in (path, film))
    info = track_info(path)

    assert late is not None
    assert ahead is not None
    assert info is not None
    assert info.end is not None
    assert abs(clicks_in(late[0])[0] - 0.65 * RATE) <= RATE // 1000
    assert np.abs(late[0, : int(0.38 * RATE)]).max() == np.abs(late[0, RATE:]).max() == 0
    assert abs(clicks_in(ahead[0])[0] - 0.6 * RATE) <= RATE // 1000
    assert (info.rate, info.channels, info.tracks) == (48000, 2, 1)
    assert (info.start, info.end) == pytest.approx((0.4, 0.9), abs=0.03)


def test_a_gap_in_the_times_is_silent(tmp_path: Path) -> None:
    tracks = (Track((0.2,), seconds=0.4, start=start, codec="flac") for start in (0, 1.2))
    parts = [write_media(tmp_path / f"{n}.mkv", one, frames=0) for n, one in enumerate(tracks)]
    path = tmp_path / "gap.mkv"
    with av.open(str(path), "w") as target:
        stream = None
        for one in parts:
            with av.open(str(one)) as source:
                stream = stream or target.add_stream_from_template(source.streams.audio[0])
                for packet in source.demux(audio=0):
                    if packet.size:
                        packet.stream = stream
                        target.mux(packet)

    found = read_track(path, Fraction(0), 2 * RATE, RATE, 1)

    assert found is not None
    places = [place / RATE for place in clicks_in(found[0])]
    assert places == pytest.approx([0.2, 1.4], abs=0.002)


def test_of_two_tracks_the_one_with_more_channels_is_read(tmp_path: Path) -> None:
    """FFmpeg's choice, if neither is marked as the default."""
    path = write_media(tmp_path / "two.mp4", Track((0.3,), layout="mono"), Track((0.7,)))

    found, info = read_track(path, Fraction(0), RATE, RATE, 1), track_info(path)

    assert found is not None
    assert info is not None
    assert len(clicks_in(found[0])) == 1
    assert info.tracks == 2


def test_a_file_without_a_track_has_none(tmp_path: Path) -> None:
    silent = write_media(tmp_path / "silent.mp4")

    assert read_track(silent, Fraction(0), RATE, RATE, 1) is track_info(silent) is None


def test_damaged_sound_and_files_that_are_no_sound_are_named(tmp_path: Path) -> None:
    path = write_media(tmp_path / "damaged.mp3", Track((0.5,), codec="libmp3lame"), frames=0)
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 3, 2 * len(data) // 3):
        data[place] ^= 0x55
    path.write_bytes(data)
    cut = write_media(tmp_path / "cut.wav", Track((0.5,), codec="pcm_s16le"), frames=0)
    cut.write_bytes(cut.read_bytes()[:200_000])
    text = tmp_path / "list.wav"
    text.write_text("ffconcat version 1.0\nfile 'damaged.mp3'\n", encoding="utf-8")

    for one in (path, cut):
        with pytest.raises(MediaError, match=rf"{one.name}: its sound is damaged near .*convert"):
            read_track(one, Fraction(0), 2 * RATE, RATE, 1)
    with pytest.raises(MediaError, match="is in no supported sound format"):
        read_track(text, Fraction(0), RATE, RATE, 1)
    with pytest.raises(MediaError, match="does not exist"):
        read_track(tmp_path / "gone.wav", Fraction(0), RATE, RATE, 1)
