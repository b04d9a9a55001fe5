"""Videos as streams of pictures with exact times; the sound of a part of a video, as long as its pictures."""

import gc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from modules.errors import MediaError
from modules.media.encoding import X264, OutputFrame
from modules.media.reading import timed_frames, video_frames, video_info
from modules.media.streams import Clock, shown_frames, source_info
from modules.media.writing import VideoSection, write_timed_video
from tests.modules.hostile_media import SIZE, Source, write_source, write_stream
from tests.sound_media import Track, clicks_in, write_media

FILM, NTSC = Fraction(24000, 1001), Fraction(30000, 1001)
MUXERS = {".mkv": "matroska", ".mp4": "mp4", ".avi": "avi", ".flv": "flv"}
MILLISECOND = Fraction(1, 1000)
AT_ONCE = 8  # frames of FFmpeg: two that wait, their conversions, and those with which a decoder ends


@pytest.mark.parametrize("suffix", MUXERS)
@pytest.mark.parametrize("rate", [FILM, NTSC, Fraction(60)], ids=str)
def test_a_constant_rate_has_exact_times_whatever_the_container_rounds(
    tmp_path: Path, rate: Fraction, suffix: str
) -> None:
    path = write_source(tmp_path / f"clip{suffix}", Source(MUXERS[suffix], rate, 20))

    shown = list(shown_frames(path))

    assert [frame.start for frame in shown] == [index / rate for index in range(20)]
    assert {frame.seconds for frame in shown} == {1 / rate}
    info = source_info(path)
    assert (info.rate, info.width, info.height, info.is_deep) == (rate, SIZE[1], SIZE[0], False)
    assert info.frames in (20, None)


def test_frames_are_freed_without_the_garbage_collector(tmp_path: Path) -> None:
    """Their memory is FFmpeg's, which the collector does not count: it would run after hundreds of frames."""
    path = write_source(tmp_path / "clip.mp4", Source("mp4", Fraction(16), 20))
    gc.collect()
    gc.disable()
    try:
        for _ in shown_frames(path):
            assert sum(isinstance(each, av.VideoFrame) for each in gc.get_objects()) <= AT_ONCE
    finally:
        gc.enable()


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_variable_rate_keeps_its_times(tmp_path: Path, suffix: str) -> None:
    times = [Fraction(tick, 1000) for tick in (0, 40, 53, 120, 127, 200, 360)]
    path = write_source(tmp_path / f"clip{suffix}", Source(MUXERS[suffix], times=times))

    shown = list(shown_frames(path))

    # the rate of the whole file is a guess in Matroska: what is next to its grid is moved there
    assert max(abs(frame.start - time) for frame, time in zip(shown, times, strict=True)) <= MILLISECOND
    lengths = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    assert max(abs(frame.seconds - s) for frame, s in zip(shown, lengths, strict=False)) <= 2 * MILLISECOND


@pytest.mark.parametrize(
    ("name", "muxer", "codec"),
    [("clip.wmv", "asf", "wmv2"), ("clip.h264", "h264", "libx264"), ("clip.mpg", "mpeg", "mpeg2video")],
)
def test_streams_with_few_times_or_none_have_rising_ones(
    tmp_path: Path, name: str, muxer: str, codec: str
) -> None:
    frames = [np.full((48, 64, 3), 20 * index, np.uint8) for index in range(9)]
    write_stream(tmp_path / name, muxer, codec, frames)

    shown = list(shown_frames(tmp_path / name))

    assert [frame.start - shown[0].start for frame in shown] == [Fraction(index, 25) for index in range(9)]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([0, 40, 80], [0, 40, 80]),
        ([1, 41, 79, 121], [0, 40, 80, 120]),  # rounded
        ([7, 47, 88, 127], [7, 47, 87, 127]),  # from another place
        ([0, 40, 60, 120], [0, 40, 60, 120]),  # in between
        ([None, None, None], [0, 40, 80]),
        ([0, None, 80], [0, 40, 80]),
        ([0, 40, 40, 40, 80], [0, 40, 50, 60, 80]),  # twice at one moment
        ([0, 40, 20, 80], [0, 40, 50, 80]),  # falling
        ([5000, 5040, 0, 40], [5000, 5040, 5080, 5120]),  # two recordings in one file
    ],
)
def test_times_are_snapped_to_the_rate_and_never_fall(times: list[int | None], expected: list[int]) -> None:
    clock = Clock(Fraction(25), MILLISECOND)

    found = [clock.correct_start(None if time is None else time * MILLISECOND) for time in times]

    assert found == [time * MILLISECOND for time in expected]


