"""Guidance: choose the network passes of each step and combine their velocities.

A strategy is a function that makes a `GuidanceStage` (`guidance_passes`); `plan_steps` says which a step has.
A new one is a file with its function, and a line there.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from blissful_tuner.guidance_formulas import (
    Momentum,
    active_steps,
    add_skipped_layers,
    cfg_zero,
    init_factor,
    limit_norm,
    perp_neg,
    projected,
    rescale,
    watched,
)
from blissful_tuner.guidance_options import GuidanceOptions
from blissful_tuner.guidance_passes import (
    NEGATIVE,
    POSITIVE,
    GuidanceStage,
    Pass,
    PassPlan,
    Velocities,
    make_passes,
)
from blissful_tuner.guidance_steps import guidance_scales
from blissful_tuner.nag import nag_tweaks
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
