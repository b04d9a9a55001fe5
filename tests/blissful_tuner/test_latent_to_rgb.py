"""Latents as colours: a linear map, the whole range over the clip, bicubic enlargement."""

import numpy as np
import torch

from blissful_tuner.taehv import enlarge, project
from modules.contract.data import LatentSpec

TWO = LatentSpec(
    channels=2,
    stride=(4, 8, 8),
    pixel_step=16,
    frame_step=4,
    preview_factors=((1.0, 0.0, -1.0), (0.5, 2.0, 0.0)),
    preview_bias=(0.25, 0.0, 1.0),
)


def test_each_place_is_mapped_to_a_colour_of_its_own() -> None:
    latents = torch.tensor([[[[3.0, -1.0]]], [[[2.0, 4.0]]]])  # 2 1 1 2

    colours = project(latents, TWO)

    expected = torch.tensor([[[[4.25, 1.25]]], [[[4.0, 8.0]]], [[[-2.0, 2.0]]]])
    torch.testing.assert_close(colours, expected, rtol=0, atol=1e-6)


def test_the_whole_range_is_used_once_over_the_clip_not_in_each_frame() -> None:
    colours = torch.zeros(3, 2, 4, 4)
    colours[:, 0, :2] = -3.0
    colours[:, 1, 2:] = 5.0

    dark, light = enlarge(colours, 8, 8)

    assert dark.shape == light.shape == (32, 32, 3)
    assert dark.dtype == np.uint8
    assert (dark.min(), light.max()) == (0, 255)
    assert 90 <= dark.max() <= 110  # zero is 3/8 of the range; bicubic goes a little beyond
    assert 70 <= light.min() <= 96
