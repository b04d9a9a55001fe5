"""Fibo 2.0's network equals diffusers' class; each of the nearest mistakes would show."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_bria_fibo2 import compute_gist_count
from torch import Tensor

from fibo_2 import model as network
from fibo_2.configs import PLACES, STATES, Fibo2Config
from fibo_2.model import Fibo2Model
from protocols.steps import NagText, Overrides
from tests.fibo_2.making import (
    CONFIG,
    LENGTHS,
    draw_references,
    predict_there,
    tiny_inputs,
    tiny_model,
)

NEAR = 1e-5  # of the largest value: both sides sum products in another order


def error_of(velocity: Tensor, expected: Tensor) -> float:
    return float((velocity - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def predict(
    references: bool = False, batch: int = 2, model: Fibo2Model | None = None, **changes: Any
) -> Tensor:
    inputs = {**tiny_inputs(batch), **changes}
    velocity: Tensor = (model or tiny_model())(**inputs, references=draw_references(batch) * references)
    return velocity


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("references", [False, True], ids=["text", "edit"])
def test_the_network_equals_that_of_diffusers(references: bool, batch: int) -> None:
    expected = predict_there(tiny_inputs(batch), draw_references(batch) * references)
    assert error_of(predict(references, batch), expected) < NEAR


def test_gist_tokens_are_as_many_as_released() -> None:
    config = replace(CONFIG, max_gist=512)
    lengths = [1, 255, 256, 257, 704, 705, 1152, 1153, 1600, 1601, 2048, 4096]
    expected = compute_gist_count(lengths, 256, 512, 64, 256, 2048)
    assert [config.count_gist(length) for length in lengths] == expected
    assert (config.count_gist(256), config.count_gist(257)) == (256, 320)


@torch.no_grad()
def test_a_sample_with_a_short_text_equals_the_same_alone() -> None:
    inputs = tiny_inputs()
    alone = {name: value[1:] for name, value in inputs.items()}
    alone |= {"text": alone["text"][:, : LENGTHS[1]], "text_mask": alone["text_mask"][:, : LENGTHS[1]]}
    together = tiny_model()(**inputs)
    torch.testing.assert_close(together[1:], tiny_model()(**alone), rtol=1e-4, atol=1e-5)


def test_each_rule_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with diffusers would show each of these mistakes."""
    expected = predict(references=True)
    errors = {}

    def changed(name: str, model: Fibo2Model) -> None:
        errors[name] = error_of(predict(references=True, model=model), expected)

    for name, change in {
        "time reversed": lambda model, times: Fibo2Model.embed_times(model, 1000 - times),
        "one time for all": lambda model, times: Fibo2Model.embed_times(model, times)[:, :1].expand(
            -1, 2, -1
        ),
    }.items():
        model = tiny_model()
        monkeypatch.setattr(
            model, "embed_times", lambda times, model=model, change=change: change(model, times)
        )
        changed(name, model)
    for name, config in {
        "one plane off": replace(CONFIG, rope_theta=250.0),
        "all gist tokens": replace(CONFIG, max_gist=24),
    }.items():
        model = tiny_model()
        model.config = config
        changed(name, model) if name != "all gist tokens" else None
    model = tiny_model()
    model.layers[2].bundle = 1
    changed("the first bundle for all", model)
    model = tiny_model()
    model.layers[0].cross_attn_gate.data *= 0.9
    changed("another gate", model)
    monkeypatch.setattr(network, "PLACES", tuple(places[::-1] for places in PLACES))
    changed("bundles in another order", tiny_model())
    assert {name: error for name, error in errors.items() if error < 100 * NEAR} == {}


@torch.no_grad()
def test_a_second_text_that_equals_the_first_changes_nothing() -> None:
    """The picture reads both, gist tokens the text that they were made of."""
    inputs = tiny_inputs(1)
    second = {"text": inputs["text"], "text_mask": inputs["text_mask"]}
    overrides = Overrides(nag=NagText(second, lambda first, other: 2 * first - other))
    torch.testing.assert_close(
        tiny_model()(**inputs, overrides=overrides), tiny_model()(**inputs), rtol=1e-4, atol=1e-5
    )
    other = {**second, "text": -second["text"]}
    steered = tiny_model()(
        **inputs, overrides=replace(overrides, nag=NagText(other, overrides.nag.combine_attention))
    )
    assert error_of(steered, tiny_model()(**inputs)) > 1e-3


def test_the_released_sizes_are_those_of_the_network() -> None:
    config = Fibo2Config(
        **{"dim": 3584, "ffn_dim": 9536, "num_heads": 28, "num_kv_heads": 28, "num_layers": 44},
        **{"noise_refiner_layers": 2, "context_refiner_layers": 0, "in_dim": 128, "text_dim": 7680},
        time_dim=256,
    )
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in Fibo2Model(config).parameters())
    assert parameters == 8_127_342_213
    assert (len(STATES), STATES[0], STATES[-1]) == (15, 5, 35)
