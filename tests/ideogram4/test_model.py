"""Ideogram 4's network equals diffusers' class; each of the nearest mistakes would show."""

from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from ideogram4 import model as network
from ideogram4.model import Ideogram4Block, Ideogram4Model
from protocols.steps import NagText, Overrides
from tests.ideogram4.making import CONFIG, in_diffusers, predict_with, tiny_inputs, tiny_model
from tests.tiny.dit_files import frozen
from tests.tiny.ideogram4 import tiny_state

NEAR = 1e-4  # of the largest value: in float32, times of 0 to 1e4 move an angle by a thousandth
WRONG = 5e-3


def error_of(direction: Tensor, expected: Tensor) -> float:
    return float((direction - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def predict(model: Ideogram4Model | None = None, **changes: Any) -> Tensor:
    direction: Tensor = (model or tiny_model())(**{**tiny_inputs(), **changes})
    return direction


@torch.no_grad()
def expected(seed: int = 0) -> Tensor:
    return predict_with(in_diffusers(tiny_state(seed)), tiny_inputs())


@pytest.mark.parametrize("size", [(3, 5), (6, 2), (1, 1)], ids=str)
@torch.no_grad()
def test_the_network_equals_that_of_diffusers(size: tuple[int, int]) -> None:
    """Also a sample whose text is shorter than the batch's, alone."""
    inputs = tiny_inputs(2, *size)
    assert error_of(tiny_model()(**inputs), predict_with(in_diffusers(tiny_state()), inputs)) < NEAR


@torch.no_grad()
def test_padding_does_not_matter() -> None:
    inputs = tiny_inputs()
    filled = torch.where(inputs["text_mask"][..., None], inputs["text"], torch.tensor(9.0))
    torch.testing.assert_close(predict(text=filled), predict(), rtol=1e-5, atol=1e-5)


def pair() -> Ideogram4Model:
    """Both networks, with the weights of two seeds."""
    second = {f"unconditional.{name}": tensor for name, tensor in tiny_state(1).items()}
    return frozen(Ideogram4Model(CONFIG, has_second=True), tiny_state() | second)


@torch.no_grad()
def test_without_a_text_the_second_network_predicts() -> None:
    """And with one, the first; each as it does alone."""
    both, inputs = pair(), tiny_inputs()
    image = {name: inputs[name] for name in ("noisy", "times")}

    assert torch.equal(both(**inputs), tiny_model()(**inputs))
    assert torch.equal(both(**image), tiny_model(1)(**image))


@torch.no_grad()
def test_a_skipped_block_is_one_of_the_network_that_runs() -> None:
    both, inputs = pair(), tiny_inputs()
    image = {name: inputs[name] for name in ("noisy", "times")}
    skipping = Overrides(skip_blocks=frozenset({1}))

    for given, alone in ((inputs, tiny_model()), (image, tiny_model(1))):
        assert torch.equal(both(**given, overrides=skipping), alone(**given, overrides=skipping))


@torch.no_grad()
def test_a_picture_without_a_text_equals_diffusers() -> None:
    inputs = tiny_inputs()
    empty = {**inputs, "text_mask": torch.zeros_like(inputs["text_mask"])}
    alone = tiny_model()(inputs["noisy"], inputs["times"])
    assert error_of(alone, predict_with(in_diffusers(tiny_state()), empty)) < NEAR


def change_weight(name: str, change: Any) -> Ideogram4Model:
    state = tiny_state()
    state[name] = change(state[name])
    model = tiny_model()
    model.load_state_dict(state)
    return model


def test_rows_and_letters_have_their_places() -> None:
    """Text and image, and queries, keys and values, are not exchanged."""
    for name, change in (
        ("embed_image_indicator.weight", lambda rows: rows.flip(0)),
        ("layers.0.attention.qkv.weight", lambda rows: torch.cat(rows.chunk(3)[::-1])),
        ("layers.0.adaln_modulation.weight", lambda rows: torch.cat(rows.chunk(4)[::-1])),
    ):
        assert error_of(predict(change_weight(name, change)), expected()) > WRONG, name


def without_tanh(self: Ideogram4Block, time: Tensor) -> tuple[Tensor, ...]:
    scale1, gate1, scale2, gate2 = self.adaln_modulation(time).float().unsqueeze(1).chunk(4, dim=-1)
    return scale1, gate1, scale2, gate2


def cosine_first(self: Ideogram4Model, times: Tensor) -> Tensor:
    made = torch.cat
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network.torch, "cat", lambda parts, dim=0: made(parts[::-1], dim=dim))
        return TIME(self, times)


TIME = Ideogram4Model.embed_time
MISTAKES: dict[str, tuple[Any, str, Any]] = {
    "gates without tanh": (Ideogram4Block, "modulation", without_tanh),
    "cosine first": (Ideogram4Model, "embed_time", cosine_first),
    "half for half - 1": (network, "TIME_SCALE", 1e4 * 0.98),
    "picture from 0": (network, "FIRST_IMAGE_POSITION", 0),
    "no indicator": (network, "IMAGE_ROW", 0),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_rule_matters(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The comparison with diffusers would show each of these mistakes."""
    owner, attribute, replacement = MISTAKES[name]
    monkeypatch.setattr(owner, attribute, replacement)
    assert error_of(predict(), expected()) > WRONG


def test_the_last_layer_activates_the_time_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    right = expected()
    activate = functional.silu
    rows = CONFIG.time_dim
    # only what is as wide as the time and was activated before: the last layer's input
    seen: list[int] = []

    def once(x: Tensor) -> Tensor:
        if x.shape[-1] == rows:
            seen.append(1)
            return activate(x) if len(seen) == 1 else x
        return activate(x)

    monkeypatch.setattr(network.functional, "silu", once)
    assert error_of(predict(), right) > WRONG


def test_axes_in_blocks_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies of rows and columns alternate with those of the time."""
    made = Ideogram4Model._make_table

    def in_blocks(self: Ideogram4Model, layout: Any, /, *, device: torch.device) -> Tensor:
        table = made(self, layout, device=device)
        order = [*range(0, table.shape[-2], 3), *range(1, table.shape[-2], 3), *range(2, table.shape[-2], 3)]
        return table[..., order, :]

    monkeypatch.setattr(Ideogram4Model, "_make_table", in_blocks)
    assert error_of(predict(), expected()) > WRONG


def test_angles_are_float32_in_16_bits_too() -> None:
    """In bfloat16, the places of a picture would fall together."""
    model = tiny_model().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.embed(**tiny_inputs()).tokens
    assert (tokens.rotary.dtype, tokens.time.dtype) == (torch.float32, torch.float32)


@torch.no_grad()
def test_a_second_text_of_the_same_words_changes_nothing() -> None:
    inputs = tiny_inputs()
    nag = NagText({name: inputs[name] for name in ("text", "text_mask")}, lambda first, second: first)
    torch.testing.assert_close(predict(overrides=Overrides(nag=nag)), predict(), rtol=1e-5, atol=1e-5)


def test_sizes_that_do_not_fit_are_refused() -> None:
    inputs = tiny_inputs()
    with pytest.raises(ValueError, match="128 channels of one image"):
        predict(noisy=inputs["noisy"][:, :64])
    with pytest.raises(ValueError, match="a text mask of"):
        predict(text_mask=inputs["text_mask"][:, 1:])


def test_a_text_in_8_bits_is_read() -> None:
    """As caches may have it; rounded, so less exactly."""
    rounded = tiny_inputs()["text"].to(torch.float8_e4m3fn)
    assert 0 < error_of(predict(text=rounded), expected()) < 0.2
