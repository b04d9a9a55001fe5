"""Pixels of a source are put back, exactly, where its latents were kept, and blended at the edge of these."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import ltx2_generate_video
from ltx_2.configs import LATENT
from ltx_2.given_media_options import Ltx2GivenMedia
from ltx_2.source_pasting import SourcePasting, make_blend_weights
from modules.media.reading import resize_cover
from modules.media.writing import write_png
from tests.faults.messages import assert_one_message, run_here
from tests.ltx_2.release import TinyRelease, write_release, write_upscaler
from tests.ltx_2.test_family import HEIGHT, PROMPT, SEED, WIDTH
from tests.tiny.project import moving_square

FRAMES = 9  # 2 latent frames
Frames = numpy.ndarray  # F H W 3


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> TinyRelease:
    return write_release(tmp_path_factory.mktemp("größe"), "2.3")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip as images, its right part, and masks whose left third is white: an image, and in the end all."""
    folder = tmp_path_factory.mktemp("media")
    for name in ("clip", "right", "masks"):
        (folder / name).mkdir()
    mask = numpy.zeros((HEIGHT, WIDTH, 3), numpy.uint8)
    mask[:, :32] = 255
    write_png(folder / "mask.png", mask)
    for number, frame in enumerate(clip()):
        write_png(folder / "clip" / f"{number:02}.png", frame)
        write_png(folder / "right" / f"{number:02}.png", numpy.ascontiguousarray(frame[:, 32:]))
        # black in one of the 8 frames of the second latent, which is then made anew
        write_png(folder / "masks" / f"{number:02}.png", mask if number != 5 else numpy.zeros_like(mask))
    return folder


def clip() -> list[numpy.ndarray]:
    return moving_square(FRAMES, WIDTH, HEIGHT, 5)


def make(release: TinyRelease, folder: Path, *words: object, scale: int = 1) -> Frames:
    """The frames that a command writes."""
    size = ["--video_size", scale * HEIGHT, scale * WIDTH, "--video_length", FRAMES, "--infer_steps", 1]
    command = [*release.words, *release.vaes, *release.texts, "--device", "cpu", "--seed", SEED]
    made = ["--prompt", PROMPT, "--output_type", "images", "--save_path", folder]
    ltx2_generate_video.main([str(word) for word in [*command, *size, *made, *words]])
    return read_images(folder)


def read_images(folder: Path) -> Frames:
    return numpy.stack([numpy.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))])


def ramp(feather: int, size: int) -> numpy.ndarray:
    """Weights of pixels from the edge of what is kept."""
    return numpy.array([min((index + 1) / (feather + 1), 1) for index in range(size)])


def blend(weight: numpy.ndarray, source: Frames, made: Frames) -> numpy.ndarray:
    """The mean of both, with the weight of the source by column."""
    of_source = weight[None, None, :, None]
    mean: numpy.ndarray = of_source * source + (1 - of_source) * made
    return mean


def test_the_weight_rises_from_the_edge_of_what_is_kept_and_not_from_that_of_the_frame() -> None:
    is_kept = numpy.array([[False, True], [True, True]])

    weights = make_blend_weights(is_kept, 4, 8)

    expected = numpy.array(
        [
            [
                # the distance to the latent that is not kept, along rows or columns
                min(max(row - 7, column - 7, 0) / 5, 1)
                for column in range(16)
            ]
            for row in range(16)
        ]
    )
    numpy.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert numpy.array_equal(make_blend_weights(is_kept, 0, 8), expected > 0)
    assert (make_blend_weights(numpy.ones((2, 2), bool), 4, 8) == 1).all()
    assert (make_blend_weights(numpy.zeros((2, 2), bool), 4, 8) == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "--outpaint_source {0}/right --outpaint_region 32,0,64,64",
        "--inpaint_source {0}/clip --inpaint_mask {0}/mask.png --inpaint_invert",
    ],
    ids=["outpainting", "inverted"],
)
def test_kept_pixels_are_those_of_the_source(
    release: TinyRelease, media: Path, tmp_path: Path, words: str
) -> None:
    typed = words.format(media.as_posix()).split()
    start = 32  # first column that is kept

    plain = make(release, tmp_path / "plain", *typed)
    pasted = make(release, tmp_path / "pasted", *typed, "--paste_source", 5)

    source = numpy.stack(clip())
    weight = numpy.concatenate([numpy.zeros(start), ramp(5, WIDTH - start)])
    # two values that are each rounded to a step of 1
    numpy.testing.assert_allclose(pasted, blend(weight, source, plain), atol=1.01)
    assert numpy.array_equal(pasted[:, :, :start], plain[:, :, :start])
    assert numpy.array_equal(pasted[:, :, start + 5 :], source[:, :, start + 5 :])
    assert not numpy.array_equal(plain[:, :, start + 5 :], source[:, :, start + 5 :])
    image = next(iter(sorted((tmp_path / "pasted").rglob("*.png"))))
    assert Image.open(image).info["bt_paste_source"] == "5"


