"""MOSS-Image's network gives the recorded velocities; each of the nearest mistakes would show."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moss_image import model as network
from moss_image.configs import AXES, DIT
from moss_image.model import MossImageModel
from protocols.steps import Overrides, StepPosition
from tests.moss_image.making import (
    CONFIG,
    GOLDEN,
    LENGTHS,
    draw_references,
    tiny_inputs,
    tiny_model,
    tiny_weights,
)
from tests.moss_image.plain import PlainMossImage

# of the largest value: both sides sum products in another order. The nearest mistakes are above 1e-3
# (`test_each_rule_matters`)
NEAR = 1e-5


def recorded(name: str) -> Tensor:
    return torch.tensor(GOLDEN[name]).unflatten(1, (CONFIG.channels, 1, 3, 5))


def error_of(velocity: Tensor, name: str) -> float:
    expected = recorded(name)
    return float((velocity - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def predict(model: nn.Module, has_references: bool = False, **changes: Any) -> Tensor:
    inputs = {**tiny_inputs(), **changes}
    if has_references:
        inputs.setdefault("references", draw_references())
    velocity: Tensor = model(**inputs)
    return velocity


SKIPS = Overrides(skip_blocks=frozenset({1}))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("plain", {}),
        ("skip 1", {"overrides": SKIPS}),
        ("references", {"has_references": True}),
        ("references, skip 1", {"has_references": True, "overrides": SKIPS}),
        ("references, joint", {"has_references": True, "isolated": False}),
    ],
)
def test_the_network_equals_the_other_implementation(name: str, changes: dict[str, Any]) -> None:
    assert error_of(predict(tiny_model(), **changes), name) < NEAR


@pytest.mark.parametrize("name", ["plain", "references", "references, joint"])
@torch.no_grad()
def test_the_network_that_trainings_are_compared_with_equals_the_recorded_numbers(name: str) -> None:
    inputs, there = tiny_inputs(), PlainMossImage(tiny_weights())
    references = [] if name == "plain" else draw_references()
    found = []
    for sample, length in enumerate(LENGTHS):
        own = [latents[sample, :, 0] for latents in references]
        text, time = inputs["text"][sample, :length], inputs["timesteps"][sample]
        found.append(there(inputs["noisy"][sample, :, 0], time, text, own, joint="joint" in name))
    assert error_of(torch.stack(found)[:, :, None], name) < NEAR


def test_references_that_are_remembered_give_the_same_in_each_pass() -> None:
    """Each pass has a memory of its own: its blocks, and the positions that its text gives."""
    model = tiny_model()
    memory: dict[Any, Any] = {}
    for which, name in (("positive", "references"), ("negative", "references, skip 1")) * 2:
        skips = SKIPS.skip_blocks if which == "negative" else frozenset()
        overrides = Overrides(
            skip_blocks=skips, section_cache=memory, step_position=StepPosition(0, 2, 640.0, 0.0, which)
        )
        assert error_of(predict(model, has_references=True, overrides=overrides), name) < NEAR

    assert set(memory) == {"positive", "negative"}
    kept = memory["positive"]
    changed = [2 * latents for latents in draw_references()]
    overrides = Overrides(section_cache=memory, step_position=StepPosition(1, 2, 640.0, 0.0, "positive"))
    assert (
        error_of(predict(model, references=changed, overrides=overrides), "references") < NEAR
    )  # not read again
    assert memory["positive"] is kept


@torch.no_grad()
def test_a_sample_with_a_short_text_equals_the_same_alone() -> None:
    """Its clock is the number of its own tokens, not that of the longest text."""
    inputs = tiny_inputs()
    alone = {name: value[1:] for name, value in inputs.items()}
    alone |= {"text": alone["text"][:, :4], "text_mask": alone["text_mask"][:, :4]}

    together = tiny_model()(**inputs)

    torch.testing.assert_close(together[1:], tiny_model()(**alone), rtol=1e-5, atol=1e-6)


def with_rule(name: str, rule: Callable[[MossImageModel], Callable[..., Any]]) -> float:
    """Return the change of the velocity if a method of the network is replaced."""
    model = tiny_model()
    setattr(model, name, rule(model))
    return error_of(predict(model), "plain")


def with_weights(change: Callable[[str, Tensor], Tensor]) -> float:
    """Return the change of the velocity if weights are read in another order."""
    model = tiny_model()
    model.load_state_dict({name: change(name, tensor) for name, tensor in tiny_weights().items()})
    return error_of(predict(model), "plain")


def swap_halves(ending: str) -> Callable[[str, Tensor], Tensor]:
    def change(name: str, tensor: Tensor) -> Tensor:
        return torch.cat(tensor.chunk(2)[::-1]) if ending in name else tensor

    return change


def test_each_rule_matters() -> None:
    """The comparison with the recorded numbers would show each of these mistakes."""
    inputs = tiny_inputs()
    wave = CONFIG.freq_dim // 2

    def swap_waves(name: str, tensor: Tensor) -> Tensor:
        return tensor.roll(wave, dims=1) if name == "time_embedding.0.weight" else tensor

    def in_16_bits(model: MossImageModel) -> Callable[..., Any]:
        return lambda times: MossImageModel.embed_time(model, times.bfloat16().float())

    def as_shares(model: MossImageModel) -> Callable[..., Any]:
        return lambda times: MossImageModel.embed_time(model, times / 1000)

    def with_turns(change: Callable[[Any], Any]) -> Callable[[MossImageModel], Callable[..., Any]]:
        def rule(model: MossImageModel) -> Callable[..., Any]:
            return lambda positions, device: MossImageModel._grid_rotations(model, change(positions), device)

        return rule

    def from_corners(positions: Any) -> Any:
        return *positions[:2], *(axis - axis.min() for axis in positions[2:])

    def no_clock(positions: Any) -> Any:
        return positions if len(positions[1]) > 1 else (positions[0], 0 * positions[1], *positions[2:])

    def padded_clock(model: MossImageModel) -> Callable[..., Any]:
        def make(layout: Any, /, device: torch.device) -> Tensor:
            return MossImageModel._make_table(model, layout._replace(text_lengths=(7, 7)), device=device)

        return make

    padded = {**inputs, "text_mask": torch.ones(2, 7)}
    errors = {
        "time as a share": with_rule("embed_time", as_shares),
        "time in 16 bits": with_rule("embed_time", in_16_bits),
        "sines first": with_weights(swap_waves),
        "halves of ffn_up_gate": with_weights(swap_halves("proj.ffn_up_gate")),
        "shift and scale of the end": with_weights(swap_halves("video_head_modulation")),
        "padding is seen": error_of(predict(tiny_model(), **padded), "plain"),
        "rows from the corner": with_rule("_grid_rotations", with_turns(from_corners)),
        "no clock": with_rule("_grid_rotations", with_turns(no_clock)),
        "a block skipped": error_of(predict(tiny_model(), overrides=SKIPS), "plain"),
        "references see all": error_of(
            predict(tiny_model(), has_references=True, isolated=False), "references"
        ),
    }
    model = tiny_model()
    model._rotary.make = padded_clock(model)
    errors["the clock of padded texts"] = error_of(predict(model), "plain")

    assert {name: error for name, error in errors.items() if error < 100 * NEAR} == {}


def behind_the_second_layer(model: MossImageModel) -> None:
    """Put a SiLU where the released embedding of time has none."""
    model.time_embedding[2].register_forward_hook(lambda _, __, out: nn.functional.silu(out))


def band_major(model: MossImageModel) -> None:
    """Put the angles of all axes of a frequency side by side."""

    def make(positions: Any, device: torch.device) -> Tensor:
        pairs = MossImageModel._grid_rotations(model, positions, device)
        return pairs.unflatten(-2, (AXES, -1)).transpose(-3, -2).flatten(-3, -2)

    model._grid_rotations = make  # type: ignore[method-assign]


def no_places_in_refiners(model: MossImageModel) -> None:
    """Rotate no token of the text before it joins the picture."""
    make = model._text_rotary.make

    def still(length: int, /, *, device: torch.device) -> Tensor:
        return make(length, device=device)[:1].expand(length, -1, -1, -1)

    model._text_rotary.make = still


def references_of_the_image_time(model: MossImageModel) -> None:
    """Modulate references as the noisy picture."""

    def embed(timesteps: Tensor, has_references: bool) -> Tensor:
        rows = model.embed_time(timesteps)[:, :, None]
        return torch.cat([rows] * 2, dim=2) if has_references else rows

    model._embed_times = embed  # type: ignore[method-assign]


def references_on_the_same_place(model: MossImageModel) -> None:
    """Number all references 1."""
    make = model._grid_rotations

    def alike(positions: Any, device: torch.device) -> Tensor:
        return make((positions[0].clamp(max=1), *positions[1:]), device)

    model._grid_rotations = alike  # type: ignore[method-assign]


def rotate_neighbors(x: Tensor, table: Tensor) -> Tensor:
    """Rotate channels 2j and 2j + 1 in place of j and j + D/2."""
    cosine, sine = table.unbind(-1)
    first, second = x[..., 0::2], x[..., 1::2]
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return torch.stack(turned, dim=-1).flatten(-2)


def attend_before(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Let each token see those before it alone."""
    heads = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)


