"""Make the stages of several tools, and lead pictures through them."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modules.devices import is_out_of_memory
from modules.errors import MemoryPlanError
from post.blurring.options import BlurOptions
from post.blurring.stage import check_blur, make_blur
from post.chain_options import ToolOptions, name_tool
from post.contract import Clip, Picture, Stage
from post.faces.options import FacefixOptions
from post.faces.stage import check_facefix, make_facefix
from post.interpolation.options import InterpolationOptions
from post.interpolation.stage import check_interpolation, make_interpolation
from post.precision import check_compiling
from post.tiling import short_reason
from post.upscaling.options import UpscalerOptions
from post.upscaling.stage import check_upscaler, make_upscaler

Check = Callable[[Any], None]  # of the options of a tool
Make = Callable[[Any, torch.device], Stage]
# what reads the headers of each tool's model files, and what loads its networks, by the type of its options
TOOLS: dict[type, tuple[Check, Make]] = {
    UpscalerOptions: (check_upscaler, make_upscaler),
    InterpolationOptions: (check_interpolation, make_interpolation),
    FacefixOptions: (check_facefix, make_facefix),
    BlurOptions: (check_blur, make_blur),
}


@dataclass(frozen=True)
class NamedStage:
    """A stage, and how messages name it in a chain; empty: not at all."""

    stage: Stage
    label: str = ""


def check_tools(tools: Sequence[ToolOptions], labels: Sequence[str], device: torch.device) -> None:
    """Read the headers of all model files. labels: how messages name the tools; empty: not at all.

    Raises UserError if a file does not fit, or if --compile cannot be followed on the device.
    """
    for (_, options), label in zip(tools, labels, strict=True):
        with name_tool(label):
            check, _ = TOOLS[type(options)]
            check(options)
            check_compiling(options.network, device)


def make_stages(
    tools: Sequence[ToolOptions], labels: Sequence[str], device: torch.device
) -> list[NamedStage]:
    """Load the networks of all tools. Raises UserError."""
    stages = []
    for (_, options), label in zip(tools, labels, strict=True):
        with name_tool(label), _explain_memory("its network"):
            _, make = TOOLS[type(options)]
            stages.append(NamedStage(make(options, device), label))
    return stages


def results(stages: Sequence[NamedStage], clip: Clip) -> list[Clip]:
    """Return the clips between the stages, from the first input to the last result.

    Raises MediaError or OptionError if a stage cannot use its input.
    """
    clips = [clip]
    for each in stages:
        with name_tool(each.label):
            clips.append(each.stage.result(clips[-1]))
    return clips


def lead_through(
    stages: Sequence[NamedStage], pictures: Iterator[Picture], clips: Sequence[Clip]
) -> Iterator[Picture]:
    """Yield the results of the last stage. clips: those of `results`.

    A stage's error names it; earlier errors are unchanged. Raises MemoryPlanError if memory ends.
    """
    foreign: list[BaseException] = []
    pictures = _note_errors(pictures, clips[0], "", foreign)
    for each, clip in zip(stages, clips, strict=False):  # one clip more: the last result
        pictures = _note_errors(each.stage.run(pictures, clip), clip, each.label, foreign)
    return pictures


def _note_errors(
    pictures: Iterator[Picture], clip: Clip, label: str, foreign: list[BaseException]
) -> Iterator[Picture]:
    """Pass pictures on; name the tool in an error, unless it is of an earlier one."""
    try:
        with _explain_memory(f"pictures of {clip.width} x {clip.height}"):
            yield from pictures
    except BaseException as error:
        with name_tool("" if error in foreign else label):
            foreign.append(error)
            raise


@contextlib.contextmanager
def _explain_memory(what: str) -> Iterator[None]:
    """Raise MemoryPlanError, with a remedy, if memory ends in the block. what: does not fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryPlanError(
            f"there is too little memory for {what} ({short_reason(error)}).\n"
            "  Use --dtype bf16 or fp16, with GIMMVFI --ds_factor 0.5 or 0.25, smaller pictures, or close "
            "other programs."
        ) from error
