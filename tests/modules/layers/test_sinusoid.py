"""Numbers as vectors: against diffusers, and what float32 angles lose."""

import math

import pytest
import torch
from diffusers.models.embeddings import Timesteps

from modules.layers.rope import sinusoid

NUMBERS = torch.tensor([0.0, 1.0, 37.5, 1000.0, 6000.0])


def test_float32_angles_are_those_of_diffusers() -> None:
    theirs = Timesteps(num_channels=256, flip_sin_to_cos=True, downscale_freq_shift=0)(NUMBERS)

    torch.testing.assert_close(sinusoid(NUMBERS, 256, torch.float32), theirs, rtol=0, atol=1e-6)


def test_float32_frequencies_are_the_same_on_every_processor() -> None:
    exponents = (-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128).tolist()
    angles = torch.outer(NUMBERS, torch.tensor([math.exp(each) for each in exponents]))

    assert torch.equal(sinusoid(NUMBERS, 256, torch.float32), torch.cat([angles.cos(), angles.sin()], dim=1))


@pytest.mark.parametrize("width", [2, 32, 256])
def test_cosines_stand_before_sines_and_frequencies_fall(width: int) -> None:
    vectors = sinusoid(NUMBERS, width).double()

    half = width // 2
    for index in range(half):
        angles = NUMBERS.double() * 10000 ** (-index / half)
        torch.testing.assert_close(vectors[:, index], angles.cos(), rtol=0, atol=1e-7)
        torch.testing.assert_close(vectors[:, half + index], angles.sin(), rtol=0, atol=1e-7)


def test_float64_frequencies_are_powers_to_the_last_bit() -> None:
    numbers = torch.linspace(0, 1000, 16001)
    angles = torch.outer(numbers.double(), 10000.0 ** -(torch.arange(128, dtype=torch.float64) / 128))

    assert torch.equal(sinusoid(numbers, 256), torch.cat([angles.cos(), angles.sin()], dim=1).float())


def test_large_numbers_are_rounded_in_float32() -> None:
    lost = (sinusoid(NUMBERS, 256, torch.float32) - sinusoid(NUMBERS, 256)).abs().amax(dim=1)

    assert lost[1] < 1e-6
    assert 1e-5 < lost[4] < 1e-2
