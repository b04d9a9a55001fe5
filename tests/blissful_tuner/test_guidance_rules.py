"""What a model's guidance does beside the formula: an early end, a limit of its size."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blissful_tuner.guidance import make_guidance
from blissful_tuner.options import PLAIN_GUIDANCE
from generation.session import wanted_texts
from modules.contract.data import Conditions
from modules.contract.requests import Request
from modules.contract.rules import GuidanceRules
from modules.contract.steps import NO_TWEAKS, Section, Step, Tweaks
from tests.golden_cases import read_case
from tests.preparing import prepare

DESCRIPTION, TENSORS = read_case("image_guidance")


def guided(scale: float, rules: GuidanceRules, sigma: float = 0.9) -> tuple[Tensor, int]:
    """The velocity of a step, and how many passes it made."""
    positive, negative = TENSORS["cond"][0].unsqueeze(2), TENSORS["uncond"][0].unsqueeze(2)
    section, made = Section(positive, {"v": positive}, {"v": negative}), []

    def predict(*conditions: Conditions, tweaks: Tweaks = NO_TWEAKS) -> tuple[Tensor, ...]:
        made.extend(conditions)
        return tuple(one["v"] for one in conditions)  # type: ignore[misc]

    prepared = replace(prepare(Request("p", 0, steps=1, guidance_scale=scale)), rules=rules)
    guidance = make_guidance(prepared, PLAIN_GUIDANCE)
    velocity = guidance(Step(0, 1, sigma, 1000 * sigma, torch.zeros_like(positive)), predict, section)
    return velocity, len(made)


@pytest.mark.parametrize("case", DESCRIPTION["lumina"], ids=lambda case: case["name"])
def test_a_limited_velocity_equals_the_recorded_one(case: dict[str, float | str]) -> None:
    limit = float(case["renorm_cfg"]) or None

    velocity, _ = guided(float(case["guidance_scale"]), GuidanceRules(norm_limit=limit))

    torch.testing.assert_close(velocity.squeeze(2), TENSORS[str(case["name"])], atol=2e-4, rtol=1e-4)
    if case["limited"]:
        assert velocity.norm() <= 1.0001 * float(case["renorm_cfg"]) * TENSORS["cond"][0].norm()


@pytest.mark.parametrize(("sigma", "passes"), [(1.0, 2), (0.76, 2), (0.75, 1), (0.1, 1)])
def test_late_steps_have_no_guidance(sigma: float, passes: int) -> None:
    velocity, made = guided(3.5, GuidanceRules(below_share=0.25), sigma)
    assert made == passes
    assert torch.equal(velocity, TENSORS["cond"][0].unsqueeze(2)) is (passes == 1)


def test_a_share_of_zero_needs_no_negative_text() -> None:
    prepared = prepare(Request("p", 0, steps=3, guidance_scale=3.5))
    late = replace(prepared, rules=GuidanceRules(below_share=0.0))
    assert wanted_texts(prepared)[0].negative is not None
    assert wanted_texts(late)[0].negative is None
