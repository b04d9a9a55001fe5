"""The tools by name, as scripts, `--then` and `--post` know them. Standard library only."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from post.blurring.options import BlurOptions, add_blur_arguments
from post.faces.options import FacefixOptions, add_facefix_arguments
from post.interpolation.options import InterpolationOptions, add_interpolation_arguments
from post.upscaling.options import UpscalerOptions, add_upscaler_arguments


@dataclass(frozen=True)
class Tool:
    """One tool: its names, its options, and what it adds to a file's name."""

    name: str
    aliases: tuple[str, ...]  # other names, in lower case
    record: type
    add_arguments: Callable[[argparse.ArgumentParser], None]
    added: Callable[[Any], str]  # options -> SWINIR, VFI
    needs_video: bool = False  # it can do nothing with a single picture
    hides: bool = False  # what was to be seen before must not be in its result, in a cover picture either


TOOLS = (
    Tool(
        "upscaler",
        ("upscale",),
        UpscalerOptions,
        add_upscaler_arguments,
        lambda options: options.mode.upper(),
    ),
    Tool(
        "GIMMVFI",
        ("gimmvfi", "interpolate"),
        InterpolationOptions,
        add_interpolation_arguments,
        lambda _: "VFI",
        needs_video=True,
    ),
    Tool("facefix", (), FacefixOptions, add_facefix_arguments, lambda options: options.mode.upper()),
    Tool("yolo_blur", ("blur",), BlurOptions, add_blur_arguments, lambda _: "blur", hides=True),
)
