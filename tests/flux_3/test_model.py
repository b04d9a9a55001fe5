"""FLUX 3's network gives what diffusers' gives with the same weights: base, distilled, with references."""

from dataclasses import replace

import pytest
import torch

from flux_3.model import Flux3Model
from tests.flux_3.making import in_diffusers, predict_with, tiny_inputs, tiny_model
from tests.tiny.flux_3 import CONFIG, tiny_state

# of the largest value: both sides sum products in another order. The nearest mistakes, such as positions of
# rows that are not halved, are above 1e-2 (`test_each_rule_matters`)
NEAR = 1e-5


def draw_references() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, CONFIG.channels, 1, *size, generator=generator) for size in ((2, 4), (3, 3))]


@pytest.mark.parametrize("is_flow_map", [False, True], ids=["base", "distilled"])
@pytest.mark.parametrize("has_references", [False, True], ids=["text", "references"])
@torch.no_grad()
def test_the_network_equals_that_of_diffusers(is_flow_map: bool, has_references: bool) -> None:
    inputs = tiny_inputs(is_flow_map=is_flow_map)
    references = draw_references() if has_references else []

    velocity = tiny_model(is_flow_map=is_flow_map)(**inputs, references=references)

    expected = predict_with(in_diffusers(tiny_state(is_flow_map=is_flow_map)), inputs, references)
    assert (velocity - expected).abs().max() < NEAR * expected.abs().max()


@torch.no_grad()
def test_texts_of_two_lengths_in_a_batch_equal_each_by_itself() -> None:
    """What fills up the shorter text is no padding of the model's, which it sees."""
    inputs = tiny_inputs()
    inputs["text_mask"][1, 6:] = False
    references = draw_references()

    together = tiny_model()(**inputs, references=references)

    short = {name: value[1:] for name, value in inputs.items()}
    short |= {"text": short["text"][:, :6], "text_mask": short["text_mask"][:, :6]}
    alone = tiny_model()(**short, references=[one[1:] for one in references])
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_each_rule_matters() -> None:
    """The comparison with diffusers would show each of these mistakes."""
    inputs = tiny_inputs(is_flow_map=True)
    references = draw_references()
    model = tiny_model(is_flow_map=True)
    right = model(**inputs, references=references)
    scale = right.abs().max()

    def error(**changes: object) -> float:
        return float((model(**{**inputs, "references": references, **changes}) - right).abs().max() / scale)

    padded = torch.cat([inputs["text"], torch.zeros_like(inputs["text"])], dim=1)
    mask = torch.ones(padded.shape[:2], dtype=torch.bool)
    assert error(next_timesteps=inputs["timesteps"]) > 1e-2
    assert error(references=references[::-1]) > 1e-2  # their places on the last axis
    assert error(text=padded, text_mask=mask) > 1e-2
    swapped = model.final_layer["image"].adaLN_modulation[1].weight
    swapped.copy_(torch.cat(swapped.chunk(2)[::-1]))
    assert error() > 1e-2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"noisy": torch.zeros(2, 64, 1, 3, 5)}, "128 channels"),
        ({"text_mask": torch.ones(2, 3)}, "text mask"),
        ({"next_timesteps": torch.zeros(2)}, "times at which steps end"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_model()(**{**tiny_inputs(), **change})


def test_a_released_model_has_5_538_458_368_weights() -> None:
    released = replace(
        CONFIG,
        dim=3072,
        ffn_dim=9216,
        num_heads=24,
        mode_blocks=5,
        joint_blocks=28,
        text_dim=20480,
        freq_dim=256,
    )
    with torch.device("meta"):
        base, distilled = Flux3Model(released), Flux3Model(replace(released, is_flow_map=True))
    count = sum(weight.numel() for weight in base.parameters())
    assert count == 5_538_458_368
    assert sum(weight.numel() for weight in distilled.parameters()) - count == 3072 * (256 + 3072)
