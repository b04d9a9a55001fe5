"""From the options of tools to stages."""

from collections.abc import Callable
from typing import Any

import torch

from post.blurring.options import BlurOptions
from post.blurring.stage import check_blur, make_blur
from post.contract import Stage
from post.faces.options import FacefixOptions
from post.faces.stage import check_facefix, make_facefix
from post.interpolation.options import InterpolationOptions
from post.interpolation.stage import check_interpolation, make_interpolation
from post.upscaling.options import UpscalerOptions
from post.upscaling.stage import check_upscaler, make_upscaler

_CHECKS: dict[type, Callable[[Any], None]] = {
    UpscalerOptions: check_upscaler,
    InterpolationOptions: check_interpolation,
    FacefixOptions: check_facefix,
    BlurOptions: check_blur,
}
_MAKERS: dict[type, Callable[[Any, torch.device], Stage]] = {
    UpscalerOptions: make_upscaler,
    InterpolationOptions: make_interpolation,
    FacefixOptions: make_facefix,
    BlurOptions: make_blur,
}


def check_tool(options: Any) -> None:
    """Read the headers of a tool's model files. Raises UserError if they do not fit."""
    _CHECKS[type(options)](options)


def make_stage(options: Any, device: torch.device) -> Stage:
    """Load the networks of a tool. Raises UserError if its model files do not fit."""
    return _MAKERS[type(options)](options, device)
