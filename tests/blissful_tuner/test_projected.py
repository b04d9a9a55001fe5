"""Adaptive projected guidance against recorded values, against diffusers, and in its limits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blissful_tuner.guidance import make_guidance
from blissful_tuner.options import PLAIN_GUIDANCE
from modules.contract.requests import Request
from modules.contract.rules import GuidanceRules, Projection
from modules.contract.steps import Section, Step, Tweaks
from tests.golden_cases import read_case
from tests.preparing import prepare

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
