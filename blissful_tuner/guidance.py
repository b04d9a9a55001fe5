"""Guidance: which steps have it and how strongly, the passes of each, and checks before anything loads.

A strategy is a function that makes a `GuidanceStage` (`guidance_formulas`); `plan_steps` says which ones a
step has. A new one is a function there, and a line here.
"""

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from blissful_tuner.guidance_formulas import (
    NEGATIVE,
    POSITIVE,
    GuidanceStage,
    Momentum,
    Pass,
    PassPlan,
    Velocities,
    active_steps,
    add_skipped_layers,
    cfg_zero,
    init_factor,
    limit_norm,
    make_passes,
    nag_tweaks,
    perp_neg,
    projected,
    rescale,
    watched,
)
from blissful_tuner.guidance_options import MOST_SCALE, PLAIN_GUIDANCE, GuidanceOptions
from modules.contract.requests import Prepared
from modules.contract.rules import ONE_EXPERT, Expert, GuidanceRules, expert_at
from modules.contract.steps import NO_TWEAKS, Guidance, Needs, Predict, Section, Step, Tweaks
from modules.errors import OptionError


def make_guidance(
    prepared: Prepared, options: GuidanceOptions, experts: Sequence[Expert] = ONE_EXPERT
) -> Guidance:
    """Make the guidance of one section. experts: `Family.experts`; each has its own guidance scale.

    Raises OptionError if the request's schedule and the options do not go together.
    """
    plans = plan_steps(prepared, options)
    join = functools.cache(Tweaks.within)  # the same objects at all steps, as `Tweaks.turn` requires
    tweak = nag_tweaks(options.nag)  # at steps with and without guidance
    asked: list[tuple[Section, Tweaks]] = []

    def of_positive(section: Section) -> Tweaks:
        if not asked or asked[0][0] is not section:
            asked[:] = [(section, tweak(section))]
        return asked[0][1]

    def guide(step: Step, predict: Predict, section: Section) -> Tensor:
        plan = plans[expert_at(step.timestep, experts)][step.index]
        if is_truncated(step, prepared.rules):
            plan = PassPlan(factor=plan.factor)
        if not plan.passes:
            return torch.zeros_like(step.noisy)
        return plan.combine(make_passes(plan, predict, section, of_positive(section), join))

    return guide


def plan_steps(prepared: Prepared, options: GuidanceOptions) -> list[tuple[PassPlan, ...]]:
    """List by expert the plan of each step.

    Raises OptionError if the request's schedule and the options do not go together.
    """
    weakened = Pass("negative", Tweaks(skip_blocks=options.skipped_layers))
    weakens = active_steps(options, prepared.num_steps)
    of_all = Tweaks(embedded_guidance=False) if options.disable_embedded_for_cfg else NO_TWEAKS
    rule = prepared.rules.projection
    if rule is not None:
        _refuse_other_formulas(options)
    momentum = Momentum(0.0 if rule is None else rule.momentum)

    def plan(index: int, scale: float | None) -> PassPlan:
        factor = init_factor(options, index)
        if scale is None:
            return PassPlan(factor=factor)
        skips = index in weakens
        negative = weakened if skips and options.slg_mode == "uncond" else NEGATIVE
        stages, share = [*_formula(scale, negative, options)], options.guidance_rescale
        if stages and rule is not None:
            if prepared.first_step + index > rule.after_step:
                stages, share = [projected(rule, momentum, negative)], rule.rescale
            else:
                stages = [watched(stages[0], momentum, negative)]
        if skips and options.slg_mode == "original" and options.slg_scale != 0:
            stages.append(add_skipped_layers(weakened, options.slg_scale))
        if stages and share != 0:
            stages.append(rescale(share))
        if stages and prepared.rules.norm_limit is not None:
            stages.append(limit_norm(prepared.rules.norm_limit))
        return PassPlan(tuple(stages), factor, of_all)

    return [
        tuple(plan(index, scale) for index, scale in enumerate(scales))
        for scales in guidance_scales(prepared, options)
    ]


def is_truncated(step: Step, rules: GuidanceRules) -> bool:
    """Return whether a step comes so late that the model's rules leave guidance out."""
    return rules.below_share is not None and 1 - step.sigma >= rules.below_share


def _formula(scale: float, negative: Pass, options: GuidanceOptions) -> tuple[GuidanceStage, ...]:
    """Return the stage that joins the positive and the negative pass; none if it gives the positive one
    back.
    """
    if options.perp_neg is not None:
        return (perp_neg(scale, options.perp_neg, negative),)
    if scale == 1:
        return ()
    return (cfg_zero(scale, negative) if options.cfgzerostar_scaling else plain_cfg(scale, negative),)


def _refuse_other_formulas(options: GuidanceOptions) -> None:
    """Raise OptionError if the options name a formula that cannot go with the projection."""
    given = {"--cfgzerostar_scaling": options.cfgzerostar_scaling, "--perp_neg": options.perp_neg is not None}
    for option, is_given in given.items():
        if is_given:
            raise OptionError(
                f"{option} replaces the formula of guidance, and this model has one of its own (projected "
                "guidance). Leave it out"
            )


