"""Sound, subtitles, attachments, chapters and tags of a video in what is made from its pictures."""

import logging
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from modules.errors import MediaError
from modules.media.encoding import X264, OutputFrame
from modules.media.reading import read_tags
from modules.media.streams import shown_frames, source_info
from modules.media.writing import write_timed_video
from tests.modules.hostile_media import FONT, SUBTITLES, Source, packets, write_source

FILM = Fraction(24000, 1001)
MUXERS = {".mkv": "matroska", ".mp4": "mp4", ".mov": "mov", ".ts": "mpegts", ".avi": "avi"}


def remake(source: Path, suffix: str, codec: str = "h264", **more: Any) -> Path:
    """What a tool does that changes no picture."""
    path = source.with_name(f"made{suffix}")
    rate = source_info(source).rate
    write_timed_video(
        path, shown_frames(source), rate, codec, preset="ultrafast", copied_video=source, **more
    )
    return path


def add_black(target: Any, frames: int, aspect: Fraction = Fraction(1)) -> None:
    """Write a stream of black pictures. aspect: of a pixel."""
    video = target.add_stream("libx264", rate=25, options=X264)
    video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
    video.codec_context.sample_aspect_ratio = aspect
    for _ in range(frames):
        target.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
    target.mux(video.encode())


@pytest.mark.parametrize(
    ("encoder", "original", "suffix"),
    [
        ("aac", ".mkv", ".mp4"),
        ("aac", ".mp4", ".mkv"),
        ("libopus", ".mp4", ".mp4"),
        ("libmp3lame", ".mkv", ".mkv"),
        ("flac", ".mkv", ".mp4"),
        ("ac3", ".mp4", ".mkv"),
    ],
)
def test_sound_is_copied_byte_by_byte_with_its_times(
    tmp_path: Path, encoder: str, original: str, suffix: str
) -> None:
    source = write_source(tmp_path / f"source{original}", Source(MUXERS[original], FILM, 15, audio=encoder))

    made = remake(source, suffix)

    expected, found = packets(source, "audio"), packets(made, "audio")
    assert len(found) == len(expected) > 5
    assert [data for _, data in found] == [data for _, data in expected]
    apart = [abs(ours[0] - theirs[0]) for ours, theirs in zip(found, expected, strict=True)]
    assert max(apart) <= Fraction(1, 999)  # Matroska counts in milliseconds
    assert [frame.start for frame in shown_frames(made)] == [index / FILM for index in range(15)]


@pytest.mark.parametrize("first", [Fraction(0), 5 / FILM])
@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_pictures_and_sound_stay_in_step(tmp_path: Path, suffix: str, first: Fraction) -> None:
    content = Source(rate=FILM, first=first, audio="libmp3lame", offset="3")
    source = write_source(tmp_path / "source.mkv", content)

    made = remake(source, suffix)

    before, after = (packets(one, "video")[0][0] - packets(one, "audio")[0][0] for one in (source, made))
    assert abs(after - before) <= Fraction(1, 500)


