"""Create the stages of several tools, and run images through them."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from modules.devices import is_out_of_memory
from modules.errors import MemoryPlanError, OptionError
from modules.media.encoding import OutputFrame, in_eight_bits
from modules.media.reading import join_alpha, split_alpha
from postprocessing.blurring.stage import check_blur, make_blur
from postprocessing.chain_options import NamedTools, ToolOptions, prefix_errors
from postprocessing.contract import Clip, Stage
from postprocessing.faces.stage import check_facefix, make_facefix
from postprocessing.interpolation.stage import check_interpolation, make_interpolation
from postprocessing.options import BlurOptions, FacefixOptions, InterpolationOptions, UpscalerOptions
from postprocessing.tiling import check_network, short_reason
from postprocessing.upscaling.stage import check_upscaler, make_upscaler


class _ToolLoaders(NamedTuple):
    """Functions of a tool: one checks its model files, the other loads its networks."""

    check_files: Callable[[Any], None]  # reads the headers of its model files
    load_stage: Callable[[Any, torch.device], Stage]


# by the class of a tool's options
_LOADERS: dict[type, _ToolLoaders] = {
    UpscalerOptions: _ToolLoaders(check_upscaler, make_upscaler),
    InterpolationOptions: _ToolLoaders(check_interpolation, make_interpolation),
    FacefixOptions: _ToolLoaders(check_facefix, make_facefix),
    BlurOptions: _ToolLoaders(check_blur, make_blur),
}


@dataclass(frozen=True)
class NamedStage:
    """A postprocessing stage, and the name that prefixes its messages; "" for no prefix."""

    stage: Stage
    label: str = ""


def check_tools(tools: Sequence[ToolOptions], labels: Sequence[str], device: torch.device) -> None:
    """Read the headers of all model files; `labels` are the tools' names in messages.

    Raises UserError if a file is not suitable, or if the device does not support --compile.
    """
    for (_, options), label in zip(tools, labels, strict=True):
        with prefix_errors(label):
            check_network(options.network, device)
            _LOADERS[type(options)].check_files(options)


def make_stages(
    tools: Sequence[ToolOptions], labels: Sequence[str], device: torch.device
) -> list[NamedStage]:
    """Load the networks of all tools, as stages in the order of the tools.

    Args:
        tools: Tools with their options.
        labels: Name of each tool in messages; "" omits it.
        device: Device of the run.

    Raises:
        UserError: If a model file cannot be used.
    """
    stages = []
    for (_, options), label in zip(tools, labels, strict=True):
        with prefix_errors(label), _explain_memory("its network"):
            stage = _LOADERS[type(options)].load_stage(options, device)
        stages.append(NamedStage(stage, label))
    return stages


def plan_clips(stages: Sequence[NamedStage], clip: Clip) -> list[Clip]:
    """Return the properties of the clip before the first stage and after each stage.

    Raises MediaError or OptionError if a stage cannot process its input.
    """
    clips = [clip]
    for named in stages:
        with prefix_errors(named.label):
            clips.append(named.stage.plan_output(clips[-1]))
    return clips


def run_stages(
    stages: Sequence[NamedStage], frames: Iterator[OutputFrame], clips: Sequence[Clip]
) -> Iterator[OutputFrame]:
    """Chain the stages: each one reads the frames that the previous one yields; return the last results.

    Errors of a stage name its tool. Raises MemoryPlanError if memory runs out.

    Args:
        stages: The stages in order.
        frames: Frames of the input.
        clips: Properties of the clip before the first stage and after each stage, from `plan_clips`.
    """
    prefixer = _ErrorPrefixer()
    frames = prefixer.add_error_prefix(frames, clips[0], "")
    for named, clip in zip(stages, clips, strict=False):  # one clip more: the last result
        frames = prefixer.add_error_prefix(named.stage.run(frames, clip), clip, named.label)
    return frames


class _ErrorPrefixer:
    """Prefix errors with the label of the stage that raised them, not of later stages they pass through."""

    def __init__(self) -> None:
        self._handled: list[BaseException] = []

    def add_error_prefix(
        self, frames: Iterator[OutputFrame], clip: Clip, label: str
    ) -> Iterator[OutputFrame]:
        """Yield the frames of a stage; prefix its errors with `label`, and explain a lack of memory."""
        try:
            with _explain_memory(f"images of {clip.width} x {clip.height}"):
                yield from frames
        except BaseException as error:
            if error in self._handled:  # raised by an earlier stage
                raise
            self._handled.append(error)
            with prefix_errors(label):
                raise


@contextlib.contextmanager
def _explain_memory(what: str) -> Iterator[None]:
    """Turn an out-of-memory error in the `with` block into a MemoryPlanError that names a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryPlanError(
            f"there is too little memory for {what} ({short_reason(error)}).\n"
            "  Use --dtype bf16 or fp16, with GIMMVFI --ds_factor 0.5 or 0.25, smaller images, or close "
            "other programs."
        ) from error


