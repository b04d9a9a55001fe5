"""Videos written at the times of their pictures: rates, colors, depth, memory; whole files or none."""

import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from modules.errors import MediaError
from modules.media.encoding import OutputFrame, recompress
from modules.media.streams import shown_frames, source_info
from modules.media.writing import write_timed_video

FORMATS = [
    *(("h264", ".mp4"), ("h264", ".mkv"), ("h265", ".mp4"), ("h265", ".mkv")),
    *(("prores", ".mkv"), ("prores", ".mov")),
]
FILM = Fraction(24000, 1001)
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
COLOURS |= {"grey": (128, 128, 128), "white": (255, 255, 255), "black": (0, 0, 0)}


def shown(starts: Sequence[Fraction], height: int = 48, width: int = 64) -> Iterator[OutputFrame]:
    """A picture from each start to the next one; the last start is the end."""
    for index, (start, end) in enumerate(zip(starts, starts[1:], strict=False)):
        pixels = np.full((height, width, 3), 8 * index % 256, np.uint8)
        yield OutputFrame(pixels, start, end - start)


def at_rate(rate: Fraction, count: int) -> list[Fraction]:
    return [index / rate for index in range(count + 1)]


@pytest.mark.parametrize("rate", [FILM, Fraction(25)], ids=str)
@pytest.mark.parametrize(("codec", "suffix"), FORMATS)
def test_a_constant_rate_is_read_back_as_it_was(
    tmp_path: Path, codec: str, suffix: str, rate: Fraction
) -> None:
    path = tmp_path / f"clip{suffix}"

    written = write_timed_video(path, shown(at_rate(rate, 14)), rate, codec, preset="ultrafast")

    assert (written.frames, written.seconds, written.width, written.height) == (14, 14 / rate, 64, 48)
    back = list(shown_frames(path))
    assert [frame.start for frame in back] == at_rate(rate, 13)
    assert {frame.seconds for frame in back} == {1 / rate}
    assert source_info(path).rate == rate
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == rate
        assert abs(Fraction(container.duration, 1_000_000) - 14 / rate) <= Fraction(1, 1000)
        assert stream.codec_context.name == {"h265": "hevc"}.get(codec, codec)
        pixel_format = {"prores": "yuv422p10le"}.get(codec, "yuv420p")
        assert stream.codec_context.pix_fmt == pixel_format
        if codec == "prores":
            assert stream.codec_context.profile == "HQ"
        if (codec, suffix) == ("h265", ".mp4"):
            assert stream.codec_context.codec_tag == "hvc1"


@pytest.mark.parametrize(("codec", "suffix"), FORMATS)
def test_a_variable_rate_is_read_back_as_it_was(tmp_path: Path, codec: str, suffix: str) -> None:
    odd = [Fraction(1, 7), Fraction(1, 6), Fraction(3, 10), Fraction(2, 3), Fraction(5, 7), Fraction(1)]
    starts = [Fraction(0), 1 / FILM, 2 / FILM, *odd, *(1 + index / FILM for index in range(1, 7))]
    path = tmp_path / f"clip{suffix}"

    written = write_timed_video(path, shown(starts), FILM, codec, preset="ultrafast")

    back = list(shown_frames(path))
    accuracy = Fraction(1, 1000) if suffix == ".mkv" else Fraction(1, 10_000)
    assert len(back) == len(starts) - 1
    errors = [abs(frame.start - start) for frame, start in zip(back, starts, strict=False)]
    assert max(errors) <= accuracy
    assert errors[1:3] == [0, 0]  # places of the rate
    assert abs(back[-1].start + back[-1].seconds - starts[-1]) <= accuracy
    assert written.seconds == starts[-1]


EVEN = at_rate(Fraction(25), 25)  # a second
LATER = [3 + index / Fraction(25) for index in range(4)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    "starts",
    [EVEN, [*EVEN[:3], EVEN[-1]], [EVEN[0], *LATER], [*EVEN, LATER[0]], [*EVEN, *LATER]],
    ids=["even", "held last", "held first", "held at the end", "held before three"],
)
def test_what_is_stored_lasts_as_long_as_the_pictures(
    tmp_path: Path, starts: list[Fraction], suffix: str
) -> None:
    path, rate = tmp_path / f"clip{suffix}", (len(starts) - 1) / starts[-1]

    write_timed_video(
        path, shown(starts), rate, "h264", preset="medium"
    )  # faster ones keep the pictures' order

    *before, last = shown_frames(path)
    assert len(before) == len(starts) - 2
    assert abs(last.start + last.seconds - starts[-1]) <= Fraction(1, 1000)
    with av.open(str(path)) as container:
        assert abs(Fraction(container.duration, 1_000_000) - starts[-1]) <= Fraction(1, 1000)
        stored: list[Any] = [packet for packet in container.demux(video=0) if packet.size]
    if suffix == ".mp4":
        lasts = (stored[-1].dts + stored[-1].duration - stored[0].dts) * stored[0].time_base
        assert abs(lasts - starts[-1]) <= Fraction(1, 1000)
        assert [packet.dts for packet in stored] == sorted({packet.dts for packet in stored})
        assert all(packet.dts <= packet.pts for packet in stored)


