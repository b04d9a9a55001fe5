"""From a request to latents: the loop against recorded runs, batched passes, noise."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from generation.denoise import LoopStart, SeededNoise, denoise, make_latents
from modules.contract.requests import Request
from modules.contract.steps import EncodedPrompts, Section, Step, StepDone
from modules.flow.solvers import solver_for
from tests.generation.toy_family import ToyDit, ToyFamily
from tests.golden_cases import DRAWN, make_weights, read_case
from tests.preparing import prepare
from wan.configs import TASKS, WanConfig
from wan.family import Wan, WanFiles
from wan.model import WanModel

CPU = torch.device("cpu")
REQUEST = prepare(Request("p", 3, 32, 32, 5, 4, 5.0, None, 3.0, "unipc", 16.0))


def toy_texts(positive: float = 3, negative: float | None = 8) -> dict[int, EncodedPrompts]:
    def letters(value: float) -> dict[str, Tensor | list[Tensor]]:
        return {"letters": [torch.full((1, 1), float(value))]}

    return {0: EncodedPrompts(letters(positive), None if negative is None else letters(negative))}


def note(noted: list[Any], what: object) -> bool:
    """Watch a step without ending the loop."""
    noted.append(what)
    return False


def golden_wan() -> WanModel:
    description, _ = read_case("wan_dit_t2v")
    names = {field.name for field in fields(WanConfig)}
    config = WanConfig(**{key: value for key, value in description["config"].items() if key in names})
    model = WanModel(config)
    model.load_state_dict(make_weights(description["weights_model_key"], description["weights"]))
    return model.eval()


@pytest.mark.parametrize(
    ("solver", "recorded"),
    [("unipc", "latent_unipc"), ("dpm++", "latent_dpmpp"), ("euler", "latent_vanilla")],
)
def test_a_whole_wan_run_equals_the_recorded_one(solver: str, recorded: str) -> None:
    description, tensors = read_case("wan_sampling")
    _, _, latent_frames, rows, columns = (1, *tensors["noise"].shape)
    request = Request(
        "p",
        description["seed"],
        width=columns * 8,
        height=rows * 8,
        frames=(latent_frames - 1) * 4 + 1,
        steps=description["steps"],
        guidance_scale=description["guidance_scale"],
        flow_shift=description["flow_shift"],
        solver=solver,
    )
    texts = {0: EncodedPrompts({"t5": [tensors["context"]]}, {"t5": [tensors["context_null"]]})}
    family, dit = Wan(WanFiles(task=TASKS["t2v-1.3B"])), golden_wan()
    starts: list[Tensor] = []

    latents = make_latents(
        family,
        lambda timestep: dit,
        prepare(request),
        texts,
        {0: {}},
        CPU,
        cpu_noise=True,
        watchers=[lambda done: note(starts, done.step.noisy)],
    )

    torch.testing.assert_close(starts[0][0], tensors["noise"], atol=DRAWN, rtol=0)
    torch.testing.assert_close(latents[0], tensors[recorded], atol=2e-3, rtol=2e-3)


def test_cpu_noise_is_the_global_generators_stream() -> None:
    noise = SeededNoise(5, CPU, cpu_noise=True)
    first, second = noise.draw((1, 2, 3)), noise.draw((4,))
    torch.manual_seed(5)
    assert torch.equal(first, torch.randn(1, 2, 3))
    assert torch.equal(second, torch.randn(4))


def test_watchers_see_each_step_and_the_clean_estimate() -> None:
    seen: list[StepDone] = []
    dit = ToyDit()
    latents = make_latents(
        ToyFamily(),
        lambda t: dit,
        REQUEST,
        toy_texts(),
        {0: {}},
        CPU,
        watchers=[lambda done: note(seen, done)],
    )
    assert [(done.step.index, done.step.num_steps) for done in seen] == [(step, 4) for step in range(4)]
    assert seen[-1].clean.shape == latents.shape
    assert not latents.requires_grad


def test_a_watcher_that_has_enough_makes_the_clean_estimate_the_result() -> None:
    family, told, estimates = ToyFamily(), list[int](), list[Tensor]()

    def enough(done: StepDone) -> bool:
        estimates.append(done.clean)
        return done.step.index == 1

    def count(done: StepDone) -> bool:
        return note(told, done.step.index)

    latents = make_latents(
        family, lambda t: ToyDit(), REQUEST, toy_texts(), {0: {}}, CPU, watchers=[enough, count]
    )

    assert torch.equal(latents, estimates[-1])
    assert told == [0, 1]  # also of the last one, by which another has ended the loop
    assert len(family.diary) == 2 * 2  # passes: no step more


def test_a_start_in_the_middle_makes_only_the_last_steps() -> None:
    family, dit = ToyFamily(), ToyDit()
    section = Section(torch.zeros(1, 2, 1, 2, 2), toy_texts()[0].positive)
    steps: list[int] = []

    def positive_only(step: Step, predict: object, section: Section) -> Tensor:
        steps.append(step.index)
        return predict(section.positive)[0]  # type: ignore[operator]

    start = LoopStart(torch.ones(1, 2, 1, 2, 2), step=3)
    denoise(family, lambda timestep: dit, section, start, solver_for("unipc", 5, 3.0), positive_only)
    assert steps == [0, 1]
