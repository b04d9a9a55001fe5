"""Pictures of Qwen-Image-2.1 by command line equal those of diffusers' pipeline."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.faults.messages import succeed_here
from tests.parity.running import assert_equal, latents_in
from tests.qwen_image_21.making import make, pipeline
from tests.tiny.dit_files import TinyModel
from tests.tiny.qwen_image_21 import config_json, tiny_state, write_dit, write_tiny_qwen_image_21, write_turbo

# Measured: 1e-6 to 3e-6 of the largest value; guidance multiplies it
NEAR = 1e-4
SCRIPT = "qwen_image_21_generate_image.py"
SIZE = ("--image_size", 64, 96, "--infer_steps", 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_qwen_image_21(tmp_path_factory.mktemp("models"))


def generate(folder: Path, files: TinyModel, *words: object, dit: Path | None = None) -> Tensor:
    """The latents, 1 Z 1 h w."""
    models = ["--dit", dit or files.dit, "--vae", files.vae, "--text_encoder", files.text_encoder]
    precise = ["--dit_dtype", "float32", "--vae_dtype", "float32", "--text_encoder_dtype", "float32"]
    asked = ["--prompt", "a cat on a mat", "--seed", 7, "--save_path", "made", "--device", "cpu"]
    succeed_here(SCRIPT, *models, *precise, *asked, *words, folder=folder)
    return latents_in(folder / "made")[None]


@pytest.mark.slow_cases("release", "shard")
@pytest.mark.parametrize("layout", ["folder", "release", "shard", "comfyui"])
def test_a_picture_from_a_text(tmp_path: Path, files: TinyModel, layout: str) -> None:
    """From each layout of the transformer; the PNG is the decoded picture with its transparency."""
    dit = write_dit(
        tmp_path / "release", tiny_state(), "comfyui" if layout == "comfyui" else "diffusers_sharded"
    )
    if layout != "comfyui":
        (dit / "config.json").write_text(json.dumps(config_json()), encoding="utf-8")
        given = {"folder": dit, "release": dit.parent, "shard": next(iter(sorted(dit.glob("*-00001-*"))))}
        dit = given[layout]
    expected = make(files, steps=3)

    ours = generate(tmp_path, files, *SIZE, "--output_type", "latent_images", dit=dit)

    assert_equal(ours, expected, layout, NEAR)
    (image,) = (tmp_path / "made").glob("*.png")
    shown = torch.from_numpy(numpy.array(Image.open(image))).float()
    vae = pipeline(files).vae
    mean, deviation = (
        torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    with torch.no_grad():
        pixels = vae.decode(expected * deviation + mean).sample[0, :, 0].clamp(-1, 1)
    assert shown.shape == (64, 96, 4)
    assert (shown - (pixels.permute(1, 2, 0) + 1) * 127.5).abs().max() < 0.6


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (
            ("--guidance_scale", 3, "--negative_prompt", "dull"),
            {"true_cfg_scale": 3.0, "negative_prompt": "dull"},
        ),
        pytest.param(
            ("--guidance_scale", 2, "--negative_prompt", ""),
            {"true_cfg_scale": 2.0, "negative_prompt": ""},
            marks=pytest.mark.slow,
        ),
        pytest.param(("--no_kv_cache",), {}, marks=pytest.mark.slow),
    ],
    ids=["guidance", "empty negative prompt", "no cache"],
)
def test_guidance(
    tmp_path: Path, files: TinyModel, words: tuple[object, ...], asked: dict[str, object]
) -> None:
    expected = make(files, steps=3, **asked)  # type: ignore[arg-type]
    assert_equal(generate(tmp_path, files, *SIZE, *words, "--output_type", "latent"), expected, "", NEAR)


def test_turbo_has_the_levels_of_its_release(tmp_path: Path, files: TinyModel) -> None:
    levels = [1.0, 0.9, 0.5]
    dit = write_turbo(tmp_path / "release", levels)
    ours = generate(tmp_path, files, "--image_size", 64, 96, "--output_type", "latent", dit=dit)
    assert_equal(ours, make(files, levels=levels), "Turbo", NEAR)


@pytest.mark.slow
def test_turbo_by_its_name_has_the_released_levels(tmp_path: Path, files: TinyModel) -> None:
    from qwen_image_21.files import TURBO_LEVELS

    dit = write_dit(tmp_path, load_file(files.dit), name="qwen_image_2.1_turbo_bf16")
    ours = generate(tmp_path, files, "--image_size", 64, 96, "--output_type", "latent", dit=dit)
    assert_equal(ours, make(files, levels=TURBO_LEVELS), "Turbo", NEAR)


@pytest.mark.slow
def test_an_edit_of_two_pictures_with_guidance(tmp_path: Path, files: TinyModel) -> None:
    """One is larger than it is seen, one smaller and transparent; the negative prompt sees them too."""
    numbers = numpy.random.default_rng(0)
    for name, shape, size in (("a", (40, 70, 3), (200, 120)), ("b", (30, 30, 4), (64, 96))):
        pixels = numbers.integers(0, 255, shape, dtype=numpy.uint8)
        Image.fromarray(pixels).resize(size).save(tmp_path / f"{name}.png")
    images = [Image.open(tmp_path / f"{name}.png") for name in "ab"]
    expected = make(files, steps=3, image=images, true_cfg_scale=2.0, negative_prompt="dull")
    words = ("--control_image_path", "a.png", "b.png", "--guidance_scale", 2, "--negative_prompt", "dull")
    ours = generate(tmp_path, files, *SIZE, *words, "--output_type", "latent")
    assert_equal(ours, expected, "edit", NEAR)
