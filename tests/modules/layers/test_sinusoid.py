"""Numbers as vectors: against diffusers, and what float32 angles lose."""

import math

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
