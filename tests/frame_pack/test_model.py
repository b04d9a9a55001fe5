"""The FramePack transformer against recorded vectors, against diffusers, and against itself."""

from typing import Any

import pytest
import torch
from torch import Tensor

from frame_pack.model import FramePackModel
from hunyuan_model.blocks import HunyuanTokens
from tests.frame_pack.making import CLEAN, golden_model, in_diffusers, run_there, tiny_inputs, tiny_model
from tests.golden_cases import FLOAT32_POWERS

NEAR = 2e-6  # of the largest value: the same formulas in float32, summed in another order


def embedded(model: FramePackModel, inputs: dict[str, Any]) -> tuple[Tensor, HunyuanTokens]:
    """What the model hands its first block."""
    found: list[tuple[Tensor, HunyuanTokens]] = []
    hook = model.transformer_blocks[0].register_forward_pre_hook(lambda _, given: found.append(given))
    model(**inputs)
    hook.remove()
    return found[0]


def without(inputs: dict[str, Any], *kinds: str) -> dict[str, Any]:
    left_out = {name for kind in kinds for name in (kind, CLEAN[kind][1])}
    return {name: value for name, value in inputs.items() if name not in left_out}


@pytest.mark.parametrize(
    ("stored", "left_out", "scale"),
    [
        ("out", (), 1.0),
        ("out_only_1x_clean", ("clean_latents_2x", "clean_latents_4x"), 1.0),
        ("out_rope_scaled", (), 0.5),
    ],
)
def test_forward_equals_the_recorded_output(stored: str, left_out: tuple[str, ...], scale: float) -> None:
    model, inputs, expected = golden_model()

    velocity = model(**without(inputs, *left_out), position_scale=scale)

    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, expected[stored], **expected["tolerance"]["out*"])
    assert (velocity - expected[stored]).abs().max() <= FLOAT32_POWERS * expected[stored].abs().max()


def test_packed_latents_and_rotary_angles_equal_the_recorded_ones() -> None:
    model, inputs, expected = golden_model()

    x, tokens = embedded(model, inputs)

    torch.testing.assert_close(
        x[:, : tokens.video], expected["packed_tokens"], rtol=0, **expected["tolerance"]["packed_tokens"]
    )
    cosines, sines = expected["rope_freqs"][0].chunk(2, dim=-1)
    turns = tokens.rotary.squeeze(1).repeat_interleave(2, dim=-2)
    torch.testing.assert_close(turns[..., 0], cosines, rtol=0, **expected["tolerance"]["rope_freqs"])
    torch.testing.assert_close(turns[..., 1], sines, rtol=0, **expected["tolerance"]["rope_freqs"])


@pytest.mark.parametrize("size", [(6, 10), (8, 8), (2, 2)])
@pytest.mark.parametrize("lengths", [(5, 11), (7,), (12, 12), (3, 1, 9)])
def test_forward_equals_diffusers_with_the_same_weights(
    lengths: tuple[int, ...], size: tuple[int, int]
) -> None:
    inputs = tiny_inputs(lengths, size=size)

    velocity = tiny_model()(**inputs)

    with torch.no_grad():
        expected = run_there(in_diffusers(), inputs)
    assert (velocity - expected).abs().max() <= NEAR * expected.abs().max()


def test_samples_of_a_batch_may_stand_at_different_places() -> None:
    model, inputs = tiny_model(), tiny_inputs((5, 11))
    for name, value in inputs.items():
        if name.endswith("indices"):
            inputs[name] = torch.stack([value[0], value[0] + torch.arange(value.shape[1]) + 1])

    _, tokens = embedded(model, inputs)
    together = model(**inputs)

    assert tokens.rotary.ndim == 5
    for sample in range(2):
        alone = {name: value[sample : sample + 1] for name, value in inputs.items()}
        assert (model(**alone) - together[sample]).abs().max() <= NEAR * together.abs().max()
    assert not torch.allclose(model(**tiny_inputs((5, 11)))[1], together[1])
