"""The latents and images that the script makes are those of a plain loop over the plain network."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from hidream_o1.texts import TEMPLATE
from modules.media.reading import read_image
from tests.faults.messages import succeed_here
from tests.hidream_o1.making import shape_of
from tests.hidream_o1.plain import PlainHiDreamO1, predict_clean, put_together, velocity
from tests.parity.running import assert_equal, latents_in
from tests.tiny.hidream_o1 import TinyHiDreamO1, write_tiny_hidream_o1

HEIGHT, WIDTH, SEED, STEPS = 64, 96, 3, 4
SCALE = 8.0  # of the noise, in pixels of -1..1
Step = Callable[[Tensor, Tensor, int], Tensor]  # velocity, noisy, number of the step -> noisy


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyHiDreamO1:
    return write_tiny_hidream_o1(tmp_path_factory.mktemp("model"))


def ids_of(files: TinyHiDreamO1, prompt: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(files.tokenizer / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(TEMPLATE.format(prompt), add_special_tokens=False).ids
    return ids


def shifted(levels: Tensor, shift: float) -> Tensor:
    return shift * levels / (1 + (shift - 1) * levels)


def euler(sigmas: Tensor) -> Step:
    return lambda velocity, noisy, number: noisy + (sigmas[number + 1] - sigmas[number]) * velocity


def unipc(scheduler: UniPCMultistepScheduler) -> Step:
    return lambda velocity, noisy, number: scheduler.step(
        velocity, scheduler.timesteps[number], noisy, return_dict=False
    )[0]


@torch.no_grad()
def loop(
    files: TinyHiDreamO1,
    sigmas: Tensor,
    step: Step,
    *,
    guidance: float,
    negative: str = " ",
    scale: float = SCALE,
) -> Tensor:
    """The pixels 3 H W at the end of a plain loop."""
    network = PlainHiDreamO1(load_file(files.dit))
    noise = torch.randn(1, 3, 1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(SEED))[0, :, 0]
    noisy = scale * noise
    texts = [ids_of(files, text) for text in ("a cat", negative)]
    for number in range(len(sigmas) - 1):
        sigma = float(sigmas[number])
        wanted, other = (
            velocity(noisy, predict_clean(network, shape_of(), ids, noisy, sigma), sigma) for ids in texts
        )
        noisy = step(other + guidance * (wanted - other), noisy, number)
    return noisy


def make(
    files: TinyHiDreamO1,
    folder: Path,
    *words: object,
    output: str = "latent",
    steps: Sequence[object] = ("--infer_steps", STEPS),
) -> None:
    sizes = ("--image_size", HEIGHT, WIDTH, *steps, "--seed", SEED)
    options = ["--prompt", "a cat", "--save_path", "made", "--output_type", output, "--device", "cpu"]
    script = "hidream_o1_generate_image.py"
    succeed_here(script, *files.models, *options, *map(str, (*sizes, *words)), folder=folder)


def test_latents_are_those_of_a_plain_loop(files: TinyHiDreamO1, tmp_path: Path) -> None:
    """Euler's steps, with the default guidance away from a space and the default shift."""
    sigmas = shifted(torch.linspace(1, 0, STEPS + 1), 3.0)
    make(files, tmp_path, "--sample_solver", "vanilla")

    expected = loop(files, sigmas, euler(sigmas), guidance=5.0)

    assert_equal(SCALE * latents_in(tmp_path / "made").squeeze(1), expected, "plain loop")


@pytest.mark.parametrize("mistake", ["scale", "negative", "guidance", "shift"])
def test_a_wrong_number_would_show(files: TinyHiDreamO1, tmp_path: Path, mistake: str) -> None:
    """The noise of other models, an empty text without its space, another guidance or shift."""
    sigmas = shifted(torch.linspace(1, 0, STEPS + 1), 2.9 if mistake == "shift" else 3.0)
    wrong: dict[str, Any] = {"scale": {"scale": 1.0}, "negative": {"negative": ""}}.get(mistake, {})
    make(files, tmp_path, "--sample_solver", "vanilla")

    expected = loop(files, sigmas, euler(sigmas), guidance=4.9 if mistake == "guidance" else 5.0, **wrong)

    with pytest.raises(AssertionError, match="relative error"):
        assert_equal(SCALE * latents_in(tmp_path / "made").squeeze(1), expected)


def test_the_usual_steps_are_those_of_unipc(files: TinyHiDreamO1, tmp_path: Path) -> None:
    """From the noisiest level that models are trained on, as in the released code; with exact times."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(STEPS)
    scheduler.sigmas = shifted(torch.linspace(0.999, 0, STEPS + 1), 3.0)
    scheduler.timesteps = 1000 * scheduler.sigmas[:-1]
    scheduler.set_begin_index(0)
    make(files, tmp_path, "--negative_prompt", "dull", "--guidance_scale", 3)

    expected = loop(files, scheduler.sigmas, unipc(scheduler), guidance=3.0, negative="dull")

    assert_equal(SCALE * latents_in(tmp_path / "made").squeeze(1), expected, "UniPC")


TIMES = (
    *(
        999,
        987,
        974,
        960,
        945,
        929,
        913,
        895,
        877,
        857,
        836,
        814,
        790,
        764,
        737,
        707,
        675,
        640,
        602,
        560,
        515,
    ),
    *(464, 409, 347, 278, 199, 110, 8),
)


@torch.no_grad()
def test_dev_forgets_the_noise_of_each_step(files: TinyHiDreamO1, tmp_path: Path) -> None:
    """Without guidance; noise is 7.5 times as loud as usual, and none is beyond 2.5 of its own deviations."""
    dev, generator = 7.5, torch.Generator().manual_seed(SEED)
    network = PlainHiDreamO1(load_file(files.dit))
    ids, levels = ids_of(files, "a cat"), [*(time / 1000 for time in TIMES), 0.0]

    def loud_noise() -> Tensor:
        noise = torch.randn(1, 3, 1, HEIGHT, WIDTH, generator=generator)[0, :, 0]
        return dev * noise.clamp(-2.5 * noise.std(), 2.5 * noise.std())

    noisy = loud_noise()
    for sigma, after in itertools.pairwise(levels):
        clean = predict_clean(network, shape_of(), ids, noisy, sigma)
        noisy = (1 - after) * clean + after * loud_noise() if after else clean

    make(files, tmp_path, "--model_type", "dev", steps=())

    assert_equal(dev * latents_in(tmp_path / "made").squeeze(1), noisy, "Dev")


def test_an_image_is_the_pixels_without_a_decoder(files: TinyHiDreamO1, tmp_path: Path) -> None:
    sigmas = shifted(torch.linspace(1, 0, STEPS + 1), 3.0)
    make(files, tmp_path, "--sample_solver", "vanilla", output="images")

    (path,) = (tmp_path / "made").glob("*.png")
    pixels = loop(files, sigmas, euler(sigmas), guidance=5.0)
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert numpy.abs(read_image(path) - expected).max() <= 1  # rounded from numbers that differ by 1e-6


def test_patches_are_put_together_as_they_were_cut() -> None:
    from tests.hidream_o1.plain import cut

    picture = torch.randn(3, 12, 20)
    assert torch.equal(put_together(cut(picture, 4), 12, 20, 4), picture)
