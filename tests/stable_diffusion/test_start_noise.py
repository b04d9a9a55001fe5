"""Pyramid noise and noise offset."""

import pytest
import torch
from torch import Tensor

from stable_diffusion.sampling_options import StartNoiseOptions
from stable_diffusion.starting import add_offset, add_pyramid, vary_noise


def draw(seed: int) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 24, 16, generator=generator), generator


def test_nothing_is_drawn_by_what_is_not_asked_for() -> None:
    pyramid = StartNoiseOptions(pyramid_noise_prob=0.0, pyramid_noise_discount_range=(0.1, 0.2))
    offset = StartNoiseOptions(noise_offset_prob=0.0, noise_offset_range=(0.1, 0.2))
    for options in (StartNoiseOptions(), pyramid, offset):
        noise, generator = draw(1)
        state = generator.get_state()
        assert vary_noise(noise, options, generator) is noise
        assert torch.equal(generator.get_state(), state)


def test_an_offset_is_one_number_for_each_channel() -> None:
    noise, generator = draw(1)
    options = StartNoiseOptions(noise_offset_prob=1.0, noise_offset_range=(0.5, 0.5))
    shift = vary_noise(noise, options, generator) - noise
    torch.testing.assert_close(shift, shift[:, :1, :1].expand_as(shift))
    assert len(set(shift[:, 0, 0].tolist())) == 4
    _, generator = draw(1)
    torch.testing.assert_close(add_offset(noise, 0.0, generator), noise)


def test_offsets_have_the_size_that_is_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    shifts = torch.stack([add_offset(torch.zeros(4, 1, 1), 0.3, generator) for _ in range(1000)])
    assert shifts.std().item() == pytest.approx(0.3, rel=0.05)


def test_pyramid_noise_is_coarser_and_as_strong() -> None:
    def roughness(noise: Tensor) -> float:
        return float((noise[:, 1:] - noise[:, :-1]).square().mean() / noise.var())

    options = StartNoiseOptions(pyramid_noise_prob=1.0, pyramid_noise_discount_range=(0.8, 0.9))
    for seed in range(5):
        noise, generator = draw(seed)
        pyramid = vary_noise(noise, options, generator)
        assert pyramid.shape == noise.shape
        assert pyramid.std().item() == pytest.approx(1, abs=1e-4)
        assert roughness(pyramid) < 0.8 * roughness(noise)
    torch.testing.assert_close(add_pyramid(noise, 0.0, generator), noise / noise.std())


def test_a_probability_is_the_share_of_pictures() -> None:
    options = StartNoiseOptions(noise_offset_prob=0.25, noise_offset_range=(1.0, 2.0))
    changed = [
        vary_noise(noise, options, generator) is not noise for noise, generator in map(draw, range(400))
    ]
    assert sum(changed) == pytest.approx(100, abs=30)
    for seed in (1, 2):
        once, again = (vary_noise(*(draw(seed)[0], options, draw(seed)[1])) for _ in range(2))
        assert torch.equal(once, again)