def test_coarse_ticks_are_not_snapped_to_an_average() -> None:
    clock = Clock(Fraction(12), Fraction(1, 30))  # on average every 2.5th tick has a picture
    times = [Fraction(tick, 30) for tick in (0, 2, 5, 7)]

    assert [clock.correct_start(time) for time in times] == times


def test_only_so_many_pictures_are_read_as_are_asked_for(tmp_path: Path) -> None:
    path = write_source(tmp_path / "clip.mkv", Source())
    full = [(frame.start, frame.seconds) for frame in shown_frames(path)]

    for limit in (0, 1, 5, 12, 50):
        part = [(frame.start, frame.seconds) for frame in shown_frames(path, limit=limit)]
        assert part == full[:limit]


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("degrees", [0, 90, -90, 180])
def test_pictures_are_turned_and_mirrored_upright(
    tmp_path: Path, degrees: int, flips: tuple[bool, bool]
) -> None:
    image = np.zeros((32, 64, 3), np.uint8)
    image[:16, :32] = 255  # top left
    with av.open(str(tmp_path / "phone.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options=X264)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(degrees, hflip=flips[0], vflip=flips[1])
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())

    (shown,) = shown_frames(tmp_path / "phone.mp4", deep=True)

    expected = np.rot90(image, degrees // 90)
    expected = expected[:, ::-1] if flips[0] else expected
    expected = expected[::-1] if flips[1] else expected
    assert np.abs(shown.pixels.astype(int) - expected).mean() < 8
    (read,) = video_frames(tmp_path / "phone.mp4")
    assert np.abs(read.astype(int) - expected).mean() < 8
    info, header = source_info(tmp_path / "phone.mp4"), video_info(tmp_path / "phone.mp4")
    assert (info.height, info.width) == (header.height, header.width) == expected.shape[:2]


def test_a_transparent_clip_is_turned_and_mirrored_as_its_container_says(tmp_path: Path) -> None:
    image = np.full((32, 64, 4), 255, np.uint8)
    image[:16, :32, :3] = 0  # top left
    with av.open(str(tmp_path / "clear.webm"), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuva420p"
        stream.set_display_rotation(90, hflip=True)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgba")))
        container.mux(stream.encode())

    (read,) = video_frames(tmp_path / "clear.webm")

    expected = np.rot90(image)[:, ::-1, :3]
    assert read.shape == expected.shape
    assert np.abs(read.astype(int) - expected).mean() < 8


@pytest.mark.parametrize("shift", [-4, 8])
def test_the_edit_list_of_a_clip_cuts_what_players_do_not_show(tmp_path: Path, shift: int) -> None:
    frames = [np.full((48, 64, 3), 15 * index, np.uint8) for index in range(12)]
    write_stream(tmp_path / "all.mp4", "mp4", "libx264", frames)
    with av.open(str(tmp_path / "all.mp4")) as full:
        stream = full.streams.video[0]
        assert stream.time_base is not None
        assert stream.average_rate is not None
        options = {"avoid_negative_ts": "disabled", "use_editlist": "1"}
        with av.open(str(tmp_path / "cut.mp4"), "w", options=options) as cut:
            copied = cut.add_stream_from_template(stream)
            for packet in (one for one in full.demux(stream) if one.size):
                assert packet.pts is not None
                assert packet.dts is not None
                ticks = round(shift / stream.average_rate / stream.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + ticks, packet.dts + ticks, copied
                cut.mux(packet)

    found = [round(float(frame.pixels.mean()) / 15) for frame in shown_frames(tmp_path / "cut.mp4")]

    assert found == list(range(max(-shift, 0), 12))


def test_more_than_eight_bits_are_read_only_where_they_are(tmp_path: Path) -> None:
    frames = [np.full((48, 64, 3), 128, np.uint8)] * 2
    write_stream(tmp_path / "deep.mov", "mov", "prores_ks", frames, "yuv422p10le")
    write_stream(tmp_path / "flat.mp4", "mp4", "libx264", frames)

    assert source_info(tmp_path / "deep.mov").is_deep
    assert next(shown_frames(tmp_path / "deep.mov", deep=True)).pixels.dtype == np.uint16
    assert next(shown_frames(tmp_path / "deep.mov")).pixels.dtype == np.uint8
    assert next(shown_frames(tmp_path / "flat.mp4", deep=True)).pixels.dtype == np.uint8


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp"])
def test_animations_are_read_as_everywhere_else(tmp_path: Path, name: str) -> None:
    images = [Image.new("RGB", (32, 16), (40 * index, 0, 90)) for index in range(4)]
    durations = [40, 110, 70, 200]
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=durations)

    shown = list(shown_frames(tmp_path / name))

    assert [frame.seconds for frame in shown] == [Fraction(duration, 1000) for duration in durations]
    assert [frame.start for frame in shown] == [Fraction(sum(durations[:index]), 1000) for index in range(4)]
    for ours, theirs in zip(shown, timed_frames(tmp_path / name), strict=True):
        np.testing.assert_array_equal(ours.pixels, theirs[0])
    assert source_info(tmp_path / name).rate == 4 / Fraction(420, 1000)


def write_audio(path: Path, with_cover: bool = False) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        if with_cover:
            cover = container.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt, cover.disposition = 32, 32, "yuvj420p", 1 << 10
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if with_cover:
            container.mux(cover.encode(av.VideoFrame(32, 32, "yuvj420p")))
            container.mux(cover.encode())


def write_cut(path: Path) -> None:
    times = [Fraction(index, 25) for index in range(60)]
    full = write_source(path.with_name("whole" + path.suffix), Source(MUXERS[path.suffix], times=times))
    data = full.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 5])


def write_unknown(path: Path) -> None:
    """A codec that nobody has heard of."""
    path.write_bytes(write_source(path, Source("mp4")).read_bytes().replace(b"avc1", b"zzzz"))


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("unknown.mp4", write_unknown, "a format that FFmpeg here does not support"),
        ("song.m4a", lambda path: write_audio(path, with_cover=True), "only sound and a cover picture"),
        ("sound.mp4", write_audio, "no video stream, only audio"),
        ("cut.mp4", write_cut, "cannot be read|cut short"),
        ("cut.mkv", write_cut, "cannot be read|cut short"),
        ("empty.mp4", Path.touch, "0 bytes"),
        ("noise.mp4", lambda path: path.write_bytes(bytes(range(256)) * 20), "cannot be read"),
        ("text.mkv", lambda path: path.write_text("not a video"), "cannot be read|no video format"),
        ("folder", Path.mkdir, "cannot be read|no video"),
        ("absent.mp4", lambda path: None, "does not exist"),
    ],
)
def test_what_is_no_whole_video_is_named_with_the_reason(
    tmp_path: Path, name: str, write: Callable[[Path], object], reason: str
) -> None:
    path = tmp_path / name
    write(path)

    with pytest.raises(MediaError, match=reason) as caught:
        [source_info(path), *shown_frames(path)]

    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_cut_file_is_told_before_it_is_read(tmp_path: Path, suffix: str) -> None:
    source = Source(MUXERS[suffix], frames=60, audio="pcm_s16le", options=(("movflags", "faststart"),))
    full = write_source(tmp_path / f"whole{suffix}", source)
    source_info(full)

    (tmp_path / f"cut{suffix}").write_bytes(full.read_bytes()[:-5000])

    with pytest.raises(MediaError, match=rf"cut\{suffix} is cut short: it has .* bytes of"):
        source_info(tmp_path / f"cut{suffix}")


