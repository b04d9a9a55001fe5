"""`new --train lllite`, `lllite_inpainting` and `controlnet`: networks that follow control images.

For inpainting, each image is its own control image, on which the training script draws masks.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from downloads.catalogue import ModelSet
from project.kinds.contract import RunKind, drop_lora_options, find_catalog_command, find_reason
from project.kinds.whole_model import FORMS, RECIPE

INPAINTING = "lllite_inpainting"
INPAINTING_TITLE = "a ControlNet-LLLite for inpainting"
SWAPPING = "blocks_to_swap"  # ControlNet-LLLite needs all blocks on the GPU


def _change_to_lllite(values: Mapping[str, Any], memory: float) -> dict[str, Any]:
    changed = drop_lora_options(values, memory)
    changed.pop(SWAPPING, None)
    return changed


def _why_no_inpainting(model: ModelSet, memory: float) -> str | None:
    """Return why an inpainting ControlNet-LLLite cannot be trained for a model; None if it can."""
    if find_catalog_command(INPAINTING, model) or not find_catalog_command("lllite", model):
        return find_reason(INPAINTING, INPAINTING_TITLE, model, memory)
    return (
        f"no program reads a mask next to the control images of {model.title}. Its training script makes an "
        "inpainting model instead, with --train_inpainting"
    )


def _change_to_control_net(values: Mapping[str, Any], memory: float) -> dict[str, Any]:
    """Convert LoRA options to those for a ControlNet: half a U-Net in float32, with the least memory."""
    changed = {name: value for name, value in drop_lora_options(values, memory).items() if name not in FORMS}
    return {**changed, **RECIPE}


LLLITE = RunKind(
    name="lllite",
    title="a ControlNet-LLLite",
    find_training_command=partial(find_catalog_command, "lllite"),
    why_unsupported=partial(find_reason, "lllite", "a ControlNet-LLLite"),
    adapt_options=_change_to_lllite,
    architecture_suffix="control-net-lllite",
    uses_control_images=True,
)
LLLITE_INPAINTING = RunKind(
    name=INPAINTING,
    title=INPAINTING_TITLE,
    find_training_command=partial(find_catalog_command, INPAINTING),
    why_unsupported=_why_no_inpainting,
    adapt_options=_change_to_lllite,
    architecture_suffix="control-net-lllite",
    switch="--lllite_cond_in_channels=4",
    uses_control_images=True,
    inpaints_images=True,
)
CONTROL_NET = RunKind(
    name="controlnet",
    title="a ControlNet",
    find_training_command=partial(find_catalog_command, "controlnet"),
    why_unsupported=partial(find_reason, "controlnet", "a ControlNet"),
    adapt_options=_change_to_control_net,
    architecture_suffix="controlnet",
    uses_control_images=True,
    saves_large_files=True,
)
