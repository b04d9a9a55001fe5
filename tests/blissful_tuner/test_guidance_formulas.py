"""The passes of a step, and each formula of guidance on recorded values, against the paper or diffusers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.pipelines.ltx2.pipeline_ltx2 import LTX2Pipeline, rescale_noise_cfg
from torch import Tensor

from blissful_tuner.guidance import make_guidance
from blissful_tuner.guidance_formulas import (
    BLANK,
    NEGATIVE,
    POSITIVE,
    GuidanceStage,
    NormalizedGuidance,
    cfg_zero,
    perp_neg,
)
from blissful_tuner.options import PLAIN_GUIDANCE, GuidanceOptions, NagOptions
from protocols.data import AudioVideoShapes, Conditions
from protocols.requests import Request
from protocols.rules import GuidanceRules, Projection, StreamGuidance
from protocols.steps import NO_OVERRIDES, Overrides, Section, Step
from tests.golden_cases import read_case
from tests.preparing import prepare

REQUEST = prepare(Request("p", 0, steps=4, guidance_scale=5.0))
SLG = {"slg_mode": "uncond", "slg_layers": "1", "slg_end": 0.5}


def step(index: int) -> Step:
    return Step(index, 4, 0.5, 500.0, torch.ones(1, 1, 1, 2, 2))


def combine(stage: GuidanceStage, positive: Tensor, negative: Tensor, blank: Tensor) -> Tensor:
    return stage.change(positive, {POSITIVE: positive, NEGATIVE: negative, BLANK: blank})


def by_three() -> dict[str, Tensor]:
    """The recorded velocities as a batch of one."""
    _, tensors = read_case("guidance")
    return {name: tensors[name][None] for name in ("cond", "uncond", "nocond")}


def test_zero_star_and_perpendicular_guidance_equal_the_recorded_values() -> None:
    _, tensors = read_case("guidance")
    star = combine(cfg_zero(5.0, NEGATIVE), *by_three().values())
    torch.testing.assert_close(star, tensors["zerostar_batched"], atol=1e-4, rtol=0)
    perpendicular = combine(perp_neg(5.0, 1.5, NEGATIVE), *by_three().values())
    torch.testing.assert_close(perpendicular[0], tensors["perp_neg"], atol=1e-4, rtol=0)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 1, 1, 2, 2)


class Network:
    """Answers each pass with its own velocity, less a tenth for each skipped block; notes the calls."""

    def __init__(
        self, positive: Tensor, negative: Tensor, blank: Tensor | None = None, nag: Tensor | None = None
    ) -> None:
        others = [None if one is None else {"v": one} for one in (blank, nag)]
        self.section = Section(positive, {"v": positive}, {"v": negative})
        self.section = replace(self.section, blank=others[0], nag=others[1])
        self.calls: list[tuple[str, ...]] = []
        self.overrides: list[Overrides] = []

    def __call__(self, *conditions: Conditions, overrides: Overrides = NO_OVERRIDES) -> tuple[Tensor, ...]:
        names = {id(self.section.positive): "+", id(self.section.negative): "-", id(self.section.blank): "0"}
        mark = "!" if overrides.skip_blocks else ""
        self.calls.append(tuple(names[id(one)] + mark for one in conditions))
        self.overrides.append(overrides)
        return tuple((1 - 0.1 * len(overrides.skip_blocks)) * torch.as_tensor(one["v"]) for one in conditions)


def four() -> Network:
    """A network with all four texts."""
    return Network(numbers(1, 2, 3, 4), numbers(1, 0, 1, 0), numbers(0, 0, 1, 1), numbers(3, 3, 3, 3))


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, [("+", "-")]),
        ({"cfgzerostar_scaling": True, "guidance_rescale": 0.5}, [("+", "-")]),
        ({"perp_neg": 1.5, "guidance_rescale": 0.5}, [("+", "-", "0")]),
        ({"perp_neg": 0.0}, [("+", "0")]),
        ({"perp_neg": 1.5, **SLG}, [("+", "0"), ("-!",)]),
        ({**SLG, "slg_mode": "original"}, [("+", "-"), ("-!",)]),
        ({"cfgzerostar_init_steps": 1}, []),
        ({"cfgzerostar_init_steps": 1, "cfgzerostar_multiplier": 0.5}, [("+", "-")]),
    ],
)
def test_passes_with_equal_tweaks_are_asked_for_together_and_once(
    options: dict[str, Any], calls: list[tuple[str, ...]]
) -> None:
    network = four()
    make_guidance(REQUEST, replace(PLAIN_GUIDANCE, **options))(step(0), network, network.section)
    assert sorted(network.calls) == sorted(calls)


def test_the_first_steps_are_multiplied_with_and_without_guidance() -> None:
    request = replace(REQUEST, request=replace(REQUEST.request, cfg_schedule="2-4"))
    options = replace(PLAIN_GUIDANCE, cfgzerostar_init_steps=2, cfgzerostar_multiplier=0.5)
    network = four()

    def velocities(options: GuidanceOptions) -> list[Tensor]:
        guidance = make_guidance(request, options)
        return [guidance(step(index), network, network.section) for index in range(3)]

    first, second, third = velocities(PLAIN_GUIDANCE)
    assert all(map(torch.equal, velocities(options), (0.5 * first, 0.5 * second, third)))
    assert not torch.equal(first, second)


SHAPE = (2, 5, 3, 4)  # B L N D


def seen(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(toward: Tensor, nag: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """Equations 7 to 10 of the paper, token by token, with the names of the project's page."""
    result = torch.empty_like(toward)
    for sample in range(len(toward)):
        for token in range(toward.shape[1]):
            plus, minus = toward[sample, token].flatten(), nag[sample, token].flatten()
            guided = scale * plus - (scale - 1) * minus
            ratio = sum(map(abs, guided.tolist())) / sum(map(abs, plus.tolist()))
            guided = guided * min(ratio, tau) / ratio
            result[sample, token] = (alpha * guided + (1 - alpha) * plus).view(SHAPE[2:])
    return result


