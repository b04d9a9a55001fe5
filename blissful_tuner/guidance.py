"""Guidance: select its steps, scales and passes, and check them before anything loads.

A kind of guidance is a function that makes a `GuidanceStage` (in `guidance_formulas`); `plan_steps` chooses
the stages of each step. A new kind is a function there, and a line here.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from blissful_tuner.guidance_formulas import (
    NEGATIVE,
    POSITIVE,
    GuidanceStage,
    Momentum,
    NormalizedGuidance,
    Pass,
    PassPlan,
    Velocities,
    add_difference,
    cfg_zero,
    feed_momentum,
    guide_chain,
    guide_stream,
    keep_token_norms,
    limit_norm,
    list_skip_layer_steps,
    perp_neg,
    project_chain,
    project_momentum,
    rescale,
    run_passes,
)
from blissful_tuner.options import MAX_SCALE, PLAIN_GUIDANCE, GuidanceOptions, NagOptions
from modules.errors import OptionError
from protocols.data import Conditions
from protocols.requests import Prepared
from protocols.rules import ONE_EXPERT, Expert, GuidanceRules, Projection, StreamGuidance, expert_at
from protocols.steps import NO_OVERRIDES, Guidance, NagText, Overrides, Predict, RunPasses, Section, Step

logger = logging.getLogger(__name__)

Number = TypeVar("Number", int, float)


def make_guidance(
    prepared: Prepared,
    options: GuidanceOptions,
    experts: Sequence[Expert] = ONE_EXPERT,
    run: RunPasses = run_passes,
) -> Guidance:
    """Return the function that runs the network passes of a step and combines them into the guided velocity.

    Args:
        prepared: The request with all values resolved.
        options: Options of guidance other than its scale.
        experts: Transformers for parts of the noise range; each has its own guidance scale.
        run: Runs the passes of a step.

    Raises:
        OptionError: If the request's schedule conflicts with the options.
    """
    plans = plan_steps(prepared, options)
    # cached, so that all steps get the same objects, because overrides are compared by identity
    combine_overrides = functools.cache(Overrides.merge)
    max_guided_signal = prepared.rules.max_signal
    nag_overrides = _NagOverrides(options.nag) if options.nag.is_on else None

    def guide(step: Step, predict: Predict, section: Section) -> Tensor:
        """Run the passes of a step's plan, and return the guided velocity."""
        plan = plans[expert_at(step.timestep, experts)][step.index]
        # some models use no guidance in late steps, at low noise
        if max_guided_signal is not None and 1 - step.sigma >= max_guided_signal:
            plan = PassPlan(plan.passes[:1], velocity_factor=plan.velocity_factor)  # only the positive pass
        if not plan.passes:  # CFG-Zero* with a factor of 0: the first steps do not move
            return torch.zeros_like(step.noisy)
        # a call is identified by its overrides and conditions; passes that share both are computed once
        conditions_by_overrides: dict[Overrides, dict[int, Conditions]] = {}
        call_by_pass: dict[Pass, tuple[Overrides, int]] = {}
        for pass_ in plan.passes:
            conditions = getattr(section, pass_.conditions_name)
            assert conditions is not None, f"the section has no {pass_.conditions_name} conditions"
            # its own overrides, the step's, and those for --nag_scale
            overrides = combine_overrides(pass_.overrides, plan.common_overrides)
            if nag_overrides is not None and pass_.conditions_name == "positive":
                overrides = combine_overrides(overrides, nag_overrides.get_section_overrides(section))
            conditions_by_overrides.setdefault(overrides, {})[id(conditions)] = conditions
            call_by_pass[pass_] = overrides, id(conditions)
        velocity_by_call = run(conditions_by_overrides, predict, section)
        velocities = {pass_: velocity_by_call[call] for pass_, call in call_by_pass.items()}
        return plan.combine(velocities, step, section)

    return guide


