"""Latents as colours: a linear map, the whole range over the clip, bicubic enlargement."""

import contextlib

import numpy as np
import pytest
import torch

from blissful_tuner.taehv import enlarge, project
from frame_pack.family import LATENT as FRAMEPACK
from hunyuan_model.spec import LATENT as HUNYUAN
from modules.contract.family import LatentSpec
from tests.test_waiting import META, _Copies, _Made
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


def test_the_map_is_computed_in_float32_under_autocast() -> None:
    latents = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(project(latents, TWO), project(latents.clone(), TWO))
        assert project(latents, TWO).dtype == torch.float32


def test_the_map_has_the_host_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # meta has none
    with _Copies() as copies, _Made(copies):
        project(torch.zeros(2, 1, 4, 4, device=META), TWO)
    assert copies.waiting == []


@pytest.mark.parametrize("spec", [WAN, HUNYUAN, FRAMEPACK], ids=["wan", "hunyuan", "framepack"])
def test_every_family_has_a_colour_for_each_channel(spec: LatentSpec) -> None:
    assert len(spec.preview_factors) == spec.channels
    assert all(len(row) == 3 for row in spec.preview_factors)
    assert len(spec.preview_bias) == 3


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


def test_enlarging_is_the_bicubic_of_torch() -> None:
    colours = torch.rand(3, 1, 5, 7, generator=torch.Generator().manual_seed(2))
    stretched = (colours - colours.min()) / (colours.max() - colours.min())
    expected = torch.nn.functional.interpolate(stretched[:, 0][None], scale_factor=8, mode="bicubic")[0]

    (frame,) = enlarge(colours, 8, 8)

    difference = torch.from_numpy(frame).permute(2, 0, 1) - expected.clamp(0, 1) * 255
    assert difference.abs().max() <= 0.51  # rounding


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_clip_without_colours_is_dark(value: float) -> None:
    (frame,) = enlarge(torch.full((3, 1, 2, 2), value), 8, 8)
    assert not frame.any()