SIZES = [(64, 64), (192, 96), (480, 272), (832, 480)]


@pytest.mark.slow_cases("h264-64-64")
@pytest.mark.parametrize(
    ("codec", "width", "height"),
    [
        ("h264", *SIZES[0]),
        *(pytest.param("h264", *size, marks=pytest.mark.slow) for size in SIZES[1:]),
        *(pytest.param("h265", *size, marks=pytest.mark.slow) for size in (*SIZES, (64, 128))),
        *(pytest.param("prores", *size, marks=pytest.mark.slow) for size in SIZES[:2]),
    ],
)
def test_equal_pictures_and_sound_become_equal_files_on_any_number_of_cores(
    tmp_path: Path, codec: str, width: int, height: int
) -> None:
    random, rate = np.random.default_rng(0), Fraction(16)
    still = np.kron(random.integers(0, 256, (height // 8, width // 8, 3)), np.ones((8, 8, 1)))
    moving = [np.roll(still, (index, 2 * index), (0, 1)).astype(np.uint8) for index in range(8)]
    track = random.uniform(-0.5, 0.5, (2, 12000)).astype(np.float32), 24000
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    files, shown_again = set(), set()
    try:
        for attempt in range(40):
            if cores:
                os.sched_setaffinity(0, {min(cores)} if attempt % 2 else cores)
            # memory that is given back holds other values each time
            used = [np.full(size, attempt, np.uint8) for size in random.integers(1000, 3_000_000, 8)]
            del used
            images = (OutputFrame(*one, 1 / rate) for one in zip(moving, at_rate(rate, 7), strict=True))
            path = tmp_path / ("a.mkv" if codec == "prores" else "a.mp4")
            write_timed_video(path, images, rate, codec, crf=19, preset="medium", track=track)
            files.add(path.read_bytes())
            shown_again.add(recompress(moving[0], 30).tobytes())
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
    assert (len(files), len(shown_again)) == (1, 1)


@pytest.mark.parametrize(("codec", "suffix"), [("h264", ".mp4"), ("h264", ".mkv"), ("prores", ".mkv")])
@pytest.mark.parametrize("deep", [False, True])
def test_colors_come_back(tmp_path: Path, codec: str, suffix: str, deep: bool) -> None:
    image = np.zeros((32, 192, 3), np.uint16 if deep else np.uint8)
    for index, color in enumerate(COLOURS.values()):
        image[:, 32 * index : 32 * index + 32] = np.array(color) * (257 if deep else 1)
    path = tmp_path / f"colours{suffix}"
    frames = [OutputFrame(image, index / Fraction(25), 1 / Fraction(25)) for index in range(3)]

    write_timed_video(path, frames, Fraction(25), codec)

    back = list(shown_frames(path))[1].pixels
    for index, (name, color) in enumerate(COLOURS.items()):
        patch = back[8:24, 32 * index + 8 : 32 * index + 24].astype(int)
        assert np.abs(patch - color).max() <= 2, name
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        for source in (container.streams.video[0].codec_context, frame):
            assert (source.colorspace, source.color_range) == (1, 1)
            for name in ("color_primaries", "color_trc"):
                assert getattr(source, name, 1) == 1


def test_ten_bits_survive(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 128).round().astype(np.uint16)
    image = np.tile(ramp[None, :, None], (48, 1, 3))
    frames: Iterable[OutputFrame] = [OutputFrame(image, Fraction(0), Fraction(1, 25))]

    for path in (tmp_path / "first.mkv", tmp_path / "second.mkv"):
        write_timed_video(path, frames, Fraction(25), "prores")
        (back,) = frames = list(shown_frames(path, deep=True))
        assert back.pixels.dtype == np.uint16
        assert np.abs(back.pixels.astype(float) - image).max() * 1023 / 65535 <= 2


@pytest.mark.parametrize("codec", ["h264", "prores"])
def test_pictures_of_8_and_16_bits_may_be_mixed(tmp_path: Path, codec: str) -> None:
    images = [np.full((48, 64, 3), 100, np.uint8), np.full((48, 64, 3), 100 * 257, np.uint16)] * 2
    frames = [OutputFrame(image, Fraction(i, 25), Fraction(1, 25)) for i, image in enumerate(images)]

    write_timed_video(tmp_path / "mixed.mkv", frames, Fraction(25), codec)

    for frame in shown_frames(tmp_path / "mixed.mkv"):
        assert np.abs(frame.pixels.astype(int) - 100).max() <= 1


def test_an_odd_last_row_is_cropped_and_mp4_can_be_played_before_it_has_been_loaded(tmp_path: Path) -> None:
    written = write_timed_video(tmp_path / "odd.mp4", shown(at_rate(FILM, 2), 49, 67), FILM, "h264")

    assert (written.width, written.height) == (66, 48)
    assert next(shown_frames(tmp_path / "odd.mp4")).pixels.shape == (48, 66, 3)
    data = (tmp_path / "odd.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(("codec", "suffix"), [("prores", ".mkv"), ("h264", ".mp4")])
def test_pictures_are_let_go_as_the_file_grows(tmp_path: Path, codec: str, suffix: str) -> None:
    made: list[weakref.ref[np.ndarray]] = []
    maximum = 0

    def counted() -> Iterator[OutputFrame]:
        nonlocal maximum
        for index in range(200):
            pixels = np.full((16, 16, 3), index, np.uint8)
            made.append(weakref.ref(pixels))
            maximum = max(maximum, sum(one() is not None for one in made))
            yield OutputFrame(pixels, Fraction(index, 25), Fraction(1, 25))
            del pixels

    write_timed_video(tmp_path / f"long{suffix}", counted(), Fraction(25), codec, preset="ultrafast")

    assert maximum <= 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, MediaError])
def test_an_interrupt_leaves_no_file(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> Iterator[OutputFrame]:
        yield from shown(at_rate(FILM, 5))
        raise error("enough")

    (tmp_path / "old.mp4").write_bytes(b"earlier")
    for name in ("new.mkv", "old.mp4"):
        with pytest.raises(error, match="enough"):
            write_timed_video(tmp_path / name, interrupted(), FILM, "h264", preset="ultrafast")

    assert [file.name for file in tmp_path.iterdir()] == ["old.mp4"]
    assert (tmp_path / "old.mp4").read_bytes() == b"earlier"


SMALL, LOW = list(shown(at_rate(FILM, 2), 32, 48)), list(shown(at_rate(FILM, 2), 1, 64))
DEFAULT = list(shown(at_rate(FILM, 2)))
WIDER = OutputFrame(np.zeros((48, 80, 3), np.uint8), 2 / FILM, 1 / FILM)


@pytest.mark.parametrize(
    ("name", "pictures", "codec", "preset", "message"),
    [
        ("clip.mp4", map(int, "no"), "prores", "", "prores can be written to .mkv"),  # none is computed
        ("clip.mkv", [], "h264", "", "no frame to write"),
        ("clip.mkv", SMALL, "h265", "", "h265 cannot be used for 48 x 32"),
        ("clip.mkv", LOW, "h264", "", "64 x 1 pixels are too few"),
        ("clip.mkv", DEFAULT, "h264", "no such preset", "encoder libx264 fails"),
        ("clip.mkv", [*DEFAULT, WIDER], "h264", "", "image 3 has 80 x 48 pixels, those before it 64 x 48"),
        ("clip.mkv", DEFAULT * 2, "h264", "", "the one before at"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(
    tmp_path: Path, name: str, pictures: Iterable[OutputFrame], codec: str, preset: str, message: str
) -> None:
    with pytest.raises((MediaError, ValueError), match=message):
        write_timed_video(tmp_path / name, iter(pictures), FILM, codec, preset=preset or "ultrafast")

    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ten_bit_pictures_are_converted_alike_each_time(tmp_path: Path) -> None:
    """With several threads swscale damaged the beginnings of rows, here in half of all conversions."""
    noise = np.random.default_rng(0).integers(0, 65536, (576, 720, 3), dtype=np.uint16)
    one = Fraction(1, 25)
    frames = [OutputFrame(noise, index * one, one) for index in range(4)]
    write_timed_video(tmp_path / "a.mkv", frames, Fraction(25), "prores")

    first, *others = shown_frames(tmp_path / "a.mkv", deep=True)

    assert all(np.array_equal(first.pixels, other.pixels) for other in others)