class _NagOverrides:
    """Overrides that steer the attention of positive passes away from --nag_prompt.

    They are made once per section, because overrides are compared by identity.
    """

    def __init__(self, options: NagOptions) -> None:
        self._options = options
        self._section: Section | None = None
        self._overrides = NO_OVERRIDES

    def get_section_overrides(self, section: Section) -> Overrides:
        """Return the overrides that apply --nag_prompt in a section (a run of the denoising loop)."""
        if section is not self._section:
            self._section = section
            # Overrides that steer attention away from the section's NAG prompt, `section.nag`.
            nag_options = self._options
            assert section.nag is not None, "`needs` asks for the text"
            assert nag_options.nag_scale is not None
            steer = NormalizedGuidance(nag_options.nag_scale, nag_options.nag_tau, nag_options.nag_alpha)
            self._overrides = Overrides(nag=NagText(section.nag, steer))
        return self._overrides


def plan_steps(prepared: Prepared, options: GuidanceOptions) -> list[tuple[PassPlan, ...]]:
    """Plan the passes of each step; each tuple contains one plan per expert of the model.

    Raises:
        OptionError: If the request's schedule conflicts with the options.
    """
    if prepared.rules.projection is not None or prepared.rules.streams or prepared.rules.references:
        reject_other_formulas(prepared.rules, options)
    planner = _StepPlanner(prepared, options)
    plans = []
    for expert, scales in enumerate(guidance_scales(prepared, options)):
        plans.append(tuple(planner.plan(index, scale, expert) for index, scale in enumerate(scales)))
    return plans


