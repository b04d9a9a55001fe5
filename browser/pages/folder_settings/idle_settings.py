"""Find settings that have no effect in a run because of its other settings, as the options declare it."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from modules.errors import UserError
from modules.options import Options, list_idle_reasons, option_name
from modules.pages.language import say
from training.learning_options import LrScheduleOptions
from training.noise_options import LossOptions, TimestepOptions
from training.saving.options import SavingOptions

OPTION_RECORDS: tuple[type[Options], ...] = (LrScheduleOptions, SavingOptions, TimestepOptions, LossOptions)
WARM_UP, SCHEDULE = "lr_warmup_steps", "lr_scheduler"
SCHEDULE_WITHOUT_WARM_UP = "constant"  # schedule that rejects warm-up steps


def explain_idle(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, str]:
    """Return, by option name, the reason why an option that run.toml does not set would have no effect.

    Options that run.toml sets are not included, because the training run itself logs what it ignores.

    Args:
        values: Options that run.toml sets.
    """
    all_values = {**defaults, **values}
    reasons = {name: reason for record in OPTION_RECORDS for name, reason in _list_idle(record, all_values)}
    if all_values.get(SCHEDULE) == SCHEDULE_WITHOUT_WARM_UP:
        reasons[WARM_UP] = say(
            "No effect in this run: %(needed)s is %(value)s.", needed=SCHEDULE, value=SCHEDULE_WITHOUT_WARM_UP
        )
    return {name: reason for name, reason in reasons.items() if name not in values}


def _list_idle(record: type[Options], values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name of each option in `record` that has no effect with these values, and the reason."""
    names = {option_name(field): field.name for field in dataclasses.fields(record)}
    known = {names[name]: value for name, value in values.items() if name in names}
    try:
        made = record.from_defaults(**known)
        for field in dataclasses.fields(record):
            if list_idle_reasons(made, field):
                yield option_name(field), say("No effect in this run, with its other settings.")
    except (UserError, TypeError, ValueError):
        return  # the table shows these values, and the training run reports what is wrong with them
