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
from fibo_2.options import MASK, Fibo2GenerationOptions
from fibo_2_generate_image import DEFAULTS
from generation.options import read_generation
from generation.prompt_lines import parse_generation_line
from generation.request import make_request
from modules.errors import OptionError
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
    empty = prepare(family, negative_prompt="")
    assert empty.prompts[0].negative is not None
    assert (empty.prompts[0].negative.text, empty.negative_prompt) == ("", "")


def test_an_empty_negative_prompt_is_typed_and_is_not_the_null_caption(family: Fibo2, tmp_path: Path) -> None:
    """The whole way from the command line and from a prompt line to the request."""
    values = ["--dit", str(family.files.dit), "--save_path", str(tmp_path), "--prompt", "a cat"]
    for typed, line, expected in (
        ([], {}, None),
        (["--negative_prompt", ""], {}, ""),
        ([], parse_generation_line("a cat --n"), ""),
    ):
        options, _ = read_generation(None, DEFAULTS, Fibo2GenerationOptions, [*values, *typed])
        request = make_request(options.request, line)
        assert request.negative_prompt == expected


def test_images_to_edit_keep_their_size(family: Fibo2, tmp_path: Path) -> None:
    frame = np.random.default_rng(1).integers(0, 255, (70, 101, 3), dtype=np.uint8)
    Image.fromarray(frame).save(tmp_path / "a.png")
    Image.new("L", (101, 70), 255).save(tmp_path / "mask.png")
    own = replace(family, resizes_references=False)
    edit = replace(REQUEST, prompt="add a hat", control_images=(tmp_path / "a.png",))
    (pixels,) = own.prepare(edit).prompts[0].positive.image_pixels
    assert np.array_equal(pixels, frame[:64, :96])
    masked = replace(edit, extra={MASK: str(tmp_path / "mask.png")})
    prompt = own.prepare(masked).prompts[0].positive
    assert prompt.image_pixels[0].shape == (64, 96, 3)
    assert prompt.image_pixels[0].unique().tolist() == [128]
    assert prompt != own.prepare(edit).prompts[0].positive
    resized = family.prepare(replace(edit, width=64, height=96)).prompts[0].positive
    assert resized.image_pixels == ()
    Image.new("RGB", (101, 15)).save(tmp_path / "narrow.png")
    with pytest.raises(OptionError, match=r"each side needs at least\s+16"):
        own.prepare(replace(edit, control_images=(tmp_path / "narrow.png",)))


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
