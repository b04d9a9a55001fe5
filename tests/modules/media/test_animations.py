"""GIF and animated WebP: frames, times, transparency, and files that end early. Videos by their times."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from modules.errors import MediaError
from modules.media.decoding import animation_durations, is_animation
from modules.media.reading import frames_at_rate, video_frames, video_info

GREYS = (0, 40, 80, 120, 160, 200)


def make_animation(path: Path, milliseconds: Sequence[int], clear: bool = False) -> Path:
    """Frame i is grey GREYS[i]; clear: a part of its right half is transparent."""
    frames = []
    for grey, _ in zip(GREYS, milliseconds, strict=False):
        frame = Image.new("RGBA", (32, 32), (grey, grey, grey, 255))
        if clear:
            frame.paste((0, 0, 0, 0), (16, 4, 28, 28))
        frames.append(frame)
    more = {"lossless": True} if path.suffix == ".webp" else {"disposal": 2}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=list(milliseconds), **more)
    return path


def make_video(path: Path, times: Sequence[int], codec: str = "ffv1") -> Path:
    """Frame i is grey GREYS[i] and begins at times[i] milliseconds; transparent in its right half."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = 32, 32
        stream.pix_fmt = "yuva420p" if codec == "libvpx-vp9" else "bgra" if codec == "ffv1" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for grey, time in zip(GREYS, times, strict=False):
            pixels = np.full((32, 32, 4), grey, np.uint8)
            pixels[..., 3] = 255
            pixels[:, 16:, 3] = 0
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys(frames: object) -> list[int]:
    return [round(float(frame[4:12, 4:12, 0].mean()) / 40) for frame in frames]  # type: ignore[attr-defined]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_frames_are_shown_as_long_as_the_file_says(tmp_path: Path, suffix: str) -> None:
    path = make_animation(tmp_path / f"ä b{suffix}", [100, 50, 250])

    assert animation_durations(path) == pytest.approx((0.1, 0.05, 0.25))
    assert greys(video_frames(path)) == [0, 1, 2]
    assert greys(frames_at_rate(path, 20)) == [0, 0, 1, 2, 2, 2, 2, 2]
    assert greys(frames_at_rate(path, 5)) == [0, 2]  # 0.06 s and 0.26 s
    assert (video_info(path).frames, video_info(path).fps) == (3, pytest.approx(7.5))


def test_a_duration_of_0_means_a_tenth_of_a_second_as_in_browsers(tmp_path: Path) -> None:
    assert animation_durations(make_animation(tmp_path / "a.gif", [0, 10, 20])) == (0.1, 0.1, 0.02)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_what_is_transparent_becomes_white_unless_it_is_asked_for(tmp_path: Path, suffix: str) -> None:
    path = make_animation(tmp_path / f"a{suffix}", [100, 100], clear=True)

    plain, kept = list(video_frames(path)), list(video_frames(path, alpha=True))

    assert [frame.shape for frame in (*plain, *kept)] == [(32, 32, 3)] * 2 + [(32, 32, 4)] * 2
    assert [frame[8, 24].tolist() for frame in plain] == [[255, 255, 255]] * 2  # disposed of, not piled up
    assert [(frame[8, 8, 3], frame[8, 24, 3]) for frame in kept] == [(255, 0)] * 2


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize("missing", [1, 30])
def test_one_that_is_cut_short_is_named(tmp_path: Path, suffix: str, missing: int) -> None:
    path = make_animation(tmp_path / f"a{suffix}", [100] * 4)
    path.write_bytes(path.read_bytes()[:-missing])

    with pytest.raises(MediaError, match=r"a\.(gif|webp) (is damaged or cut short|cannot be read)"):
        list(video_frames(path))


def test_every_cut_of_a_file_is_an_error_and_no_other_exception(tmp_path: Path) -> None:
    whole = make_animation(tmp_path / "a.gif", [100] * 3).read_bytes()
    for length in range(1, len(whole)):
        path = tmp_path / "cut.gif"
        path.write_bytes(whole[:length])
        with pytest.raises(MediaError):
            list(video_frames(path))


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_one_frame_is_an_image(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / f"a{suffix}")

    assert not is_animation(tmp_path / f"a{suffix}")
    assert not is_animation(tmp_path / "missing.gif")


def test_a_video_of_a_variable_rate_is_played_by_its_times(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", [0, 40, 80, 280, 320])

    assert greys(video_frames(path)) == [0, 1, 2, 3, 4]
    assert greys(frames_at_rate(path, 25)) == [0, 1, 2, 2, 2, 2, 2, 3, 4]


@pytest.mark.parametrize(("rate", "expected"), [(24, 24), (12, 12), (16, 16), (30, 30)])
def test_a_second_stays_a_second_at_every_rate(tmp_path: Path, rate: int, expected: int) -> None:
    times = [round(1000 * index / 24) for index in range(24)]  # as Matroska rounds them
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "bgra"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * index, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame.reformat(format="bgra")))
        container.mux(stream.encode())

    found = [round(float(frame.mean()) / 10) for frame in frames_at_rate(tmp_path / "a.mkv", rate)]

    assert len(found) == expected
    assert found == [int((slot + 0.3) * 24 / rate) for slot in range(expected)]


def test_a_frame_that_lasts_for_minutes_is_refused(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", [0, 40, 100_000])

    with pytest.raises(MediaError, match=r"a\.mkv shows one frame for 100 s"):
        list(frames_at_rate(path, 25))


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "ffv1"), ("a.webm", "libvpx-vp9")])
def test_the_transparency_of_a_video_is_read_if_asked_for(tmp_path: Path, name: str, codec: str) -> None:
    path = make_video(tmp_path / name, [0, 40, 80], codec)

    frames = list(video_frames(path, alpha=True))

    assert len(frames) == 3
    assert all(frame[8, 4, 3] > 250 and frame[8, 28, 3] < 5 for frame in frames)
    assert all(frame.shape == (32, 32, 3) for frame in video_frames(path))