@pytest.mark.parametrize(
    ("encoder", "original"), [("pcm_s16le", ".mkv"), ("pcm_s16le", ".mov"), ("vorbis", ".mkv")]
)
def test_sound_that_the_container_does_not_play_is_encoded_anew_and_said(
    tmp_path: Path, encoder: str, original: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source = write_source(tmp_path / f"source{original}", Source(MUXERS[original], frames=25, audio=encoder))

    made = remake(source, ".mp4")

    said = [record.getMessage() for record in caplog.records if "AAC" in record.getMessage()]
    assert len(said) == 1
    assert encoder in said[0]
    assert ".mkv keeps it" in said[0]
    with av.open(str(made)) as container:
        stream = container.streams.audio[0]
        assert (stream.codec_context.name, stream.codec_context.layout.name) == ("aac", "stereo")
        assert stream.metadata.get("language") in ("deu", "und")
        audio = np.concatenate([frame.to_ndarray() for frame in container.decode(stream)], axis=1)
    assert abs(audio.shape[1] / 48_000 - 1) < 0.05
    # the tone is still there, and nothing else
    spectrum = np.abs(np.fft.rfft(audio[0, 4800:43_200] * np.hanning(38_400)))
    assert abs(spectrum.argmax() * 48_000 / 38_400 - 440) < 3
    times = np.array([float(time) for time, _ in packets(made, "audio")])
    np.testing.assert_allclose(np.diff(times), 1024 / 48_000, atol=1e-9)


def test_missing_sound_becomes_silence_when_it_is_encoded_anew(tmp_path: Path) -> None:
    path = tmp_path / "gap.mkv"
    with av.open(str(path), "w") as target:
        audio = target.add_stream("pcm_s16le", rate=48_000)
        audio.layout = "mono"
        add_black(target, 50)
        for start in (*range(0, 19_200, 4800), *range(67_200, 96_000, 4800)):  # none from 0.4 s to 1.4 s
            loud = av.AudioFrame.from_ndarray(np.full((1, 4800), 9000, np.int16), format="s16", layout="mono")
            loud.sample_rate, loud.pts, loud.time_base = 48_000, start, Fraction(1, 48_000)
            target.mux(audio.encode(loud))
        target.mux(audio.encode(None))

    made = remake(path, ".mp4")

    with av.open(str(made)) as container:
        found = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    level = np.abs(found[:96_000].reshape(-1, 4800)).mean(axis=1)
    assert level[[1, 2, 16, 17]].min() > 0.1
    assert level[6:12].max() < 0.01


@pytest.mark.parametrize(
    ("original", "encoder", "suffix", "kept_as"),
    [
        (".mkv", "srt", ".mkv", {"srt", "subrip"}),
        (".mkv", "ass", ".mkv", {"ass", "ssa"}),
        (".mp4", "mov_text", ".mp4", {"mov_text"}),
        (".mkv", "srt", ".mp4", {"mov_text"}),
        (".mkv", "ass", ".mp4", {"mov_text"}),
        (".mp4", "mov_text", ".mkv", {"srt", "subrip"}),
    ],
)
def test_subtitles_are_kept(
    tmp_path: Path, original: str, encoder: str, suffix: str, kept_as: set[str]
) -> None:
    source = write_source(tmp_path / f"source{original}", Source(MUXERS[original], subtitles=encoder))

    made = remake(source, suffix)

    with av.open(str(made)) as container:
        stream = container.streams.subtitles[0]
        assert stream.metadata["language"] == "eng"
        assert stream.codec_context.name in kept_as
    texts = [(time, data.decode("utf-8", "replace")) for time, data in packets(made, "subtitles")]
    shown = [(time, text) for time, text in texts if len(text) > 2]
    assert [time for time, _ in shown] == [Fraction(1, 10), Fraction(3, 10)]
    for line, (_, text) in zip(SUBTITLES, shown, strict=True):
        assert line in text
        assert ("{\\i1}" in text) == ("ass" in kept_as)


def test_chapters_fonts_and_tags_are_kept_in_matroska(tmp_path: Path) -> None:
    tags = (("BT_PROMPT", "eine Katze, 漢字"), ("title", "Tiere"), ("place", "x"))
    content = Source(audio="aac", font=True, chapters=True, subtitles="ass", tags=tags)
    source = write_source(tmp_path / "source.mkv", content)

    made = remake(source, ".mkv", tags={"bt_prompt": "ein Hund", "bt_tool": "upscaler"})

    found = read_tags(made)
    assert found.pop("encoder") == "Lavf"  # ours, without a version
    assert found == {"bt_prompt": "ein Hund", "title": "Tiere", "place": "x", "bt_tool": "upscaler"}
    with av.open(str(made)) as container:
        first, last = container.chapters()
        assert (first["metadata"]["title"], last["metadata"]["title"]) == ("Anfang", "Ende")
        assert (first["start"], last["start"] * last["time_base"]) == (0, Fraction(1, 5))
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert video.metadata["title"] == "Bild"
        assert (audio.metadata["title"], audio.metadata["language"]) == ("Ton", "deu")
        (font,) = [stream for stream in container.streams if stream.type == "attachment"]
        assert (font.metadata["filename"], font.data) == ("schrift.ttf", FONT)


def test_chapters_and_tags_are_kept_in_mp4_and_the_font_is_missed_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tags = (("BT_PROMPT", "eine Katze, 漢字"), ("title", "Tiere"))
    content = Source(audio="aac", font=True, chapters=True, subtitles="srt", tags=tags)
    source = write_source(tmp_path / "source.mkv", content)

    made = remake(source, ".mp4")

    found = read_tags(made)
    assert (found["bt_prompt"], found["title"]) == ("eine Katze, 漢字", "Tiere")
    with av.open(str(made)) as container:
        titles = [chapter["metadata"]["title"] for chapter in container.chapters()]
        assert titles == ["Anfang", "Ende"]
        assert container.streams.audio[0].metadata["language"] == "deu"
    (warning,) = caplog.records
    assert "schrift.ttf) is left out: .mp4 files do not support it; .mkv keeps it" in warning.getMessage()
    # chapters are a stream in MP4, which is not copied as one
    again = remake(made, ".mkv")
    with av.open(str(again)) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio", "subtitle"]
        assert len(container.chapters()) == 2
    assert len(caplog.records) == 1


def test_tags_that_mp4_knows_are_written_so_that_players_show_them(tmp_path: Path) -> None:
    tags = (("title", "Tiere"), ("artist", "Ich"))
    source = write_source(tmp_path / "source.mp4", Source("mp4", tags=tags))

    made = remake(source, ".mp4")

    assert b"\xa9nam" in made.read_bytes()
    assert {"title": "Tiere", "artist": "Ich"}.items() <= read_tags(made).items()


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_recording_of_a_broadcast_becomes_a_file_that_begins_at_zero(tmp_path: Path, suffix: str) -> None:
    source = write_source(tmp_path / "source.ts", Source("mpegts", frames=20, audio="aac", offset="1000"))

    made = remake(source, suffix)

    with av.open(str(made)) as container:
        assert container.start_time == 0
    first, last = packets(made, "audio")[0][0], packets(source, "audio")[0][0] - 1000
    assert abs(first - last) < Fraction(1, 10)
    assert len(packets(made, "audio")) == len(packets(source, "audio"))
    starts = [frame.start for frame in shown_frames(made)]
    assert [start - starts[0] for start in starts] == [Fraction(index, 25) for index in range(20)]


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_the_cover_picture_is_kept(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / "source.mp4"
    image = np.full((32, 32, 3), 200, np.uint8)
    with av.open(str(source), "w", format="mp4") as target:
        cover = target.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = 1 << 10
        add_black(target, 5)
        target.mux(cover.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        target.mux(cover.encode())

    made = remake(source, suffix)

    assert len(list(shown_frames(made))) == 5
    covers = []
    for path in (source, made):
        with av.open(str(path)) as container:
            (cover,) = [stream for stream in container.streams.video if stream.disposition & 1 << 10]
            covers.append(next(bytes(packet) for packet in container.demux(cover)))
    assert covers[0] == covers[1]


@pytest.mark.parametrize("code", ["01:00:00:00", "01:00:00;00"])
@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov"])
def test_a_time_code_is_kept_and_another_stream_of_pictures_is_not(
    tmp_path: Path, suffix: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, made, ntsc = tmp_path / "camera.mov", tmp_path / f"made{suffix}", Fraction(30000, 1001)
    with av.open(str(path), "w") as target:
        for width in (64, 32):
            video = target.add_stream("libx264", rate=ntsc, options=X264)
            video.width, video.height, video.pix_fmt = width, 32, "yuv420p"
            video.metadata["timecode"] = code
        for video in target.streams.video:
            target.mux(video.encode(av.VideoFrame(video.width, 32, "yuv420p")))
            target.mux(video.encode())

    for rate, expected in ((ntsc, code), (Fraction(25), None if ";" in code else code)):
        write_timed_video(made, shown_frames(path), rate, "h264", copied_video=path)

        with av.open(str(made)) as container:
            (video,) = container.streams.video
            found = {name.lower(): value for name, value in video.metadata.items()}
        assert found.get("timecode") == expected
    left_out = "stream 1 (pictures: h264) is left out: only the main stream of pictures is written"
    assert {record.getMessage().split(": ", 1)[1] for record in caplog.records} == {left_out}


def test_pixels_that_are_not_square_stay_so(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "dvd.mp4"), "w") as target:
        add_black(target, 1, aspect=Fraction(16, 15))

    for suffix in (".mkv", ".mp4"):
        with av.open(str(remake(tmp_path / "dvd.mp4", suffix))) as container:
            assert container.streams.video[0].sample_aspect_ratio == Fraction(16, 15)


def test_damaged_sound_does_not_lose_the_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_source(tmp_path / "source.mkv", Source(frames=25, audio="vorbis"))
    data = bytearray(source.read_bytes())
    damaged = [packet for _, packet in packets(source, "audio")][5:9]
    for packet in damaged:
        place = data.index(packet)
        data[place : place + len(packet)] = b"\xff" * len(packet)
    source.write_bytes(data)

    made = remake(source, ".mp4")

    assert len(list(shown_frames(made))) == 25
    assert "packets of stream 1 (sound: vorbis, deu) are damaged" in caplog.text
    assert packets(made, "audio")[-1][0] > Fraction(9, 10)
    assert len(packets(remake(source, ".mkv"), "audio")) == len(packets(source, "audio"))


def test_sound_that_ffmpeg_cannot_write_does_not_lose_the_pictures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_source(tmp_path / "source.ts", Source("mpegts", frames=25, audio="aac"))
    data = bytearray(source.read_bytes())
    heads = [found.start() for found in re.finditer(b"\xff\xf1", data)]
    for head in heads[10:14]:
        data[head + 2] = 0xFF  # in a header, which is taken off in MP4: a rate that does not exist
    source.write_bytes(data)

    made = remake(source, ".mp4")

    assert len(list(shown_frames(made))) == 25
    assert len(packets(made, "audio")) > 40
    assert "stream 1 (sound: aac, deu) are damaged and left out" in caplog.text


def test_sound_is_read_as_far_as_the_pictures_have_come(tmp_path: Path) -> None:
    """Nothing is collected: the file contains the sound up to a short time before the newest picture."""
    source = write_source(tmp_path / "source.mkv", Source(frames=150, audio="pcm_s16le"))
    path, sizes = tmp_path / "made.mkv", []

    def watched() -> Any:
        for frame in shown_frames(source):
            sizes.append(sum(file.stat().st_size for file in tmp_path.glob(".made.mkv.*")))
            yield frame

    write_timed_video(path, watched(), Fraction(25), "prores", copied_video=source)

    # raw sound of 6 s is 1.15 MB: all but the last two seconds have been written before the last picture
    assert sizes[-1] > 4 * 48_000 * 4
    assert sizes[75] < 0.6 * path.stat().st_size


def test_a_source_that_is_gone_is_named(tmp_path: Path) -> None:
    frames = [OutputFrame(np.zeros((48, 64, 3), np.uint8), Fraction(0), Fraction(1, 25))]

    with pytest.raises(MediaError, match=r"absent\.mkv does not exist"):
        write_timed_video(tmp_path / "made.mkv", frames, FILM, "h264", copied_video=tmp_path / "absent.mkv")
    assert not list(tmp_path.iterdir())