@pytest.mark.parametrize(
    ("scale", "tau", "alpha"), [(5, 2.5, 0.25), (11, 3.5, 0.5), (1.5, 100, 1), (4, 0.5, 1)]
)
def test_the_formula_is_that_of_the_paper(scale: float, tau: float, alpha: float) -> None:
    toward, nag = seen(1), seen(2)

    steered = NormalizedGuidance(scale, tau, alpha)(toward, nag)

    torch.testing.assert_close(steered, by_hand(toward, nag, scale, tau, alpha), rtol=1e-5, atol=1e-5)


def test_without_guidance_each_step_is_one_pass_with_the_same_tweaks() -> None:
    network = four()
    request = prepare(Request("p", 0, steps=4, guidance_scale=1.0))
    guide = make_guidance(request, replace(PLAIN_GUIDANCE, nag=NagOptions(nag_scale=5.0)))
    for index in range(3):
        guide(step(index), network, network.section)

    assert network.calls == [("+",)] * 3
    (overrides,) = set(network.overrides)
    assert overrides.nag is not None
    assert overrides.nag.text is network.section.nag
    assert overrides.nag.combine_attention == NormalizedGuidance(5.0, 3.5, 0.5)


RULE = Projection(after_step=-1, scale=10.0, momentum=-0.5, norm_limit=10.0)
CASES = read_case("image_guidance")[0]["hunyuan_image"]


def guide(cond: Tensor, uncond: Tensor, rule: Projection, scale: float, rescale: float = 0.0) -> list[Tensor]:
    """The guided velocities of all steps. cond, uncond: steps B C F H W."""
    request = prepare(Request("p", 0, steps=len(cond), guidance_scale=scale))
    prepared = replace(request, rules=GuidanceRules(projection=rule))
    guidance = make_guidance(prepared, replace(PLAIN_GUIDANCE, guidance_rescale=rescale))
    made = []
    for index, (positive, negative) in enumerate(zip(cond, uncond, strict=True)):
        network = Network(positive, negative)
        made.append(guidance(step(index), network, network.section))
    return made


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_guidance_of_hunyuan_image_equals_the_recorded_values(case: dict[str, Any]) -> None:
    description, tensors = read_case("image_guidance")
    rule = replace(RULE, after_step=case["apg_start_step"], rescale=case["guidance_rescale_apg"])
    cond, uncond = (tensors[name].unsqueeze(3) for name in ("cond", "uncond"))

    made = guide(cond, uncond, rule, case["guidance_scale"], case["guidance_rescale"])

    expected = tensors[case["name"]].unsqueeze(3)
    torch.testing.assert_close(torch.stack(made), expected, **description["tolerance"]["*"])


