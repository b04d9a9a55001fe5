"""Guidance: which steps have it and how strongly, the passes of each, and checks before anything loads.

A kind of guidance is a function that makes a `GuidanceStage` (in `guidance_formulas`); `plan_steps` chooses
the stages of each step. A new kind is a function there, and a line here.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from blissful_tuner.guidance_formulas import (
    NEGATIVE,
    POSITIVE,
    GuidanceStage,
    Momentum,
    NormalisedGuidance,
    Pass,
    PassPlan,
    RunPasses,
    Velocities,
    active_steps,
    add_skipped_layers,
    cfg_zero,
    guide_stream,
    keep_norms,
    limit_norm,
    perp_neg,
    projected,
    rescale,
    run_passes,
    watched,
)
from blissful_tuner.options import MOST_SCALE, PLAIN_GUIDANCE, GuidanceOptions
from modules.contract.data import Conditions
from modules.contract.requests import Prepared
from modules.contract.rules import ONE_EXPERT, Expert, GuidanceRules, StreamGuidance, expert_at
from modules.contract.steps import NO_TWEAKS, Away, Guidance, Predict, Section, Step, Tweaks
from modules.errors import OptionError

logger = logging.getLogger(__name__)

Number = TypeVar("Number", int, float)


def make_guidance(
    prepared: Prepared,
    options: GuidanceOptions,
    experts: Sequence[Expert] = ONE_EXPERT,
    run: RunPasses = run_passes,
) -> Guidance:
    """Make the guidance of one section. experts: `Family.experts`; each has its own guidance scale.

    run: runs the passes of a step.
    Raises OptionError if the request's schedule and the options do not go together.
    """
    plans = plan_steps(prepared, options)
    join = functools.cache(Tweaks.within)  # the same objects at all steps, as `Tweaks.turn` requires
    below = prepared.rules.below_share
    asked: list[tuple[Section, Tweaks]] = []  # the section, and the tweaks of its positive passes

    def guide(step: Step, predict: Predict, section: Section) -> Tensor:
        plan = plans[expert_at(step.timestep, experts)][step.index]
        if below is not None and 1 - step.sigma >= below:  # so late the model's rules leave guidance out
            plan = PassPlan(plan.passes[:1], factor=plan.factor)
        if not plan.passes:
            return torch.zeros_like(step.noisy)
        if not asked or asked[0][0] is not section:  # whose conditions are on the device by now
            steered, nag = NO_TWEAKS, options.nag
            if nag.is_on:
                assert section.away is not None, "`needs` asks for the text"
                assert nag.nag_scale is not None
                steer = NormalisedGuidance(nag.nag_scale, nag.nag_tau, nag.nag_alpha)
                steered = Tweaks(away=Away(section.away, steer))
            asked[:] = [(section, steered)]
        calls: dict[Tweaks, dict[int, Conditions]] = {}
        place: dict[Pass, tuple[Tweaks, int]] = {}  # two with the same conditions and tweaks are one
        for one in plan.passes:
            conditions = getattr(section, one.text)
            assert conditions is not None, f"the section has no {one.text} conditions"
            tweaks = join(one.tweaks, plan.tweaks)
            if one.text == "positive":
                tweaks = join(tweaks, asked[0][1])
            calls.setdefault(tweaks, {})[id(conditions)] = conditions
            place[one] = tweaks, id(conditions)
        made = run(calls, predict, section)
        return plan.combine({one: made[where] for one, where in place.items()}, step, section)

    return guide


def plan_steps(prepared: Prepared, options: GuidanceOptions) -> list[tuple[PassPlan, ...]]:
    """List by expert the plan of each step.

    Raises OptionError if the request's schedule and the options do not go together.
    """
    layers = options.skipped_layers
    weakened = Pass("negative", Tweaks(skip_blocks=layers))
    weakens = active_steps(options, prepared.num_steps) if layers else range(0)
    of_all = Tweaks(embedded_guidance=False) if options.disable_embedded_for_cfg else NO_TWEAKS
    rules, rule = prepared.rules, prepared.rules.projection
    if rule is not None or rules.streams:
        refuse_other_formulas(rules, options)
    perturbed = Pass("positive", Tweaks(skip_self_attention=rules.perturbed_blocks))
    isolated = Pass("positive", Tweaks(isolated=True))

    def stream_stages(own: StreamGuidance, scale: float) -> tuple[GuidanceStage, ...]:
        modality = 0 if prepared.joint is None else own.modality - 1
        weights = {NEGATIVE: (scale if own.text is None else own.text) - 1}
        weights |= {perturbed: own.perturbed, isolated: modality}
        weights = {one: weight for one, weight in weights.items() if weight}
        return (guide_stream(own, weights),) if weights else ()

    def plain_stages(index: int, scale: float, momentum: Momentum | None) -> tuple[GuidanceStage, ...]:
        skips = index in weakens
        negative = weakened if skips and options.slg_mode == "uncond" else NEGATIVE
        stages, share = list[GuidanceStage](), options.guidance_rescale
        if options.perp_neg is not None:
            stages.append(perp_neg(scale, options.perp_neg, negative))
        elif scale != 1:  # at 1 the formula gives the positive velocity back
            stages.append((cfg_zero if options.cfgzerostar_scaling else plain_cfg)(scale, negative))
        if stages and rule is not None and momentum is not None:
            if prepared.first_step + index > rule.after_step:
                stages, share = [projected(rule, momentum, negative)], rule.rescale
            else:
                stages = [watched(stages[0], momentum, negative)]
        if skips and options.slg_mode == "original" and options.slg_scale != 0:
            stages.append(add_skipped_layers(weakened, options.slg_scale))
        if stages and share != 0:
            stages.append(rescale(share))
        if stages and rules.norm_limit is not None:
            stages.append(limit_norm(rules.norm_limit))
        if stages and rules.token_side is not None:
            stages.append(keep_norms(rules.token_side))
        return tuple(stages)

    momenta = [None if rule is None else Momentum(rule.momentum) for _ in range(2)]

    def plan(index: int, scale: float | None) -> PassPlan:
        factor = options.cfgzerostar_multiplier if index < options.cfgzerostar_init_steps else 1.0
        made: list[tuple[GuidanceStage, ...]] = [(), ()]
        if scale is not None and rules.streams:
            made = [stream_stages(own, scale) for own in rules.streams]
        elif scale is not None:
            made = [plain_stages(index, scale, momentum) for momentum in momenta]
        stages = made[0], () if prepared.joint is None else made[1]
        passes = [POSITIVE, *(one for stage in chain(*stages) for one in stage.passes)] if factor else ()
        tweaks = NO_TWEAKS if scale is None else of_all
        return PassPlan(tuple(dict.fromkeys(passes)), stages, factor, tweaks)

    return [tuple(plan(*one) for one in enumerate(each)) for each in guidance_scales(prepared, options)]


def refuse_other_formulas(rules: GuidanceRules, options: GuidanceOptions) -> None:
    """Raise OptionError if the options replace a formula that is the model's own."""
    given = {"--cfgzerostar_scaling": options.cfgzerostar_scaling, "--perp_neg": options.perp_neg is not None}
    own = "projected guidance"
    if rules.streams:
        given |= {"--slg_layers": bool(options.skipped_layers)}
        given |= {"--guidance_rescale": options.guidance_rescale != 0}
        own = "for the picture and for the sound"
    for option in (option for option, is_given in given.items() if is_given):
        raise OptionError(
            f"{option} replaces the formula of guidance, and this model has one of its own ({own}). "
            "Leave it out"
        )


