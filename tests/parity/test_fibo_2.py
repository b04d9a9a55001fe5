"""Fibo 2.0 through the command line equals diffusers' text states, network and scheduler, step by step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor

import fibo_2_generate_image
from tests.fibo_2.making import bundles_there, in_diffusers, unpack
from tests.parity.running import assert_equal, latents_in
from tests.tiny.dit_files import TinyModel
from tests.tiny.fibo_2 import CONFIG, write_tiny_fibo_2

SEED, STEPS, HEIGHT, WIDTH = 20, 3, 64, 96
PROMPT = '{"short_description": "a red cat", "context": "", "objects": [{"description": "a cat"}]}'
CLEANED = '{"short_description":"a red cat","objects":[{"description":"a cat"}]}'
NULL = (
    '{"short_description":"","objects":[],"background_setting":"","lighting":{},"aesthetics":{},'
    '"photographic_characteristics":{},"style_medium":"","context":"","artistic_style":""}'
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny_fibo_2(tmp_path_factory.mktemp("models"))


def embed(text: str) -> Tensor:
    """The states that this network reads: 1 bundles T 3W."""
    return bundles_there(text)[None, : 1 + len(CONFIG.injections)]


@torch.no_grad()
def make_theirs(dit: Any, prompt: str, negative: str, guidance: float) -> Tensor:
    """The latents, 32 h w, of the pipeline's loop with diffusers' parts."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    tokens = HEIGHT * WIDTH // 256
    mu = 0.5 + 0.65 * (tokens - 256) / 3840
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS), mu=mu)
    generator = torch.Generator().manual_seed(SEED)
    latents = torch.randn(1, 32, HEIGHT // 8, WIDTH // 8, generator=generator)
    texts = [embed(prompt), *[embed(negative)] * (guidance != 1)]
    for time in scheduler.timesteps:
        made = [dit(latents, time[None] / 1000, text, None, return_dict=False)[0] for text in texts]
        velocity = made[-1] + guidance * (made[0] - made[-1])
        latents = scheduler.step(velocity, time, latents, return_dict=False)[0]
    return latents[0]


@pytest.mark.parametrize(
    ("words", "negative", "guidance"),
    [
        ([], NULL, 5.0),
        (["--negative_prompt", "dull", "--guidance_scale", "3"], "dull", 3.0),
        (["--guidance_scale", "1"], "", 1.0),
    ],
    ids=["as released", "with a negative prompt", "unguided"],
)
def test_a_picture_is_made_as_in_diffusers(
    files: TinyModel, tmp_path: Path, words: list[str], negative: str, guidance: float
) -> None:
    expected = make_theirs(in_diffusers(load_file(files.dit)), CLEANED, negative, guidance)

    options = [*files.models, "--vae_dtype", "float32", "--text_encoder_dtype", "float32"]
    options += ["--prompt", PROMPT, "--image_size", str(HEIGHT), str(WIDTH), "--infer_steps", str(STEPS)]
    options += ["--seed", str(SEED), "--output_type", "latent", "--device", "cpu"]
    fibo_2_generate_image.main([*options, "--save_path", str(tmp_path), *words])

    assert_equal(unpack(latents_in(tmp_path)[None])[0], expected, "latents")
