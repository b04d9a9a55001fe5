"""The HunyuanImage transformer against recorded vectors, against diffusers, and against itself."""

import pytest
import torch

from tests.golden_cases import read_case
from tests.hunyuan_image.making import golden_model, in_diffusers, run_there, tiny_inputs, tiny_model

NEAR = 3e-6  # of the largest value: the same formulas in float32, summed in another order


def test_forward_equals_the_recorded_output() -> None:
    case, tensors = read_case("hunyuan_image_dit")
    inputs = (tensors[name] for name in ("text", "text_mask", "byt5", "byt5_mask"))

    velocity = golden_model()(tensors["x"], tensors["t"].float(), *inputs)

    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, tensors["out"], **case["tolerance"]["out"])


def test_refined_text_order_and_rotary_angles_equal_the_recorded_ones() -> None:
    case, tensors = read_case("hunyuan_image_dit")
    model, counts = golden_model(), tensors["text_mask"].sum(1).tolist()

    text = model.txt_in(tensors["text"], tensors["t"].float(), counts, torch.float32)
    inputs = (tensors[name] for name in ("text", "text_mask", "byt5", "byt5_mask"))
    x, tokens = model.embed(tensors["x"], tensors["t"].float(), *inputs)

    glyphs = tensors["byt5_mask"].sum(1).tolist()
    for sample, count in enumerate(counts):
        torch.testing.assert_close(
            text[sample, :count], tensors["refined_text"][sample, :count], rtol=0, atol=2e-4
        )
        start = tokens.video + glyphs[sample]
        assert torch.equal(x[sample, start : start + count], text[sample, :count])
    turns = tokens.rotary.squeeze(1).repeat_interleave(2, dim=-2)
    for index, name in enumerate(("rope_cos", "rope_sin")):
        torch.testing.assert_close(turns[..., index], tensors[name], rtol=0, atol=1e-6)
    assert tokens.lengths is not None
    real = tensors["joined_mask"].sum(1)
    assert [count - tokens.video for count in tokens.lengths.counts] == real.tolist()
    assert x.shape[1] - tokens.video == real.max()  # cut to the longest


@pytest.mark.parametrize(
    ("lengths", "glyphs"), [((5, 9), (4, 0)), ((7,), (6,)), ((9, 9), (2, 2)), ((1, 3), (0, 0))]
)
def test_forward_equals_diffusers_with_the_same_weights(
    lengths: tuple[int, ...], glyphs: tuple[int, ...]
) -> None:
    inputs = tiny_inputs(lengths, glyphs)

    velocity = tiny_model()(**inputs)

    expected = run_there(in_diffusers(), inputs)
    assert (velocity - expected).abs().max() <= NEAR * expected.abs().max()
