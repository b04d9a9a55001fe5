"""ERNIE-Image's network equals diffusers' class; each of the nearest mistakes would show."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from ernie_image import model as network
from ernie_image.configs import DIT
from ernie_image.model import ErnieImageModel, mix_halves
from modules.layers.half_rope import rotate_halves
from modules.layers.rope import rotate
from protocols.steps import NagText, Overrides
from tests.ernie_image.making import CONFIG, LENGTHS, in_diffusers, predict_with, tiny_inputs, tiny_model
from tests.manifests import tensor_list
from tests.tiny.ernie_image import tiny_state

NEAR = 1e-5  # of the largest value: both sides sum products in another order


def error_of(velocity: Tensor, expected: Tensor) -> float:
    return float((velocity - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def predict(model: ErnieImageModel | None = None, **changes: Any) -> Tensor:
    velocity: Tensor = (model or tiny_model())(**{**tiny_inputs(), **changes})
    return velocity


@torch.no_grad()
def expected() -> Tensor:
    return predict_with(in_diffusers(tiny_state()), tiny_inputs())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [(3, 5), (6, 2), (1, 1)], ids=str)
@torch.no_grad()
def test_the_network_equals_that_of_diffusers(batch: int, size: tuple[int, int]) -> None:
    inputs = tiny_inputs(batch, *size)
    assert error_of(tiny_model()(**inputs), predict_with(in_diffusers(tiny_state()), inputs)) < NEAR


@torch.no_grad()
def test_a_sample_with_a_short_text_equals_the_same_alone() -> None:
    """Its picture stands behind its own tokens, not behind the longest text."""
    inputs = tiny_inputs()
    alone = {name: value[1:] for name, value in inputs.items()}
    alone |= {"text": alone["text"][:, : LENGTHS[1]], "text_mask": alone["text_mask"][:, : LENGTHS[1]]}

    torch.testing.assert_close(predict()[1:], tiny_model()(**alone), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_does_not_matter() -> None:
    inputs = tiny_inputs()
    filled = torch.where(inputs["text_mask"][..., None], inputs["text"], torch.tensor(9.0))
    assert torch.equal(predict(text=filled), predict())


def swap_rows(state: dict[str, Tensor], name: str, *order: int) -> None:
    for ending in ("weight", "bias"):
        rows = state[f"{name}.{ending}"].chunk(len(order))
        state[f"{name}.{ending}"] = torch.cat([rows[index] for index in order])


def exchange_gates(state: dict[str, Tensor]) -> None:
    for index in range(CONFIG.num_layers):
        start = f"layers.{index}.mlp."
        gate, up = f"{start}gate_proj.weight", f"{start}up_proj.weight"
        state[gate], state[up] = state[up], state[gate]


WEIGHTS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "shift before scale at the end": lambda state: swap_rows(state, "final_norm.linear", 1, 0),
    "scale before shift in blocks": lambda state: swap_rows(state, "adaLN_modulation.1", 1, 0, 2, 4, 3, 5),
    "gate and up exchanged": exchange_gates,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_order_of_rows_matters(name: str) -> None:
    state = tiny_state()
    WEIGHTS[name](state)
    model = tiny_model()
    model.load_state_dict(state)
    assert error_of(predict(model), expected()) > 1e-3


def true_rotation(x: Tensor, table: Tensor) -> Tensor:
    """The halves of a head, rotated by one angle each."""
    return rotate_halves(x, table[..., : x.shape[-1] // 2, :])


def rotation_of_neighbors(x: Tensor, table: Tensor) -> Tensor:
    return rotate(x, table[..., ::2, :])


def swap_waves(numbers: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    from modules.layers.rope import sinusoid

    cosines, sines = sinusoid(numbers, width, dtype).chunk(2, dim=1)
    return torch.cat([sines, cosines], dim=1)


FUNCTIONS: dict[str, tuple[str, Any]] = {
    "rotation of halves": ("mix_halves", true_rotation),
    "rotation of neighbors": ("mix_halves", rotation_of_neighbors),
    "cosine first": ("sinusoid", swap_waves),
    "time in 0..1": ("sinusoid", lambda numbers, *more: network_sinusoid(numbers / 1000, *more)),
}
network_sinusoid = network.sinusoid


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_rule_matters(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The comparison with diffusers would show each of these mistakes."""
    target, replacement = FUNCTIONS[name]
    monkeypatch.setattr(network, target, replacement)
    assert error_of(predict(), expected()) > 1e-3


@pytest.mark.parametrize("activation", [functional.silu, partial(functional.gelu, approximate="tanh")])
def test_the_gate_is_the_exact_gelu(
    monkeypatch: pytest.MonkeyPatch, activation: Callable[[Tensor], Tensor]
) -> None:
    """The GELU with tanh is near: five times what the comparison allows."""
    right = expected()
    monkeypatch.setattr(network.functional, "gelu", activation)
    assert error_of(predict(), right) > 3 * NEAR


def test_the_end_takes_the_time_without_an_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    right = expected()
    run = network.run_float32

    def activated(layer: Any, x: Tensor) -> Tensor:
        is_end = layer.weight.shape[0] == 2 * CONFIG.dim
        result: Tensor = run(layer, functional.silu(x) if is_end else x)
        return result

    monkeypatch.setattr(network, "run_float32", activated)
    assert error_of(predict(), right) > 1e-3


def test_a_picture_behind_the_padded_length_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    right = expected()
    made = ErnieImageModel._make_table

    def padded(self: ErnieImageModel, layout: Any, /, *, device: torch.device) -> Tensor:
        return made(self, layout._replace(captions=(layout.longest,) * len(layout.captions)), device=device)

    monkeypatch.setattr(ErnieImageModel, "_make_table", padded)
    assert error_of(predict()[1:], right[1:]) > 1e-3


def test_positions_change_the_lengths_of_heads() -> None:
    """They are no rotation, so no kernel of rotations may take their place."""
    model = tiny_model()
    inputs = tiny_inputs()
    tokens = model.embed(**inputs).tokens
    x = torch.randn(2, tokens.rotary.shape[-4], 1, CONFIG.head_width)
    assert (mix_halves(x, tokens.rotary).norm(dim=-1) / x.norm(dim=-1) - 1).abs().max() > 0.1


def test_angles_are_float32_in_16_bits_too() -> None:
    """In bfloat16, positions beyond 256 fall together."""
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


def test_the_modules_of_a_lora_are_all_linear_layers_of_the_blocks() -> None:
    """252 in the released model; everything that modulates stays in 16 bits in 8-bit files."""
    from torch import nn

    blocks = [name for name, module in tiny_model().layers.named_modules() if isinstance(module, nn.Linear)]
    assert len(blocks) == 7 * CONFIG.num_layers
    names = tensor_list("ernie-image-dit")
    kept = {name for name in names if any(part in name for part in DIT.fp8_exclude)}
    assert {"adaLN_modulation.1.weight", "layers.0.self_attention.norm_q.weight"} <= kept
    assert "layers.0.mlp.gate_proj.weight" not in kept
