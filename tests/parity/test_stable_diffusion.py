"""Pictures of gen_img.py equal those of diffusers' pipelines with the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stable_diffusion.contract import ImageSettings, RequestedImage
from tests.parity.stable_diffusion import (
    CLASSES,
    SIZE,
    TOLERANCE,
    FilesOf,
    assert_close,
    generators,
    make_here,
    pipeline,
    run_script,
    their_pixels,
    write_image,
    write_mask,
)

PROMPT, NEGATIVE = "a red cat sits on a table", "blurred, ugly"
STEPS, SCALE = 4, 5.0
# diffusers' pipelines begin with PNDM's Runge-Kutta steps in the middle, but for inpainting with SD 1 and 2:
# tests/stable_diffusion/test_samplers.py shows what comes of it
FROM_IMAGES = [name for name in CLASSES if name != "pndm"]


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


def slow(*cases: tuple[str, str, str]) -> list[Any]:
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    ("model", "task", "sampler"),
    [
        ("sd1", "", "euler_a"),
        ("sd1", "Img2Img", "ddim"),
        ("sd1", "Img2Img", "dpm_2_a"),
        ("sd1", "Inpaint", "euler_a"),
        ("sd1 painter", "Inpaint", "ddim"),
        *slow(*(("sd1", "", name) for name in CLASSES)),
        *slow(*(("sdxl", "Img2Img", name) for name in FROM_IMAGES)),
        *slow(*(("sd2", "Inpaint", name) for name in CLASSES)),
        *slow(*((f"{kind} painter", "Inpaint", "euler_a") for kind in ("sd1", "sd2", "sdxl"))),
    ],
)
def test_pictures_equal_those_of_the_pipeline(
    files_of: FilesOf, tmp_path: Path, model: str, task: str, sampler: str
) -> None:
    """The picture and the mask are of a different size than what is made."""
    files, given, there = files_of(model), [], {"width": SIZE, "height": SIZE}
    strength = 1.0 if (model, sampler) == ("sd1 painter", "ddim") else 0.6
    if task:
        source = write_image(tmp_path / "source.png", (90, 70))
        given += ["--image_path", source, "--strength", strength]
        there |= {"image": Image.open(source), "strength": strength}
    if task == "Img2Img":
        resized = Image.open(source).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        there = {"image": resized, "strength": strength}
    if task == "Inpaint":
        mask = write_mask(tmp_path / "mask.png", (50, 60), (11, 5, 33, 50))
        given += ["--mask_path", mask]
        there["mask_image"] = Image.open(mask)

    ours = run_script(files, tmp_path / "out", *words(sampler, 3, 7), *given)

    assert_close(ours, their_pixels(pipeline(files, task, sampler)(**asked([3], 7), **there)))


def test_pictures_of_a_model_that_predicts_v(files_of: FilesOf, tmp_path: Path) -> None:
    theirs = pipeline(files_of("sd2"), "", "heun", velocity=True)(**asked([8]), **square())
    ours = run_script(files_of("sd2"), tmp_path, *words("heun", 8), "--v_parameterization")
    assert_close(ours, their_pixels(theirs))


def test_pictures_of_xl_with_sizes(files_of: FilesOf, tmp_path: Path) -> None:
    sizes = {
        "original_size": (512, 256),
        "crops_coords_top_left": (8, 16),
        "target_size": (48, 80),
        "negative_original_size": (96, 128),
        "negative_crops_coords_top_left": (8, 16),
        "negative_target_size": (48, 80),
    }
    theirs = pipeline(files_of("sdxl"), "", "euler")(**asked([9]), width=80, height=48, **sizes)
    told = ["--original_height", 512, "--original_width", 256, "--crop_top", 8, "--crop_left", 16]
    told += ["--original_height_negative", 96, "--original_width_negative", 128, "--W", 80, "--H", 48]
    assert_close(run_script(files_of("sdxl"), tmp_path, *words("euler", 9), *told), their_pixels(theirs))


def test_latents_and_a_batch(files_of: FilesOf) -> None:
    """Four pictures at once have the latents of four pictures of diffusers, and of four batches of one."""
    seeds = [1, 2, 3, 4]
    settings = ImageSettings(SIZE, SIZE, STEPS, SCALE)
    images = [
        RequestedImage("", f"{PROMPT} {'and more ' * seed}", NEGATIVE, seed, settings, "") for seed in seeds
    ]
    made = make_here(files_of("sd1"), images, "--sampler", "euler_a")
    texts = {"prompt": [image.prompt for image in images], "output_type": "latent"}
    theirs = pipeline(files_of("sd1"), "", "euler_a")(**{**asked(seeds), **texts}, **square()).images
    singly = [make_here(files_of("sd1"), [image], "--sampler", "euler_a") for image in images]

    assert relative(made.latents, theirs) < TOLERANCE
    assert made.images is not None
    for number, single in enumerate(singly):
        # convolutions of another batch size sum in another order
        assert relative(made.latents[number], single.latents[0]) < TOLERANCE
        assert single.images is not None
        assert_close(np.asarray(made.images[number])[None], np.asarray(single.images[0])[None])


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_pictures_without_guidance(files_of: FilesOf, tmp_path: Path, scale: float) -> None:
    theirs = pipeline(files_of("sd2"), "", "ddim")(**{**asked([5]), "guidance_scale": scale}, **square())
    prompt = f"{PROMPT} --n {NEGATIVE} --l {scale} --s {STEPS} --d 5"
    assert_close(run_script(files_of("sd2"), tmp_path, "--prompt", prompt), their_pixels(theirs))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())
