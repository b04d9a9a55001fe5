"""Options of the scripts that train a ControlNet. Standard library only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.option_values import Placeholder, option_argv
from modules.options import CHANGEABLE, FREE, option
from modules.speed_options import BASE_FORMS
from stable_diffusion.training_options import StableDiffusionTrainingOptions, gen_img_options

WEIGHTS = "--controlnet_model_name_or_path"
_NONE = "a ControlNet is a copy of the U-Net's first half, and has no such setting. Omit it"
# settings of `training.image_options.control_trainer`
REJECTED: Mapping[str, str] = {
    "network_dim": _NONE,
    "network_dropout": _NONE,
    "network_weights": f"Pass the ControlNet to start from to {WEIGHTS}",
    **{
        switch: f"a ControlNet begins as a copy of the U-Net's weights, and {form.name} rounds them. Omit it"
        for form in BASE_FORMS
        for switch in form.switches
    },
}


def weights_option() -> Any:
    """Declare the option for the ControlNet file to start from."""
    return option(
        "ControlNet to start from: a file, or a folder in diffusers' layout; default: a copy of the U-Net",
        place="there",
        facts=FREE,
        often=True,
    )


def rate_option() -> Any:
    """Declare the option for the learning rate of ControlNet layers that a U-Net does not have."""
    return option(
        "learning rate of the parts that the U-Net does not have: the control image's embedding and "
        "the outputs, which are initialized to zero",
        default=1e-4,
        minimum=0,
        below=1000.0,
        hint="1e-4 is usual",
        facts=CHANGEABLE,
    )


def list_generation_command(
    options: StableDiffusionTrainingOptions,
    flag: str,
    file: Path,
    sample: Mapping[str, Any],
    _: Sequence[str],
) -> list[str]:
    """Return the arguments of gen_img.py, including its name, to use a trained ControlNet or LLLite.

    Args:
        options: Options of the run.
        flag: Option for the file.
        file: The trained file.
        sample: Settings of the image, such as prompt and seed; missing ones are omitted or placeholders.
        _: Ignored; other kinds of networks need it.
    """
    arguments = {
        **gen_img_options(options, sample),
        flag: file,
        "--guide_image_path": sample.get("control_path") or Placeholder("CONTROL_PICTURE"),
        "--control_net_multipliers": (sample.get("extra") or {}).get("control_multiplier"),
        "--prompt": sample.get("prompt") or Placeholder("what it should show"),
        "--outdir": file.parent / "generated",
    }
    return ["gen_img.py", *option_argv(arguments)]
