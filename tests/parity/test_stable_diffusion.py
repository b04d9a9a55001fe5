"""Pictures of gen_img.py equal those of diffusers' pipelines with the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stable_diffusion.contract import AskedPicture, PictureSettings
from tests.parity.stable_diffusion import (
    CLASSES,
    SIZE,
    TOLERANCE,
    Files,
    assert_close,
    generators,
    make_here,
    pipeline,
    run_script,
    their_pixels,
    their_scheduler,
    write_files,
    write_mask,
    write_picture,
)

PROMPT, NEGATIVE = "a red cat sits on a table", "blurred, ugly"
STEPS, SCALE = 4, 5.0
# diffusers' pipelines begin with PNDM's Runge-Kutta steps in the middle, but for inpainting with SD 1 and 2:
# tests/stable_diffusion/test_samplers.py shows what comes of it
FROM_PICTURES = [name for name in CLASSES if name != "pndm"]


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files("sd1", tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files("sd2", tmp_path_factory.mktemp("sd2"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files("sdxl", tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """An inpainting checkpoint."""
    return write_files("sd1", tmp_path_factory.mktemp("painter"), channels=9)


def words(sampler: str, seed: int, steps: int = STEPS) -> list[object]:
    return ["--prompt", f"{PROMPT} --n {NEGATIVE} --l {SCALE} --s {steps} --d {seed}", "--sampler", sampler]


def asked(seeds: list[int], steps: int = STEPS) -> dict[str, Any]:
    return {
        "prompt": [PROMPT] * len(seeds),
        "negative_prompt": [NEGATIVE] * len(seeds),
        "num_inference_steps": steps,
        "guidance_scale": SCALE,
        "generator": generators(*seeds),
    }


def square() -> dict[str, int]:
    return {"width": SIZE, "height": SIZE}


@pytest.mark.parametrize("sampler", [pytest.param("ddim", marks=pytest.mark.slow), "euler_a"])
def test_pictures_from_text(sd1: Files, tmp_path: Path, sampler: str) -> None:
    theirs = pipeline(sd1, "", sampler)(**asked([7]), **square())
    assert_close(run_script(sd1, tmp_path, *words(sampler, 7)), their_pixels(theirs))


def test_pictures_of_a_model_that_predicts_v(sd2: Files, tmp_path: Path) -> None:
    theirs = pipeline(sd2, "", "heun", velocity=True)(**asked([8]), **square())
    ours = run_script(sd2, tmp_path, *words("heun", 8), "--v_parameterization")
    assert_close(ours, their_pixels(theirs))


def test_pictures_of_xl_with_sizes(sdxl: Files, tmp_path: Path) -> None:
    sizes = {
        "original_size": (512, 256),
        "crops_coords_top_left": (8, 16),
        "target_size": (48, 80),
        "negative_original_size": (96, 128),
        "negative_crops_coords_top_left": (8, 16),
        "negative_target_size": (48, 80),
    }
    theirs = pipeline(sdxl, "", "euler")(**asked([9]), width=80, height=48, **sizes)
    told = ["--original_height", 512, "--original_width", 256, "--crop_top", 8, "--crop_left", 16]
    told += ["--original_height_negative", 96, "--original_width_negative", 128, "--W", 80, "--H", 48]
    assert_close(run_script(sdxl, tmp_path, *words("euler", 9), *told), their_pixels(theirs))


@pytest.mark.parametrize("sampler", ["ddim", "dpm_2_a"])
def test_pictures_from_pictures(sd1: Files, tmp_path: Path, sampler: str) -> None:
    source = write_picture(tmp_path / "source.png", (100, 90))
    resized = Image.open(source).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    theirs = pipeline(sd1, "Img2Img", sampler)(**asked([3], 5), image=resized, strength=0.7)
    ours = run_script(sd1, tmp_path / "out", *words(sampler, 3, 5), "--image_path", source, "--strength", 0.7)
    assert_close(ours, their_pixels(theirs))


@pytest.mark.parametrize(
    ("model", "sampler", "strength"),
    [
        ("sd1", "euler_a", 0.6),
        pytest.param("sd1", "ddim", 1.0, marks=pytest.mark.slow),
        pytest.param("painter", "euler_a", 0.6, marks=pytest.mark.slow),
        ("painter", "ddim", 1.0),
    ],
)
def test_inpainting(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, sampler: str, strength: float
) -> None:
    files: Files = request.getfixturevalue(model)
    source = write_picture(tmp_path / "source.png", (SIZE, SIZE))
    mask = write_mask(tmp_path / "mask.png", (SIZE, SIZE), (11, 5, 43, 50))
    theirs = pipeline(files, "Inpaint", sampler)(
        **asked([3], 5), image=Image.open(source), mask_image=Image.open(mask), strength=strength, **square()
    )
    given = ["--image_path", source, "--mask_path", mask, "--strength", strength]
    assert_close(run_script(files, tmp_path / "out", *words(sampler, 3, 5), *given), their_pixels(theirs))


def test_latents_and_a_batch(sd1: Files) -> None:
    """Four pictures at once have the latents of four pictures of diffusers, and of four batches of one."""
    seeds = [1, 2, 3, 4]
    settings = PictureSettings(SIZE, SIZE, STEPS, SCALE)
    pictures = [
        AskedPicture("", f"{PROMPT} {'and more ' * seed}", NEGATIVE, seed, settings, "") for seed in seeds
    ]
    made = make_here(sd1, pictures, "--sampler", "euler_a")
    texts = {"prompt": [picture.prompt for picture in pictures], "output_type": "latent"}
    theirs = pipeline(sd1, "", "euler_a")(**{**asked(seeds), **texts}, **square()).images
    singly = [make_here(sd1, [picture], "--sampler", "euler_a") for picture in pictures]

    assert relative(made.latents, theirs) < TOLERANCE
    assert made.images is not None
    for number, single in enumerate(singly):
        # convolutions of another batch size sum in another order
        assert relative(made.latents[number], single.latents[0]) < TOLERANCE
        assert single.images is not None
        assert_close(np.asarray(made.images[number])[None], np.asarray(single.images[0])[None])


@pytest.mark.slow
@pytest.mark.parametrize("sampler", CLASSES)
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_pictures_from_text_with_each_sampler(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, sampler: str
) -> None:
    files: Files = request.getfixturevalue(kind)
    theirs = pipeline(files, "", sampler)(**asked([7], 6), **square())
    assert_close(run_script(files, tmp_path, *words(sampler, 7, 6)), their_pixels(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", FROM_PICTURES)
def test_pictures_from_pictures_with_each_sampler(sdxl: Files, tmp_path: Path, sampler: str) -> None:
    source = write_picture(tmp_path / "source.png", (SIZE, SIZE))
    theirs = pipeline(sdxl, "Img2Img", sampler)(**asked([3], 7), image=Image.open(source), strength=0.6)
    given = ["--image_path", source, "--strength", 0.6]
    assert_close(run_script(sdxl, tmp_path / "out", *words(sampler, 3, 7), *given), their_pixels(theirs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "sampler"), [*(("sd2", name) for name in CLASSES), *(("sdxl", name) for name in FROM_PICTURES)]
)
def test_inpainting_with_each_sampler(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, sampler: str
) -> None:
    """The mask and the picture are of another size than what is made."""
    files: Files = request.getfixturevalue(kind)
    source = write_picture(tmp_path / "source.png", (90, 70))
    mask = write_mask(tmp_path / "mask.png", (50, 60), (11, 5, 33, 50))
    given = ["--image_path", source, "--mask_path", mask, "--strength", 0.6]
    ours = run_script(files, tmp_path / "out", *words(sampler, 3, 7), *given)

    theirs = pipeline(files, "Inpaint", sampler)(
        **asked([3], 7), image=Image.open(source), mask_image=Image.open(mask), strength=0.6, **square()
    )
    assert_close(ours, their_pixels(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_inpainting_checkpoints_of_other_kinds(kind: str, tmp_path: Path) -> None:
    files = write_files(kind, tmp_path, channels=9)
    source = write_picture(tmp_path / "source.png", (SIZE, SIZE))
    mask = write_mask(tmp_path / "mask.png", (SIZE, SIZE), (11, 5, 43, 50))
    theirs = pipeline(files, "Inpaint", "euler_a")(
        **asked([3], 5), image=Image.open(source), mask_image=Image.open(mask), strength=0.6, **square()
    )
    given = ["--image_path", source, "--mask_path", mask, "--strength", 0.6]
    assert_close(run_script(files, tmp_path / "out", *words("euler_a", 3, 5), *given), their_pixels(theirs))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_pictures_without_guidance(sd2: Files, tmp_path: Path, scale: float) -> None:
    theirs = pipeline(sd2, "", "ddim")(**{**asked([5]), "guidance_scale": scale}, **square())
    prompt = f"{PROMPT} --n {NEGATIVE} --l {scale} --s {STEPS} --d 5"
    assert_close(run_script(sd2, tmp_path, "--prompt", prompt), their_pixels(theirs))


@pytest.mark.slow
def test_pictures_with_zero_terminal_snr(sd2: Files, tmp_path: Path) -> None:
    made = pipeline(sd2, "", "ddim", velocity=True)
    made.scheduler = their_scheduler("ddim", True, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    theirs = made(**asked([5]), **square())
    ours = run_script(sd2, tmp_path, *words("ddim", 5), "--v_parameterization", "--zero_terminal_snr")
    assert_close(ours, their_pixels(theirs))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())
