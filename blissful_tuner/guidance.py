"""Guidance: combine the velocities of a network's passes into one velocity.

A strategy is a `Combine`: given a step, its guidance scale and `predict`, it returns the velocity. Strategies
wrap one another in `make_guidance`; a new one is a function that wraps a `Combine`, and a line there.
`predict` caches the passes of a step, so a strategy can ask for every pass it needs.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from blissful_tuner.cfg_schedule import parse_cfg_schedule
from blissful_tuner.guidance_options import GuidanceOptions
from modules.contract.data import Conditions
from modules.contract.generation import NO_TWEAKS, Predict, Section, Tweaks
from modules.contract.prepared import Prepared
from modules.contract.steps import Guidance, Needs, Step, expert_at
from modules.errors import OptionError

# a `Guidance` that is told the guidance scale of the step
Combine = Callable[[Step, float, Predict, Section], Tensor]


def make_guidance(
    prepared: Prepared, options: GuidanceOptions, experts: Sequence[float] = (0.0,)
) -> Guidance:
    """Make the guidance of one section. experts: `Family.experts`; each has its own guidance scale.

    Raises OptionError if the request's schedule and the options do not go together.
    """
    scales = guidance_scales(prepared, options)
    combine = add_rescaling(
        add_skipped_layers(plain_cfg, options, prepared.num_steps), options.guidance_rescale
    )

    def guide(step: Step, predict: Predict, section: Section) -> Tensor:
        scale = scales[expert_at(step.timestep, experts)][step.index]
        if scale is None or section.negative is None:
            (velocity,) = predict(section.positive)
            return velocity
        return combine(step, scale, remember_passes(predict), section)

    return guide


def guidance_scales(prepared: Prepared, options: GuidanceOptions) -> list[tuple[float | None, ...]]:
    """List by expert the guidance scale of each step that is made; None: the positive conditions alone.

    Raises OptionError if the request's schedule and the options do not go together.
    """
    return [_scales_of_steps(prepared, options, scale) for scale in prepared.guidance_scale]


def _scales_of_steps(prepared: Prepared, options: GuidanceOptions, scale: float) -> tuple[float | None, ...]:
    schedule, num_steps = prepared.asked.cfg_schedule, prepared.num_steps
    if schedule:
        if options.cfg_skip_mode != "none":
            raise OptionError(
                f"--cfg_schedule {schedule!r} and --cfg_skip_mode {options.cfg_skip_mode} both say which "
                "steps have "
                "guidance: give one of them"
            )
        table = parse_cfg_schedule(schedule, num_steps, scale)
        return tuple(table.get(step + 1) for step in range(num_steps))
    if scale == 1.0:  # the formula gives the positive velocity back
        return (None,) * num_steps
    applied = choose_applied_steps(options.cfg_skip_mode, options.cfg_apply_ratio, num_steps)
    return tuple(scale if is_applied else None for is_applied in applied)


def needs(prepared: Prepared, options: GuidanceOptions) -> Needs:
    """Find which texts the guidance of a request asks for, so that no other is encoded.

    Raises OptionError as `make_guidance` does.
    """
    return Needs(
        negative=any(scale is not None for scales in guidance_scales(prepared, options) for scale in scales)
    )


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


def plain_cfg(step: Step, scale: float, predict: Predict, section: Section) -> Tensor:
    """Classifier-free guidance: extrapolate from the negative velocity through the positive one.

    Source: Ho and Salimans 2022, arXiv 2207.12598.
    """
    assert section.negative is not None
    positive, negative = predict(section.positive, section.negative)
    return negative + scale * (positive - negative)


def add_skipped_layers(inner: Combine, options: GuidanceOptions, num_steps: int) -> Combine:
    """Skip-layer guidance: steer away from the velocity of a pass that skips some blocks.

    Source: the released code of Stable Diffusion 3.5 ("original"). "uncond" needs no further pass: it skips
    the blocks in the negative one.
    """
    layers = options.skipped_layers
    active = range(int(options.slg_start * num_steps), int(options.slg_end * num_steps))
    if not layers:
        return inner

    @functools.cache  # the same tweaks at every call: `remember_passes` knows them by identity
    def without_layers(tweaks: Tweaks) -> Tweaks:
        return replace(tweaks, skip_blocks=tweaks.skip_blocks | layers)

    def uncond(step: Step, scale: float, predict: Predict, section: Section) -> Tensor:
        def skipping(*conditions: Conditions, tweaks: Tweaks = NO_TWEAKS) -> tuple[Tensor, ...]:
            skip = without_layers(tweaks)
            return tuple(
                predict(one, tweaks=skip if one is section.negative else tweaks)[0] for one in conditions
            )

        return inner(step, scale, skipping if step.index in active else predict, section)

    def original(step: Step, scale: float, predict: Predict, section: Section) -> Tensor:
        velocity = inner(step, scale, predict, section)
        if step.index not in active:
            return velocity
        (positive,) = predict(section.positive)
        (skipped,) = predict(section.negative, tweaks=without_layers(NO_TWEAKS))
        return velocity + options.slg_scale * (positive - skipped)

    return uncond if options.slg_mode == "uncond" else original


def add_rescaling(inner: Combine, share: float) -> Combine:
    """Undo a share (0 to 1) of the increase that guidance causes in the velocity's standard deviation.

    This corrects overexposed, too contrasty pictures.
    Source: Lin et al. 2023, arXiv 2305.08891, section 3.4.
    """
    if share == 0:
        return inner

    def rescaled(step: Step, scale: float, predict: Predict, section: Section) -> Tensor:
        velocity = inner(step, scale, predict, section)
        (positive,) = predict(section.positive)
        axes = tuple(range(1, velocity.ndim))  # of each sample by itself
        factor = positive.std(axes, keepdim=True) / velocity.std(axes, keepdim=True)
        return velocity * (share * factor + (1 - share))

    return rescaled


def remember_passes(predict: Predict) -> Predict:
    """Wrap `predict` for one step so that each pass runs once, however often it is requested."""
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
