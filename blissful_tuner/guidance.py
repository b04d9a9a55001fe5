"""Guidance: how the velocities of a network's passes become one velocity.

A strategy is a `Combine`: given a step, its guidance scale and `predict`, it returns the velocity. Strategies
wrap one another in `make_guidance`; a new idea is a function that wraps a `Combine` and a line there.
`predict` answers a pass that was already made at this step from memory, so a strategy simply asks for every
pass it needs.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from blissful_tuner.cfg_schedule import parse_cfg_schedule
from blissful_tuner.options import GuidanceOptions
from modules.contract.data import Conditions
from modules.contract.generation import NO_TWEAKS, Predict, Request, Section, Tweaks
from modules.errors import OptionError

Guidance = Callable[[int, Predict, Section], Tensor]  # (step from 0, predict, section) -> velocity B C F H W
Combine = Callable[[int, float, Predict, Section], Tensor]  # the same with the guidance scale of the step


def make_guidance(request: Request, options: GuidanceOptions, num_steps: int) -> Guidance:
    """The guidance of one section. `num_steps`: how many steps will be made.

    Raises OptionError where the request's schedule and the options do not go together.
    """
    scales = guidance_scales(request, options, num_steps)
    combine = with_rescaling(with_skipped_layers(plain_cfg, options, num_steps), options.guidance_rescale)

    def guide(step: int, predict: Predict, section: Section) -> Tensor:
        scale = scales[step]
        if scale is None or section.negative is None:
            (velocity,) = predict(section.positive)
            return velocity
        return combine(step, scale, remembering(predict), section)

    return guide


def guidance_scales(request: Request, options: GuidanceOptions, num_steps: int) -> tuple[float | None, ...]:
    """The guidance scale of each step; None where the positive conditions are used alone."""
    scale = 1.0 if request.guidance_scale is None else request.guidance_scale
    if request.cfg_schedule:
        if options.cfg_skip_mode != "none":
            raise OptionError(
                f"--cfg_schedule {request.cfg_schedule!r} and --cfg_skip_mode {options.cfg_skip_mode} both "
                "say which steps have "
                "guidance: give one of them"
            )
        table = parse_cfg_schedule(request.cfg_schedule, num_steps, scale)
        return tuple(table.get(step + 1) for step in range(num_steps))
    if scale == 1.0:  # the formula gives the positive velocity back
        return (None,) * num_steps
    applied = applied_steps(options.cfg_skip_mode, options.cfg_apply_ratio, num_steps)
    return tuple(scale if is_applied else None for is_applied in applied)


def uses_guidance(request: Request) -> bool:
    """Whether any step may need the negative conditions."""
    return bool(request.cfg_schedule) or request.guidance_scale not in (None, 1.0)


def applied_steps(mode: str, ratio: float | None, num_steps: int) -> tuple[bool, ...]:
    """At which steps `--cfg_skip_mode` keeps guidance: int(num_steps * ratio) of them, or about so many for
    "alternate".

    The mode names where guidance is skipped: early, late, in the middle, or early and late.
    """
    if mode == "none" or ratio is None:
        return (True,) * num_steps
    if mode == "alternate":
        return _alternating(ratio, num_steps)
    kept = int(num_steps * ratio)
    skipped = num_steps - kept
    kept_at = {
        "early": range(skipped, num_steps),
        "late": range(kept),
        "early_late": range(skipped // 2, skipped // 2 + kept),
        "middle": [step for step in range(num_steps) if not 0 <= step - (num_steps - skipped) // 2 < skipped],
    }[mode]
    return tuple(step in kept_at for step in range(num_steps))


def _alternating(ratio: float, num_steps: int) -> tuple[bool, ...]:
    # plain doubles: 0.6 added five times is a little below 3, and the known tools follow that
    applied, due = [], 0.0
    for _ in range(num_steps):
        due += ratio
        applied.append(due >= 1.0)
        if applied[-1]:
            due -= 1.0
    return tuple(applied)


def plain_cfg(step: int, scale: float, predict: Predict, section: Section) -> Tensor:
    """Classifier-free guidance: from the negative velocity through the positive one, and beyond for scale >
    1.

    Source: Ho and Salimans 2022, arXiv 2207.12598.
    """
    assert section.negative is not None
    positive, negative = predict(section.positive, section.negative)
    return negative + scale * (positive - negative)


def with_skipped_layers(inner: Combine, options: GuidanceOptions, num_steps: int) -> Combine:
    """Skip-layer guidance: a pass without some blocks shows what is weak about a picture, and guidance leads
    away from it.

    Source: the released code of Stable Diffusion 3.5 ("original"); "uncond" makes no further pass but weakens
    the negative one.
    """
    layers = options.skipped_layers
    active = range(int(options.slg_start * num_steps), int(options.slg_end * num_steps))
    if not layers:
        return inner

    @functools.cache  # the same tweaks at every call: `remembering` knows them by identity
    def without_layers(tweaks: Tweaks) -> Tweaks:
        return replace(tweaks, skip_blocks=tweaks.skip_blocks | layers)

    def uncond(step: int, scale: float, predict: Predict, section: Section) -> Tensor:
        def skipping(*conditions: Conditions, tweaks: Tweaks = NO_TWEAKS) -> tuple[Tensor, ...]:
            skip = without_layers(tweaks)
            return tuple(
                predict(one, tweaks=skip if one is section.negative else tweaks)[0] for one in conditions
            )

        return inner(step, scale, skipping if step in active else predict, section)

    def original(step: int, scale: float, predict: Predict, section: Section) -> Tensor:
        velocity = inner(step, scale, predict, section)
        if step not in active:
            return velocity
        (positive,) = predict(section.positive)
        (skipped,) = predict(section.negative, tweaks=without_layers(NO_TWEAKS))
        return velocity + options.slg_scale * (positive - skipped)

    return uncond if options.slg_mode == "uncond" else original


def with_rescaling(inner: Combine, share: float) -> Combine:
    """Take back, to a share from 0 to 1, what guidance adds to the deviation of the velocity: pictures that
    are too strong.

    Source: Lin et al. 2023, arXiv 2305.08891, section 3.4.
    """
    if share == 0:
        return inner

    def rescaled(step: int, scale: float, predict: Predict, section: Section) -> Tensor:
        velocity = inner(step, scale, predict, section)
        (positive,) = predict(section.positive)
        axes = tuple(range(1, velocity.ndim))  # of each sample by itself
        factor = positive.std(axes, keepdim=True) / velocity.std(axes, keepdim=True)
        return velocity * (share * factor + (1 - share))

    return rescaled


def remembering(predict: Predict) -> Predict:
    """`predict` for one step that makes each pass once, however often it is asked for."""
    made: dict[tuple[int, Tweaks], Tensor] = {}

    def predict_once(*conditions: Conditions, tweaks: Tweaks = NO_TWEAKS) -> tuple[Tensor, ...]:
        missing = [one for one in conditions if (id(one), tweaks) not in made]
        if missing:
            velocities = predict(*missing, tweaks=tweaks)
            made.update(
                {(id(one), tweaks): velocity for one, velocity in zip(missing, velocities, strict=True)}
            )
        return tuple(made[id(one), tweaks] for one in conditions)

    return predict_once