def swiglu(value: Tensor, gate: Tensor) -> Tensor:
    return nn.functional.silu(gate) * value


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("plain", behind_the_second_layer),
        ("plain", band_major),
        ("plain", no_places_in_refiners),
        ("references", references_of_the_image_time),
        ("references", references_on_the_same_place),
    ],
)
def test_a_network_with_another_rule_gives_something_else(
    name: str, mistake: Callable[[MossImageModel], None]
) -> None:
    model = tiny_model()
    mistake(model)
    assert error_of(predict(model, has_references=name == "references"), name) > 100 * NEAR


@pytest.mark.parametrize(
    ("function", "mistake"),
    [
        ("rotate_halves", rotate_neighbors),
        ("attend", attend_before),  # of the refiners
        ("situ", swiglu),
        ("VALUE_CAP", 1e6),
        ("GATE_CAP", 1e6),
    ],
)
def test_another_function_in_its_place_gives_something_else(
    function: str, mistake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, function, mistake)
    assert error_of(predict(tiny_model()), "plain") > 10 * NEAR


@pytest.mark.parametrize(("value", "gate"), [(3.0, 1.0), (-60.0, 2.0), (200.0, 40.0), (5.0, -9.0)])
def test_situ_caps_values_at_25_and_gates_at_4(value: float, gate: float) -> None:
    made = network.situ(torch.tensor(value), torch.tensor(gate))

    tanh, sigmoid = torch.tanh, torch.sigmoid
    expected = (
        4 * tanh(torch.tensor(gate / 4)) * sigmoid(torch.tensor(gate)) * 25 * tanh(torch.tensor(value / 25))
    )
    torch.testing.assert_close(made, expected)
    assert abs(float(made)) <= 100


