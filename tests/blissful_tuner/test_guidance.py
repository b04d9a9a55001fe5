"""Guidance strategies on passes whose results are known, their schedules and contradictions."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blissful_tuner.guidance import (
    check_guidance,
    make_guidance,
    parse_cfg_schedule,
    select_applied_steps,
    warn_about_low_scales,
)
from blissful_tuner.options import PLAIN_GUIDANCE, GuidanceOptions
from generation.loaded_networks import select_prompts
from modules.errors import OptionError
from protocols.requests import Request
from protocols.rules import GuidanceRules, StreamGuidance
from protocols.steps import Step
from tests.blissful_tuner.test_guidance_formulas import Network, step
from tests.golden_cases import read_case
from tests.preparing import prepare

REQUEST = prepare(Request("p", 0, steps=10, guidance_scale=5.0))


def passes() -> Network:
    return Network(torch.full((1, 1, 1, 2, 2), 2.0), torch.full((1, 1, 1, 2, 2), 1.0))


def test_plain_guidance_equals_the_recorded_values() -> None:
    _, tensors = read_case("guidance")
    recorded = Network(tensors["cond"], tensors["uncond"])
    velocity = make_guidance(replace(REQUEST, steps=1), PLAIN_GUIDANCE)(step(0), recorded, recorded.section)
    torch.testing.assert_close(velocity, tensors["plain_cfg"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("early", "SSSSAAAAAA"),
        ("late", "AAAAAASSSS"),
        ("early_late", "SSAAAAAASS"),
        ("middle", "AAASSSSAAA"),
        ("alternate", "SASASAASAS"),
    ],
)
def test_skip_modes_follow_the_documented_pattern(mode: str, expected: str) -> None:
    assert "".join("A" if applied else "S" for applied in select_applied_steps(mode, 0.6, 10)) == expected


@pytest.mark.parametrize(
    ("scale", "schedule", "ratio", "negative"),
    [
        (5.0, None, None, True),
        (1.0, None, None, False),
        (1.0, "2:3", None, True),
        (5.0, "!2", None, False),  # nothing is left for which a negative text would have to be encoded
        (5.0, None, 0.0, False),
        (5.0, None, 0.1, True),
    ],
)
def test_a_negative_text_is_needed_if_any_step_has_guidance(
    scale: float, schedule: str | None, ratio: float | None, negative: bool
) -> None:
    request = prepare(Request("p", 0, steps=10, guidance_scale=scale, cfg_schedule=schedule))
    options = replace(
        PLAIN_GUIDANCE, cfg_skip_mode="none" if ratio is None else "late", cfg_apply_ratio=ratio
    )
    (texts,) = select_prompts(request, options).values()
    assert (texts.negative is not None, texts.blank, texts.nag) == (negative, None, None)


def skipping(mode: str, layers: str) -> GuidanceOptions:
    return replace(PLAIN_GUIDANCE, slg_mode=mode, slg_layers=layers, slg_end=0.5)


def test_skip_layer_uncond_weakens_the_negative_pass_while_active() -> None:
    guidance, network = make_guidance(replace(REQUEST, steps=4), skipping("uncond", "1,3")), passes()
    velocity = guidance(step(0), network, network.section)
    assert network.calls == [("+",), ("-!",)]
    assert network.overrides[-1].skip_blocks == {1, 3}
    torch.testing.assert_close(velocity, torch.full_like(velocity, 0.8 + 5 * (2 - 0.8)))
    assert float(guidance(step(2), network, network.section).mean()) == 6.0


def test_skip_layer_original_adds_a_third_pass_while_active() -> None:
    guidance, network = make_guidance(replace(REQUEST, steps=4), skipping("original", "1")), passes()
    velocity = guidance(step(1), network, network.section)
    assert network.calls == [("+", "-"), ("-!",)]
    torch.testing.assert_close(velocity, torch.full_like(velocity, 6.0 + 3.0 * (2 - 0.9)))
    guidance(step(2), network, network.section)
    assert network.calls[2:] == [("+", "-")]


def drawn() -> Network:
    """Two samples of different deviation."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)
    return Network(*(sizes * torch.randn(2, 4, 3, 5, 5, generator=generator) for _ in range(2)))


