"""The passes of a step, and each formula of guidance on recorded values, against the paper or diffusers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blissful_tuner.guidance import make_guidance
from blissful_tuner.guidance_formulas import (
    BLANK,
    NEGATIVE,
    POSITIVE,
    GuidanceStage,
    NormalisedGuidance,
    cfg_zero,
    perp_neg,
)
from blissful_tuner.options import PLAIN_GUIDANCE, GuidanceOptions, NagOptions
from modules.contract.data import Conditions
from modules.contract.requests import Request
from modules.contract.rules import GuidanceRules, Projection
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


def test_zero_star_and_perpendicular_guidance_equal_the_recorded_values() -> None:
    _, tensors = read_case("guidance")
    star = combine(cfg_zero(5.0, NEGATIVE), *by_three().values())
    torch.testing.assert_close(star, tensors["zerostar_batched"], atol=1e-4, rtol=0)
    perpendicular = combine(perp_neg(5.0, 1.5, NEGATIVE), *by_three().values())
    torch.testing.assert_close(perpendicular[0], tensors["perp_neg"], atol=1e-4, rtol=0)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 1, 1, 2, 2)


class Network:
    """Answers each pass with its own numbers, and notes the calls."""

    def __init__(self) -> None:
        self.section = Section(numbers(0, 0, 0, 0), {"v": numbers(1, 2, 3, 4)}, {"v": numbers(1, 0, 1, 0)})
        self.section = replace(
            self.section, blank={"v": numbers(0, 0, 1, 1)}, away={"v": numbers(3, 3, 3, 3)}
        )
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


SHAPE = (2, 5, 3, 4)  # B L N D


def seen(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(toward: Tensor, away: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """Equations 7 to 10 of the paper, token by token, with the names of the project's page."""
    result = torch.empty_like(toward)
    for sample in range(len(toward)):
        for token in range(toward.shape[1]):
            plus, minus = toward[sample, token].flatten(), away[sample, token].flatten()
            guided = scale * plus - (scale - 1) * minus
            ratio = sum(map(abs, guided.tolist())) / sum(map(abs, plus.tolist()))
            guided = guided * min(ratio, tau) / ratio
            result[sample, token] = (alpha * guided + (1 - alpha) * plus).view(SHAPE[2:])
    return result


@pytest.mark.parametrize(
    ("scale", "tau", "alpha"), [(5, 2.5, 0.25), (11, 3.5, 0.5), (1.5, 100, 1), (4, 0.5, 1)]
)
def test_the_formula_is_that_of_the_paper(scale: float, tau: float, alpha: float) -> None:
    toward, away = seen(1), seen(2)

    steered = NormalisedGuidance(scale, tau, alpha)(toward, away)

    torch.testing.assert_close(steered, by_hand(toward, away, scale, tau, alpha), rtol=1e-5, atol=1e-5)


def test_a_token_grows_by_tau_at_most() -> None:
    toward, away = seen(1), seen(2)

    steered = NormalisedGuidance(50, 2.0, 1.0)(toward, away)

    sizes = [each.abs().sum((-2, -1)) for each in (steered, toward)]
    torch.testing.assert_close(sizes[0], 2 * sizes[1], rtol=1e-6, atol=0)


def test_without_guidance_each_step_is_one_pass_with_the_same_tweaks() -> None:
    network = Network()
    request = prepare(Request("p", 0, steps=4, guidance_scale=1.0))
    guide = make_guidance(request, replace(PLAIN_GUIDANCE, nag=NagOptions(nag_scale=5.0)))
    for index in range(3):
        guide(step(index), network, network.section)

    assert network.calls == [("+",)] * 3
    (tweaks,) = set(network.tweaks)
    assert tweaks.away is not None
    assert tweaks.away.text is network.section.away
    assert tweaks.away.steer == NormalisedGuidance(5.0, 3.5, 0.5)


RULE = Projection(after_step=-1, scale=10.0, momentum=-0.5, norm_limit=10.0)
CASES = read_case("image_guidance")[0]["hunyuan_image"]


def guide(cond: Tensor, uncond: Tensor, rule: Projection, scale: float, rescale: float = 0.0) -> list[Tensor]:
    """The guided velocities of all steps. cond, uncond: steps B C F H W."""
    request = prepare(Request("p", 0, steps=len(cond), guidance_scale=scale))
    prepared = replace(request, rules=GuidanceRules(projection=rule))
    guidance = make_guidance(prepared, replace(PLAIN_GUIDANCE, guidance_rescale=rescale))
    made = []
    for index, (positive, negative) in enumerate(zip(cond, uncond, strict=True)):
        section = Section(positive, {"v": positive}, {"v": negative})

        def predict(*conditions: Any, tweaks: Tweaks) -> tuple[Tensor, ...]:
            return tuple(one["v"] for one in conditions)

        step = Step(index, len(cond), 0.5, 500.0, torch.zeros_like(positive))
        made.append(guidance(step, predict, section))
    return made


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_guidance_of_hunyuan_image_equals_the_recorded_values(case: dict[str, Any]) -> None:
    description, tensors = read_case("image_guidance")
    rule = replace(RULE, after_step=case["apg_start_step"], rescale=case["guidance_rescale_apg"])
    cond, uncond = (tensors[name].unsqueeze(3) for name in ("cond", "uncond"))

    made = guide(cond, uncond, rule, case["guidance_scale"], case["guidance_rescale"])

    expected = tensors[case["name"]].unsqueeze(3)
    torch.testing.assert_close(torch.stack(made), expected, **description["tolerance"]["*"])


def test_projection_equals_that_of_diffusers() -> None:
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    torch.manual_seed(0)
    cond, uncond = torch.randn(2, 4, 2, 3, 1, 4, 5).mul(3).unbind(0)

    made = guide(cond, uncond, replace(RULE, scale=4.0, norm_limit=7.0, eta=0.3), 3.0)

    buffer = MomentumBuffer(-0.5)
    for ours, positive, negative in zip(made, cond, uncond, strict=True):
        # theirs guides from the positive velocity on: a scale of 4 is one of 3 there
        theirs = normalized_guidance(
            positive, negative, 4.0, buffer, 0.3, 7.0, use_original_formulation=False
        )
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_steps_are_counted_in_the_whole_schedule() -> None:
    torch.manual_seed(0)
    cond, uncond = torch.randn(2, 1, 2, 3, 1, 4, 5).unbind(0)
    prepared = replace(
        prepare(Request("p", 0, steps=4, guidance_scale=3.0)),
        rules=GuidanceRules(projection=replace(RULE, after_step=2)),
    )
    section = Section(cond[0], {"v": cond[0]}, {"v": uncond[0]})

    def velocity(first_step: int) -> Tensor:
        guidance = make_guidance(replace(prepared, first_step=first_step), PLAIN_GUIDANCE)
        step = Step(0, 4 - first_step, 0.5, 500.0, cond[0])
        return guidance(step, lambda *given, tweaks: tuple(one["v"] for one in given), section)

    assert torch.equal(velocity(0), uncond[0] + 3.0 * (cond[0] - uncond[0]))
    assert not torch.equal(velocity(3), velocity(0))
