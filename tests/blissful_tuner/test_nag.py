"""Normalised attention guidance: its formula against the paper's, and which passes have it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blissful_tuner.guidance import make_guidance
from blissful_tuner.guidance_formulas import NormalisedGuidance
from blissful_tuner.options import PLAIN_GUIDANCE, NagOptions
from modules.contract.data import Conditions
from modules.contract.requests import Request
from modules.contract.steps import NO_TWEAKS, Section, Step, Tweaks
from tests.preparing import prepare

SHAPE = (2, 5, 3, 4)  # B L N D
ON = NagOptions(nag_scale=5.0)


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


class Calls:
    """Notes which conditions the network is called with, and with which tweaks."""

    def __init__(self) -> None:
        ones = torch.ones(1, 1, 1, 2, 2)
        self.section = Section(ones, {"v": ones}, {"v": 2 * ones}, away={"v": 3 * ones})
        self.made: list[tuple[Conditions, Tweaks]] = []

    def __call__(self, *conditions: Conditions, tweaks: Tweaks = NO_TWEAKS) -> tuple[Tensor, ...]:
        self.made += [(one, tweaks) for one in conditions]
        return tuple(value for one in conditions if isinstance(value := one["v"], Tensor))


def calls_of(nag: NagOptions, guidance_scale: float) -> Calls:
    calls, request = Calls(), prepare(Request("p", 0, steps=3, guidance_scale=guidance_scale))
    guide = make_guidance(request, replace(PLAIN_GUIDANCE, nag=nag))
    for index in range(3):
        guide(Step(index, 3, 0.5, 500.0, torch.zeros(1, 1, 1, 2, 2)), calls, calls.section)
    return calls


def test_without_guidance_each_step_is_one_pass_with_the_same_tweaks() -> None:
    calls = calls_of(ON, 1.0)

    assert [one is calls.section.positive for one, _ in calls.made] == [True] * 3
    (tweaks,) = {tweaks for _, tweaks in calls.made}
    assert tweaks.away is not None
    assert tweaks.away.text is calls.section.away
    assert tweaks.away.steer == NormalisedGuidance(5.0, 3.5, 0.5)
