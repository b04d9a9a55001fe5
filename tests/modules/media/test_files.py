"""Images, videos and animations on disk: what is written is read back; damaged files are told by name."""

import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from modules.errors import MediaError
from modules.media.decoding import animation_durations, is_animation
from modules.media.encoding import X264
from modules.media.reading import (
    frame_times,
    frames_at,
    image_size,
    image_suffixes,
    read_image,
    read_tags,
    resize_cover,
    video_frames,
    video_info,
)
from modules.media.writing import encode_segment, join_segments, write_png, write_video
from tests.golden_cases import read_case


def gradients(count: int, width: int = 64, height: int = 48) -> Iterator[np.ndarray]:
    """Smooth colored frames, each a little brighter than the one before."""
    x, y = np.meshgrid(np.linspace(0, 150, width), np.linspace(0, 120, height))
    for index in range(count):
        yield np.stack([x + index, y + 2 * index, 200 - x], axis=-1).clip(0, 255).astype(np.uint8)


def write_noise(path: Path, count: int = 48) -> None:
    """A clip whose frames are hard to compress, so that cutting the file cuts frames."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    write_video(path, iter(noise), 16, preset="ultrafast")


def cut(path: Path, fraction: float) -> Path:
    shorter = path.with_name("cut_" + path.name)
    data = path.read_bytes()
    shorter.write_bytes(data[: int(len(data) * fraction)])
    return shorter


@pytest.mark.parametrize("name", ["50x37_to_32x32", "20x14_to_32x32", "32x32_to_32x32", "64x20_to_32x16"])
def test_resizing_equals_the_recorded_pixels(name: str) -> None:
    description, tensors = read_case("resize_pixels")
    expected = tensors[f"{name}.out"].numpy()

    resized = resize_cover(tensors[f"{name}.in"].numpy(), (expected.shape[1], expected.shape[0]))

    assert resized.shape == expected.shape
    assert np.abs(resized.astype(int) - expected).max() <= description["tolerance"]["out"]["max_abs_diff"]


HOSTILE = "</script><b>'\"\\ \x1b[31m; key=value\\n# 漢字 🐈‍⬛ \u202e"


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov"])
def test_tags_of_any_text_are_read_back_as_written(tmp_path: Path, suffix: str) -> None:
    tags = {"bt_prompt": "ein Käfer, 漢字 --f 9", "bt_seeds": "7", "bt_negative_prompt": HOSTILE}
    tags["bt_long"] = "wörd " * 20_000
    path = tmp_path / f"clip{suffix}"

    write_video(path, gradients(2), 16, preset="ultrafast", tags=tags)

    assert tags.items() <= read_tags(path).items()
    assert len(list(video_frames(path))) == 2


def test_png_text_is_read_back_as_written(tmp_path: Path) -> None:
    frame = next(gradients(1))
    text = {"bt_prompt": "plain", "bt_negative_prompt": "色调艳丽, é"}

    write_png(tmp_path / "bild ü.png", frame, text)

    assert read_tags(tmp_path / "bild ü.png") == text
    np.testing.assert_array_equal(read_image(tmp_path / "bild ü.png"), frame)


def test_a_folder_of_images_is_a_video_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a frame")
    with pytest.raises(MediaError, match="a folder without images"):
        list(video_frames(tmp_path))
    for name, value in (("B2.png", 2), ("a.jpg", 0), ("b1.png", 1), ("b10.PNG", 4), ("b010.jpg", 3)):
        Image.new("RGB", (8, 6), (value * 50,) * 3).save(tmp_path / name)

    assert [round(frame.mean() / 50) for frame in video_frames(tmp_path)] == [0, 1, 2, 3, 4]
    assert video_info(tmp_path).frames == 5


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", ["ITU601", "ITU709"])
def test_colors_are_read_by_what_the_file_says(tmp_path: Path, full_range: bool, matrix: str) -> None:
    color = np.zeros((32, 32, 3), np.uint8) + np.array([200, 40, 90], np.uint8)
    path = tmp_path / "colour.mkv"
    space = av.video.reformatter.Colorspace[matrix]
    levels = av.video.reformatter.ColorRange["JPEG" if full_range else "MPEG"]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "5", **X264})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.color_range = levels.value
        stream.codec_context.colorspace = space.value
        frame = av.VideoFrame.from_ndarray(color, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=space, dst_color_range=levels)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())

    (back,) = video_frames(path)

    assert np.abs(back.astype(int) - color).max() <= 4


def test_image_size_needs_only_the_header_and_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # taken sideways
    Image.effect_noise((400, 200), 80).save(tmp_path / "phone.jpg", exif=exif)

    assert image_size(cut(tmp_path / "phone.jpg", 0.5)) == (200, 400)
    assert read_image(tmp_path / "phone.jpg").shape == (400, 200, 3)
    with pytest.raises(MediaError, match="the file is cut short"):
        read_image(tmp_path / "cut_phone.jpg")


def test_alpha_is_kept_only_when_asked_for_and_there(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (10, 20, 30, 40)).save(tmp_path / "rgba.png")
    Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "rgb.png")

    assert read_image(tmp_path / "rgba.png", alpha=True)[0, 0].tolist() == [10, 20, 30, 40]
    assert read_image(tmp_path / "rgba.png").shape == (8, 8, 3)
    assert read_image(tmp_path / "rgb.png", alpha=True).shape == (8, 8, 3)


@pytest.mark.parametrize(("suffix", "usable"), [(".mkv", 5), (".mp4", 0)])
def test_a_video_that_was_cut_short_is_refused_behind_its_last_whole_frame(
    tmp_path: Path, suffix: str, usable: int
) -> None:
    write_noise(tmp_path / f"whole{suffix}")

    frames = video_frames(cut(tmp_path / f"whole{suffix}", 0.6))

    assert [next(frames).shape for _ in range(usable)] == [(64, 64, 3)] * usable
    with pytest.raises(MediaError, match=f"cut_whole{suffix}.*(cut short|cannot be read)"):
        list(frames)


@pytest.mark.parametrize(("content", "reason"), [(b"", "0 bytes"), (bytes(range(256)), "can be read")])
def test_an_unreadable_picture_is_named_with_the_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x.png").write_bytes(content)

    with pytest.raises(MediaError, match=rf"x\.png .*{reason}"):
        read_image(tmp_path / "x.png")


def test_a_name_with_a_colon_is_a_file_name(tmp_path: Path) -> None:
    write_noise(tmp_path / "plain.mkv", 2)
    path = (tmp_path / "plain.mkv").rename(tmp_path / "rtmp:take 2.mkv")

    assert len(list(video_frames(path))) == 2


def segments(frames: list[np.ndarray], lengths: list[int], fps: float = 30) -> list[bytes]:
    """The frames cut into videos of their own."""
    return [encode_segment(part, fps) for part in np.split(np.stack(frames), np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize(("lengths", "fps"), [([7], 30), ([1, 2, 17, 3, 20], 23.976)], ids=str)
def test_joined_videos_show_the_same_pictures_one_behind_the_other(
    tmp_path: Path, lengths: list[int], fps: float
) -> None:
    path = tmp_path / "joined.mp4"
    parts = segments(list(gradients(sum(lengths))), lengths, fps)
    expected = []
    for part in parts:
        (tmp_path / "part.mp4").write_bytes(part)
        expected += list(video_frames(tmp_path / "part.mp4"))

    join_segments(path, parts, fps)

    assert all((ours == theirs).all() for ours, theirs in zip(video_frames(path), expected, strict=True))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = [float(frame.time) for frame in container.decode(stream)]
        assert stream.frames == sum(lengths)
        assert stream.codec_context.colorspace == av.video.reformatter.Colorspace.ITU709.value
    # the container counts in ticks
    np.testing.assert_allclose(times, np.arange(sum(lengths)) / fps, atol=1e-4)


def test_joining_leaves_the_file_that_is_being_watched_alone(tmp_path: Path) -> None:
    frames = list(gradients(12))
    parts = segments(frames, [4, 8])
    join_segments(tmp_path / "joined.mp4", parts[:1], 30)
    with av.open(str(tmp_path / "joined.mp4")) as player:
        join_segments(tmp_path / "joined.mp4", parts, 30)
        assert sum(1 for _ in player.decode(video=0)) == 4
    assert sum(1 for _ in video_frames(tmp_path / "joined.mp4")) == 12


GRAYS = (0, 40, 80, 120, 160, 200)


def make_animation(path: Path, milliseconds: Sequence[int], clear: bool = False) -> Path:
    """Frame i is gray GRAYS[i]; clear: a part of its right half is transparent."""
    frames = []
    for gray, _ in zip(GRAYS, milliseconds, strict=False):
        frame = Image.new("RGBA", (32, 32), (gray, gray, gray, 255))
        if clear:
            frame.paste((0, 0, 0, 0), (16, 4, 28, 28))
        frames.append(frame)
    more = {"lossless": True} if path.suffix == ".webp" else {"disposal": 2}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=list(milliseconds), **more)
    return path


def make_video(path: Path, times: Sequence[int], codec: str = "ffv1", grays: Sequence[int] = GRAYS) -> Path:
    """Frame i is gray grays[i] and begins at times[i] milliseconds; transparent in its right half."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = 32, 32
        stream.pix_fmt = "yuva420p" if codec == "libvpx-vp9" else "bgra"
        stream.codec_context.time_base = Fraction(1, 1000)
        for gray, time in zip(grays, times, strict=False):
            pixels = np.full((32, 32, 4), gray, np.uint8)
            pixels[..., 3] = 255
            pixels[:, 16:, 3] = 0
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def at_rate(path: Path, rate: float) -> Iterator[np.ndarray]:
    return (frame for frame, _, _ in frames_at(path, frame_times(rate)))


