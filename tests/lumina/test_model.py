"""The Lumina-Image-2.0 transformer against recorded vectors, against diffusers, and against itself."""

import pytest
import torch

from modules.contract.steps import Away, Tweaks
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


def test_a_second_caption_steers_what_the_image_sees_and_nothing_where_it_is_let_be() -> None:
    model, inputs, other = tiny_model(), tiny_inputs(), tiny_inputs((3,))
    text = {name: other[name][:, :3] + 1 for name in ("caption", "caption_mask")}
    plain = model(**inputs)

    kept = model(**inputs, tweaks=Tweaks(away=Away(text, lambda first, second: first)))
    swapped = model(**inputs, tweaks=Tweaks(away=Away(text, lambda first, second: second)))

    assert (kept - plain).abs().max() <= NEAR * plain.abs().max()
    # the image then sees the second caption alone, at that caption's positions
    of_second = {name: value.expand(2, *value.shape[1:]) for name, value in text.items()}
    expected = model(**{**inputs, **of_second})
    assert (swapped - expected).abs().max() <= NEAR * expected.abs().max()
    assert (plain - expected).abs().max() > 0.01 * expected.abs().max()


def test_skipped_layers_pass_their_input_through() -> None:
    model, inputs = tiny_model(), tiny_inputs()

    skipped = model(**inputs, tweaks=Tweaks(skip_blocks=frozenset({1})))

    del model.layers[1]
    assert torch.equal(skipped, model(**inputs))


def test_padding_before_real_tokens_is_refused() -> None:
    inputs = tiny_inputs()
    with pytest.raises(ValueError, match="padding before real tokens"):
        tiny_model()(**{**inputs, "caption_mask": inputs["caption_mask"].flip(1)})
