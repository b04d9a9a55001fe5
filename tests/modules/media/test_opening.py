"""Opening media of any kind, hostile ones among them, and the buckets their sizes fall into."""

import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from dataset.sources.decoding import find_bucket_fit
from modules.errors import MediaError
from modules.media.augmenting import Face, change_colors, crop_anywhere, fit_face
from modules.media.buckets import (
    Fit,
    bucket_sizes,
    fit_cover,
    image_bucket_sizes,
    inner_box,
    select_bucket,
    select_interpolation,
)
from modules.media.opening import open_image
from modules.media.reading import fit_frame, image_size, read_image, video_frames, video_info
from tests.dataset.making import subset_table
from tests.golden_cases import read_case
from tests.modules.hostile_media import BRIGHT, REFERENCES, external_references, write_secret, write_stream

FRAMES = [np.full((48, 64, 3), BRIGHT, np.uint8)] * 5
# name, FFmpeg's container, encoder, pixel format
CONTAINERS = [
    ("clip.mp4", "mp4", "libx264", "yuv420p"),
    ("clip.mov", "mov", "libx264", "yuv420p"),
    ("clip.mkv", "matroska", "libx264", "yuv420p"),
    ("clip.webm", "webm", "libvpx-vp9", "yuv420p"),
    ("clip.avi", "avi", "mpeg4", "yuv420p"),
    ("clip.gif", "gif", "gif", "rgb8"),
    ("clip.ts", "mpegts", "libx264", "yuv420p"),
    ("clip.mpg", "mpeg", "mpeg2video", "yuv420p"),
    ("clip.mpeg", "mpeg1video", "mpeg1video", "yuv420p"),
    ("clip.m4v", "ipod", "libx264", "yuv420p"),
    ("bare.m4v", "m4v", "mpeg4", "yuv420p"),
    ("clip.wmv", "asf", "wmv2", "yuv420p"),
    ("clip.flv", "flv", "flv", "yuv420p"),
    ("clip.ogv", "ogg", "libvpx", "yuv420p"),
    ("clip.3gp", "3gp", "mpeg4", "yuv420p"),
    ("clip.mxf", "mxf", "mpeg2video", "yuv420p"),
    ("clip.apng", "apng", "apng", "rgb24"),
    ("clip.y4m", "yuv4mpegpipe", "wrapped_avframe", "yuv420p"),
    ("clip.h264", "h264", "libx264", "yuv420p"),
    ("clip.mjpeg", "mjpeg", "mjpeg", "yuvj420p"),
]


@pytest.mark.parametrize(("name", "container", "codec", "pixels"), CONTAINERS)
def test_every_container_that_people_have_is_read(
    name: str, container: str, codec: str, pixels: str, tmp_path: Path
) -> None:
    options = {"strict": "unofficial"} if codec == "mjpeg" else {}
    write_stream(tmp_path / name, container, codec, FRAMES, pixels, **options)

    read = np.stack(list(video_frames(tmp_path / name)))

    assert read.shape == (5, 48, 64, 3)
    assert np.abs(read.astype(float) - BRIGHT).mean() < 25  # GIF has few colors
    assert (video_info(tmp_path / name).width, video_info(tmp_path / name).height) == (64, 48)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp"])
def test_a_picture_given_as_a_video_is_its_only_frame(suffix: str, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48), (BRIGHT,) * 3).save(tmp_path / f"still{suffix}")

    assert [frame.shape for frame in video_frames(tmp_path / f"still{suffix}")] == [(48, 64, 3)]