def grays(frames: object) -> list[int]:
    return [round(float(frame[4:12, 4:12, 0].mean()) / 40) for frame in frames]  # type: ignore[attr-defined]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_frames_are_shown_as_long_as_the_file_says(tmp_path: Path, suffix: str) -> None:
    path = make_animation(tmp_path / f"ä b{suffix}", [100, 50, 250])

    assert animation_durations(path) == pytest.approx((0.1, 0.05, 0.25))
    assert grays(video_frames(path)) == [0, 1, 2]
    assert grays(at_rate(path, 20)) == [0, 0, 1, 2, 2, 2, 2, 2]
    assert grays(at_rate(path, 5)) == [0, 2]  # 0.06 s and 0.26 s
    assert (video_info(path).frames, video_info(path).fps) == (3, pytest.approx(7.5))
    assert not is_animation(make_animation(tmp_path / f"still{suffix}", [100]))
    assert not is_animation(tmp_path / f"missing{suffix}")


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
def test_every_cut_of_an_animation_is_one_error_that_names_it(tmp_path: Path, suffix: str) -> None:
    path = make_animation(tmp_path / f"a{suffix}", [100] * 3)
    full = path.read_bytes()
    for length in range(1, len(full)):
        path.write_bytes(full[:length])
        with pytest.raises(MediaError, match=rf"a\{suffix} (is|has|cannot)"):
            list(video_frames(path))


