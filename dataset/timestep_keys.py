"""Keys of a table that say which noise levels its items are trained at. Standard library only.

They have the names and meanings of options of the trainers, whose values count where no key is given.
"""

from collections.abc import Mapping
from typing import Any

from dataset import config_keys as forms

NUM_TIMESTEPS = 1000  # in which windows are counted
MAX_SHIFT = 1000

LOW = forms.whole(0, NUM_TIMESTEPS - 1, f"a whole number from 0 to {NUM_TIMESTEPS - 1}, in thousandths")
HIGH = forms.whole(1, NUM_TIMESTEPS, f"a whole number from 1 to {NUM_TIMESTEPS}, in thousandths")
SHIFT = forms.number(
    lambda value: 0 < value <= MAX_SHIFT,
    f"a number above 0, at most {MAX_SHIFT}, such as 3.0; 1 is no shift",
)

WINDOW_KEYS = ("min_timestep", "max_timestep")
SHIFT_KEY = "discrete_flow_shift"
TIMESTEP_KEYS = (*WINDOW_KEYS, SHIFT_KEY)


def find_window_error(values: Mapping[str, Any]) -> str | None:
    """Return an error message if a table's min_timestep is not below its max_timestep; otherwise None."""
    low, high = (values[name] for name in WINDOW_KEYS)
    if low is None or high is None or low < high:
        return None
    return f"min_timestep = {low} is not below max_timestep = {high}, so no noise level is left"


def find_unused(declared: Mapping[str, Any]) -> str | None:
    """Return an error about timestep keys in a validation table, which is never trained on.

    `declared` contains the keys of the table. Returns None if there is no conflict.
    """
    unused = [name for name in TIMESTEP_KEYS if name in declared]
    if not declared.get("validation") or not unused:
        return None
    return (
        f"{' and '.join(unused)} with validation = true: this table is never trained on, and a validation "
        "measures all tables at the same noise levels. Omit one or the other"
    )