def plain_cfg(scale: float, negative: Pass) -> GuidanceStage:
    """Make the stage of CFG: extrapolate from the negative velocity through the positive one.

    Source: Ho and Salimans 2022, arXiv 2207.12598.
    """

    def change(_: Tensor, velocities: Velocities) -> Tensor:
        without = velocities[negative]
        return without + scale * (velocities[POSITIVE] - without)

    return GuidanceStage((POSITIVE, negative), change)


def guidance_scales(prepared: Prepared, options: GuidanceOptions) -> list[tuple[float | None, ...]]:
    """List by expert the guidance scale of each step that runs; None: the positive conditions alone.

    The scales are those of the usual formula, in which 1 turns guidance off. Raises OptionError if the
    request's schedule and the options do not go together.
    """
    schedule, num_steps, found = prepared.asked.cfg_schedule, prepared.num_steps, []
    if prepared.rules.below_share is not None and prepared.rules.below_share <= 0:
        return [(None,) * num_steps] * len(prepared.guidance_scale)  # the first step already has that share
    if schedule and options.cfg_skip_mode != "none":
        raise OptionError(
            f"--cfg_schedule {schedule!r} and --cfg_skip_mode {options.cfg_skip_mode} both say which steps "
            "have guidance: give one of them"
        )
    applied, ratio = (True,) * num_steps, options.cfg_apply_ratio
    if options.cfg_skip_mode != "none" and ratio is not None:
        applied = choose_applied_steps(options.cfg_skip_mode, ratio, num_steps)
    usual = 1 - prepared.rules.off_at
    # beside the prompt's
    streams = prepared.rules.streams
    has_more = any(own.perturbed or own.modality != 1 or own.text not in (None, 1) for own in streams)
    for scale in prepared.guidance_scale:
        if schedule:
            table = parse_cfg_schedule(schedule, num_steps, scale)
            steps = (table.get(step + 1) for step in range(num_steps))
            found.append(tuple(None if one is None else one + usual for one in steps))
        else:  # at 1 the formula gives the positive velocity back
            weight = scale + usual
            guides = weight != 1 or has_more
            found.append(tuple(weight if is_applied and guides else None for is_applied in applied))
    return found


