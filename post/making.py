"""From the options of tools to stages."""

from typing import Any

import torch

from modules.installation import import_own
from post.blurring.options import BlurOptions
from post.contract import Stage
from post.faces.options import FacefixOptions
from post.interpolation.options import InterpolationOptions
from post.upscaling.options import UpscalerOptions

# options of a tool -> the module with `check_NAME` and `make_NAME`, and NAME. Only what is asked for is
# imported: every generation could run a tool, and all their networks take a sixth of a second
_STAGES = {
    UpscalerOptions: ("post.upscaling.stage", "upscaler"),
    InterpolationOptions: ("post.interpolation.stage", "interpolation"),
    FacefixOptions: ("post.faces.stage", "facefix"),
    BlurOptions: ("post.blurring.stage", "blur"),
}


def check_tool(options: Any) -> None:
    """Read the headers of a tool's model files. Raises UserError if they do not fit."""
    module, name = _STAGES[type(options)]
    getattr(import_own(module), f"check_{name}")(options)


def make_stage(options: Any, device: torch.device) -> Stage:
    """Load the networks of a tool. Raises UserError if its model files do not fit."""
    module, name = _STAGES[type(options)]
    stage: Stage = getattr(import_own(module), f"make_{name}")(options, device)
    return stage
