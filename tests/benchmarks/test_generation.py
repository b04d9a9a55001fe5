"""The benchmark of plain generation sees a host that waits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.generation import count_waits
from blissful_tuner.guidance import make_guidance
from blissful_tuner.options import PLAIN_GUIDANCE
from generation.denoise import LoopStart, denoise
from modules.contract.requests import Request
from modules.contract.rules import ONE_EXPERT
from modules.contract.steps import Section
from modules.flow.solvers import solver_for
from tests.preparing import prepare

STEPS = 3
NETWORK = torch.nn.Identity()


class Family:
    """A family whose passes send a tensor to the device, or do not."""

    def __init__(self, waits: bool) -> None:
        self.waits = waits

    def predict(self, dit: torch.nn.Module, noisy: Tensor, *_: Any) -> Tensor:
        return noisy * torch.ones(1).to(noisy.device) if self.waits else noisy


def arguments(family: Family) -> dict[str, Any]:
    noise = torch.ones(1, 2, 1, 3, 4)
    return {
        "family": family,
        "dit_at": lambda timestep: NETWORK,
        "section": Section(noise, {}),
        "start": LoopStart(noise),
        "solver": solver_for("unipc", STEPS, 3.0),
        "guidance": make_guidance(
            prepare(Request("p", 1, guidance_scale=1.0, steps=STEPS)), PLAIN_GUIDANCE, ONE_EXPERT
        ),
    }


@pytest.mark.parametrize(("waits", "expected"), [(False, 0), (True, STEPS)])
def test_every_wait_of_a_step_is_counted(waits: bool, expected: int) -> None:
    assert count_waits(denoise, arguments(Family(waits))) == expected
