"""Noise, its levels and what a request becomes are those of diffusers' pipeline."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from fibo_2.captions import NULL
from fibo_2.configs import LATENT, NOISE
from fibo_2.family import Fibo2
from fibo_2.files import Fibo2Files
from modules.flow.schedule import shift_sigmas
from protocols.requests import Prepared, Request
from tests.fibo_2.making import unpack
from tests.tiny.fibo_2 import write_tiny_fibo_2

REQUEST = Request('{"short_description":"a cat"}', seed=1, width=64, height=96)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Fibo2:
    files = write_tiny_fibo_2(tmp_path_factory.mktemp("model"))
    return Fibo2(replace(Fibo2Files(), dit=files.dit, vae=files.vae, text_encoder=files.text_encoder))


def prepare(family: Fibo2, **changes: Any) -> Prepared:
    return family.prepare(replace(REQUEST, **changes))


@pytest.mark.parametrize(("width", "height"), [(64, 96), (1024, 1024), (2048, 2048), (832, 1248)])
@pytest.mark.parametrize("steps", [4, 30])
def test_noise_levels_are_those_of_the_pipelines_scheduler(
    family: Fibo2, width: int, height: int, steps: int
) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    tokens = width * height // 256
    mu = 0.5 + 0.65 * (tokens - 256) / 3840
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)

    prepared = prepare(family, width=width, height=height, steps=steps)

    levels = shift_sigmas(torch.linspace(1, 0, steps + 1, dtype=torch.float64), prepared.flow_shift)
    torch.testing.assert_close(levels.float(), scheduler.sigmas, rtol=0, atol=1e-6)


def test_noise_is_drawn_before_it_is_packed(family: Fibo2) -> None:
    """A seed gives the picture that it gives in diffusers."""

    class Source:
        def draw(self, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(3), dtype=dtype)

    noise = family.draw_noise(prepare(family), Source())
    expected = torch.randn(1, 32, 12, 8, generator=torch.Generator().manual_seed(3))
    assert noise.shape == LATENT.shape(1, 96, 64)
    assert torch.equal(unpack(noise), expected)


def test_a_request_is_settled_as_released(family: Fibo2) -> None:
    prepared = prepare(family)
    texts = prepared.prompts[0]
    assert (prepared.steps, prepared.guidance_scale) == (30, (5.0,))
    assert texts.negative is not None
    assert (texts.negative.text, texts.negative.is_negative) == (NULL, True)
    empty = prepare(family, negative_prompt="").prompts[0].negative
    assert empty is not None
    assert empty.text == ""


def test_an_edit_shows_its_pictures_to_the_positive_prompt_alone(family: Fibo2, tmp_path: Path) -> None:
    Image.new("RGB", (640, 480), "red").save(tmp_path / "a.png")
    edit = replace(REQUEST, prompt="add a hat", control_images=(tmp_path / "a.png",))
    texts = family.prepare(edit).prompts[0]
    assert (len(texts.positive.images), texts.positive.image_size) == (1, (64, 96))
    assert texts.negative is not None
    assert texts.negative.images == ()
    unsized = family.prepare(replace(edit, width=None, height=None))
    assert (unsized.width, unsized.height) == (1152, 864)


def test_a_training_step_feeds_the_share_of_noise_in_thousandths() -> None:
    assert NOISE.training_offset == 0
    latents, noise = torch.zeros(1, 2), torch.ones(1, 2)
    assert torch.equal(NOISE.velocity(latents, noise, torch.ones(1)), noise - latents)