def test_projection_equals_that_of_diffusers() -> None:
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance

    torch.manual_seed(0)
    cond, uncond = torch.randn(2, 4, 2, 3, 1, 4, 5).mul(3).unbind(0)

    made = guide(cond, uncond, replace(RULE, scale=4.0, norm_limit=7.0, eta=0.3), 3.0)

    buffer = MomentumBuffer(-0.5)
    for ours, positive, negative in zip(made, cond, uncond, strict=True):
        # theirs guides from the positive velocity on: a scale of 4 is one of 3 there
        theirs = normalized_guidance(
            positive, negative, 4.0, buffer, 0.3, 7.0, use_original_formulation=False
        )
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_steps_are_counted_in_the_whole_schedule() -> None:
    torch.manual_seed(0)
    positive, negative = torch.randn(2, 2, 3, 1, 4, 5).unbind(0)
    rules = GuidanceRules(projection=replace(RULE, after_step=2))
    prepared = replace(prepare(Request("p", 0, steps=4, guidance_scale=3.0)), rules=rules)
    network = Network(positive, negative)

    def velocity(first_step: int) -> Tensor:
        guidance = make_guidance(replace(prepared, first_step=first_step), PLAIN_GUIDANCE)
        return guidance(step(0), network, network.section)

    assert torch.equal(velocity(0), negative + 3.0 * (positive - negative))
    assert not torch.equal(velocity(3), velocity(0))


# guidance of picture and sound

TEXTS = ("positive", "negative", "blank")
JOINT = AudioVideoShapes((2, 2, 3, 2), (2, 3, 4))
RULES = GuidanceRules(
    streams=(
        StreamGuidance(perturbed_scale=1.5, modality_scale=3.0, rescale=0.7),
        StreamGuidance(text_scale=7.0, perturbed_scale=0.5, modality_scale=2.0),
    ),
    perturbed_blocks=frozenset({29}),
)


class Hears:
    """Answers each kind of pass with random numbers of its own, and notes the passes."""

    def __init__(self, joint: AudioVideoShapes | None) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (1, *JOINT.image) if joint is None else (1, 24 + 24)
        names = ("noisy", *TEXTS, "perturbed", "isolated")
        self.numbers = {name: torch.randn(*shape, generator=generator) for name in names}
        overrides = NO_OVERRIDES if joint is None else Overrides(audio_video_shapes=joint)
        noise = torch.zeros(shape)
        self.section = Section(noise, {}, {}, {}, nag={}, overrides=overrides)
        self.passes: list[str] = []
        self.steered: list[str] = []

    def __call__(self, *conditions: Conditions, overrides: Overrides = NO_OVERRIDES) -> tuple[Tensor, ...]:
        assert overrides.skip_self_attention in (frozenset(), RULES.perturbed_blocks)
        special = (
            "perturbed"
            if overrides.skip_self_attention
            else "isolated"
            if overrides.isolate_modalities
            else ""
        )
        names = [
            special or next(name for name in TEXTS if one is getattr(self.section, name))
            for one in conditions
        ]
        self.passes += names
        self.steered += names if overrides.nag is not None else []
        return tuple(self.numbers[name] for name in names)

    def streams(self, joint: AudioVideoShapes | None) -> list[dict[str, Tensor]]:
        if joint is None:
            return [self.numbers]
        return [{name: joint.split(one)[index] for name, one in self.numbers.items()} for index in range(2)]


def guide_streams(joint: AudioVideoShapes | None, **options: Any) -> tuple[Tensor, Hears]:
    request = replace(REQUEST, audio_video_shapes=joint, rules=options.pop("rules", RULES))
    network = Hears(joint)
    now = Step(0, 4, 0.6, 600.0, network.numbers["noisy"])
    guidance = make_guidance(request, replace(PLAIN_GUIDANCE, **options))
    return guidance(now, network, network.section), network


@pytest.mark.parametrize("joint", [None, JOINT], ids=["picture", "both"])
def test_each_stream_is_guided_by_the_arithmetic_of_diffusers(joint: AudioVideoShapes | None) -> None:
    """Its own functions between velocity and clean prediction, and its rescaling: float32, so 1e-5."""

    class Levels:
        sigmas = torch.tensor([0.6])

    made, network = guide_streams(joint)

    expected = []
    for numbers, rule, text in zip(network.streams(joint), RULES.streams, (5.0, 7.0), strict=False):
        noisy = numbers["noisy"]
        clean = {
            name: LTX2Pipeline.convert_velocity_to_x0(None, noisy, one, 0, Levels())
            for name, one in numbers.items()
        }
        own = clean["positive"]
        guided = (
            own + (text - 1) * (own - clean["negative"]) + rule.perturbed_scale * (own - clean["perturbed"])
        )
        if joint is not None:
            guided = guided + (rule.modality_scale - 1) * (own - clean["isolated"])
        guided = rescale_noise_cfg(guided, own, guidance_rescale=rule.rescale) if rule.rescale else guided
        expected.append(LTX2Pipeline.convert_x0_to_velocity(None, noisy, guided, 0, Levels()))
    full = expected[0] if joint is None else joint.join(*expected)
    torch.testing.assert_close(made, full, atol=1e-5, rtol=1e-5)
    assert network.passes == ["positive", "negative", "perturbed", *([] if joint is None else ["isolated"])]


