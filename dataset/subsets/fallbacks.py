"""The command line's values of keys, in the form of a dataset file. Standard library only."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from dataset.subset_keys import OTHER_NAMES, SUBSET_KEYS
from dataset.subset_options import SubsetOptions


def fallback_values(given: SubsetOptions) -> dict[str, Any]:
    """Return the values of keys that the command line has."""
    options = {one.name: getattr(given, one.name) for one in fields(given)}
    values: dict[str, Any] = {}
    for name, key in SUBSET_KEYS.items():
        value = options.get(name if key.option is None else key.option)
        if value is not None:
            values[name] = str(value) if isinstance(value, Path) else value
    values |= {name: options[other] for other, name in OTHER_NAMES.items() if options.get(other) is not None}
    if given.size is not None:
        values["resolution"] = list(given.size)
    return values
