"""Latents as colours: a linear map, the whole range over the clip, bicubic enlargement."""

import numpy as np
import pytest
import torch

from blissful_tuner.taehv import enlarge, project
from frame_pack.family import LATENT as FRAMEPACK
from hunyuan_model.spec import LATENT as HUNYUAN
from modules.contract.data import LatentSpec
from wan.family import LATENT as WAN

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


def test_wan_and_hunyuan_have_the_published_maps() -> None:
    assert WAN.preview_factors[0] == (-0.1299, -0.1692, 0.2932)
    assert WAN.preview_factors[15] == (0.1984, 0.0913, 0.1861)
    assert HUNYUAN.preview_factors[12] == (-0.2315, -0.1920, -0.1355)
    assert HUNYUAN.preview_bias == FRAMEPACK.preview_bias == (0.0259, -0.0192, -0.0761)


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


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_clip_without_colours_is_dark(value: float) -> None:
    (frame,) = enlarge(torch.full((3, 1, 2, 2), value), 8, 8)
    assert not frame.any()
