"""Check the options of guidance for impossible or useless values, before anything loads."""

import logging

from blissful_tuner.guidance import plan_steps
from blissful_tuner.guidance_formulas import active_steps
from blissful_tuner.guidance_options import PLAIN_GUIDANCE, GuidanceOptions
from blissful_tuner.guidance_passes import PassPlan
from blissful_tuner.guidance_steps import guidance_scales
from modules.contract.requests import Prepared
from modules.errors import OptionError

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
