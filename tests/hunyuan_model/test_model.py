"""The HunyuanVideo transformer against recorded vectors, against diffusers, and against itself."""

from dataclasses import replace

import pytest
import torch

from hunyuan_model.model import HunyuanVideoModel
from modules.contract.steps import Tweaks
from tests.golden_cases import FLOAT32_POWERS
from tests.hunyuan_model.making import golden_model, in_diffusers, run_there, tiny_inputs, tiny_model
from tests.tiny.hunyuan_dit import CONFIGS

CASES = ("hv_dit_guidance", "hv_dit_noguidance", "skyreels_i2v_dit")
NEAR = 2e-6  # of the largest value: the same formulas in float32, summed in another order


@pytest.mark.parametrize("case", CASES)
def test_forward_equals_the_recorded_output(case: str) -> None:
    model, inputs, expected = golden_model(case)

    velocity = model(**inputs)

    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, expected["out"], **expected["tolerance"]["out"])
    assert (velocity - expected["out"]).abs().max() <= FLOAT32_POWERS * expected["out"].abs().max()


def test_refined_text_and_rotary_angles_equal_the_recorded_ones() -> None:
    model, inputs, expected = golden_model("hv_dit_guidance")
    lengths = inputs["llama_mask"].sum(1).tolist()

    text = model.txt_in(inputs["llama"], inputs["timesteps"], lengths, torch.float32)
    _, tokens = model.embed(**inputs)

    for sample, length in enumerate(lengths):
        ours, theirs = text[sample, :length], expected["refined_text"][sample, :length]
        torch.testing.assert_close(ours, theirs, rtol=0, **expected["tolerance"]["refined_text"])
    turns = tokens.rotary.squeeze(1).repeat_interleave(2, dim=-2)
    torch.testing.assert_close(
        turns[..., 0], expected["freqs_cos"], rtol=0, **expected["tolerance"]["freqs_*"]
    )
    torch.testing.assert_close(
        turns[..., 1], expected["freqs_sin"], rtol=0, **expected["tolerance"]["freqs_*"]
    )


@pytest.mark.parametrize("lengths", [(5, 11), (1, 12), (7,), (12, 12), (3, 3, 9)])
@pytest.mark.parametrize("kind", CONFIGS)
def test_forward_equals_diffusers_with_the_same_weights(kind: str, lengths: tuple[int, ...]) -> None:
    inputs = tiny_inputs(kind, lengths)

    velocity = tiny_model(kind)(**inputs)

    expected = run_there(in_diffusers(kind), inputs)
    assert (velocity - expected).abs().max() <= NEAR * expected.abs().max()


def test_guidance_changes_the_output_of_a_distilled_model_alone() -> None:
    for kind, differs in (("t2v", True), ("undistilled", False)):
        model, inputs = tiny_model(kind), tiny_inputs(kind)
        other = model(**inputs | {"guidance": torch.tensor([2000.0, 3000.0])})
        assert torch.equal(model(**inputs), other) is not differs

    assert torch.equal(model(**inputs | {"guidance": None}), other)


def test_without_embedded_guidance_a_distilled_model_is_one_that_has_none() -> None:
    distilled, inputs = tiny_model("t2v"), tiny_inputs("t2v")
    plain = HunyuanVideoModel(replace(CONFIGS["t2v"], has_guidance=False))
    plain.load_state_dict(
        {name: value for name, value in distilled.state_dict().items() if not name.startswith("guidance_in.")}
    )

    without = distilled(**inputs, tweaks=Tweaks(embedded_guidance=False))

    assert torch.equal(without, plain(**inputs))
    assert not torch.equal(without, distilled(**inputs))


def test_the_mask_may_be_of_truth_values() -> None:
    model, inputs = tiny_model("t2v"), tiny_inputs("t2v")

    assert torch.equal(model(**inputs), model(**inputs | {"llama_mask": inputs["llama_mask"].bool()}))


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_the_embedding_stays_float32_in_bfloat16_and_tokens_do_not(how: str) -> None:
    model, inputs = tiny_model("t2v"), tiny_inputs("t2v")
    if how == "weights":
        model = model.to(torch.bfloat16)

    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        x, tokens = model.embed(**inputs)
        double, single = model.double_blocks[0](x, tokens), model.single_blocks[0](x, tokens)

    assert {x.dtype, double.dtype, single.dtype, tokens.dtype} == {torch.bfloat16}
    assert tokens.vector.dtype == torch.float32