def test_a_video_of_a_variable_rate_is_played_by_its_times(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", [0, 40, 80, 280, 320])

    assert grays(video_frames(path)) == [0, 1, 2, 3, 4]
    assert grays(at_rate(path, 25)) == [0, 1, 2, 2, 2, 2, 2, 3, 4]


@pytest.mark.parametrize("rate", [24, 12, 16, 30])
def test_a_second_stays_a_second_at_every_rate(tmp_path: Path, rate: int) -> None:
    times = [round(1000 * index / 24) for index in range(24)]  # as Matroska rounds them
    path = make_video(tmp_path / "a.mkv", times, grays=range(0, 240, 10))

    found = [round(float(frame[:, :16].mean()) / 10) for frame in at_rate(path, rate)]

    assert found == [int((slot + 0.3) * 24 / rate) for slot in range(rate)]


def test_a_frame_that_lasts_for_minutes_is_refused(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", [0, 40, 100_000])

    with pytest.raises(MediaError, match=r"a\.mkv shows one frame for 100 s"):
        list(at_rate(path, 25))


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "ffv1"), ("a.webm", "libvpx-vp9")])
def test_the_transparency_of_a_video_is_read_if_asked_for(tmp_path: Path, name: str, codec: str) -> None:
    path = make_video(tmp_path / name, [0, 40, 80], codec)

    frames = list(video_frames(path, alpha=True))

    assert len(frames) == 3
    assert all(frame[8, 4, 3] > 250 and frame[8, 28, 3] < 5 for frame in frames)
    assert all(frame.shape == (32, 32, 3) for frame in video_frames(path))


def test_heic_is_read_where_pillow_heif_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "EXTENSION", {**Image.registered_extensions()})
    plugin = SimpleNamespace(register_heif_opener=lambda: Image.register_extension("HEIF", ".heic"))
    for there in (True, False):
        monkeypatch.setitem(sys.modules, "pillow_heif", plugin if there else None)
        Image.EXTENSION.pop(".heic", None)
        assert (".heic" in image_suffixes.__wrapped__()) is there


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".tif", ".webp", ".png", ".jpg"])
def test_pictures_and_animations_are_laid_as_their_exif_says(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:16, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, path = Image.fromarray(stored), tmp_path / f"a{suffix}"
    more = {"save_all": True, "append_images": [Image.fromarray(255 - stored)]} if suffix == ".webp" else {}
    image.save(path, exif=exif if suffix == ".tif" else exif.tobytes(), quality=100, **more)
    turned = stored.swapaxes(0, 1) if orientation > 4 else stored
    turned = turned[:, ::-1] if orientation in (2, 3, 6, 7) else turned
    expected = turned[::-1] if orientation in (3, 4, 7, 8) else turned

    shown = next(video_frames(path)) if suffix == ".webp" else read_image(path)

    assert shown.shape == expected.shape
    assert np.abs(shown.astype(int) - expected).mean() < 4
    assert image_size(path) == (shown.shape[1], shown.shape[0])