class _StepPlanner:
    """Choose each step's passes and guidance stages; all steps and experts share the same pass objects."""

    def __init__(self, prepared: Prepared, options: GuidanceOptions) -> None:
        """Make the passes that steps may need: weakened, perturbed, isolated, and without audio reference."""
        self._prepared = prepared
        self._options = options
        self._rules = prepared.rules
        layers = options.skipped_layers
        strengths = self._rules.negative_lora_strengths
        # passes are compared by the identity of their overrides, so make each of these only once
        self._negative = NEGATIVE
        if strengths:
            self._negative = Pass("negative", Overrides(stage_lora_strengths=strengths))
        without_layers = Overrides(skip_blocks=layers, stage_lora_strengths=strengths)
        self._pass_without_layers = Pass("negative", without_layers)  # skips --slg_layers
        self._steps_without_layers = range(0)
        if layers:
            self._steps_without_layers = list_skip_layer_steps(options, prepared.num_steps)
        model_skips = Overrides(skip_blocks=self._rules.negative_skips.blocks)
        self._negative_with_model_skips = Pass("negative", model_skips)
        without_self_attention = Overrides(skip_self_attention=self._rules.perturbed_blocks)
        self._pass_without_self_attention = Pass("positive", without_self_attention)
        self._pass_of_isolated_streams = Pass("positive", Overrides(isolate_modalities=True))
        self._pass_without_audio_reference = Pass("positive", Overrides(drop_audio_reference=True))
        self._reference_passes: tuple[Pass, ...] = ()  # the chain of `ReferenceGuidance`, without its end
        if self._rules.references is not None:
            self._reference_passes = tuple(
                NEGATIVE if count is None else Pass("negative", Overrides(max_references=count))
                for count in self._rules.references.counts
            )
        self._guided_overrides = NO_OVERRIDES
        if options.disable_embedded_for_cfg:
            self._guided_overrides = Overrides(embedded_guidance=False)
        rule = self._rules.projection
        # images and audio are guided separately, so each has its own momentum
        self._momentum_by_stream = [None if rule is None else Momentum(rule.momentum) for _ in range(2)]

    def plan(self, index: int, scale: float | None, expert: int) -> PassPlan:
        """Return the plan of one sampling step: its network passes and how their outputs are combined.

        Args:
            index: Index of the step.
            scale: Guidance scale of the step; None uses the positive conditions alone.
            expert: Index of the transformer, which may have its own weights of references.
        """
        options = self._options
        velocity_factor = options.cfgzerostar_multiplier if index < options.cfgzerostar_init_steps else 1.0
        if scale is None:
            return PassPlan((POSITIVE,) if velocity_factor else (), velocity_factor=velocity_factor)
        if self._rules.streams:
            image_rule, audio_rule = self._rules.streams
            image_stages = self._make_stream_stages(image_rule, scale)
            audio_stages = self._make_stream_stages(audio_rule, scale)
        else:
            image_momentum, audio_momentum = self._momentum_by_stream
            image_stages = self._make_plain_stages(index, scale, expert, image_momentum)
            audio_stages = self._make_plain_stages(index, scale, expert, audio_momentum)
        if self._prepared.audio_video_shapes is None:  # the video has no audio
            audio_stages = ()
        passes: list[Pass] = []
        if velocity_factor:  # 0, as in CFG-Zero*'s first steps, makes the velocity 0 without any pass
            passes.append(POSITIVE)
            for stage in (*image_stages, *audio_stages):
                passes += stage.passes
        return PassPlan(
            passes=tuple(dict.fromkeys(passes)),  # each pass runs once, even if several stages use it
            stages=(image_stages, audio_stages),
            velocity_factor=velocity_factor,
            common_overrides=self._guided_overrides,
        )

    def _make_stream_stages(self, rule: StreamGuidance, scale: float) -> tuple[GuidanceStage, ...]:
        """Return the guidance stages of one stream (images or audio), based on its own guidance scales."""
        text_scale = scale if rule.text_scale is None else rule.text_scale
        weights = {
            NEGATIVE: text_scale - 1,
            self._pass_without_self_attention: rule.perturbed_scale,
        }
        if self._prepared.audio_video_shapes is not None:  # there are two streams, which can be isolated
            weights[self._pass_of_isolated_streams] = rule.modality_scale - 1
        weights = {pass_: weight for pass_, weight in weights.items() if weight}  # only passes with an effect
        stages = [guide_stream(weights, rule.rescale)] if weights else []
        if rule.identity_scale:
            stages.append(add_difference(self._pass_without_audio_reference, rule.identity_scale))
        return tuple(stages)

    def _make_plain_stages(
        self, index: int, scale: float, expert: int, momentum: Momentum | None
    ) -> tuple[GuidanceStage, ...]:
        """Return the guidance stages of one step, each a change of the velocity, in the order of application.

        `index` is the step, `expert` the transformer, `momentum` the running sum of earlier differences for
        projected guidance.
        """
        options = self._options
        rules = self._rules
        skips_layers = index in self._steps_without_layers
        may_skip = skips_layers or bool(rules.negative_skips.blocks)
        negative = self._select_negative_pass(index, skips_layers) if may_skip else self._negative
        stages: list[GuidanceStage]
        # the formula that combines the positive and the negative pass
        if options.perp_neg is not None:
            stages = [perp_neg(scale, options.perp_neg, negative)]
        elif rules.references is not None:
            weights = (*rules.references.weights[expert], scale)
            make_stage = project_chain if rules.references.is_projected else guide_chain
            stages = [make_stage(self._reference_passes, weights)]
        elif scale == 1:  # the formula would give the positive velocity back
            stages = []
        elif options.cfgzerostar_scaling:
            stages = [cfg_zero(scale, negative)]
        else:
            stages = [plain_cfg(scale, negative)]
        rescale_fraction = options.guidance_rescale
        if stages and rules.projection is not None and momentum is not None:
            is_projected = self._prepared.first_step + index > rules.projection.after_step
            stages = [_make_projected_stage(stages[0], rules.projection, momentum, negative, is_projected)]
            rescale_fraction = rules.projection.rescale if is_projected else rescale_fraction
        # skip-layer guidance away from the pass with skipped blocks
        if skips_layers and options.slg_mode == "original" and options.slg_scale != 0:
            stages.append(add_difference(self._pass_without_layers, options.slg_scale))
        if stages:  # without guidance there is nothing to rescale
            stages += _list_rescaling_stages(rules, rescale_fraction)
        return tuple(stages)

    def _select_negative_pass(self, index: int, skips_layers: bool) -> Pass:
        """Return the negative pass of a step, with blocks skipped if the options or the model request it."""
        if skips_layers:  # the user's layers replace the blocks that the model skips by default
            return self._pass_without_layers if self._options.slg_mode == "uncond" else self._negative
        skips = self._rules.negative_skips
        step = self._prepared.first_step + index
        if skips.blocks and skips.is_active(step, self._prepared.steps):
            return self._negative_with_model_skips
        return self._negative


