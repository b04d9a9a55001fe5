"""From the options of tools to stages."""

from collections.abc import Callable
from typing import Any

import torch

from post.blurring.options import BlurOptions
from post.contract import Stage
from post.faces.options import FacefixOptions
from post.interpolation.options import InterpolationOptions
from post.upscaling.options import UpscalerOptions

Check = Callable[[Any], None]
Make = Callable[[Any, torch.device], Stage]


def check_tool(options: Any) -> None:
    """Read the headers of a tool's model files. Raises UserError if they do not fit."""
    check, _ = _import_tools()[type(options)]
    check(options)


def make_stage(options: Any, device: torch.device) -> Stage:
    """Load the networks of a tool. Raises UserError if its model files do not fit."""
    _, make = _import_tools()[type(options)]
    return make(options, device)


def _import_tools() -> dict[type, tuple[Check, Make]]:
    """Return what checks and what makes each tool, by the type of its options.

    Imported only when a tool is asked for: every generation could run one, and all their networks take a
    tenth of a second.
    """
    from post.blurring.stage import check_blur, make_blur
    from post.faces.stage import check_facefix, make_facefix
    from post.interpolation.stage import check_interpolation, make_interpolation
    from post.upscaling.stage import check_upscaler, make_upscaler

    return {
        UpscalerOptions: (check_upscaler, make_upscaler),
        InterpolationOptions: (check_interpolation, make_interpolation),
        FacefixOptions: (check_facefix, make_facefix),
        BlurOptions: (check_blur, make_blur),
    }
