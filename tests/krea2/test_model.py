"""The Krea 2 transformer against diffusers' in float32."""

import pytest
import torch

from krea2.configs import STATES
from modules.layers.norms import CentredNorm, rms_norm
from tests.krea2.making import in_diffusers, predict_with, tiny_inputs, tiny_model
from tests.parity.running import assert_equal
from tests.qwen_image.making import pack
from tests.tiny.krea2 import tiny_state


@pytest.mark.parametrize("batch", [1, 2], ids=["no padding", "padded"])
@torch.no_grad()
def test_velocities_equal_those_of_diffusers(batch: int) -> None:
    given = tiny_inputs(batch)

    ours = tiny_model()(**given)

    assert_equal(pack(ours), predict_with(in_diffusers(tiny_state()), given), "velocity", 1e-5)


def test_states_are_those_that_diffusers_reads() -> None:
    assert STATES == (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)


@torch.no_grad()
def test_the_scale_of_a_norm_is_not_cut_in_16_bits() -> None:
    """1 + 2^-8 is 1 in bfloat16; 1.75 of it is not 1.75."""
    norm = CentredNorm(4, 0.0).bfloat16()
    norm.scale.fill_(2**-8)
    x = torch.tensor([1.75, (4 - 1.75**2) ** 0.5, 0, 0]).bfloat16()
    expected = x.float() * (1 + 2**-8) / x.float().square().mean().sqrt()
    assert torch.equal(norm(x), expected.bfloat16())
    assert not torch.equal(norm(x), rms_norm(x, 1 + norm.scale, 0.0))


def test_sizes_that_do_not_fit_are_refused() -> None:
    given = tiny_inputs()
    with pytest.raises(ValueError, match="even sides"):
        tiny_model()(**{**given, "noisy": given["noisy"][..., :-1]})
    with pytest.raises(ValueError, match="a text mask of"):
        tiny_model()(**{**given, "text_mask": given["text_mask"][:, :-1]})
