"""Wan2.1 from a video through the command line equals diffusers' networks and solvers, begun at a later step
(features.md, section 3.6).
"""

from pathlib import Path

import numpy
import pytest
from PIL import Image
from torch import Tensor

from modules.media.writing import write_png
from tests.parity.reference import (
    Inputs,
    Sampling,
    TheirSolver,
    draw_noise,
    features_of,
    guided,
    image_condition,
    stretched,
    to_pixels,
    video_size_for,
)
from tests.parity.running import assert_equal, generate
from tests.parity.theirs import Theirs
from tests.tiny.wan import write_tiny_wan

PROMPT, SEED = "a small rabbit wakes up", 20
HEIGHT, WIDTH, FRAMES, STEPS = 32, 48, 9, 6
SIZE = ("--video_size", HEIGHT, WIDTH, "--video_length", FRAMES, "--infer_steps", STEPS)
SAY = (*SIZE, "--prompt", PROMPT, "--seed", SEED, "--guidance_scale", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    write_tiny_wan(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Theirs:
    return Theirs(folder)


def write_frames(folder: Path, count: int, height: int, width: int) -> list[numpy.ndarray]:
    """A folder of pictures, which counts as a video."""
    random = numpy.random.default_rng(3)
    frames = [random.integers(0, 256, (height, width, 3), dtype=numpy.uint8) for _ in range(count)]
    folder.mkdir()
    for index, frame in enumerate(frames):
        write_png(folder / f"{index:02d}.png", frame)
    return frames


def encoded(theirs: Theirs, frames: list[numpy.ndarray], height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """Stretched by Pillow's bicubic filter and encoded: 16 f h w."""
    resized = [
        numpy.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
        for frame in frames
    ]
    return theirs.encode(to_pixels(resized))[0]


def from_video(
    theirs: Theirs, clean: Tensor, inputs: Inputs, sampling: Sampling, begin: int, extra: Tensor | float = 0.0
) -> Tensor:
    """Denoise from step `begin` on, with diffusers' solvers; sampling.scales: of the steps that are made."""
    every = Sampling(sampling.solver, sampling.flow_shift, scales=(None,) * STEPS)
    solver = TheirSolver(every)
    if solver.scheduler is not None:
        solver.scheduler.set_begin_index(begin)
    sigma = solver.sigmas[begin]
    latents = sigma * inputs.noise + (1 - sigma) * clean + extra
    for made, step in enumerate(range(begin, STEPS)):
        velocity = guided(theirs.dit, latents, solver.timesteps[step], made, inputs, sampling)
        latents = solver.step(step, velocity, latents)
    return latents


def inputs_of(theirs: Theirs) -> Inputs:
    return Inputs(draw_noise(SEED, FRAMES, HEIGHT, WIDTH), theirs.text(PROMPT), theirs.text(""))


@pytest.mark.slow_cases("unipc-0.7-traditional-2")
@pytest.mark.parametrize(
    ("solver", "denoise", "mode", "begin"),
    [
        ("unipc", 0.7, "traditional", 2),
        ("dpm++", 0.5, "traditional", 3),
        ("vanilla", 0.01, "traditional", 5),
        # shift 5: timesteps 1000, 961.5, 909.1, 833.3, 714.3, 500
        ("vanilla", 0.5, "direct", 5),
        ("unipc", 0.9, "direct", 2),
    ],
)
def test_latents_equal_those_of_diffusers(
    tmp_path: Path, folder: Path, theirs: Theirs, solver: str, denoise: float, mode: str, begin: int
) -> None:
    frames = write_frames(tmp_path / "clip", 11, 40, 56)
    options = ("--sample_solver", solver, "--v2v_denoise", denoise, "--v2v_noise_mode", mode)

    latents = generate(tmp_path, folder, "t2v-1.3B", *SAY, "--video_path", tmp_path / "clip", *options)

    sampling = Sampling(solver, scales=(None,) * (STEPS - begin))
    expected = from_video(theirs, encoded(theirs, frames[:FRAMES]), inputs_of(theirs), sampling, begin)
    assert_equal(latents, expected, f"{solver} {denoise} {mode}")


@pytest.mark.slow_cases("False")
@pytest.mark.parametrize("with_image", [True, False])
def test_an_image_is_the_anchor_or_else_the_first_frame(tmp_path: Path, with_image: bool) -> None:
    """Image-to-video from a video: the anchor's proportions are the video's, which is stretched to them."""
    write_tiny_wan(tmp_path / "models", "i2v")
    theirs = Theirs(tmp_path / "models")
    frames = write_frames(tmp_path / "clip", FRAMES, HEIGHT, WIDTH)
    random = numpy.random.default_rng(8)
    anchor = random.integers(0, 256, (64, 56, 3), dtype=numpy.uint8) if with_image else frames[0]
    write_png(tmp_path / "anchor.png", anchor)
    options = ("--video_path", tmp_path / "clip", "--sample_solver", "vanilla", "--flow_shift", 5)
    options += ("--image_path", tmp_path / "anchor.png") if with_image else ()

    latents = generate(tmp_path, tmp_path / "models", "i2v-14B", *SAY, *options)

    height, width = video_size_for(anchor, HEIGHT, WIDTH)
    condition = image_condition(theirs, to_pixels([stretched(anchor, height, width)]), FRAMES)
    inputs = Inputs(
        draw_noise(SEED, FRAMES, height, width),
        theirs.text(PROMPT),
        theirs.text(""),
        features_of(theirs, anchor),
        condition,
    )
    clean = encoded(theirs, frames, height, width)
    expected = from_video(theirs, clean, inputs, Sampling("vanilla", scales=(None,) * 3), 3)
    assert_equal(latents, expected, f"image {with_image}")


def test_an_image_is_made_from_an_image(tmp_path: Path, folder: Path, theirs: Theirs) -> None:
    (frame,) = write_frames(tmp_path / "pictures", 1, 64, 40)
    noise = draw_noise(SEED, 1, HEIGHT, WIDTH)
    inputs = Inputs(noise, theirs.text(PROMPT), theirs.text(""))
    expected = from_video(
        theirs, encoded(theirs, [frame]), inputs, Sampling("vanilla", scales=(None,) * 3), 3
    )
    say = ("--prompt", PROMPT, "--seed", SEED, "--guidance_scale", 1, "--sample_solver", "vanilla")
    size = ("--video_size", HEIGHT, WIDTH, "--infer_steps", STEPS)
    for task in ("t2i-14B", "t2v-1.3B"):
        image = tmp_path / "pictures" / "00.png"
        latents = generate(tmp_path / task, folder, task, *size, *say, "--i2i_path", image)
        assert_equal(latents, expected, task)