def _list_rescaling_stages(rules: GuidanceRules, rescale_fraction: float) -> list[GuidanceStage]:
    """Return the stages that adjust the guided velocity's standard deviation and norm."""
    stages: list[GuidanceStage] = []
    if rescale_fraction != 0:
        stages.append(rescale(rescale_fraction))
    if rules.norm_limit is not None:
        stages.append(limit_norm(rules.norm_limit))
    if rules.norm_patch_size is not None:
        stages.append(keep_token_norms(rules.norm_patch_size))
    return stages


def _make_projected_stage(
    formula: GuidanceStage, rule: Projection, momentum: Momentum, negative: Pass, is_projected: bool
) -> GuidanceStage:
    """Return the stage of projected guidance, which replaces the standard formula after the first steps."""
    if is_projected:
        return project_momentum(rule, momentum, negative)
    # the first steps use the standard formula, but already add to the momentum
    return feed_momentum(formula, momentum, negative)


def reject_other_formulas(rules: GuidanceRules, options: GuidanceOptions) -> None:
    """Raise OptionError if the options replace the guidance formula of a model that needs its own."""
    replacing = {
        "--cfgzerostar_scaling": options.cfgzerostar_scaling,
        "--perp_neg": options.perp_neg is not None,
    }
    # such a model has projected guidance, guidance by references, or rules for each stream
    formula = "projected guidance"
    if rules.references is not None:
        formula = "one for the sources"
        replacing["--slg_layers"] = bool(options.skipped_layers)
    if rules.streams:
        formula = "separate ones for picture and sound"
        replacing["--slg_layers"] = bool(options.skipped_layers)
        replacing["--guidance_rescale"] = options.guidance_rescale != 0
    for option, replaces in replacing.items():
        if replaces:
            raise OptionError(
                f"{option} replaces the guidance formula, but this model needs its own ({formula}). Omit it"
            )


def plain_cfg(scale: float, negative: Pass) -> GuidanceStage:
    """Return the stage of CFG: extrapolate from the negative velocity through the positive one.

    Source: Ho and Salimans 2022, arXiv 2207.12598.
    """

    def change(_: Tensor, velocities: Velocities) -> Tensor:
        """Return the CFG velocity: negative + scale * (positive - negative)."""
        without = velocities[negative]
        return without + scale * (velocities[POSITIVE] - without)

    return GuidanceStage((POSITIVE, negative), change)


def guidance_scales(prepared: Prepared, options: GuidanceOptions) -> list[tuple[float | None, ...]]:
    """Return each transformer's guidance scale in each step; for None, only the positive pass runs.

    A model may have two transformers, for high and low noise. Scales follow the standard formula, in which 1
    turns guidance off.

    Raises:
        OptionError: If the request's schedule conflicts with the options.
    """
    schedule = prepared.request.cfg_schedule
    num_steps = prepared.num_steps
    rules = prepared.rules
    if rules.max_signal is not None and rules.max_signal <= 0:  # guidance ends before the first step
        return [(None,) * num_steps] * len(prepared.guidance_scale)
    # converts a scale of the model to the standard formula
    offset_to_standard = 1 - rules.neutral_scale
    if schedule:
        if options.cfg_skip_mode != "none":
            raise OptionError(
                f"--cfg_schedule {schedule!r} and --cfg_skip_mode {options.cfg_skip_mode} both say which "
                "steps have guidance: pass one of them"
            )
        return [
            _schedule_scales(schedule, num_steps, scale, offset_to_standard)
            for scale in prepared.guidance_scale
        ]
    guided_steps = (True,) * num_steps
    if options.cfg_skip_mode != "none" and options.cfg_apply_ratio is not None:
        guided_steps = select_applied_steps(options.cfg_skip_mode, options.cfg_apply_ratio, num_steps)
    guides_streams = any(map(_has_guidance, rules.streams))
    scales_by_expert: list[tuple[float | None, ...]] = []
    for scale in prepared.guidance_scale:
        standard_scale = scale + offset_to_standard
        # at 1 the formula returns the positive velocity; video and audio may have scales of their own
        step_scale = standard_scale if standard_scale != 1 or guides_streams else None
        scales = [step_scale if is_guided else None for is_guided in guided_steps]
        for step in range(max(num_steps - rules.final_steps, 0), num_steps):
            if scales[step] is not None:
                scales[step] = rules.final_scale + offset_to_standard
        scales_by_expert.append(tuple(scales))
    return scales_by_expert