def choose_applied_steps(mode: str, ratio: float, num_steps: int) -> tuple[bool, ...]:
    """Return for each step whether `--cfg_skip_mode` keeps guidance.

    int(num_steps * ratio) steps keep it, with "alternate" about that many. The mode names the steps that skip
    it: early, late, in the middle, or early and late.
    """
    if mode == "alternate":
        # plain doubles: 0.6 added five times is a little below 3, and existing tools depend on that
        applied, due = [], 0.0
        for _ in range(num_steps):
            due += ratio
            applied.append(due >= 1.0)
            if applied[-1]:
                due -= 1.0
        return tuple(applied)
    kept = int(num_steps * ratio)
    skipped = num_steps - kept
    kept_at = {
        "early": range(skipped, num_steps),
        "late": range(kept),
        "early_late": range(skipped // 2, skipped // 2 + kept),
        "middle": [step for step in range(num_steps) if not 0 <= step - (num_steps - skipped) // 2 < skipped],
    }[mode]
    return tuple(step in kept_at for step in range(num_steps))


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
        numbers, colon, scale_text = entry.removeprefix("!").partition(":")
        try:
            first_text, dash, last_text = numbers.strip().partition("-")
            whole = "{!r} is not a whole number"
            if first_text.startswith("e~"):
                every = read_or_explain(int, numbers.strip()[2:], whole)
                if every < 1:
                    raise ValueError("the interval after ~ must be at least 1")
                chosen = range(every, steps + 1, every)
            else:
                first = read_or_explain(int, first_text, whole)
                last = read_or_explain(int, last_text, whole) if dash else first
                if first > last:
                    raise ValueError(f"it runs backwards, from {first} to {last}")
                if first < 1 or last > steps:
                    raise ValueError(f"the steps are 1 to {steps}")
                chosen = range(first, last + 1)
            if entry.startswith("!"):
                excluded.update(chosen)
                continue
            scale = guidance_scale
            if colon:
                scale = read_or_explain(float, scale_text, "the scale {!r} is not a number")
            if colon and not abs(scale) <= MOST_SCALE:  # nan too
                raise ValueError(f"give a scale of at most {MOST_SCALE}")
        except ValueError as error:
            raise OptionError(
                f"--cfg_schedule entry {entry!r}: {error}. Write entries such as 1-10, 20, e~3 or 1-10:6.5, "
                "!5"
            ) from None
        scales.update(dict.fromkeys(chosen, scale))
    return {step: scales[step] for step in sorted(scales.keys() - excluded)}


def read_or_explain(read: Callable[[str], Number], text: str, reason: str) -> Number:
    """Return a number read from a text. Raises ValueError with `reason` and the text."""
    try:
        return read(text)
    except ValueError:
        raise ValueError(reason.format(text.strip())) from None


NO_STEP = "no step uses guidance"


def check_guidance(prepared: Prepared, options: GuidanceOptions = PLAIN_GUIDANCE) -> None:
    """Raise OptionError if the guidance is impossible; warn of its options that have no effect."""
    is_guided = any(scale is not None for scales in guidance_scales(prepared, options) for scale in scales)
    plans = [plan for plans in plan_steps(prepared, options) for plan in plans]
    passes = [one for plan in plans for one in plan.passes]
    steps = options.cfgzerostar_init_steps
    of_zero_star = {
        "--cfgzerostar_scaling": options.cfgzerostar_scaling,
        f"--cfgzerostar_init_steps {steps}": steps > 0,
    }
    for option, is_given in of_zero_star.items():
        if is_given and not is_guided:
            raise OptionError(
                f"{option} needs guidance, and {NO_STEP}: give a --guidance_scale other than "
                f"{prepared.rules.off_at:g} or a --cfg_schedule, or leave it out"
            )
    if not passes:
        raise OptionError(
            f"--cfgzerostar_init_steps {steps}: none of the {len(plans)} steps would call the model. Give "
            "fewer; 1 or 2 are usual"
        )
    text, away = prepared.asked.negative_prompt, prepared.asked.away_prompt
    if away is not None and not options.nag.is_on:
        logger.warning("--nag_prompt %r is ignored because --nag_scale is not given, or turned off", away)
    # without --nag_prompt attention is steered away from the negative one
    is_used = options.nag.is_on and away is None
    if text and not is_used and not any(one.text == "negative" for one in passes):
        reason = f"{NO_STEP} (--guidance_scale)" if not is_guided else "no step has a pass with it"
        if is_guided and options.perp_neg == 0:
            reason = "--perp_neg 0 leaves it out"
        logger.warning("the negative prompt %r is ignored because %s", text, reason)
    given = {
        f"--slg_mode {options.slg_mode}": bool(options.skipped_layers),
        f"--guidance_rescale {options.guidance_rescale:g}": options.guidance_rescale != 0,
        f"--perp_neg {options.perp_neg or 0:g}": options.perp_neg is not None,
        "--disable_embedded_for_cfg": options.disable_embedded_for_cfg,
    }
    layers, _, perp_neg, embedded = given
    reasons: dict[str, str] = {} if is_guided else dict.fromkeys(given, NO_STEP)
    if is_guided and not any(one.tweaks.skip_blocks for one in passes):
        if options.skipped_layers:
            reasons[layers] = why_none_skipped(options, prepared.num_steps)
        if all(texts.negative is None or not texts.negative.text for texts in prepared.prompts.values()):
            reasons[perp_neg] = "the negative prompt is empty"
    if prepared.embedded_guidance is None:
        reasons[embedded] = "the model has no embedded guidance"
    for option, reason in reasons.items():
        if given[option]:
            logger.warning("%s is ignored because %s", option, reason)


def warn_of_low_scales(prepared: Prepared, options: GuidanceOptions = PLAIN_GUIDANCE) -> None:
    """Warn about guidance scales below the one that turns guidance off, which other programs count from 0."""
    request, off = prepared.asked, prepared.rules.off_at
    named: dict[float, str] = {}  # by scale: each is reported once, by the first option that gives it
    if request.guidance_scale is not None:
        named[request.guidance_scale] = "--guidance_scale {} (--l in a prompt line)"
    for expert, scale in request.expert_guidance.items():
        named.setdefault(scale, f"--guidance_scale_{expert} {{}}")
    streams = prepared.rules.streams
    for name, stream in zip(("video", "audio"), streams, strict=False):
        if stream.text is not None:
            named.setdefault(stream.text, f"--{name}_cfg_scale {{}}")
    scheduled = guidance_scales(prepared, options) if request.cfg_schedule else []
    for scales in scheduled:
        for weight in scales:
            if weight is not None:
                named.setdefault(weight - 1 + off, "the scale {} of --cfg_schedule")
    used = {*prepared.guidance_scale, *(stream.text for stream in streams)}
    for scale, option in named.items():
        if scale < off and (scale in used or scheduled):
            logger.warning("%s: %s", option.format(f"{scale:g}"), _low_scale_in_words(scale, off))


def _low_scale_in_words(scale: float, off: float) -> str:
    """Say what a guidance scale below `off`, the one that turns guidance off, does."""
    weight = scale + 1 - off  # of the usual formula, in which 0 is the negative prompt alone
    effect = f"{scale:g} leaves the prompt out"
    if weight:
        effect = f"{scale:g} {'weakens' if weight > 0 else 'steers away from'} the prompt"
    elsewhere = f"; what programs that count from 0 call {scale:g} is {scale + 1:g} here"
    return f"it counts from {off:g} here; {effect}; {off:g} turns guidance off{elsewhere if off else ''}"


def why_none_skipped(options: GuidanceOptions, num_steps: int) -> str:
    """Say why no pass skips the layers of --slg_layers although there is guidance."""
    skipping = active_steps(options, num_steps)
    if options.slg_mode == "original" and options.slg_scale == 0:
        return "--slg_scale is 0"
    if options.perp_neg == 0:
        return "--perp_neg 0 has no negative pass"
    if not skipping:
        return f"--slg_start and --slg_end leave none of the {num_steps} steps"
    return f"none of its steps, {skipping[0] + 1} to {skipping[-1] + 1}, has a negative pass"