def test_pictures_of_other_sizes_are_not_mixed(tmp_path: Path) -> None:
    parts = []
    for number, size in enumerate([(48, 64), (64, 64)]):
        frames = [np.full((*size, 3), 90, np.uint8)] * 3
        write_stream(tmp_path / f"{number}.mpg", "mpeg1video", "mpeg1video", frames)
        parts.append((tmp_path / f"{number}.mpg").read_bytes())
    (tmp_path / "joined.mpg").write_bytes(b"".join(parts))

    with pytest.raises(MediaError, match=r"joined\.mpg changes its size from 64 x 48 to 64 x 64"):
        list(shown_frames(tmp_path / "joined.mpg"))


RATE = 48_000


def write_part(source: Path, start: Fraction, seconds: Fraction, path: Path, with_audio: bool = True) -> Path:
    pixels = np.zeros((48, 64, 3), np.uint8)
    frames = (
        OutputFrame(pixels, Fraction(number, 25), Fraction(1, 25)) for number in range(int(seconds * 25))
    )
    section = VideoSection(source, start, seconds, with_audio)
    write_timed_video(path, frames, Fraction(25), "h264", preset="ultrafast", audio_section=section)
    return path


def audio_of(path: Path) -> NDArray[np.float32]:
    """The samples from time 0 on, as a player plays them."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
        begin = round(frames[0].pts * frames[0].time_base * RATE)
        joined = np.concatenate([frame.to_ndarray()[0] for frame in frames])
    assert begin >= 0 or len(joined) > -begin
    return joined[-begin:] if begin < 0 else np.concatenate([np.zeros(begin, np.float32), joined])


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    ("name", "codec", "first"),
    [("film.mkv", "pcm_s16le", 0), ("film.mp4", "aac", 0), ("film.ts", "mp2", 7), ("film.mkv", "flac", 3)],
)
def test_sound_is_cut_where_the_pictures_are(
    tmp_path: Path, name: str, codec: str, first: int, suffix: str
) -> None:
    track = Track((0.7, 2.2, 3.1), seconds=4.0, start=first, codec=codec)
    source = write_media(tmp_path / name, track, frames=100, first=Fraction(first))

    samples = audio_of(write_part(source, Fraction(2), Fraction(8, 5), tmp_path / f"part{suffix}"))

    # Matroska counts in milliseconds, and MPEG sound is delayed by its encoder
    found = [place / RATE for place in clicks_in(samples)]
    assert found == pytest.approx([0.2, 1.1], abs=0.012 if codec == "mp2" else 0.002)
    assert abs(len(samples) / RATE - 1.6) < 2 * 1024 / RATE


def test_sound_that_begins_later_or_ends_earlier_is_filled_with_silence(tmp_path: Path) -> None:
    track = Track((0.1,), seconds=0.5, start=2.1)
    source = write_media(tmp_path / "film.mkv", track, frames=100)

    samples = audio_of(write_part(source, Fraction(2), Fraction(8, 5), tmp_path / "part.mp4"))

    assert [place / RATE for place in clicks_in(samples)] == pytest.approx([0.2], abs=0.002)
    assert abs(len(samples) / RATE - 1.6) < 2 * 1024 / RATE


def test_no_sound_is_written_on_demand_or_if_there_is_none(tmp_path: Path) -> None:
    source = write_media(tmp_path / "film.mkv", Track(seconds=4.0), frames=100)

    part = write_part(source, Fraction(1), Fraction(1), tmp_path / "part.mp4", with_audio=False)
    again = write_part(part, Fraction(0), Fraction(1), tmp_path / "again.mp4")

    for path in (part, again):
        with av.open(str(path)) as container:
            assert not container.streams.audio
