"""Image-to-video, first-and-last-frame and Fun-Control generations through the command line equal diffusers'
networks.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from modules.media.writing import write_png, write_video
from tests.golden_cases import read_case
from tests.parity import reference
from tests.parity.datasets import decoded
from tests.parity.reference import Inputs, Sampling, denoise, draw_noise, open_image, to_pixels
from tests.parity.running import assert_equal, generate_one
from tests.parity.theirs import Theirs
from tests.tiny.project import moving_square
from tests.tiny.wan import write_tiny_wan

PROMPT, SEED, FRAMES, STEPS = "close up of a butterfly", 31, 9, 4
HEIGHT, WIDTH = 32, 64  # asked for; images set the aspect
OPTIONS = (
    *("--prompt", PROMPT, "--seed", SEED, "--video_size", HEIGHT, WIDTH, "--video_length", FRAMES),
    *("--infer_steps", STEPS),
)
NEGATIVE = read_case("text_constants")[0]["wan_default_negative_prompt"]
SAMPLING = Sampling(scales=(5.0,) * STEPS)
FIRST_LAST_SHIFT = 16.0  # what these models are sampled with, by the released code


def picture(height: int, width: int, seed: int) -> numpy.ndarray:
    """A picture with detail at every scale, so that each way to resize gives other pixels."""
    random = numpy.random.default_rng(seed)
    return random.integers(0, 256, (height, width, 3), dtype=numpy.uint8)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several shapes, a control video larger than asked for and one as a folder of images."""
    folder = tmp_path_factory.mktemp("media")
    for name, height, width in (("high", 90, 60), ("small", 24, 20), ("wide", 40, 100), ("exact", 32, 64)):
        write_png(folder / f"{name}.png", picture(height, width, height))
    write_video(folder / "control.mp4", moving_square(15, 96, 80, 3), fps=16)
    (folder / "control").mkdir()
    for index in range(FRAMES):
        write_png(folder / "control" / f"{index:03d}.png", picture(20, 40, index))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> a folder with tiny models of it, written once."""
    root, written = tmp_path_factory.mktemp("models"), set[str]()

    def folder_of(kind: str) -> Path:
        if kind not in written:
            write_tiny_wan(root / kind, kind)
            written.add(kind)
        return root / kind

    return folder_of


def texts(theirs: Theirs, negative: str = NEGATIVE) -> tuple[Tensor, Tensor]:
    return theirs.text(PROMPT), theirs.text(negative)


def resized(path: Path, height: int, width: int) -> Tensor:
    return to_pixels([reference.stretched(open_image(path), height, width)])


@pytest.mark.parametrize(
    ("image", "in_process"), [("high", False), ("small", True), ("wide", True), ("exact", True)]
)
def test_image_to_video(
    tmp_path: Path, media: Path, models: Callable[[str], Path], image: str, in_process: bool
) -> None:
    path = media / f"{image}.png"

    latents = generate_one(
        tmp_path, models("i2v"), "i2v-14B", *OPTIONS, "--image_path", path, in_process=in_process
    )

    theirs = Theirs(models("i2v"))
    height, width = reference.video_size_for(open_image(path), HEIGHT, WIDTH)
    condition = reference.image_condition(theirs, resized(path, height, width), FRAMES)
    clip = reference.features_of(theirs, open_image(path))
    inputs = Inputs(draw_noise(SEED, FRAMES, height, width), *texts(theirs), clip, condition)
    assert_equal(latents, denoise(theirs.dit, inputs, SAMPLING), f"i2v {image} {height}x{width}")


def test_image_to_video_with_an_end_image(tmp_path: Path, media: Path, models: Callable[[str], Path]) -> None:
    """One more latent frame, of noise too; the image tower sees the start image only."""
    start, end = media / "high.png", media / "wide.png"

    latents = generate_one(
        tmp_path, models("i2v"), "i2v-14B", *OPTIONS, "--image_path", start, "--end_image_path", end
    )

    theirs = Theirs(models("i2v"))
    height, width = reference.video_size_for(open_image(start), HEIGHT, WIDTH)
    first, last = resized(start, height, width), resized(end, height, width)
    condition = reference.image_condition(theirs, first, FRAMES, last)
    noise = draw_noise(SEED, FRAMES + 4, height, width)
    inputs = Inputs(noise, *texts(theirs), reference.features_of(theirs, open_image(start)), condition)
    assert_equal(latents, denoise(theirs.dit, inputs, SAMPLING), "i2v with end image")


@pytest.mark.parametrize("solver", ["unipc", pytest.param("dpm++", marks=pytest.mark.slow)])
def test_first_and_last_image(
    tmp_path: Path, media: Path, models: Callable[[str], Path], solver: str
) -> None:
    """514 image tokens with positions; both images in one clip; the negative text of these models names cuts
    first.
    """
    start, end = media / "high.png", media / "wide.png"
    more = ("--image_path", start, "--end_image_path", end, "--sample_solver", solver)

    latents = generate_one(tmp_path, models("flf2v"), "flf2v-14B", *OPTIONS, *more)

    theirs = Theirs(models("flf2v"))
    height, width = reference.video_size_for(open_image(start), HEIGHT, WIDTH)
    condition = reference.first_last_condition(
        theirs, resized(start, height, width), resized(end, height, width), FRAMES
    )
    clip = reference.features_of(theirs, open_image(start), open_image(end))
    noise = draw_noise(SEED, FRAMES, height, width)
    inputs = Inputs(noise, *texts(theirs, "镜头切换，" + NEGATIVE), clip, condition)
    assert_equal(
        latents, denoise(theirs.dit, inputs, Sampling(solver, FIRST_LAST_SHIFT, SAMPLING.scales)), "flf2v"
    )


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


@pytest.mark.parametrize(("control", "in_process"), [("control.mp4", False), ("control", True)])
def test_control_without_an_image(
    tmp_path: Path, media: Path, models: Callable[[str], Path], control: str, in_process: bool
) -> None:
    """The image channels are zero, and so are the features of the image tower."""
    more = ("--control_path", media / control)

    latents = generate_one(
        tmp_path, models("fun-control"), "t2v-1.3B-FC", *OPTIONS, *more, in_process=in_process
    )

    theirs = Theirs(models("fun-control"))
    if control == "control":
        frames = [open_image(path) for path in sorted((media / control).iterdir())]
    else:
        frames = decoded(media / "control.mp4")[:FRAMES]
    pixels = to_pixels([reference.covering(frame, HEIGHT, WIDTH) for frame in frames])
    extra = reference.control_condition(theirs, pixels, None)
    zeros = torch.zeros(1, 257, theirs.dit.config.image_dim)
    inputs = Inputs(draw_noise(SEED, FRAMES, HEIGHT, WIDTH), *texts(theirs), zeros, extra)
    assert_equal(latents, denoise(theirs.dit, inputs, SAMPLING), f"t2v-FC {control}")


@pytest.mark.parametrize(("with_end", "control_frames"), [(False, FRAMES), (True, FRAMES + 1), (True, 15)])
def test_control_with_an_image(
    tmp_path: Path, media: Path, models: Callable[[str], Path], with_end: bool, control_frames: int
) -> None:
    """Of the image's latents only the first frame is kept, and the end image's; no mask. The model's ref_conv
    is not used.

    An end image takes four frames more, of which the control video needs to have one.
    """
    start, end, control = media / "high.png", media / "small.png", tmp_path / "control"
    control.mkdir()
    frames = decoded(media / "control.mp4")[:control_frames]
    for index, frame in enumerate(frames):
        write_png(control / f"{index:03d}.png", frame)
    more = [
        *("--image_path", start, "--control_path", control),
        *(["--end_image_path", end] if with_end else []),
    ]

    latents = generate_one(
        tmp_path, models("fun-control-v1.1"), "i2v-14B-FC", *OPTIONS, *more, in_process=with_end
    )

    theirs = Theirs(models("fun-control-v1.1"))
    height, width = reference.video_size_for(open_image(start), HEIGHT, WIDTH)
    length = FRAMES + 4 * with_end
    last = resized(end, height, width) if with_end else None
    image = reference.image_condition(theirs, resized(start, height, width), FRAMES, last)[4:]
    followed = [reference.covering(frame, height, width) for frame in [*frames, *[frames[-1]] * 3][:length]]
    extra = reference.control_condition(theirs, to_pixels(followed), image, with_end)
    clip = reference.features_of(theirs, open_image(start))
    inputs = Inputs(draw_noise(SEED, length, height, width), *texts(theirs), clip, extra)
    assert_equal(latents, denoise(theirs.dit, inputs, SAMPLING), f"i2v-FC end {with_end}")


def test_the_pipelines_of_diffusers_make_the_same_conditions(
    media: Path, models: Callable[[str], Path]
) -> None:
    """The formulas of reference.py against the ones diffusers runs itself."""
    from diffusers import WanImageToVideoPipeline

    theirs = Theirs(models("i2v"))
    pipeline = WanImageToVideoPipeline(None, None, theirs.vae, None)
    first, last = (resized(media / f"{name}.png", 48, 32) for name in ("high", "wide"))
    size = {"height": 48, "width": 32, "num_frames": FRAMES, "dtype": torch.float32}

    _, one = pipeline.prepare_latents(first[:, :, 0], 1, **size)
    _, two = pipeline.prepare_latents(first[:, :, 0], 1, **size, last_image=last[:, :, 0])

    assert_equal(reference.image_condition(theirs, first, FRAMES), one[0], "pipeline i2v")
    assert_equal(reference.first_last_condition(theirs, first, last, FRAMES), two[0], "pipeline flf2v")
