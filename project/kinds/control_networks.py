"""`new --train lllite`, `lllite_inpainting` and `controlnet`: networks that follow control images.

For inpainting, each image is its own control image, on which the training draws masks.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from downloads.catalogue import ModelSet
from project.kinds.contract import RunKind, drop_lora_options, find_reason, read_words
from project.kinds.whole_model import FORMS, RECIPE

INPAINTING = "lllite_inpainting"
INPAINTING_TITLE = "a ControlNet-LLLite for inpainting"
SWAPPING = "blocks_to_swap"  # ControlNet-LLLite needs all blocks on the card


def _change_to_lllite(values: Mapping[str, Any], memory: float) -> dict[str, Any]:
    changed = drop_lora_options(values, memory)
    changed.pop(SWAPPING, None)
    return changed


def _why_no_inpainting(model: ModelSet, memory: float) -> str | None:
    """Return why a model cannot train a ControlNet-LLLite for inpainting; None if it can."""
    if read_words(INPAINTING, model) or not read_words("lllite", model):
        return find_reason(INPAINTING, INPAINTING_TITLE, model, memory)
    return (
        f"no program reads a mask next to the control images of {model.title}. Its training script makes an "
        "inpainting model instead, with --train_inpainting"
    )


def _change_to_control_net(values: Mapping[str, Any], memory: float) -> dict[str, Any]:
    """Convert LoRA options for training a ControlNet: half a U-Net in float32, with the least memory."""
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
LLLITE_INPAINTING = RunKind(
    name=INPAINTING,
    title=INPAINTING_TITLE,
    find_words=partial(read_words, INPAINTING),
    why_not=_why_no_inpainting,
    change=_change_to_lllite,
    ending="control-net-lllite",
    switch="--lllite_cond_in_channels=4",
    sees_controls=True,
    controls_are_images=True,
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