def test_a_rescaled_velocity_has_the_deviation_of_the_positive_one_in_each_sample() -> None:
    network = drawn()
    plain = make_guidance(replace(REQUEST, steps=1), PLAIN_GUIDANCE)(step(0), network, network.section)
    network.calls.clear()

    velocity = make_guidance(replace(REQUEST, steps=1), replace(PLAIN_GUIDANCE, guidance_rescale=1.0))(
        step(0), network, network.section
    )

    assert network.calls == [("+", "-")]  # the positive pass is not made again
    # its noise is the positive one
    torch.testing.assert_close(velocity.flatten(1).std(1), network.section.noise.flatten(1).std(1))
    ratio = (velocity / plain).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))  # one factor for each sample
    assert not torch.isclose(ratio[0, 0], ratio[1, 0])


CASE, _ = read_case("cfg_schedule")


@pytest.mark.parametrize(("text", "expected"), CASE["cases"])
def test_schedules_are_the_measured_ones(text: str, expected: dict[str, Any]) -> None:
    if "raises" in expected:
        with pytest.raises(OptionError, match="cfg_schedule entry"):
            parse_cfg_schedule(text, CASE["infer_steps"], CASE["guidance_scale"])
    else:
        table = parse_cfg_schedule(text, CASE["infer_steps"], CASE["guidance_scale"])
        assert {str(step): scale for step, scale in table.items()} == expected


def test_steps_may_be_left_out_before_a_range_that_has_them() -> None:
    assert parse_cfg_schedule("!1-2,1-4", 10, 3) == {3: 3, 4: 3}


def test_a_schedule_and_a_skip_mode_are_refused_together() -> None:
    request = prepare(Request("p", 0, steps=4, guidance_scale=5.0, cfg_schedule="1"), default_negative="")
    with pytest.raises(OptionError, match="--cfg_schedule '1' and --cfg_skip_mode late"):
        check_guidance(request, replace(PLAIN_GUIDANCE, cfg_skip_mode="late", cfg_apply_ratio=0.5))


@pytest.mark.parametrize("options", [{"cfgzerostar_scaling": True}, {"cfgzerostar_init_steps": 1}])
def test_zero_star_is_refused_where_no_step_has_guidance(options: dict[str, Any]) -> None:
    def check(scale: float, schedule: str) -> None:
        request = Request("p", 0, steps=4, guidance_scale=scale, cfg_schedule=schedule)
        check_guidance(prepare(request, default_negative=""), replace(PLAIN_GUIDANCE, **options))

    (option,) = options
    with pytest.raises(OptionError, match=f"--{option}.* needs guidance, and no step uses guidance: pass a"):
        check(5.0, "!1")
    check(1.0, "2:3")


FROM_1 = "it counts from 1 here; {}; 1 turns guidance off; what programs that count from 0 call {} is {} here"