def needs(prepared: Prepared, options: GuidanceOptions) -> Needs:
    """Find which texts the guidance of a request asks for, so that no other is encoded.

    Raises OptionError as `make_guidance` does.
    """
    texts = {one.text for plans in plan_steps(prepared, options) for plan in plans for one in plan.passes}
    return Needs(negative="negative" in texts, blank="blank" in texts, away=options.nag.is_on)


def has_batches(prepared: Prepared, options: GuidanceOptions) -> bool:
    """Return whether some step has passes that can be one batch."""
    return any(plan.most_together > 1 for plans in plan_steps(prepared, options) for plan in plans)


def plain_cfg(scale: float, negative: Pass) -> GuidanceStage:
    """Classifier-free guidance: extrapolate from the negative velocity through the positive one.

    Source: Ho and Salimans 2022, arXiv 2207.12598.
    """

    def change(_: Tensor, velocities: Velocities) -> Tensor:
        without = velocities[negative]
        return without + scale * (velocities[POSITIVE] - without)

    return GuidanceStage((POSITIVE, negative), change)


def guidance_scales(prepared: Prepared, options: GuidanceOptions) -> list[tuple[float | None, ...]]:
    """List by expert the guidance scale of each step that is made; None: the positive conditions alone.

    Raises OptionError if the request's schedule and the options do not go together.
    """
    return [_scales_of_steps(prepared, options, scale) for scale in prepared.guidance_scale]


def _scales_of_steps(prepared: Prepared, options: GuidanceOptions, scale: float) -> tuple[float | None, ...]:
    schedule, num_steps = prepared.asked.cfg_schedule, prepared.num_steps
    if prepared.rules.below_share is not None and prepared.rules.below_share <= 0:
        return (None,) * num_steps  # the first step already has that share
    if schedule:
        if options.cfg_skip_mode != "none":
            raise OptionError(
                f"--cfg_schedule {schedule!r} and --cfg_skip_mode {options.cfg_skip_mode} both say which "
                "steps have guidance: give one of them"
            )
        table = parse_cfg_schedule(schedule, num_steps, scale)
        return tuple(table.get(step + 1) for step in range(num_steps))
    if scale == 1.0:  # the formula gives the positive velocity back
        return (None,) * num_steps
    applied = choose_applied_steps(options.cfg_skip_mode, options.cfg_apply_ratio, num_steps)
    return tuple(scale if is_applied else None for is_applied in applied)