@pytest.mark.parametrize("write", REFERENCES)
def test_a_file_that_refers_to_another_does_not_bring_it_in(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    write_secret(tmp_path)
    path = write(tmp_path)

    for read in (lambda: list(video_frames(path)), lambda: video_info(path)):
        with pytest.raises(MediaError) as refused:
            read()
        assert path.name in str(refused.value)


def test_the_external_reference_of_the_test_above_is_one_that_ffmpeg_could_follow(tmp_path: Path) -> None:
    write_secret(tmp_path)

    with av.open(str(external_references(tmp_path)), options={"enable_drefs": "1"}) as container:
        assert len(list(container.decode(video=0))) == 9


def test_a_picture_that_is_a_program_is_no_picture(tmp_path: Path) -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"
    (tmp_path / "picture.png").write_bytes(postscript)

    with pytest.raises(MediaError, match=r"picture\.png is not an image that can be read"):
        image_size(tmp_path / "picture.png")


def write_huge_png(path: Path, width: int, height: int) -> None:
    """A few bytes that say they are a picture of that size."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(bytes(99))):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(content)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(13_000, 13_000), (1, 200_000_000)])
@pytest.mark.parametrize("read", [read_image, image_size])
def test_a_picture_of_too_many_pixels_is_refused_by_its_header(
    read: Callable[[Path], object], width: int, height: int, tmp_path: Path
) -> None:
    write_huge_png(tmp_path / "huge.png", width, height)

    with pytest.raises(MediaError, match=r"huge\.png has .*the image smaller") as refused:
        read(tmp_path / "huge.png")

    assert "134 million" in str(refused.value)


def test_a_video_of_too_many_pixels_is_refused_by_its_header(tmp_path: Path) -> None:
    (tmp_path / "huge.y4m").write_bytes(b"YUV4MPEG2 W13000 H13000 F25:1 C420jpeg\nFRAME\n")

    with pytest.raises(MediaError, match=r"huge\.y4m has 13000 x 13000 pixels, 169 million"):
        list(video_frames(tmp_path / "huge.y4m"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("read", [read_image, image_size, video_info, lambda path: list(video_frames(path))])
def test_what_is_no_regular_file_is_refused_at_once(read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")

    for kind in ("pipe", "device"):
        with pytest.raises(MediaError, match=rf"{kind}\.png cannot be read: it is a .*{kind}, not a regular"):
            read(tmp_path / f"{kind}.png")


def test_a_header_that_claims_more_frames_than_the_file_has_bytes_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "clip.avi"
    write_stream(path, "avi", "mpeg4", FRAMES)
    assert video_info(path).frames == 5

    content = bytearray(path.read_bytes())
    length = content.index(b"strh") + 8 + 32  # of the stream, in frames
    content[length : length + 4] = (2**31 - 1).to_bytes(4, "little")
    path.write_bytes(content)

    assert video_info(path).frames is None
    assert len(list(video_frames(path))) == 5


SELECTORS = read_case("buckets")[0]["selectors"]


def selector_name(selector: dict) -> str:
    flags = "bucketed" if selector["enable_bucket"] else "fixed"
    ending = "-no_upscale" if selector["bucket_no_upscale"] else ""
    return f"{selector['architecture']}-{selector['resolution']}-{flags}{ending}"


@pytest.mark.parametrize("selector", SELECTORS, ids=selector_name)
def test_recorded_pictures_get_their_recorded_bucket_and_fit(selector: dict) -> None:
    width, height = selector["resolution"]
    sizes = bucket_sizes(width, height, 16) if selector["enable_bucket"] else ((width, height),)
    if "all_buckets" in selector:
        assert sizes == tuple(map(tuple, selector["all_buckets"]))
    for case in selector["cases"]:
        no_upscale = selector["bucket_no_upscale"]
        bucket = select_bucket(tuple(case["image"]), sizes, width * height, 16, no_upscale)
        sides = (tuple(case[name]) for name in ("resized", "crop_left_top", "bucket"))
        assert fit_cover(tuple(case["image"]), bucket) == Fit(*sides, case["interpolation"]), case["image"]


def test_every_bucket_is_its_own_nearest_bucket() -> None:
    for resolution in ((960, 544), (256, 256), (64, 48), (32, 32)):
        sizes = bucket_sizes(*resolution, 16)
        area = resolution[0] * resolution[1]
        for no_upscale in (False, True):
            assert [select_bucket(size, sizes, area, 16, no_upscale) for size in sizes] == list(sizes)


def test_a_single_step_is_the_smallest_area_and_side() -> None:
    assert bucket_sizes(16, 16, 16) == ((16, 16),)
    with pytest.raises(ValueError, match="smaller than one 16x16 bucket"):
        bucket_sizes(15, 16, 16)
    with pytest.raises(ValueError, match="side under 16"):
        select_bucket((10, 200), bucket_sizes(256, 256, 16), 256 * 256, 16, no_upscale=True)


def test_the_short_side_just_above_the_root_has_its_bucket() -> None:
    """Of most areas it is a long side too; not of this one, whose root is not a multiple of the step."""
    wide = ((80, 48), (96, 48), (144, 32))
    assert bucket_sizes(70, 70, 16) == ((32, 144), (48, 80), (48, 96), (64, 64), *wide)


@pytest.mark.parametrize(("size", "bucket"), [((1024, 64), (1024, 64)), ((1040, 64), (512, 128))])
def test_without_enlarging_a_picture_of_exactly_the_area_keeps_its_size(size, bucket) -> None:
    assert select_bucket(size, bucket_sizes(256, 256, 16), 256 * 256, 16, no_upscale=True) == bucket


CASES = read_case("image_buckets")[0]["cases"]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_buckets_and_fits_are_those_of_the_known_trainer(tmp_path, case: dict[str, Any]) -> None:
    not_keys = {"min_max_used", "buckets", "images", "resolution"}
    keys = {name: value for name, value in case.items() if name not in not_keys}
    table = subset_table(tmp_path, resolution=case["resolution"], **keys)
    rule = table.buckets.rule

    if "min_max_used" in case:
        assert [rule.minimum, rule.maximum] == case["min_max_used"]
    if "buckets" in case:
        sizes = image_bucket_sizes(table.buckets.resolution, rule.minimum, rule.maximum, rule.step)
        assert [list(size) for size in sizes] == case["buckets"]
    for size, bucket, resized, crop, interpolation, box in case["images"]:
        fit = find_bucket_fit(table, tuple(size), 16)
        assert [list(part) for part in (fit.bucket, fit.resized, fit.crop)] == [bucket, resized, crop], size
        assert fit.interpolation == interpolation, size
        assert list(inner_box(tuple(size), tuple(bucket))) == pytest.approx(box), size


@pytest.mark.parametrize(
    ("resized", "how"), [((64, 48), "none"), ((32, 24), "area"), ((80, 24), "lanczos"), ((32, 60), "lanczos")]
)
def test_a_picture_is_averaged_only_if_both_sides_shrink(resized: tuple[int, int], how: str) -> None:
    assert select_interpolation((64, 48), resized) == how


IMAGE = np.random.default_rng(1).integers(0, 256, (24, 40, 3), np.uint8)


def test_a_third_of_the_pictures_change_their_colours_a_little() -> None:
    changed = [change_colors(IMAGE, random.Random(seed)) for seed in range(300)]

    different = [one for one in changed if not np.array_equal(one, IMAGE)]
    assert 70 < len(different) < 130
    assert {one.shape for one in changed} == {IMAGE.shape}
    assert max(abs(float(one.mean()) - IMAGE.mean()) for one in different) < 8


def test_gamma_keeps_black_and_white_and_hue_keeps_grey() -> None:
    gray = np.repeat(np.array([[[0], [255], [90]]], np.uint8), 3, axis=2)

    changed = [change_colors(gray, random.Random(seed))[0, :, 0] for seed in range(60)]

    assert all(one[0] == 0 and one[1] == 255 for one in changed)
    assert {int(one[2]) for one in changed} > {90}
    assert all(85 <= one[2] <= 95 for one in changed)


def test_a_crop_is_anywhere_in_the_picture() -> None:
    fit = fit_cover((40, 24), (24, 24))

    lefts = {crop_anywhere(fit, random.Random(seed)).crop for seed in range(300)}

    assert lefts == {(left, 0) for left in range(17)}
    np.testing.assert_array_equal(fit_frame(IMAGE, crop_anywhere(fit, random.Random(0))).shape, (24, 24, 3))


@pytest.mark.parametrize("anywhere", [False, True])
def test_a_crop_around_a_face_holds_it(anywhere: bool) -> None:
    face = Face(300, 120, 40, 50)

    for seed in range(50):
        fit = fit_face((640, 480), (128, 128), face, (2.0, 4.0), random.Random(seed), anywhere)
        scale = fit.resized[0] / 640
        assert 2.0 <= 128 / (50 * scale) <= 4.01 or scale == pytest.approx(128 / 480, abs=0.01)
        for start, full, middle, half in zip(fit.crop, fit.resized, (300, 120), (20, 25), strict=True):
            assert 0 <= start <= full - 128
            assert start / scale <= middle - half + 1
            assert (start + 128) / scale >= middle + half - 1


@pytest.mark.parametrize("form", ["AVIF", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP"])
def test_whatever_a_decoder_says_of_a_damaged_picture_is_a_fault_of_that_file(
    form: str, tmp_path: Path
) -> None:
    """A damaged AVIF is a RuntimeError of Pillow, a cut GIF an EOFError of FFmpeg, which is asked too."""
    if form not in Image.registered_extensions().values():
        pytest.skip(f"this Pillow writes no {form}")
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    path = tmp_path / "a.img"
    Image.fromarray(noise).save(path, form)
    whole = path.read_bytes()
    draw = random.Random(3)
    refused = 0
    for number in range(60):
        content = bytearray(whole)
        if number % 2:
            content = content[: draw.randrange(1, len(content))]
        else:
            place = draw.randrange(len(content))
            content[place : place + 8] = b"\xff" * 8
        path.write_bytes(content)
        try:
            read_image(path)
        except MediaError:
            refused += 1
    assert refused > 10


def test_an_error_of_ours_is_no_fault_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)

    def run_out_of_memory() -> None:
        with open_image(path) as image:
            image.load()
            raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run_out_of_memory()
