"""The Lumina-Image-2.0 transformer against recorded vectors, against diffusers, and against itself."""

import pytest
import torch

from tests.golden_cases import read_case
from tests.lumina.making import golden_model, in_diffusers, tiny_inputs, tiny_model
from tests.tiny.lumina import tiny_state

NEAR = 3e-6  # of the largest value: the same formulas in float32, summed in another order


def test_forward_equals_the_recorded_output() -> None:
    description, tensors = read_case("lumina_dit")

    direction = golden_model()(tensors["x"], tensors["t"], tensors["cap_feats"], tensors["cap_mask"])

    torch.testing.assert_close(direction, tensors["out"], **description["tolerance"]["out"])
    expected = tensors["out_qk_eps_1e-5"]
    assert (direction - expected).abs().max() <= NEAR * expected.abs().max()


@pytest.mark.parametrize("lengths", [(5, 11), (7,), (12, 12), (1, 3, 9)])
def test_forward_equals_diffusers_with_the_same_weights(lengths: tuple[int, ...]) -> None:
    inputs = tiny_inputs(lengths)

    direction = tiny_model()(**inputs)

    expected = in_diffusers(tiny_state())(*inputs.values()).sample
    assert (direction - expected).abs().max() <= NEAR * expected.abs().max()