def choose_applied_steps(mode: str, ratio: float | None, num_steps: int) -> tuple[bool, ...]:
    """Return for each step whether `--cfg_skip_mode` keeps guidance.

    int(num_steps * ratio) steps keep it, with "alternate" about that many. The mode names the steps that skip
    it: early, late, in the middle, or early and late.
    """
    if mode == "none" or ratio is None:
        return (True,) * num_steps
    if mode == "alternate":
        return _alternate(ratio, num_steps)
    kept = int(num_steps * ratio)
    skipped = num_steps - kept
    kept_at = {
        "early": range(skipped, num_steps),
        "late": range(kept),
        "early_late": range(skipped // 2, skipped // 2 + kept),
        "middle": [step for step in range(num_steps) if not 0 <= step - (num_steps - skipped) // 2 < skipped],
    }[mode]
    return tuple(step in kept_at for step in range(num_steps))


def _alternate(ratio: float, num_steps: int) -> tuple[bool, ...]:
    # plain doubles: 0.6 added five times is a little below 3, and existing tools depend on that
    applied, due = [], 0.0
    for _ in range(num_steps):
        due += ratio
        applied.append(due >= 1.0)
        if applied[-1]:
            due -= 1.0
    return tuple(applied)


def parse_cfg_schedule(text: str, steps: int, guidance_scale: float) -> dict[int, float]:
    """Return the guidance scale by step number, counted from 1; other steps run without guidance.

    text: comma-separated `k`, `a-b` or `e~m` (every m-th step), each with an optional `:scale`, by default
    `guidance_scale`; `!` in front excludes. Later entries override earlier ones; exclusions override all
    entries, wherever they stand. Raises OptionError naming the entry if it is not a number, lies outside
    1..steps, runs backwards, or has a scale that is no number or too large.
    """
    scales: dict[int, float] = {}
    excluded: set[int] = set()
    for entry in filter(None, (part.strip() for part in text.split(","))):
        numbers, colon, scale = entry.removeprefix("!").partition(":")
        chosen = _steps_of(numbers.strip(), steps, entry)
        if entry.startswith("!"):
            excluded.update(chosen)
        else:
            scales.update(dict.fromkeys(chosen, _scale(scale, entry) if colon else guidance_scale))
    return {step: scales[step] for step in sorted(scales.keys() - excluded)}


def _steps_of(numbers: str, steps: int, entry: str) -> range:
    if numbers.startswith("e~"):
        every = _whole(numbers[2:], entry)
        if every < 1:
            raise _problem(entry, "the interval after ~ must be at least 1")
        return range(every, steps + 1, every)
    first_text, dash, last_text = numbers.partition("-")
    first = _whole(first_text, entry)
    last = _whole(last_text, entry) if dash else first
    if first > last:
        raise _problem(entry, f"it runs backwards, from {first} to {last}")
    if first < 1 or last > steps:
        raise _problem(entry, f"the steps are 1 to {steps}")
    return range(first, last + 1)


def _whole(text: str, entry: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise _problem(entry, f"{text.strip()!r} is not a whole number") from None


def _scale(text: str, entry: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        raise _problem(entry, f"the scale {text.strip()!r} is not a number") from None
    if not abs(scale) <= MOST_SCALE:  # nan too
        raise _problem(entry, f"give a scale of at most {MOST_SCALE}")
    return scale


def _problem(entry: str, reason: str) -> OptionError:
    return OptionError(
        f"--cfg_schedule entry {entry!r}: {reason}. Write entries such as 1-10, 20, e~3 or 1-10:6.5, !5"
    )


logger = logging.getLogger(__name__)

NO_STEP = "no step uses guidance"


def check_guidance(prepared: Prepared, options: GuidanceOptions = PLAIN_GUIDANCE) -> None:
    """Raise OptionError if the guidance is impossible; warn of its options that have no effect."""
    is_guided = any(scale is not None for scales in guidance_scales(prepared, options) for scale in scales)
    plans = [plan for plans in plan_steps(prepared, options) for plan in plans]
    _refuse_zero_star(options, plans, is_guided)
    _tell_unused_negative(prepared, options, plans, is_guided)
    for option, reason in _unused(prepared, options, plans, is_guided).items():
        logger.warning("%s is ignored because %s", option, reason)


def _refuse_zero_star(options: GuidanceOptions, plans: list[PassPlan], is_guided: bool) -> None:
    steps = options.cfgzerostar_init_steps
    given = {
        "--cfgzerostar_scaling": options.cfgzerostar_scaling,
        f"--cfgzerostar_init_steps {steps}": steps > 0,
    }
    for option, is_given in given.items():
        if is_given and not is_guided:
            raise OptionError(
                f"{option} needs guidance, and {NO_STEP}: give a --guidance_scale other than 1 or a "
                "--cfg_schedule, or leave it out"
            )
    if not any(plan.passes for plan in plans):
        raise OptionError(
            f"--cfgzerostar_init_steps {steps}: none of the {len(plans)} steps would call the model. Give "
            "fewer; 1 or 2 are usual"
        )


def _tell_unused_negative(
    prepared: Prepared, options: GuidanceOptions, plans: list[PassPlan], is_guided: bool
) -> None:
    text, away = prepared.asked.negative_prompt, prepared.asked.away_prompt
    if away is not None and not options.nag.is_on:
        logger.warning("--nag_prompt %r is ignored because --nag_scale is not given, or turned off", away)
    if options.nag.is_on and away is None:
        return  # attention is steered away from it
    if not text or any(one.text == "negative" for plan in plans for one in plan.passes):
        return
    reason = f"{NO_STEP} (--guidance_scale)" if not is_guided else "no step has a pass with it"
    if is_guided and options.perp_neg == 0:
        reason = "--perp_neg 0 leaves it out"
    logger.warning("the negative prompt %r is ignored because %s", text, reason)


def _unused(
    prepared: Prepared, options: GuidanceOptions, plans: list[PassPlan], is_guided: bool
) -> dict[str, str]:
    """Return the given options without effect, each with the reason."""
    given = {
        f"--slg_mode {options.slg_mode}": bool(options.skipped_layers),
        f"--guidance_rescale {options.guidance_rescale:g}": options.guidance_rescale != 0,
        f"--perp_neg {options.perp_neg or 0:g}": options.perp_neg is not None,
        "--disable_embedded_for_cfg": options.disable_embedded_for_cfg,
    }
    layers, _, perp_neg, embedded = given
    reasons: dict[str, str] = {} if is_guided else dict.fromkeys(given, NO_STEP)
    skips = any(one.tweaks.skip_blocks for plan in plans for one in plan.passes)
    if is_guided and not skips:
        reasons[layers] = _why_none_skips(prepared, options)
    if is_guided and not skips and _negative_is_empty(prepared):
        reasons[perp_neg] = "the negative prompt is empty"
    if prepared.embedded_guidance is None:
        reasons[embedded] = "the model has no embedded guidance"
    return {option: reason for option, reason in reasons.items() if given[option]}


def _why_none_skips(prepared: Prepared, options: GuidanceOptions) -> str:
    if options.slg_mode == "original" and options.slg_scale == 0:
        return "--slg_scale is 0"
    if options.perp_neg == 0:
        return "--perp_neg 0 has no negative pass"
    steps = active_steps(options, prepared.num_steps)
    if not steps:
        return f"--slg_start and --slg_end leave none of the {prepared.num_steps} steps"
    return f"none of its steps, {steps[0] + 1} to {steps[-1] + 1}, has a negative pass"


def _negative_is_empty(prepared: Prepared) -> bool:
    return all(texts.negative is None or not texts.negative.text for texts in prepared.prompts.values())
