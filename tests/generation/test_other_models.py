"""Models of other kinds go through the same loop: one that makes images, and one that predicts noise."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from generation.options import GenerationOptions, generation_parser, read_arguments
from generation.run import generate
from generation.script_options import ScriptDefaults
from generation.sections import make_latents
from generation.session import Session, wanted_texts
from modules.contract.data import Conditions
from modules.contract.family import LatentSpec, NoiseSource
from modules.contract.generation import NO_TWEAKS, EncodedPrompts, Request, Section, Tweaks
from modules.contract.loading import Placement
from modules.contract.noise import NoiseSpec
from modules.contract.prepared import Prepared
from modules.contract.steps import StepDone
from modules.media.reading import read_image
from modules.options import read_options
from tests.generation.toy_family import ToyFamily

CPU = torch.device("cpu")
POSITIVE, NEGATIVE, SCALE = "cat", "worse", 2.0
# a text of n letters shows n / 10 in every place; guidance goes from the negative one past the positive one
GUIDED = 0.5 + SCALE * (0.3 - 0.5)
TABLE = tuple(0.03 + 0.0146 * timestep for timestep in range(1000))  # noise beside all of the data


def clean_of(conditions: Conditions) -> float:
    """What a text shows."""
    return float(conditions["letters"][0]) / 10


def varied(toy: ToyFamily, **members: Any) -> Any:
    """The toy with other members."""
    return SimpleNamespace(
        **{name: getattr(toy, name) for name in dir(toy) if not name.startswith("_")} | members
    )


def image_family() -> Any:
    """Images of no time: C H W. It is fed 0..1 and predicts the way from noise to data."""

    class Picture(nn.Module):
        def forward(self, noisy: Tensor, share: Tensor, clean: float) -> Tensor:
            assert noisy.ndim == 4
            assert 0 < float(share[0]) <= 1
            return (clean - noisy) / share.view(-1, 1, 1, 1)

    def predict(
        dit: nn.Module, noisy: Tensor, timesteps: Tensor, cond: Conditions, tweaks: Tweaks = NO_TWEAKS
    ) -> Tensor:
        return -dit(noisy[:, :, 0], timesteps / 1000, clean_of(cond))[:, :, None]

    def load_dit(placement: Placement, expert: int = 0) -> nn.Module:
        return Picture()

    toy = ToyFamily(latent=LatentSpec(channels=2, stride=(1, 8, 8), pixel_step=16, frame_step=1))
    toy = replace(toy, defaults=replace(toy.defaults, frames=1))
    return varied(toy, predict=predict, load_dit=load_dit, dit=replace(toy.dit, block_lists=()))


def noise_family() -> Any:
    """Predicts noise, at noise levels of its own, which begin far above 1."""

    class Noise(nn.Module):
        def forward(self, noisy: Tensor, sigma: float, clean: float) -> Tensor:
            return (noisy - clean) / sigma

    def predict(
        dit: nn.Module, noisy: Tensor, timesteps: Tensor, cond: Conditions, tweaks: Tweaks = NO_TWEAKS
    ) -> Tensor:
        return dit(noisy, 0.03 + 0.0146 * float(timesteps[0]), clean_of(cond))

    def load_dit(placement: Placement, expert: int = 0) -> nn.Module:
        return Noise()

    toy = ToyFamily()

    def prepare(request: Request) -> Prepared:
        return replace(toy.prepare(request), steps=4)

    def sections(
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        shape = toy.latent.shape(prepared.frames, prepared.height, prepared.width)
        return (yield prompts[0].section(TABLE[-1] * noise.draw(shape)))

    return varied(
        toy,
        predict=predict,
        load_dit=load_dit,
        prepare=prepare,
        sections=sections,
        noise=NoiseSpec(table=TABLE),
        dit=replace(toy.dit, block_lists=()),
    )


KINDS = pytest.mark.parametrize("family_of", [image_family, noise_family])


def options(folder: Path, *arguments: object) -> GenerationOptions:
    parser = generation_parser(None, ScriptDefaults(fps=16, guidance_scale=SCALE))
    given = ["--save_path", folder, "--device", "cpu", "--video_size", 32, 48, "--sample_solver", "vanilla"]
    given += ["--prompt", POSITIVE, "--negative_prompt", NEGATIVE, "--seed", 7, *arguments]
    return read_options(GenerationOptions, read_arguments(parser, [str(each) for each in given]))


@KINDS
def test_it_is_generated_with_guidance(family_of: Callable[[], Any], tmp_path: Path) -> None:
    family = family_of()
    generate(family, options(tmp_path, "--output_type", "latent"))
    (path,) = tmp_path.glob("*_7_latent.safetensors")
    latents = load_file(path)["latent"]
    assert latents.shape == family.latent.shape(family.defaults.frames, 32, 48)[1:]
    torch.testing.assert_close(latents, torch.full_like(latents, GUIDED), atol=1e-5, rtol=0)


def test_an_image_is_written_as_a_picture(tmp_path: Path) -> None:
    generate(image_family(), options(tmp_path))
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".png"
    assert set(read_image(path).flatten().tolist()) == {round(255 * (GUIDED / 2 + 0.5))}


@KINDS
@pytest.mark.parametrize("enough_at", [None, 0, 1])
def test_watchers_see_the_clean_estimate_and_may_end_the_loop(
    family_of: Callable[[], Any], enough_at: int | None
) -> None:
    family, seen = family_of(), list[StepDone]()

    def watch(done: StepDone) -> bool:
        seen.append(done)
        return done.step.index == enough_at

    asked = Request(POSITIVE, 7, negative_prompt=NEGATIVE, guidance_scale=SCALE, solver="euler")
    prepared, dit = family.prepare(asked), family.load_dit(Placement(CPU))
    (texts,) = Session(family, CPU, lambda _: dit, keep=False).texts([wanted_texts(prepared)])
    latents = make_latents(family, lambda _: dit, prepared, texts, {0: {}}, CPU, watchers=[watch])

    assert len(seen) == (prepared.steps if enough_at is None else enough_at + 1)
    for estimate in (latents, *(done.clean for done in seen)):
        torch.testing.assert_close(estimate, torch.full_like(estimate, GUIDED), atol=1e-5, rtol=0)