# The tools of --post, which process the decoded frames of a generation before they are written.
Frame = NDArray[np.uint8]  # H W 3, RGB; a single image may have alpha, H W 4
LoadStages = Callable[[Sequence[ToolOptions], Sequence[str], torch.device], list[NamedStage]]


@dataclass
class PostTools:
    """Postprocessing tools of a generation run, loaded for its first video and kept until its end."""

    selected: NamedTools
    device: torch.device
    load: LoadStages = make_stages
    _stages: list[NamedStage] | None = field(default=None, init=False)

    @property
    def hides_content(self) -> bool:
        """Whether a tool hides image content, so that unprocessed frames must not be shown."""
        return self.selected.content_hiding_tool is not None

    def check(self) -> None:
        """Read the headers of all model files of the tools.

        Raises:
            UserError: If a file is not suitable for its tool.
        """
        check_tools(self.selected.tools, self.selected.labels, self.device)

    def check_length(self, frames: int, label: str) -> None:
        """Raise OptionError if a tool needs several frames, but there is only one.

        Args:
            frames: Number of frames.
            label: Name of the frames in the message.
        """
        for (tool, _), name in zip(self.selected.tools, self.selected.labels, strict=True):
            if frames == 1 and tool.needs_video:
                raise OptionError(
                    f"{name} works between the frames of a video, but {label} gives a single one. Omit "
                    f"{name}, or make a video."
                )

    def process(self, frames: Iterator[Frame], fps: float, is_single: bool) -> tuple[Iterator[Frame], float]:
        """Run frames through the postprocessing tools; return the results and their frame rate.

        The networks are loaded in the first call.

        Args:
            frames: The frames.
            fps: Frames per second.
            is_single: Whether there is only one frame.

        Raises:
            UserError: If a tool fails.
        """
        first = next(frames)
        # frames of videos have no alpha channel
        first, alpha = split_alpha(first) if is_single else (first, None)
        # raises if a tool needs a video and gets an image; 2 stands for any larger number of frames
        self.check_length(1 if is_single else 2, "the video")
        if self._stages is None:
            self._stages = self.load(self.selected.tools, self.selected.labels, self.device)
        # NTSC rates such as 30000/1001 have the denominator 1001
        rate = Fraction(fps).limit_denominator(1001)
        clips = plan_clips(self._stages, _describe_clip(first, None if is_single else rate))
        # `first` was taken from the iterator to learn the size
        numbered = enumerate(chain([first], frames))
        inputs = (OutputFrame(pixels, index / rate, 1 / rate) for index, pixels in numbered)
        outputs = run_stages(self._stages, inputs, clips)
        processed = (join_alpha(in_eight_bits(frame.pixels), alpha) for frame in outputs)
        return processed, float(clips[-1].rate or fps)


def _describe_clip(frame: Frame, rate: Fraction | None) -> Clip:
    """Return size, dtype and rate of a clip from its first frame; `rate` is None for an image."""
    height, width = frame.shape[:2]
    return Clip(
        path=Path("the video"),
        width=width,
        height=height,
        rate=rate,
        frames=1 if rate is None else None,
        is_deep=False,
    )
