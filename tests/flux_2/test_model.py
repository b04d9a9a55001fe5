"""The FLUX.2 transformer against diffusers' in float32, with references of any size."""

import pytest
import torch

from protocols.steps import Overrides
from tests.flux_2.making import in_diffusers, predict_with, tiny_inputs, tiny_model
from tests.parity.running import assert_equal
from tests.tiny.flux_2 import CONFIG, tiny_state


@pytest.mark.parametrize("kind", ["klein", "dev"])
@pytest.mark.parametrize("sizes", [[], [(2, 6)], [(4, 3), (1, 2), (3, 3)]], ids=str)
@torch.no_grad()
def test_velocities_equal_those_of_diffusers(kind: str, sizes: list[tuple[int, int]]) -> None:
    given, generator = tiny_inputs(kind), torch.Generator().manual_seed(3)
    references = [torch.randn(2, CONFIG.channels, 1, *size, generator=generator) for size in sizes]

    ours = tiny_model(kind)(**given, references=references)

    assert_equal(ours, predict_with(in_diffusers(tiny_state(kind)), given, references), "velocity", 1e-5)
    if references:
        assert (ours - tiny_model(kind)(**given)).abs().max() > 0.01 * ours.abs().max()


@torch.no_grad()
def test_guidance_that_is_left_out_is_as_in_diffusers() -> None:
    given = {name: tensor for name, tensor in tiny_inputs("dev").items() if name != "guidance"}
    told, model = tiny_inputs("dev"), tiny_model("dev")

    expected = predict_with(in_diffusers(tiny_state("dev")), given)

    assert_equal(model(**given), expected, "without", 1e-5)
    assert torch.equal(model(**told, overrides=Overrides(embedded_guidance=False)), model(**given))
    assert not torch.allclose(model(**told), model(**given), rtol=1e-2)


def test_sizes_that_do_not_fit_are_refused() -> None:
    given = tiny_inputs()
    with pytest.raises(ValueError, match=r"latents of \(127, 1\): 128 channels, 1 frame"):
        tiny_model()(**{**given, "noisy": given["noisy"][:, 1:]})