def test_a_mask_that_moves_is_pasted_by_latent_frame(media: Path) -> None:
    prepared: Any = SimpleNamespace(width=WIDTH, height=HEIGHT, frames=FRAMES)
    given = Ltx2GivenMedia(inpaint_source=media / "clip", inpaint_mask=media / "masks", paste_source=16)
    decoded = torch.full((1, 3, FRAMES, HEIGHT, WIDTH), 3.0)  # brighter than white, which is shown as white

    chunks = SourcePasting(given, prepared, LATENT).apply(iter(decoded.split([1, 3, 5], dim=2)))

    pixels = ((torch.cat(list(chunks), dim=2)[0] + 1) * 127.5).permute(1, 2, 3, 0).numpy()
    assert (pixels[1:] == 255).all()
    weight = numpy.concatenate([ramp(16, 32)[::-1], numpy.zeros(WIDTH - 32)])
    numpy.testing.assert_allclose(
        pixels[:1], blend(weight, numpy.stack(clip()[:1]), numpy.full_like(pixels[:1], 255)), atol=1e-3
    )


@pytest.mark.slow
def test_latents_which_do_not_have_it_do_not_record_it(
    release: TinyRelease, media: Path, tmp_path: Path
) -> None:
    typed = ["--inpaint_source", media / "clip", "--inpaint_mask", media / "mask.png", "--paste_source", 8]

    command = [*release.words, *release.vaes, *release.texts, "--device", "cpu", "--prompt", PROMPT]
    size = ["--video_size", HEIGHT, WIDTH, "--video_length", FRAMES, "--infer_steps", 1]
    made = ["--output_type", "both", "--save_path", tmp_path]
    ltx2_generate_video.main([str(word) for word in [*command, *size, *typed, *made]])

    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        assert file.metadata()["bt_inpaint_mask"] == "mask.png"
        assert "bt_paste_source" not in file.metadata()
    (clip_path,) = tmp_path.glob("*.mp4")
    assert b"bt_paste_source" in clip_path.read_bytes()


@pytest.mark.slow
def test_two_stages_paste_at_full_size(release: TinyRelease, media: Path, tmp_path: Path) -> None:
    write_upscaler(tmp_path / "up.safetensors", "rational")
    two = ["--sample_two_stage", "--spatial_upsampler_path", tmp_path / "up.safetensors"]
    two += ["--inpaint_source", media / "clip", "--inpaint_mask", media / "mask.png"]

    plain = make(release, tmp_path / "plain", *two, scale=2)
    pasted = make(release, tmp_path / "pasted", *two, "--paste_source", scale=2)

    source = numpy.stack([resize_cover(frame, (2 * WIDTH, 2 * HEIGHT)) for frame in clip()])
    weight = numpy.concatenate([ramp(16, 64)[::-1], numpy.zeros(2 * WIDTH - 64)])
    numpy.testing.assert_allclose(pasted, blend(weight, source, plain), atol=1.01)
    assert numpy.array_equal(pasted[:, :, : 64 - 16], source[:, :, : 64 - 16])


def test_a_line_may_give_the_mask(release: TinyRelease, media: Path, tmp_path: Path) -> None:
    folder = media.as_posix()
    line = f"{PROMPT} --v {folder}/clip --im {folder}/mask.png --d {SEED}\n"
    (tmp_path / "lines.txt").write_text(line, encoding="utf-8")
    size = ["--video_size", HEIGHT, WIDTH, "--video_length", FRAMES, "--infer_steps", 1]
    command = [*release.words, *release.vaes, *release.texts, "--device", "cpu", "--output_type", "images"]
    lines = ["--from_file", tmp_path / "lines.txt", "--paste_source", "0", "--save_path", tmp_path / "made"]

    ltx2_generate_video.main([str(word) for word in [*command, *size, *lines]])

    assert numpy.array_equal(read_images(tmp_path / "made")[:, :, :32], numpy.stack(clip())[:, :, :32])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "there is no clip to paste"),
        ("--inpaint_source {0}/clip --retake 0,0.1", "--retake"),
        ("{1} --latent_frame 0:{0}/mask.png", "--latent_frame"),
        ("{1} --extend_prefix {0}/mask.png", "--extend_prefix"),
        ("{1} --image_path {0}/mask.png", "the first frame is the image"),
        ("{1} --output_type latent", "no frames are decoded"),
        ("--latent_path {0}/mask.png", "does not say what was kept"),
    ],
)
def test_where_nothing_can_be_pasted_it_is_refused(
    release: TinyRelease, media: Path, tmp_path: Path, words: str, message: str
) -> None:
    command: list[object] = [*release.words, *release.texts, "--device", "cpu", "--save_path", "x"]
    command += ["--video_size", HEIGHT, WIDTH, "--video_length", FRAMES, "--infer_steps", 1]
    command += [] if "latent_path" in words else ["--prompt", "a cat"]
    painting = f"--inpaint_source {media.as_posix()}/clip --inpaint_mask {media.as_posix()}/mask.png"
    typed = words.format(media.as_posix(), painting).split()

    code, said = run_here("ltx2_generate_video.py", *command, *typed, "--paste_source", 8, folder=tmp_path)

    assert_one_message(code, said, message)
