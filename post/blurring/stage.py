"""The stage of this room."""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from modules.devices import choose_compute_dtype
from modules.errors import NothingFoundError, OptionError
from post.blurring.covering import cover
from post.blurring.options import BlurOptions
from post.blurring.tracks import Box, Tracks
from post.compiling import compile_parts
from post.contract import Clip, Picture, Stage
from post.faces.contract import Detector, FoundFace
from post.faces.detectors import check_detector, load_detector
from post.faces.onnx_header import may_be_onnx
from post.faces.retinaface import RetinaFaceDetector
from post.pixels import to_bytes

logger = logging.getLogger(__name__)


def check_blur(options: BlurOptions) -> None:
    """Read the headers of the model files. Raises CheckpointError or OptionError if they do not fit."""
    choose_compute_dtype(options.network.dtype, "--dtype", torch.float32)
    if options.network.compile and may_be_onnx(options.network.model):
        raise OptionError("--compile is for torch, but OpenCV computes .onnx files: leave it out")
    check_detector(options.network.model)


def make_blur(options: BlurOptions, device: torch.device) -> Stage:
    """Load the networks. Raises as `check_blur`."""
    dtype = choose_compute_dtype(options.network.dtype, "--dtype", torch.float32)
    detector = load_detector(options.network.model, device, dtype, options.detection_size or None)
    if isinstance(detector, RetinaFaceDetector):
        compile_parts(options.network, [detector.network])
    return BlurStage(detector, options)


class _Waiting(NamedTuple):
    """A picture that waits until it is known what the next ones show."""

    number: int
    picture: Picture
    is_found: bool  # something was found in it


@dataclass
class _Count:
    """What is said at the end."""

    pictures: int = 0
    found: int = 0  # pictures in which something was found
    held: int = 0  # others in which something is covered all the same


@dataclass(frozen=True)
class BlurStage:
    """Find, follow and cover; pictures with nothing to cover go through as they are."""

    detector: Detector
    options: BlurOptions
    name: str = "yolo_blur"

    def result(self, clip: Clip) -> Clip:
        """Return the clip: neither its size nor its times change."""
        return clip

    def run(self, pictures: Iterator[Picture], clip: Clip) -> Iterator[Picture]:
        """Yield the pictures with everything covered that was found in them or around them.

        `hold` or `lookback` pictures, whichever are more, wait in memory. Raises NothingFoundError if nothing
        was found in any of them.
        """
        options = self.options
        tracks = Tracks(options.hold, options.lookback)
        waiting: deque[_Waiting] = deque()
        count = _Count()
        for index, picture in enumerate(pictures):
            found = self.detector.find(to_bytes(picture.pixels), options.conf)
            boxes = within(found, *picture.pixels.shape[:2])
            tracks.see(index, boxes)
            waiting.append(_Waiting(index, picture, bool(boxes)))
            count.pictures += 1
            count.found += bool(boxes)
            if len(waiting) > max(options.hold, options.lookback):
                yield self._cover(waiting.popleft(), tracks, count)
        if count.pictures and not count.found:
            self._nothing(clip)
        while waiting:
            yield self._cover(waiting.popleft(), tracks, count)
        if count.found:
            _report(clip, count, tracks)

    def _cover(self, waiting: _Waiting, tracks: Tracks, count: _Count) -> Picture:
        boxes = tracks.boxes(waiting.number)
        tracks.forget(waiting.number)
        picture = waiting.picture
        if not boxes:
            return picture
        count.held += not waiting.is_found
        return Picture(cover(picture.pixels, boxes, self.options), picture.start, picture.seconds)

    def _nothing(self, clip: Clip) -> None:
        """Say that nothing was found. Raises NothingFoundError unless that is allowed."""
        least = f"nothing in it scores {self.options.conf} (--conf) or more"
        if not self.options.allow_none:
            raise NothingFoundError(
                f"{clip.path}: nothing was blurred and no file was written: {least}.\n  Lower --conf, look "
                "closer with a larger --detection_size, or write the video as it is with --allow_none."
            )
        logger.warning("%s: nothing was blurred: %s.", clip.path, least)


def within(found: Sequence[FoundFace], height: int, width: int) -> list[Box]:
    """Return the boxes of what was found, at most one picture's size beyond its edges.

    A box that is no number anywhere becomes the whole picture: rather too much is covered than nothing.
    """
    boxes = []
    for each in found:
        edges = (0, 0, width, height) if np.isnan(each.box).any() else each.box
        left, right = (float(np.clip(x, -width, 2 * width)) for x in edges[::2])
        top, bottom = (float(np.clip(y, -height, 2 * height)) for y in edges[1::2])
        if left < right and top < bottom:
            boxes.append((left, top, right, bottom))
    return boxes


def _report(clip: Clip, count: _Count, tracks: Tracks) -> None:
    """Say how much of a video was blurred."""
    if count.pictures == 1:
        logger.info("%s: %d found and blurred.", clip.path.name, tracks.started)
        return
    plain = count.pictures - count.found - count.held
    logger.info(
        "%s: of %d frames, %d with something found, %d blurred only because it was found shortly before or "
        "after, %d left as they are. Tracks: %d, the longest gap in one: %d frames.",
        clip.path.name,
        count.pictures,
        count.found,
        count.held,
        plain,
        tracks.started,
        tracks.longest_gap,
    )