@pytest.mark.parametrize(
    ("streams", "passes"),
    [
        ([(5.0, 0.0, 1.0), (1.0, 0.0, 1.0)], ["positive", "negative"]),
        ([(1.0, 0.0, 1.0), (1.0, 0.0, 1.0)], ["positive"]),
        ([(1.0, 1.0, 1.0), (1.0, 0.0, 1.0)], ["positive", "perturbed"]),
        ([(1.0, 0.0, 1.0), (1.0, 0.0, 2.0)], ["positive", "isolated"]),
    ],
)
def test_a_pass_that_no_stream_needs_is_not_made(
    streams: list[tuple[float, float, float]], passes: list[str]
) -> None:
    rules = replace(RULES, streams=tuple(StreamGuidance(*one) for one in streams))
    request = replace(REQUEST, guidance_scale=(1.0,), audio_video_shapes=JOINT, rules=rules)
    network = Hears(JOINT)
    made = make_guidance(request, PLAIN_GUIDANCE)(
        Step(0, 4, 0.6, 600.0, network.numbers["noisy"]), network, network.section
    )

    assert network.passes == passes
    numbers = network.streams(JOINT)[0]
    if streams[0] == (1.0, 0.0, 1.0):
        assert torch.equal(JOINT.split(made)[0], numbers["positive"])


def test_schedules_and_attention_guidance_hold_for_streams_too() -> None:
    nag = NagOptions(nag_scale=5.0)
    _, network = guide_streams(JOINT, nag=nag)
    assert network.steered == ["positive", "perturbed", "isolated"]
    request = replace(
        REQUEST, request=replace(REQUEST.request, cfg_schedule="2"), audio_video_shapes=JOINT, rules=RULES
    )
    alone = Hears(JOINT)
    now = Step(0, 4, 0.6, 600.0, alone.numbers["noisy"])

    made = make_guidance(request, PLAIN_GUIDANCE)(now, alone, alone.section)

    assert alone.passes == ["positive"]
    assert torch.equal(made, alone.numbers["positive"])


FORMULAS: dict[str, tuple[GuidanceRules, dict[str, Any]]] = {
    "plain": (GuidanceRules(), {}),
    "zero star": (GuidanceRules(), {"cfgzerostar_scaling": True}),
    "perpendicular": (GuidanceRules(), {"perp_neg": 1.5}),
    "rescaled": (GuidanceRules(), {"guidance_rescale": 0.7}),
    "limited": (GuidanceRules(norm_limit=1.1), {}),
    "projected": (GuidanceRules(projection=Projection(-1, 4.0, -0.5, 2.0, rescale=0.5)), {}),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_norms_and_scales_are_those_of_each_stream(name: str) -> None:
    """What the picture gets is what it gets alone, to the bit; the sound likewise if they change places."""
    rules, options = FORMULAS[name]
    made, network = guide_streams(JOINT, rules=rules, **options)

    for index, numbers in enumerate(network.streams(JOINT)):
        alone = Hears(None)
        alone.numbers = numbers
        request = replace(REQUEST, rules=rules)
        now = Step(0, 4, 0.6, 600.0, numbers["noisy"])
        expected = make_guidance(request, replace(PLAIN_GUIDANCE, **options))(now, alone, alone.section)
        assert torch.equal(JOINT.split(made)[index], expected)


def test_tweaks_of_a_pass_and_of_its_section_are_joined() -> None:
    one = Overrides(skip_self_attention=frozenset({1}))
    of_all = Overrides(skip_self_attention=frozenset({2}), isolate_modalities=True, audio_video_shapes=JOINT)

    both = one.merge(of_all)

    assert (both.skip_self_attention, both.isolate_modalities, both.audio_video_shapes) == (
        frozenset({1, 2}),
        True,
        JOINT,
    )