@pytest.mark.parametrize(
    ("asked", "off_at", "message"),
    [
        ({"guidance_scale": 1.0}, 1.0, ""),
        ({"guidance_scale": 5.5}, 1.0, ""),
        ({"guidance_scale": 0.0}, 0.0, ""),
        (
            {"guidance_scale": 0.0},
            1.0,
            "--guidance_scale 0 (--l in a prompt line): " + FROM_1.format("0 leaves the prompt out", 0, 1),
        ),
        (
            {"guidance_scale": 0.5},
            1.0,
            "--guidance_scale 0.5 (--l in a prompt line): "
            + FROM_1.format("0.5 weakens the prompt", 0.5, 1.5),
        ),
        (
            {"guidance_scale": -2.0},
            1.0,
            "--guidance_scale -2 (--l in a prompt line): "
            + FROM_1.format("-2 steers away from the prompt", -2, -1),
        ),
        (
            {"guidance_scale": 3.0, "cfg_schedule": "1-2:0,3"},
            1.0,
            "the scale 0 of --cfg_schedule: " + FROM_1.format("0 leaves the prompt out", 0, 1),
        ),
        (
            {"guidance_scale": 3.0, "cfg_schedule": "1:-1"},
            0.0,
            "the scale -1 of --cfg_schedule: it counts from 0 here; -1 leaves the prompt out; "
            "0 turns guidance off",
        ),
    ],
)
def test_a_scale_below_the_one_that_turns_guidance_off_is_reported(
    asked: dict[str, Any], off_at: float, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = prepare(Request("p", 0, steps=4, **asked), default_negative="")

    warn_about_low_scales(replace(prepared, rules=replace(prepared.rules, neutral_scale=off_at)))

    assert [record.getMessage() for record in caplog.records] == ([message] if message else [])


def test_the_scales_of_a_second_expert_and_of_streams_are_named(caplog: pytest.LogCaptureFixture) -> None:
    both = prepare(Request("p", 0, guidance_scale=3.0, expert_guidance={"high_noise": 0.0}))
    streams = StreamGuidance(text_scale=3.0), StreamGuidance(text_scale=0.0)

    warn_about_low_scales(replace(both, guidance_scale=(3.0, 0.0)))
    warn_about_low_scales(replace(prepare(Request("p", 0)), rules=GuidanceRules(streams=streams)))

    first, second = (record.getMessage() for record in caplog.records if "counts from" in record.getMessage())
    assert first.startswith("--guidance_scale_high_noise 0: it counts from 1 here; 0 leaves the prompt out")
    assert second.startswith("--audio_cfg_scale 0: it counts from 1 here; 0 leaves the prompt out")


DESCRIPTION, TENSORS = read_case("image_guidance")


def guided(scale: float, rules: GuidanceRules, sigma: float = 0.9) -> tuple[Tensor, int]:
    """The velocity of a step, and how many passes it made."""
    positive, negative = TENSORS["cond"][0].unsqueeze(2), TENSORS["uncond"][0].unsqueeze(2)
    network = Network(positive, negative)
    prepared = replace(prepare(Request("p", 0, steps=1, guidance_scale=scale)), rules=rules)
    guidance = make_guidance(prepared, PLAIN_GUIDANCE)
    velocity = guidance(Step(0, 1, sigma, 1000 * sigma, torch.zeros_like(positive)), network, network.section)
    return velocity, sum(map(len, network.calls))


@pytest.mark.parametrize("case", DESCRIPTION["lumina"], ids=lambda case: case["name"])
def test_a_limited_velocity_equals_the_recorded_one(case: dict[str, float | str]) -> None:
    limit = float(case["renorm_cfg"]) or None

    velocity, _ = guided(float(case["guidance_scale"]), GuidanceRules(norm_limit=limit))

    torch.testing.assert_close(velocity.squeeze(2), TENSORS[str(case["name"])], atol=2e-4, rtol=1e-4)
    if case["limited"]:
        assert velocity.norm() <= 1.0001 * float(case["renorm_cfg"]) * TENSORS["cond"][0].norm()


@pytest.mark.parametrize(("sigma", "passes"), [(1.0, 2), (0.76, 2), (0.75, 1), (0.1, 1)])
def test_late_steps_have_no_guidance(sigma: float, passes: int) -> None:
    velocity, made = guided(3.5, GuidanceRules(max_signal=0.25), sigma)
    assert made == passes
    assert torch.equal(velocity, TENSORS["cond"][0].unsqueeze(2)) is (passes == 1)


def test_a_share_of_zero_needs_no_negative_text() -> None:
    prepared = prepare(Request("p", 0, steps=3, guidance_scale=3.5))
    late = replace(prepared, rules=GuidanceRules(max_signal=0.0))
    assert select_prompts(prepared)[0].negative is not None
    assert select_prompts(late)[0].negative is None
