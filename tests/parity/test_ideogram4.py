"""Ideogram 4's command makes what diffusers' pipeline makes: presets, one and two networks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ideogram4_generate_image
import merge_lora
from tests.ideogram4.making import (
    ReadsText,
    files_in,
    in_diffusers,
    pipeline,
    predict_with,
    states_there,
    write_lora,
)
from tests.parity.running import assert_equal, latents_in
from tests.tiny.dit_files import TinyModel
from tests.tiny.ideogram4 import write_tiny_ideogram4

SEED, HEIGHT, WIDTH = 20, 64, 96
PROMPT = '{"compositional_deconstruction": {"background": "grass", "elements": []}}'
SIZE = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": 128, "output_type": "latent"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_ideogram4(tmp_path_factory.mktemp("models"))


def make(files: TinyModel, out: Path, *words: object) -> Tensor:
    """The latents of our command, 128 1 h w."""
    options = [*files.models, "--vae_dtype", "float32", "--text_encoder_dtype", "float32", "--seed", SEED]
    options += ["--prompt", PROMPT, "--image_size", HEIGHT, WIDTH, "--output_type", "latent"]
    options += ["--device", "cpu", "--save_path", out, *words]
    ideogram4_generate_image.main([str(word) for word in options])
    return latents_in(out)


def make_there(pipe: Any, **asked: Any) -> Tensor:
    """The same of diffusers' pipeline."""
    generator = torch.Generator().manual_seed(SEED)
    latents: Tensor = pipe(prompt=PROMPT, generator=generator, **SIZE, **asked).images
    return latents[0].T.unflatten(1, (1, HEIGHT // 16, WIDTH // 16))


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (
            ("--sampler_preset", "V4_TURBO_12"),
            {"guidance_schedule": (7.0,) * 11 + (3.0,), "mu": 0.5, "std": 1.75, "num_inference_steps": 12},
        ),
        (
            ("--infer_steps", 4),
            {"guidance_schedule": (7.0, 7.0, 3.0, 3.0), "std": 1.75, "num_inference_steps": 4},
        ),
        (
            ("--sampler_preset", "V4_QUALITY_48", "--infer_steps", 4, "--guidance_scale", 5),
            {"guidance_scale": 5.0, "guidance_schedule": None, "num_inference_steps": 4},
        ),
    ],
    ids=["turbo", "default", "constant guidance"],
)
def test_a_picture_of_both_networks_is_made_as_in_diffusers(
    files: TinyModel, tmp_path: Path, words: tuple[object, ...], asked: dict[str, Any]
) -> None:
    made = make(files, tmp_path, *files_in(files.dit.parent), *words)

    assert_equal(made, make_there(pipeline(files), **asked), "latents")


def test_one_network_leads_away_from_the_negative_prompt(files: TinyModel, tmp_path: Path) -> None:
    """As the pipeline with the first network in both places and the texts of a negative prompt."""
    words = ("--infer_steps", 3, "--guidance_scale", 3, "--negative_prompt", "dull")
    made = make(files, tmp_path, *words)

    pipe = pipeline(files)
    negative = states_there(pipe, "dull")[None]
    pipe.unconditional_transformer = ReadsText(pipe.transformer, negative)
    there = make_there(pipe, std=1.75, guidance_scale=3.0, guidance_schedule=None, num_inference_steps=3)
    assert_equal(made, there, "latents")


def test_guidance_of_1_runs_the_first_network_alone(files: TinyModel, tmp_path: Path) -> None:
    made = make(files, tmp_path, "--infer_steps", 3, "--guidance_scale", 1)

    there = {"guidance_scale": 1.0, "guidance_schedule": None, "num_inference_steps": 3, "std": 1.75}
    assert_equal(made, make_there(pipeline(files), **there), "latents")


def test_a_lora_takes_the_place_of_the_second_network(files: TinyModel, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "uncond.safetensors")
    merged = tmp_path / "merged.safetensors"
    merge_lora.main(["--dit", str(files.dit), "--lora_weight", str(lora), "--save_merged_model", str(merged)])

    made = make(files, tmp_path / "out", "--infer_steps", 3, "--unconditional_lora", lora)

    pipe = pipeline(files)
    pipe.unconditional_transformer = in_diffusers(load_file(merged))
    there = make_there(pipe, std=1.75, guidance_schedule=(7.0, 3.0, 3.0), num_inference_steps=3)
    assert_equal(made, there, "latents")


def test_the_first_level_may_be_another(files: TinyModel, tmp_path: Path) -> None:
    """It is told and stepped from; the noise stays as drawn."""
    level = 1.004
    made = make(files, tmp_path, "--infer_steps", 1, "--guidance_scale", 1, "--initial_sigma", level)

    states = states_there(pipeline(files), PROMPT)[None]
    noise = torch.randn(1, HEIGHT * WIDTH // 256, 128, generator=torch.Generator().manual_seed(SEED))
    given = {
        "noisy": noise.transpose(1, 2).unflatten(2, (1, HEIGHT // 16, WIDTH // 16)),
        "times": torch.tensor([1 - level]),
        "text": states,
        "text_mask": torch.ones(1, states.shape[1]),
    }
    with torch.no_grad():
        direction = predict_with(in_diffusers(load_file(files.dit)), given)
    assert_equal(made, (given["noisy"] + level * direction)[0], "latents")
