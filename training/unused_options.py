"""List the options of a training that have no effect in combination with other options or defaults."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from modules.options import (
    get_argument_name,
    is_set,
    list_idle_reasons,
    option_name,
    option_values,
    options_with,
)
from modules.speed_options import TRAINING_FLAGS
from training.learning_options import PartsOptions
from training.noise_options import LOSS_WEIGHTINGS, NOTHING
from training.options import TrainingOptions


def list_without_effect(
    options: TrainingOptions, family_options: Any = None, more_reasons: Mapping[str, str] | None = None
) -> list[str]:
    """Return one line for each given option that has no effect in combination with the others.

    Most options declare in `acts_if` when they have an effect; options that depend on several option classes
    are added here.

    Args:
        options: Options of the run.
        family_options: The record of the model's own options.
        more_reasons: Reason by option name, for options without effect because of the model or the data.
    """
    reasons = dict(more_reasons or {})
    if options.lora_parts is not None and _replaces_rate(options.lora_parts):
        reasons.setdefault("learning_rate", _explain_replaced_rate(options.lora_parts))
    reasons |= _without_samples(options, options)
    lines = []
    # --weighting_scheme affects the loss weights or the distribution of timesteps, or neither
    weighting = options.timesteps.weighting_scheme
    beginning = f"--weighting_scheme {weighting} has no effect: it"
    if weighting in LOSS_WEIGHTINGS and options.weighted_by == NOTHING:
        lines.append(f"{beginning} weights the loss only with --model_prediction_type sigma_scaled.")
    elif weighting in {"logit_normal", "mode"} and options.timesteps.timestep_sampling != "sigma":
        lines.append(f"{beginning} shapes the draws of --timestep_sampling sigma only.")
    lines += _list_unused(options, reasons, options.typed_options)
    if is_dataclass(family_options):
        family_reasons = _without_samples(options, family_options)
        lines += _list_unused(family_options, family_reasons, options.typed_options)
    # of several attention flags, only the first one counts
    values = option_values(options.speed.attention)
    flags = [flag for flag in TRAINING_FLAGS.values() if values[flag.removeprefix("--")]]
    return [*lines, *(f"{flag} has no effect: {flags[0]} comes first." for flag in flags[1:])]


def _without_samples(options: TrainingOptions, record: Any) -> dict[str, str]:
    """Map each set option that affects only samples to the reason why it has no effect in this run."""
    if options.samples.sample_prompts is not None:
        return {}
    reason = "no samples are made, as --sample_prompts is not given"
    return dict.fromkeys(options_with(type(record), "acts_on", "samples"), reason)


def _replaces_rate(parts: PartsOptions) -> bool:
    """Return whether every trained part has its own learning rate."""
    dit_is_replaced = parts.unet_lr is not None or not parts.trains_dit
    texts_are_replaced = parts.text_encoder_lr is not None or not parts.trains_text_encoders
    return dit_is_replaced and texts_are_replaced


def _explain_replaced_rate(parts: PartsOptions) -> str:
    """Return why --learning_rate has no effect if every trained part has its own learning rate."""
    rates = {"--unet_lr": parts.unet_lr, "--text_encoder_lr": parts.text_encoder_lr}
    match [flag for flag, rate in rates.items() if rate is not None]:
        case []:
            return "no part learns at it"
        case [flag]:
            return f"{flag} replaces it"
        case flags:
            return f"{' and '.join(flags)} replace it"


def _list_unused(record: Any, reasons: Mapping[str, str], typed: Collection[str]) -> Iterator[str]:
    """Yield a line for each given option of a record, and of the records in it, that has no effect."""
    for field in fields(record):
        name = option_name(field)
        value = getattr(record, field.name)
        if is_dataclass(value):
            yield from _list_unused(value, reasons, typed)
            continue
        is_given = is_set(record, field) or get_argument_name(field) in typed
        # `acts_if` declares the conditions under which an option has an effect
        if is_given and (name in reasons or "acts_if" in field.metadata):
            why_unused = [reasons[name]] if name in reasons else list_idle_reasons(record, field)
            if why_unused:
                yield f"--{name} has no effect: {why_unused[0]}."
