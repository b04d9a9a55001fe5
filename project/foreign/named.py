"""Take over keys of another trainer's file that are named like our options or keys of dataset.toml."""

import math
from collections.abc import Collection
from typing import Any

from dataset.config import KEYS
from dataset.config_keys import InvalidValue
from dataset.subset_options import SUBSET_KEYS
from modules.mistyped import find_our_option
from modules.options import get_option_info
from project.foreign.contract import is_off, is_on, number
from project.foreign.project import ForeignProject, show
from project.new_options import NewOptions
from project.script_facts import AdoptableOption, ScriptOptions

# also keys of dataset tables
_TRAINING_AND_TABLE_KEYS = frozenset({"discrete_flow_shift", "min_timestep", "max_timestep"})


def adopt_by_name(
    project: ForeignProject, script: ScriptOptions, options_set_by_new: Collection[str]
) -> None:
    """Adopt keys that no rule covers if they are named like our training options or dataset.toml keys.

    1. Adopt or report each key, as a key of dataset.toml, a training option, or an unknown key.
    2. Report unknown keys again if their names are similar to an option of the training script.

    `options_set_by_new` are the options for which `new` would otherwise choose a value itself.
    """
    our_names: set[str] = {*script.accepted, *KEYS, *SUBSET_KEYS, *get_option_info(NewOptions)}
    if project.program.shares_option_names:
        project.our_option_names = frozenset(our_names)
    for key, value in project.keys_without_rule.items():
        if value is None or value in ("", []):
            project.empty_keys.append(show(key))
        elif key in script.accepted or _is_dataset_key(key):
            _adopt_or_report(project, script, key, value, is_set_by_new=key in options_set_by_new)
        elif key in script.rejected:
            # a switch that is off, or a number that turns nothing on, changes nothing here either
            if is_off(value) or str(value) in {"0", "0.0"}:
                project.ineffective_keys.append(show(key))
            else:
                project.report_omitted_value(key, value, script.rejected[key])
        else:
            # no rule covers the key; this program may have it under another name
            our_name = _find_our_name(key, our_names)
            if is_off(value):
                project.ineffective_keys.append(show(key))
            elif our_name is not None:
                _report_key_with_other_name(project, key, our_name)
            else:
                project.unknown_keys.append(show(key))
    project.keys_without_rule = {}
    # unknown keys whose names are similar to one of ours, now that the script is known
    for key in list(project.unknown_keys):
        our_name = _find_our_name(key, our_names)
        if our_name is not None:
            project.unknown_keys.remove(key)
            _report_key_with_other_name(project, key, our_name)


def _is_dataset_key(key: str) -> bool:
    """Return whether a key goes into dataset.toml, and not to the training options."""
    return key in SUBSET_KEYS and key not in _TRAINING_AND_TABLE_KEYS


def _adopt_or_report(
    project: ForeignProject, script: ScriptOptions, key: str, value: Any, is_set_by_new: bool
) -> None:
    """Adopt a key of dataset.toml or a training option; report it as omitted if its value is not allowed."""
    try:
        if _is_dataset_key(key):
            # dataset.toml has the same key
            fact = SUBSET_KEYS[key]
            project.general_keys[key] = fact.value_type.read(_as_plain(value, fact.default))
            project.source_keys[key] = show(key)
            project.adopted_keys.append(show(key))
        else:
            _adopt_option(project, script.accepted[key], key, value, is_set_by_new)
    except InvalidValue as error:  # often without a text: then the key's type says what is allowed
        allowed = SUBSET_KEYS[key].value_type.allowed
        project.report_omitted_value(key, value, str(error) or f"it has to be {allowed}")
    except (ValueError, TypeError, OverflowError) as error:
        project.report_omitted_value(key, value, str(error))


def _as_plain(value: Any, default: Any) -> Any:
    """Convert a value that was written as a string to the type of the default: number or boolean."""
    if isinstance(default, bool):
        return value if isinstance(value, bool) else is_on(value)
    if isinstance(value, str) and isinstance(default, int | float):
        value = number(-math.inf, math.inf)(value)
    if isinstance(default, int) and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _adopt_option(
    project: ForeignProject, option: AdoptableOption, key: str, value: Any, is_set_by_new: bool
) -> None:
    """Adopt the value of an option; with `is_set_by_new`, `new` would otherwise choose a value itself."""
    if option.reaches_out:
        raise ValueError(f"--{key} can only be set on the command line of the training")
    # an "off" value matters only for a switch that is on by default
    turns_off = option.kind == "switch" and (is_set_by_new or option.default is True)
    is_empty = is_off(value) or (option.default is None and str(value) in {"0", "0.0"})
    if is_empty and not turns_off:
        project.ineffective_keys.append(show(key))
        return
    converted = option.read(value)
    project.adopted_keys.append(show(key))
    # written even if it is the default, where `new` would choose another value
    if converted != option.default or is_set_by_new:
        project.training_options[key] = converted
        project.source_keys[key] = show(key)


def _report_key_with_other_name(project: ForeignProject, key: str, our_name: str) -> None:
    if our_name == show(key).split(".")[-1].split(":")[-1]:
        reason = f"{our_name} is an option here too, which may count otherwise: docs/training.md"
    else:
        reason = f"not adopted: this program calls it {our_name}"
    project.report_omitted_key(key, reason)


def _find_our_name(key: str, our_names: Collection[str]) -> str | None:
    last = key.split(".")[-1].split(":")[-1]
    if last in our_names:
        return last
    return find_our_option(last, our_names) or None