def _schedule_scales(
    schedule: str, num_steps: int, scale: float, offset_to_standard: float
) -> tuple[float | None, ...]:
    """Return the guidance scale of each step, as --cfg_schedule sets it; None without guidance."""
    scale_by_step = parse_cfg_schedule(schedule, num_steps, scale)
    # schedules count steps from 1
    return tuple(
        scale_by_step[number] + offset_to_standard if number in scale_by_step else None
        for number in range(1, num_steps + 1)
    )


def _has_guidance(stream: StreamGuidance) -> bool:
    """Return whether a stream has guidance settings of its own, besides the request's guidance scale."""
    has_weights = bool(stream.perturbed_scale or stream.identity_scale)
    return has_weights or stream.modality_scale != 1 or stream.text_scale not in (None, 1)


def select_applied_steps(mode: str, ratio: float, num_steps: int) -> tuple[bool, ...]:
    """Return for each step whether `--cfg_skip_mode` keeps guidance.

    int(num_steps * ratio) steps keep it; with "alternate", about that many. The mode names the steps that
    skip guidance: early, late, in the middle, or early and late.
    """
    if mode == "alternate":
        # floats, because existing tools rely on their rounding: 0.6 added five times is a little below 3
        guided_steps = []
        due = 0.0  # accumulated number of steps that should have guidance so far
        for _ in range(num_steps):
            due += ratio
            guided_steps.append(due >= 1.0)
            if guided_steps[-1]:
                due -= 1.0
        return tuple(guided_steps)
    num_applied = int(num_steps * ratio)
    num_skipped = num_steps - num_applied
    middle_start = (num_steps - num_skipped) // 2
    applied_at = {
        "early": range(num_skipped, num_steps),
        "late": range(num_applied),
        "early_late": range(num_skipped // 2, num_skipped // 2 + num_applied),
        "middle": [step for step in range(num_steps) if not 0 <= step - middle_start < num_skipped],
    }[mode]
    return tuple(step in applied_at for step in range(num_steps))


def parse_cfg_schedule(text: str, steps: int, guidance_scale: float) -> dict[int, float]:
    """Return the guidance scale by step number, counted from 1; other steps run without guidance.

    Later entries override earlier ones; exclusions override all entries, wherever they are.

    Args:
        text: Comma-separated `k`, `a-b` or `e~m` (every m-th step), each with an optional `:scale`, by
            default `guidance_scale`; `!` in front excludes.
        steps: Number of steps.
        guidance_scale: Scale of entries without one.

    Raises:
        OptionError: If an entry is not a number, is outside 1..steps, runs backwards, or has a scale that is
            not a number or too large; the message names the entry.
    """
    scales: dict[int, float] = {}
    excluded: set[int] = set()
    for entry in filter(None, (part.strip() for part in text.split(","))):
        numbers, colon, scale_text = entry.removeprefix("!").partition(":")
        try:
            entry_steps = _parse_steps(numbers, num_steps=steps)
            if entry.startswith("!"):
                excluded.update(entry_steps)
                continue
            scale = guidance_scale
            if colon:
                scale = read_or_explain(float, scale_text, "the scale {!r} is not a number")
            if colon and not abs(scale) <= MAX_SCALE:  # written so that NaN fails too
                raise ValueError(f"pass a scale of at most {MAX_SCALE}")
        except ValueError as error:
            raise OptionError(
                f"--cfg_schedule entry {entry!r}: {error}. Write entries such as 1-10, 20, e~3 or 1-10:6.5, "
                "!5"
            ) from None
        scales.update(dict.fromkeys(entry_steps, scale))
    return {step: scales[step] for step in sorted(scales.keys() - excluded)}


def _parse_steps(text: str, num_steps: int) -> range:
    """Parse steps, counted from 1: `k`, `a-b`, or `e~m` for every m-th step; raise ValueError if invalid."""
    text = text.strip()
    not_integer = "{!r} is not a whole number"
    if text.startswith("e~"):
        interval = read_or_explain(int, text.removeprefix("e~"), not_integer)
        if interval < 1:
            raise ValueError("the interval after ~ must be at least 1")
        return range(interval, num_steps + 1, interval)
    first_text, dash, last_text = text.partition("-")
    first = read_or_explain(int, first_text, not_integer)
    last = read_or_explain(int, last_text, not_integer) if dash else first
    if first > last:
        raise ValueError(f"it runs backwards, from {first} to {last}")
    if first < 1 or last > num_steps:
        raise ValueError(f"the steps are 1 to {num_steps}")
    return range(first, last + 1)


def read_or_explain(read: Callable[[str], Number], text: str, reason: str) -> Number:
    """Convert a string to a number with `read`.

    Raises:
        ValueError: If the string is not a number; the message contains `reason` and the string.
    """
    try:
        return read(text)
    except ValueError:
        raise ValueError(reason.format(text.strip())) from None


NO_STEP = "no step uses guidance"


def check_guidance(prepared: Prepared, options: GuidanceOptions = PLAIN_GUIDANCE) -> None:
    """Raise OptionError if guidance options are unusable; warn about options without effect."""
    scales = list(itertools.chain(*guidance_scales(prepared, options)))
    is_guided = any(scale is not None for scale in scales)
    plans = list(itertools.chain(*plan_steps(prepared, options)))
    # CFG-Zero* skips the network in the first steps, possibly in all
    passes = [pass_ for plan in plans for pass_ in plan.passes]
    init_steps = options.cfgzerostar_init_steps
    zero_star_options = {
        "--cfgzerostar_scaling": options.cfgzerostar_scaling,
        f"--cfgzerostar_init_steps {init_steps}": init_steps > 0,
    }
    for option, needs_guidance in zero_star_options.items():
        if needs_guidance and not is_guided:
            raise OptionError(
                f"{option} needs guidance, and {NO_STEP}: pass a --guidance_scale other than "
                f"{prepared.rules.neutral_scale:g} or a --cfg_schedule, or omit it"
            )
    if not passes:
        raise OptionError(
            f"--cfgzerostar_init_steps {init_steps}: none of the {len(plans)} steps would call the model. "
            "Use fewer; 1 or 2 are usual"
        )
    if prepared.request.negative_prompt or prepared.request.nag_prompt is not None:
        _warn_of_unused_prompts(prepared, options, passes, is_guided)
    _warn_of_unused_options(prepared, options, passes, is_guided)


def _warn_of_unused_prompts(
    prepared: Prepared, options: GuidanceOptions, passes: Sequence[Pass], is_guided: bool
) -> None:
    """Warn if a negative prompt or --nag_prompt has no effect on any pass."""
    text = prepared.request.negative_prompt
    nag_prompt = prepared.request.nag_prompt
    if nag_prompt is not None and not options.nag.is_on:
        logger.warning(
            "--nag_prompt %r is ignored because --nag_scale is not given, or turned off", nag_prompt
        )
    # without --nag_prompt attention is steered away from the negative prompt
    is_used_by_nag = options.nag.is_on and nag_prompt is None
    if text and not is_used_by_nag and not any(pass_.conditions_name == "negative" for pass_ in passes):
        if not is_guided:
            reason = f"{NO_STEP} (--guidance_scale)"
        elif options.perp_neg == 0:
            reason = "--perp_neg 0 leaves it out"
        else:
            reason = "no step has a pass with it"
        logger.warning("the negative prompt %r is ignored because %s", text, reason)


def _warn_of_unused_options(
    prepared: Prepared, options: GuidanceOptions, passes: Sequence[Pass], is_guided: bool
) -> None:
    """Warn about each given guidance option that has no effect on these passes."""
    embedded = "--disable_embedded_for_cfg"
    negative_skips = prepared.rules.negative_skips
    is_given = {
        f"--slg_mode {options.slg_mode}": bool(options.skipped_layers),
        f"--guidance_rescale {options.guidance_rescale:g}": options.guidance_rescale != 0,
        f"--perp_neg {options.perp_neg or 0:g}": options.perp_neg is not None,
        embedded: options.disable_embedded_for_cfg,
        negative_skips.option: bool(negative_skips.option),
    }
    given = [option for option, has_value in is_given.items() if has_value]
    if not given:
        return
    reasons: dict[str, str] = {}
    if not is_guided:
        reasons = dict.fromkeys(given, NO_STEP)
    elif not any(pass_.overrides.skip_blocks for pass_ in passes):
        # steps are guided, but no pass skips a layer
        if options.skipped_layers:
            reasons[f"--slg_mode {options.slg_mode}"] = why_none_skipped(options, prepared.num_steps)
        negatives = [texts.negative for texts in prepared.prompts.values()]
        if not any(negative is not None and negative.text for negative in negatives):
            reasons[f"--perp_neg {options.perp_neg or 0:g}"] = "the negative prompt is empty"
        reasons[prepared.rules.negative_skips.option] = f"it acts in none of the {prepared.num_steps} steps"
    if prepared.embedded_guidance is None:
        reasons[embedded] = "the model has no embedded guidance"
    for option, reason in reasons.items():
        if option in given:
            logger.warning("%s is ignored because %s", option, reason)


def warn_about_low_scales(prepared: Prepared, options: GuidanceOptions = PLAIN_GUIDANCE) -> None:
    """Warn about guidance scales below the neutral one, which is 1 for most models and 0 for a few."""
    neutral_scale = prepared.rules.neutral_scale
    scheduled = guidance_scales(prepared, options) if prepared.request.cfg_schedule else []
    used_scales = {*prepared.guidance_scale, *(stream.text_scale for stream in prepared.rules.streams)}
    if not scheduled and all(scale is None or scale >= neutral_scale for scale in used_scales):
        return
    for scale, option in _name_scales(prepared, itertools.chain(*scheduled)).items():
        if scale < neutral_scale and (scale in used_scales or scheduled):
            logger.warning("%s: %s", option, _describe_low_scale(scale, neutral_scale))


def _name_scales(prepared: Prepared, scheduled: Iterable[float | None]) -> dict[float, str]:
    """Return, for messages, which option sets each guidance scale of a request (the first, if several do)."""
    request = prepared.request
    options_by_scale: dict[float, str] = {}
    if request.guidance_scale is not None:
        options_by_scale[request.guidance_scale] = (
            f"--guidance_scale {request.guidance_scale:g} (--l in a prompt line)"
        )
    for expert, scale in request.expert_guidance.items():
        options_by_scale.setdefault(scale, f"--guidance_scale_{expert} {scale:g}")
    for name, stream in zip(("video", "audio"), prepared.rules.streams, strict=False):
        if stream.text_scale is not None:
            options_by_scale.setdefault(stream.text_scale, f"--{name}_cfg_scale {stream.text_scale:g}")
    for standard_scale in scheduled:
        if standard_scale is not None:
            typed_scale = standard_scale - 1 + prepared.rules.neutral_scale
            options_by_scale.setdefault(typed_scale, f"the scale {typed_scale:g} of --cfg_schedule")
    return options_by_scale


def _describe_low_scale(scale: float, neutral_scale: float) -> str:
    """Describe the effect of a guidance scale below `neutral_scale`, the scale without guidance."""
    # in the standard formula 1 turns guidance off, and 0 uses only the negative prompt
    weight = scale + 1 - neutral_scale
    effect = "leaves the prompt out"
    if weight > 0:
        effect = "weakens the prompt"
    elif weight < 0:
        effect = "steers away from the prompt"
    text = f"it counts from {neutral_scale:g} here; {scale:g} {effect}; {neutral_scale:g} turns guidance off"
    if neutral_scale == 0:
        return text
    return f"{text}; what programs that count from 0 call {scale:g} is {scale + 1:g} here"


def why_none_skipped(options: GuidanceOptions, num_steps: int) -> str:
    """Explain why --slg_layers skips layers in no pass although guidance is on."""
    skipping = list_skip_layer_steps(options, num_steps)
    if options.slg_mode == "original" and options.slg_scale == 0:
        return "--slg_scale is 0"
    if options.perp_neg == 0:
        return "--perp_neg 0 has no negative pass"
    if not skipping:
        return f"--slg_start and --slg_end leave none of the {num_steps} steps"
    return f"none of its steps, {skipping[0] + 1} to {skipping[-1] + 1}, has a negative pass"
