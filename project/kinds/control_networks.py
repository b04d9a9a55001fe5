"""`new --train lllite` and `controlnet`: train a network that follows control pictures, from pairs."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from project.kinds.contract import RunKind, drop_lora_options, find_reason, read_words
from project.kinds.whole_model import FORMS, RECIPE

SWAPPING = "blocks_to_swap"  # ControlNet-LLLite needs all blocks on the card


def _change_to_lllite(values: Mapping[str, Any], memory: float) -> dict[str, Any]:
    changed = drop_lora_options(values, memory)
    changed.pop(SWAPPING, None)
    return changed


def _change_to_control_net(values: Mapping[str, Any], memory: float) -> dict[str, Any]:
    """Return the options of a run that trains half of a U-Net in float32, with the least memory."""
    changed = {name: value for name, value in drop_lora_options(values, memory).items() if name not in FORMS}
    return {**changed, **RECIPE}


LLLITE = RunKind(
    name="lllite",
    title="a ControlNet-LLLite",
    find_words=partial(read_words, "lllite"),
    why_not=partial(find_reason, "lllite", "a ControlNet-LLLite"),
    change=_change_to_lllite,
    ending="control-net-lllite",
    sees_controls=True,
)
CONTROL_NET = RunKind(
    name="controlnet",
    title="a ControlNet",
    find_words=partial(read_words, "controlnet"),
    why_not=partial(find_reason, "controlnet", "a ControlNet"),
    change=_change_to_control_net,
    ending="controlnet",
    sees_controls=True,
    saves_models=True,
)
