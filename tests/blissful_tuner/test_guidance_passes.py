"""The passes of a step; CFG-Zero* and perpendicular negative guidance on recorded values."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blissful_tuner.guidance import make_guidance
from blissful_tuner.guidance_formulas import BLANK, NEGATIVE, POSITIVE, GuidanceStage, cfg_zero, perp_neg
from blissful_tuner.options import PLAIN_GUIDANCE, GuidanceOptions
from modules.contract.data import Conditions
from modules.contract.requests import Request
from modules.contract.steps import NO_TWEAKS, Section, Step, Tweaks
from tests.golden_cases import read_case
from tests.preparing import prepare

REQUEST = prepare(Request("p", 0, steps=4, guidance_scale=5.0))
SLG = {"slg_mode": "uncond", "slg_layers": "1", "slg_end": 0.5}


def step(index: int) -> Step:
    return Step(index, 4, 0.5, 500.0, torch.ones(1, 1, 1, 2, 2))


def combine(stage: GuidanceStage, positive: Tensor, negative: Tensor, blank: Tensor) -> Tensor:
    return stage.change(positive, {POSITIVE: positive, NEGATIVE: negative, BLANK: blank})


def by_three() -> dict[str, Tensor]:
    """The recorded velocities as a batch of one."""
    _, tensors = read_case("guidance")
    return {name: tensors[name][None] for name in ("cond", "uncond", "nocond")}


def test_zero_star_equals_the_recorded_values() -> None:
    _, tensors = read_case("guidance")
    velocity = combine(cfg_zero(5.0, NEGATIVE), *by_three().values())
    torch.testing.assert_close(velocity, tensors["zerostar_batched"], atol=1e-4, rtol=0)


def test_perpendicular_guidance_equals_the_recorded_values() -> None:
    _, tensors = read_case("guidance")
    velocity = combine(perp_neg(5.0, 1.5, NEGATIVE), *by_three().values())
    torch.testing.assert_close(velocity[0], tensors["perp_neg"], atol=1e-4, rtol=0)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 1, 1, 2, 2)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (cfg_zero(5.0, NEGATIVE), (-3.0, 10.0, 7.0, 20.0)),
        (perp_neg(5.0, 1.5, NEGATIVE), (-10 / 3, 25 / 3, 28 / 3, 21.0)),
    ],
)
def test_documented_examples(stage: GuidanceStage, expected: tuple[float, ...]) -> None:
    velocity = combine(stage, numbers(1, 2, 3, 4), numbers(1, 0, 1, 0), numbers(0, 0, 1, 1))
    torch.testing.assert_close(velocity, numbers(*expected))


class Network:
    """Answers each pass with its own numbers, and notes the calls."""

    def __init__(self) -> None:
        self.section = Section(numbers(0, 0, 0, 0), {"v": numbers(1, 2, 3, 4)}, {"v": numbers(1, 0, 1, 0)})
        self.section = replace(self.section, blank={"v": numbers(0, 0, 1, 1)})
        self.calls: list[tuple[str, ...]] = []
        self.tweaks: list[Tweaks] = []

    def __call__(self, *conditions: Conditions, tweaks: Tweaks = NO_TWEAKS) -> tuple[Tensor, ...]:
        names = {id(self.section.positive): "+", id(self.section.negative): "-", id(self.section.blank): "0"}
        mark = "!" if tweaks.skip_blocks else ""
        self.calls.append(tuple(names[id(one)] + mark for one in conditions))
        self.tweaks.append(tweaks)
        return tuple(torch.as_tensor(one["v"]) for one in conditions)


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, [("+", "-")]),
        ({"cfgzerostar_scaling": True, "guidance_rescale": 0.5}, [("+", "-")]),
        ({"perp_neg": 1.5, "guidance_rescale": 0.5}, [("+", "-", "0")]),
        ({"perp_neg": 0.0}, [("+", "0")]),
        ({"perp_neg": 1.5, **SLG}, [("+", "0"), ("-!",)]),
        ({**SLG, "slg_mode": "original"}, [("+", "-"), ("-!",)]),
        ({"cfgzerostar_init_steps": 1}, []),
        ({"cfgzerostar_init_steps": 1, "cfgzerostar_multiplier": 0.5}, [("+", "-")]),
    ],
)
def test_passes_with_equal_tweaks_are_asked_for_together_and_once(
    options: dict[str, Any], calls: list[tuple[str, ...]]
) -> None:
    network = Network()
    make_guidance(REQUEST, replace(PLAIN_GUIDANCE, **options))(step(0), network, network.section)
    assert sorted(network.calls) == sorted(calls)


def test_the_first_steps_are_multiplied_with_and_without_guidance() -> None:
    request = replace(REQUEST, asked=replace(REQUEST.asked, cfg_schedule="2-4"))
    options = replace(PLAIN_GUIDANCE, cfgzerostar_init_steps=2, cfgzerostar_multiplier=0.5)
    network = Network()

    def velocities(options: GuidanceOptions) -> list[Tensor]:
        guidance = make_guidance(request, options)
        return [guidance(step(index), network, network.section) for index in range(3)]

    first, second, third = velocities(PLAIN_GUIDANCE)
    assert all(map(torch.equal, velocities(options), (0.5 * first, 0.5 * second, third)))
    assert not torch.equal(first, second)
