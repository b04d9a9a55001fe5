"""The stage that interpolates images of a stream."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
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


SHOWN = 5  # times of cuts in the log


NAME = "GIMMVFI"
MIN_SIDE = 128  # sides of the networks' input: smaller ones have no fourth scale to compare at


def check_interpolation(options: InterpolationOptions) -> None:
    """Read the headers of the model files. Raises CheckpointError or OptionError if they do not fit."""
    load_networks(options.network.model, options.kind, torch.device("meta"), torch.float32)


def make_interpolation(options: InterpolationOptions, device: torch.device) -> Stage:
    """Load the networks of frame interpolation. Raises CheckpointError or OptionError if files do not fit."""
    dtype = network_dtype(options.network, device, "GIMM-VFI")
    networks = load_networks(options.network.model, options.kind, device, dtype)
    compile_parts(options.network, networks.parts)
    network = Interpolation(networks.gimm, networks.estimator, float(options.part))
    return Interpolator(options, network, device)


class Interpolator:
    """Stage that inserts generated frames; it stores two frames and their features at a time."""

    name = NAME

    def __init__(self, options: InterpolationOptions, network: Interpolation, device: torch.device) -> None:
        self._options = options
        self._network = network
        self._device = device

    def result(self, clip: Clip) -> Clip:
        """Return the clip with the frames that interpolation adds.

        Raises:
            MediaError: If the clip has one image or is too small.
        """
        factor = self._options.factor
        if factor == 1:
            return clip
        if clip.rate is None:  # the frame count of a file may be wrong: `run` counts
            raise MediaError(f"{clip.path} is one picture: pictures can be made between two or more only.")
        part = self._options.part  # fraction of the size at which motion is computed (--ds_factor)
        # padding of the images to a multiple of `alignment`
        left, right, top, bottom = self._measure_margins(clip.height, clip.width)
        if min(clip.height + top + bottom, clip.width + left + right) * part < MIN_SIDE:
            step = self._options.alignment
            # sides are padded to a multiple of `step`: the smallest side whose padded size is large enough
            needed = (math.ceil(MIN_SIDE / part / step) - 1) * step + 1
            at_part = f" with --ds_factor {self._options.ds_factor:g}" if part < 1 else ""
            raise MediaError(
                f"{clip.path} is {clip.width} x {clip.height}: {NAME} needs at least {needed} pixels in "
                f"width and height{at_part}."
            )
        # none are added after the last frame
        frames = None if clip.frames is None else (clip.frames - 1) * factor + 1
        return replace(clip, rate=clip.rate * factor, frames=frames)

    def run(self, pictures: Iterator[OutputFrame], clip: Clip) -> Iterator[OutputFrame]:
        """Yield all frames, with interpolated frames between them.

        Raises:
            MediaError: If there is only one image.
        """
        if self._options.factor == 1:
            yield from pictures
            return
        cuts: list[Fraction] = []  # beginnings of new scenes
        count = 0
        previous = None
        for image in pictures:
            current = _Shown(image, self._make_frame)
            if previous is not None:
                yield from self._pair(previous, current, clip.is_deep, cuts)
            count += 1
            previous = current
        if previous is None:
            return  # no images: whoever reads the file raises the error
        if count == 1:
            raise MediaError(f"{clip.path} has one picture: pictures can be made between two or more only.")
        last = previous.picture
        # at a constant rate the last image lasts one step of the new rate; if it lasts longer, it is
        # shortened by one step of the old rate at most
        old_duration = 1 / clip.rate if clip.rate else last.seconds
        duration = max(last.seconds / self._options.factor, last.seconds - old_duration)
        yield replace(last, seconds=duration)
        if len(cuts) > SHOWN:
            logger.info("%d scenes began; at their beginnings the picture before is repeated.", len(cuts))

    def _pair(
        self, first: "_Shown", second: "_Shown", is_deep: bool, cuts: list[Fraction]
    ) -> Iterator[OutputFrame]:
        """Yield the first of two frames, then the frames interpolated between them.

        Nothing is interpolated across a cut, or between equal images: the first image is repeated. The time
        of a cut is added to `cuts`. `is_deep` says whether images have more than 8 bits.
        """
        factor = self._options.factor
        start = first.picture.start
        step = (second.picture.start - start) / factor
        # each output frame lasts one step
        yield replace(first.picture, seconds=step)
        is_same = np.array_equal(first.picture.pixels, second.picture.pixels)
        is_cut = not is_same and self._is_cut(first, second)
        if is_cut:
            cuts.append(second.picture.start)
            if len(cuts) <= SHOWN:
                text = "A new scene begins at %s: the picture before it is repeated."
                logger.info(text, clock_time(cuts[-1]))
        new_pixels: Iterator[Pixels]
        if is_same or is_cut:
            new_pixels = repeat(first.picture.pixels, factor - 1)
        else:
            new_pixels = self._interpolate(first, second, is_deep)
        for index, pixels in enumerate(new_pixels, start=1):
            yield OutputFrame(pixels, start + index * step, step)

    def _interpolate(self, first: "_Shown", second: "_Shown", is_deep: bool) -> Iterator[Pixels]:
        times = [number / self._options.factor for number in range(1, self._options.factor)]
        images = self._network.between(first.frame, second.frame, times)
        return (self._make_pixels(image, first.picture, is_deep) for image in images)

    def _is_cut(self, first: "_Shown", second: "_Shown") -> bool:
        threshold = self._options.scene_threshold
        return threshold > 0 and threshold <= scene_distance(first.thumbnail, second.thumbnail)

    def _measure_margins(self, height: int, width: int) -> tuple[int, int, int, int]:
        across, down = (-side % self._options.alignment for side in (width, height))
        return across // 2, across - across // 2, down // 2, down - down // 2

    def _make_frame(self, pixels: Pixels) -> Frame:
        image = to_tensor(pixels, self._device)
        return self._network.frame(pad(image, self._measure_margins(*pixels.shape[:2]), mode="replicate"))

    def _make_pixels(self, image: Tensor, like: OutputFrame, is_deep: bool) -> Pixels:
        """Convert an interpolated image to pixels without its padding; raise an error if it has NaN."""
        height, width = like.pixels.shape[:2]
        left, _, top, _ = self._measure_margins(height, width)
        image = image[..., top : top + height, left : left + width]
        if not bool(image.isfinite().all()):
            what = f"a picture of {NAME} has values that are NaN or infinite"
            network = self._options.network
            if self._network.network.synthesis.dtype != torch.float32:
                raise OptionError(f"--dtype {network.dtype}: {what}. Use --dtype bf16 or fp32.")
            raise CheckpointError(
                f"{network.model}: {what}. A file may be damaged: download or copy it again.", network.model
            )
        return to_pixels(image, is_deep)


class _Shown:
    """A frame of the video, whose features are computed on first use."""

    def __init__(self, picture: OutputFrame, make: Callable[[Pixels], Frame]) -> None:
        self.picture = picture
        self._make = make

    @cached_property
    def frame(self) -> Frame:
        return self._make(self.picture.pixels)

    @cached_property
    def thumbnail(self) -> Thumbnail:
        return thumbnail(self.picture.pixels)
