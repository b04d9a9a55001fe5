"""From which step a video is denoised, and with what it begins."""

from pathlib import Path

import pytest
import torch

from blissful_tuner.video_to_video import noisy_source
from modules.contract.generation import Request
from modules.flow.schedule import make_schedule
from tests.preparing import prepare


@pytest.mark.parametrize(
    ("steps", "strength", "made"), [(50, 0.8, 40), (10, 0.55, 5), (10, 0.0, 1), (10, 1.0, 10), (1, 0.5, 1)]
)
def test_the_last_steps_are_made(steps: int, strength: float, made: int) -> None:
    prepared = prepare(Request("p", 1, steps=steps, video_path=Path("x.mp4"), strength=strength))
    assert (prepared.num_steps, prepared.first_step) == (made, steps - made)


def test_from_noise_all_steps_are_made() -> None:
    assert prepare(Request("p", 1, steps=10, strength=0.3)).num_steps == 10


def test_it_begins_with_the_mixture_of_the_first_step() -> None:
    schedule = make_schedule("euler", 5, 14.5)  # sigmas 1, .98305, .95604, .90625, .78378, 0
    source, noise = torch.full((1, 2, 1, 2, 2), 10.0), torch.ones(1, 2, 1, 2, 2)
    assert torch.allclose(
        noisy_source(source, noise, schedule, 3), torch.tensor(0.90625 + 10 * (1 - 0.90625))
    )
    assert torch.equal(noisy_source(source, noise, schedule, 0), noise)
