"""Pieces of GIMM-VFI: equal to the recorded ones."""

import pytest
import torch
from torch import Tensor

from post.interpolation.layers import Correlation, grid_of, splat, warp
from post.interpolation.motion import MotionConfig, MotionField, normalised
from tests.golden_cases import make_weights, read_case

CASE, TENSORS = read_case("gimm_pieces")
MOTION = MotionConfig(
    encoder=(16, 32, 16), encoder_blocks=3, residual=(32, 64), residual_blocks=1, layers=(128,) * 4 + (2,)
)


def check(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, **CASE["tolerance"]["default"])


@pytest.fixture(scope="module")
def field() -> MotionField:
    field = MotionField(MOTION)
    field.load_state_dict(make_weights(CASE["weights_model_key"], CASE["weights_used_here"]))
    return field.requires_grad_(False)


def test_a_picture_is_warped_and_splatted_as_recorded() -> None:
    image, flow = TENSORS["warp_in"], TENSORS["warp_flow"]
    check(warp(image, flow), TENSORS["warp_out"])
    check(splat(image, flow, TENSORS["splat_metric"]), TENSORS["splat_out"])


def test_pixels_sent_to_places_that_are_not_finite_are_left_out() -> None:
    image = torch.ones(1, 1, 3, 3)
    flow = torch.zeros(1, 2, 3, 3)
    flow[0, 0, 1, 1], flow[0, 1, 0, 0] = torch.nan, torch.inf
    expected = image.clone()
    expected[0, 0, 1, 1] = expected[0, 0, 0, 0] = 0
    assert torch.equal(splat(image, flow, image), expected)


def test_the_motion_between_two_flows_is_as_recorded(field: MotionField) -> None:
    forth, back = TENSORS["flow01"], TENSORS["flow10"]
    normal, scale = normalised(forth, back)
    check(normal, TENSORS["normalised_flow"])
    check(scale[None], TENSORS["flow_scale"])
    for found, name in zip(field.splat_weights(forth, back), ("0", "1"), strict=True):
        check(found, TENSORS[f"splat_weight{name}"])
    motion = field.between(forth, back)
    for time in (0.25, 0.5):
        check(field.normal_at(motion, time), TENSORS[f"predicted_flow_normalised_t{time}"])


@pytest.mark.parametrize("keeps_volume", [True, False])
def test_features_are_compared_as_recorded(keeps_volume: bool) -> None:
    first, second = TENSORS["fmap0"], TENSORS["fmap1"]
    places = TENSORS["corr_coords"]
    forth = Correlation(first, second, keeps_volume).lookup(places)
    # the case looks back from the places mirrored at each pixel
    back = Correlation(second, first, keeps_volume).lookup(2 * grid_of(first) - places)
    check(forth[..., ::5, ::5], TENSORS["corr_lookup_every_5th"])
    check(forth[..., ::7, ::7], TENSORS["bicorr_a_every_7th"])
    check(back[..., ::7, ::7], TENSORS["bicorr_b_every_7th"])


def test_features_beyond_the_edge_compare_as_zero() -> None:
    first = torch.randn(1, 8, 9, 17)
    places = torch.full((1, 2, 9, 17), 2.25)
    places[..., :3] = torch.tensor([-1e9, 1e9, torch.nan])
    places[..., 3] = 16.5
    kept, sampled = (Correlation(first, first, keeps).lookup(places) for keeps in (True, False))
    torch.testing.assert_close(kept, sampled, atol=7e-7 * float(kept.abs().max()), rtol=0)
    assert not kept[..., :3].any()
    assert kept[..., 3:].any()