@torch.no_grad()
def test_float16_keeps_its_stream_in_float32() -> None:
    """Values above the range of float16 pass through, as they do in float32."""
    weights = tiny_weights()
    gates = slice(2 * CONFIG.dim, 3 * CONFIG.dim)  # of attention
    for ending in ("weight", "bias"):
        weights[f"shared_block_modulation.{ending}"][gates] *= 200_000
    models = {}
    for dtype in (torch.float32, torch.float16):
        models[dtype] = MossImageModel(CONFIG)
        models[dtype].load_state_dict(weights)
        for name, parameter in models[dtype].requires_grad_(False).named_parameters():
            if not name.startswith(DIT.keep_float32):  # as a file is loaded
                parameter.data = parameter.data.to(dtype)

    precise, coarse = (models[dtype](**tiny_inputs()) for dtype in (torch.float32, torch.float16))

    assert coarse.isfinite().all()
    assert (coarse - precise).abs().max() < 0.02 * precise.abs().max()


def test_latents_of_other_channels_are_refused() -> None:
    inputs = tiny_inputs()
    with pytest.raises(ValueError, match="8 channels of one image"):
        tiny_model()(**{**inputs, "noisy": inputs["noisy"][:, :4]})
    with pytest.raises(ValueError, match="text mask"):
        tiny_model()(**{**inputs, "text_mask": inputs["text_mask"][:, :3]})


def test_the_released_sizes_are_those_of_the_network() -> None:
    config = replace(
        CONFIG, dim=3072, ffn_dim=8192, num_heads=24, num_layers=42, channels=128, text_dim=4096, freq_dim=256
    )
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in MossImageModel(config).parameters())
    assert parameters == 5_082_308_624 - 16  # without rope.bands
