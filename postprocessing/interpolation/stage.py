"""The stage that interpolates images of a stream."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import repeat

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from modules.errors import CheckpointError, MediaError, OptionError
from modules.media.encoding import OutputFrame, Pixels
from modules.media.measures import Thumbnail, clock_time, scene_distance, thumbnail
from postprocessing.contract import Clip, Stage, to_pixels, to_tensor
from postprocessing.interpolation.files import load_networks
from postprocessing.interpolation.motion import Frame, Interpolation
from postprocessing.options import InterpolationOptions
from postprocessing.tiling import compile_parts, network_dtype

logger = logging.getLogger(__name__)


MAX_LOGGED_CUTS = 5  # times of cuts in the log


NAME = "GIMMVFI"
MIN_SIDE = 128  # sides of the networks' input: smaller ones have no fourth scale to compare at


def check_interpolation(options: InterpolationOptions) -> None:
    """Read the headers of the model files. Raises CheckpointError or OptionError if a file is unusable."""
    load_networks(options.network.model, options.kind, torch.device("meta"), torch.float32)


def make_interpolation(options: InterpolationOptions, device: torch.device) -> Stage:
    """Load the frame interpolation networks. Raises CheckpointError or OptionError if a file is unusable."""
    dtype = network_dtype(options.network, device, "GIMM-VFI")
    networks = load_networks(options.network.model, options.kind, device, dtype)
    compile_parts(options.network, networks.parts)
    network = Interpolation(networks.gimm, networks.estimator, float(options.motion_scale))
    return Interpolator(options, network, device)


class Interpolator:
    """Stage that inserts generated frames; it stores two frames and their features at a time."""

    name = NAME

    def __init__(self, options: InterpolationOptions, network: Interpolation, device: torch.device) -> None:
        self._options = options
        self._network = network
        self._device = device

    def plan_output(self, clip: Clip) -> Clip:
        """Return the clip with the frames that interpolation adds.

        Raises:
            MediaError: If the clip has one image or is too small.
        """
        factor = self._options.factor
        if factor == 1:
            return clip
        if clip.rate is None:  # the frame count of a file may be wrong: `run` counts
            raise MediaError(f"{clip.path} is one image: images can be made between two or more only.")
        self._check_size(clip)
        # none are added after the last frame
        frames = None if clip.frames is None else (clip.frames - 1) * factor + 1
        return replace(clip, rate=clip.rate * factor, frames=frames)

    def _check_size(self, clip: Clip) -> None:
        """Raise MediaError if a clip is too small for the networks at the size where motion is computed."""
        motion_scale = self._options.motion_scale  # fraction of the clip's size (--ds_factor)
        # padding of the images to a multiple of `alignment`
        left, right, top, bottom = self._measure_margins(clip.height, clip.width)
        if min(clip.height + top + bottom, clip.width + left + right) * motion_scale >= MIN_SIDE:
            return
        step = self._options.alignment
        # the smallest side that is large enough after padding to a multiple of `step`
        min_side = (math.ceil(MIN_SIDE / motion_scale / step) - 1) * step + 1
        with_option = f" with --ds_factor {self._options.ds_factor:g}" if motion_scale < 1 else ""
        raise MediaError(
            f"{clip.path} is {clip.width} x {clip.height}: {NAME} needs at least {min_side} pixels in "
            f"width and height{with_option}."
        )

    def run(self, frames: Iterator[OutputFrame], clip: Clip) -> Iterator[OutputFrame]:
        """Yield all frames, with interpolated frames between them.

        Raises:
            MediaError: If there is only one image.
        """
        if self._options.factor == 1:
            yield from frames
            return
        cuts = _CutLog()
        num_frames = 0
        previous = None
        for frame in frames:
            current = _CachedFrame(frame, self._encode_frame)
            if previous is not None:
                # equal frames need neither interpolation nor scene detection
                is_same = np.array_equal(previous.output.pixels, current.output.pixels)
                has_cut = not is_same and self._has_cut(previous, current)
                if has_cut:
                    cuts.log(frame.start)
                yield from self._fill_gap(previous, current, clip.is_deep, repeats=is_same or has_cut)
            num_frames += 1
            previous = current
        if previous is None:
            return  # no frames: whoever reads the file raises the error
        if num_frames == 1:
            raise MediaError(f"{clip.path} has one image: images can be made between two or more only.")
        # The last frame of a clip with the duration that it has in the output
        # If `rate`, the clip's frames per second, is constant, it lasts one step of the new rate. A frame
        # that lasts longer is shortened by at most one step of the old rate.
        old_step = 1 / clip.rate if clip.rate else previous.output.seconds
        yield replace(
            previous.output,
            seconds=max(previous.output.seconds / self._options.factor, previous.output.seconds - old_step),
        )
        cuts.log_total()

    def _fill_gap(
        self, first: "_CachedFrame", second: "_CachedFrame", is_deep: bool, repeats: bool
    ) -> Iterator[OutputFrame]:
        """Yield the first of two frames, then the frames to insert before the second one."""
        # Inserted frames are interpolated, in 16 bits if `is_deep`. With `repeats`, they are copies of the
        # first frame.
        factor = self._options.factor
        start = first.output.start
        step = (second.output.start - start) / factor
        # each output frame lasts one step
        yield replace(first.output, seconds=step)
        new_pixels: Iterator[Pixels]
        if repeats:
            new_pixels = repeat(first.output.pixels, factor - 1)
        else:
            new_pixels = self._interpolate(first, second, is_deep)
        for index, pixels in enumerate(new_pixels, start=1):
            yield OutputFrame(pixels, start + index * step, step)

    def _interpolate(self, first: "_CachedFrame", second: "_CachedFrame", is_deep: bool) -> Iterator[Pixels]:
        times = [number / self._options.factor for number in range(1, self._options.factor)]
        images = self._network.interpolate(first.frame, second.frame, times)
        return (self._make_pixels(image, first.output, is_deep) for image in images)

    def _has_cut(self, first: "_CachedFrame", second: "_CachedFrame") -> bool:
        """Return whether a new scene begins with the second frame, if --scene_threshold is above 0."""
        threshold = self._options.scene_threshold
        return 0 < threshold <= scene_distance(first.thumbnail, second.thumbnail)

    def _measure_margins(self, height: int, width: int) -> tuple[int, int, int, int]:
        across, down = (-side % self._options.alignment for side in (width, height))
        return across // 2, across - across // 2, down // 2, down - down // 2

    def _encode_frame(self, pixels: Pixels) -> Frame:
        image = to_tensor(pixels, self._device)
        return self._network.encode_image(
            pad(image, self._measure_margins(*pixels.shape[:2]), mode="replicate")
        )

    def _make_pixels(self, image: Tensor, like: OutputFrame, is_deep: bool) -> Pixels:
        """Convert an interpolated image to pixels without its padding; raise an error if it has NaN."""
        height, width = like.pixels.shape[:2]
        left, _, top, _ = self._measure_margins(height, width)
        image = image[..., top : top + height, left : left + width]
        if not bool(image.isfinite().all()):
            what = f"an image of {NAME} has values that are NaN or infinite"
            network = self._options.network
            if self._network.network.synthesis.dtype != torch.float32:
                raise OptionError(f"--dtype {network.dtype}: {what}. Use --dtype bf16 or fp32.")
            raise CheckpointError(
                f"{network.model}: {what}. A file may be damaged: download or copy it again.", network.model
            )
        return to_pixels(image, is_deep)


@dataclass
class _CutLog:
    """Log where new scenes begin: the times of the first ones, and at the end the number of all."""

    num_cuts: int = 0

    def log(self, seconds: Fraction) -> None:
        """Count a new scene that begins at a time, and log it if it is one of the first."""
        self.num_cuts += 1
        if self.num_cuts <= MAX_LOGGED_CUTS:
            text = "A new scene begins at %s: the image before it is repeated."
            logger.info(text, clock_time(seconds))

    def log_total(self) -> None:
        """Log the number of scenes if not all of them were logged."""
        if self.num_cuts > MAX_LOGGED_CUTS:
            text = "%d scenes began; at their beginnings the image before is repeated."
            logger.info(text, self.num_cuts)


class _CachedFrame:
    """A frame of the video, whose features are computed on first use."""

    def __init__(self, output: OutputFrame, encode: Callable[[Pixels], Frame]) -> None:
        self.output = output
        self._encode = encode

    @cached_property
    def frame(self) -> Frame:
        return self._encode(self.output.pixels)

    @cached_property
    def thumbnail(self) -> Thumbnail:
        return thumbnail(self.output.pixels)
