"""The stage that blurs what a detector finds."""

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from modules.devices import select_compute_dtype
from modules.errors import NothingFoundError, OptionError
from modules.integers import ceil_div
from modules.media.encoding import OutputFrame, Pixels, in_eight_bits
from modules.onnx_models import may_be_onnx
from postprocessing.blurring.tracks import Box, Tracks, widened
from postprocessing.contract import Clip, Stage
from postprocessing.faces.boxes import Area, Detector, FoundFace
from postprocessing.faces.detectors import check_detector, load_detector
from postprocessing.faces.retinaface import RetinaFaceDetector
from postprocessing.options import BlurOptions
from postprocessing.tiling import compile_parts

logger = logging.getLogger(__name__)


MIN_BLUR_FRACTION = 0.5  # minimum size of the blur, as a fraction of the box's longer side
MIN_SIGMA = 0.25  # minimum sigma, as a fraction of the blur's size: smaller ones only use the kernel's middle
MAX_FULL_SIZE_BLUR = 48  # pixels: larger blurs are computed on a copy that is downscaled to this blur size


def cover_boxes(pixels: Pixels, boxes: Iterable[Box], options: BlurOptions) -> Pixels:
    """Return a copy of an image (H W 3) with the boxes covered; pixels outside stay bit-identical."""
    result = pixels.copy()
    for box in sorted(set(boxes)):
        _cover_box(result, box, options)
    return result


def _cover_box(pixels: Pixels, box: Box, options: BlurOptions) -> None:
    """Blur or black out a box and its margin in an image (H W 3), in place."""
    height, width = pixels.shape[:2]
    left, top, right, bottom = widened(box, options.margin)
    core = Area(math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))  # fully covered
    feather = round(options.feather * min(right - left, bottom - top))
    area = core.widened(feather, width, height)
    if area.is_empty:
        return  # outside of the image
    slices = area.slices()
    covered_pixels = _make_cover(pixels, core, area, options)
    if not options.ellipse and not feather:  # opaque up to the edge
        pixels[slices] = covered_pixels
        return
    ellipse = (left, top, right, bottom) if options.ellipse else None
    # 1 inside, falling to 0 over the feathered edge
    opacity = _make_opacity(area, core, ellipse, feather)
    original = pixels[slices].astype(np.float32)
    blended = original + opacity[..., None] * (covered_pixels.astype(np.float32) - original)
    pixels[slices] = np.rint(blended).astype(pixels.dtype)


def _make_cover(pixels: Pixels, core: Area, area: Area, options: BlurOptions) -> Pixels:
    """Return a rectangle of an image, blurred or black."""
    # pixels: The image, H W 3.
    if options.method == "fill":
        return np.zeros_like(pixels[area.slices()])
    # the requested size, but at least MIN_BLUR_FRACTION of the box, which leaves a few spots of color at any
    # resolution, and at most the box, because more would only mix in its surroundings
    longer = max(core.right - core.left, core.bottom - core.top)
    # OpenCV's kernel sizes are odd, hence all the | 1
    strength = options.strength | 1
    size = min(max(strength, math.ceil(longer * MIN_BLUR_FRACTION) | 1), longer | 1)
    sigma = max(options.sigmax * size / strength, MIN_SIGMA * size)
    # blurred together with its surroundings, because the edges of a crop would be mirrored
    height, width = pixels.shape[:2]
    around = area.widened(size // 2, width, height)
    return blurred(pixels[around.slices()], size, sigma)[area.slices(around)]


def blurred(pixels: Pixels, size: int, sigma: float) -> Pixels:
    """Blur pixels with a Gaussian of `size` pixels (odd) and standard deviation `sigma`.

    Large blurs are computed on a smaller copy, which is fast and removes fine detail for good.
    """
    height, width = pixels.shape[:2]
    factor = max(1, size // MAX_FULL_SIZE_BLUR)  # the smaller copy gets a blur of about MAX_FULL_SIZE_BLUR
    # OpenCV needs an odd kernel size
    kernel = (size // factor) | 1
    image: Any = np.ascontiguousarray(pixels)
    if factor > 1:
        small_size = (ceil_div(width, factor), ceil_div(height, factor))  # rounded up
        image = cv2.resize(image, small_size, interpolation=cv2.INTER_AREA)
    image = cv2.GaussianBlur(image, (kernel, kernel), sigma / factor)
    if factor > 1:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    result: Pixels = image
    return result


def _measure_from_ellipse(
    x: NDArray[np.float32], y: NDArray[np.float32], ellipse: Box
) -> NDArray[np.floating[Any]]:
    """Return the approximate distance of pixels from an ellipse; 0 inside of it."""
    left, top, right, bottom = ellipse
    half_width = max((right - left) / 2, 0.5)
    half_height = max((bottom - top) / 2, 0.5)
    # pixels have their center at + 0.5
    horizontal = (x + 0.5 - (left + right) / 2) / half_width
    vertical = (y + 0.5 - (top + bottom) / 2) / half_height
    radius = np.hypot(horizontal, vertical)  # 1 on the ellipse
    distance: NDArray[np.floating[Any]] = np.maximum(radius - 1, 0) * min(half_width, half_height)
    return distance


def _make_opacity(area: Area, core: Area, ellipse: Box | None, feather: int) -> NDArray[np.float32]:
    """Return the opacity of the cover for each pixel of a rectangle, 0..1."""
    # It is 1 in `core`, or in `ellipse` if there is one, and decreases over `feather` pixels around.
    x = np.arange(area.left, area.right, dtype=np.float32)[None]
    y = np.arange(area.top, area.bottom, dtype=np.float32)[:, None]
    if ellipse is None:
        # distance to the core in x; 0 inside
        horizontal = np.maximum(np.maximum(core.left - x, x - core.right + 1), 0)
        vertical = np.maximum(np.maximum(core.top - y, y - core.bottom + 1), 0)
        distance = np.hypot(horizontal, vertical)
    else:
        distance = _measure_from_ellipse(x, y, ellipse)
    opacity = 1 - distance / (feather + 1) if feather else distance <= 0
    return np.clip(opacity, 0, 1).astype(np.float32)


def check_blur(options: BlurOptions) -> None:
    """Read the header of the detector file. Raises CheckpointError or OptionError if it is unusable."""
    if options.network.compile and may_be_onnx(options.network.model):
        raise OptionError("--compile is for torch, but onnxruntime runs .onnx files: omit it")
    check_detector(options.network.model)


def make_blur(options: BlurOptions, device: torch.device) -> Stage:
    """Load the detector. Raises CheckpointError or OptionError if its file is unusable."""
    dtype = select_compute_dtype(options.network.dtype, "--dtype", torch.float32)
    detector = load_detector(options.network.model, device, dtype, options.detection_size or None)
    if isinstance(detector, RetinaFaceDetector):
        compile_parts(options.network, [detector.network])
    return BlurStage(detector, options)


class _BufferedFrame(NamedTuple):
    """A frame that waits until later frames have been searched, because they may add boxes to it."""

    frame_index: int
    frame: OutputFrame
    has_detections: bool


@dataclass
class _FrameCounts:
    """Numbers of frames for the summary in the log."""

    total: int = 0
    with_detections: int = 0
    covered_without_detection: int = 0  # something was found only in neighboring frames

    @property
    def unchanged(self) -> int:
        return self.total - self.with_detections - self.covered_without_detection


@dataclass(frozen=True)
class BlurStage:
    """Stage that finds, tracks and covers objects; frames without any pass unchanged."""

    detector: Detector
    options: BlurOptions
    name: str = "yolo_blur"

    def plan_output(self, clip: Clip) -> Clip:
        """Return the clip unchanged: blurring keeps size and frame rate."""
        return clip

    def run(self, frames: Iterator[OutputFrame], clip: Clip) -> Iterator[OutputFrame]:
        """Yield all frames with the found objects covered, also where only neighboring frames show them.

        A frame is buffered until as many later frames as the larger of --hold and --lookback are searched.

        Raises:
            NothingFoundError: If nothing was found in any frame.
        """
        options = self.options
        tracks = Tracks(options.hold, options.lookback)  # the boxes of each object over time
        buffer: deque[_BufferedFrame] = deque()
        counts = _FrameCounts()
        for index, frame in enumerate(frames):
            height, width = frame.pixels.shape[:2]
            detections = self.detector.find(in_eight_bits(frame.pixels), options.conf)
            boxes = clamp_boxes(detections, height, width)
            tracks.add_detections(index, boxes)
            buffer.append(_BufferedFrame(index, frame, has_detections=bool(boxes)))
            counts.total += 1
            counts.with_detections += bool(boxes)
            if len(buffer) > max(options.hold, options.lookback):
                yield self._cover_frame(buffer.popleft(), tracks, counts)
        if counts.total and not counts.with_detections:
            # raises NothingFoundError, unless options allow it
            # Raise NothingFoundError because nothing was found to blur; with --allow_none, only log it
            minimum = f"nothing in it scores {self.options.conf} (--conf) or more"
            if not self.options.allow_none:
                raise NothingFoundError(
                    f"{clip.path}: nothing was blurred and no file was written: {minimum}.\n  Lower --conf, "
                    "look "
                    "closer with a larger --detection_size, or write the video unchanged with --allow_none."
                )
            logger.warning("%s: nothing was blurred: %s.", clip.path, minimum)
        while buffer:
            yield self._cover_frame(buffer.popleft(), tracks, counts)
        if counts.with_detections:
            _log_summary(clip, counts, tracks)

    def _cover_frame(self, buffered: _BufferedFrame, tracks: Tracks, counts: _FrameCounts) -> OutputFrame:
        """Return a frame with its boxes covered; `tracks` forget what no later frame needs."""
        frame = buffered.frame
        boxes = tracks.boxes(buffered.frame_index)
        tracks.forget(buffered.frame_index)
        if not boxes:
            return frame
        counts.covered_without_detection += not buffered.has_detections
        return replace(frame, pixels=cover_boxes(frame.pixels, boxes, self.options))


def _log_summary(clip: Clip, counts: _FrameCounts, tracks: Tracks) -> None:
    """Log how many frames of a clip, or objects of a single image, were blurred."""
    if counts.total == 1:
        logger.info("%s: %d found and blurred.", clip.path.name, tracks.num_objects)
        return
    logger.info(
        "%s: of %d frames, %d with something found, %d blurred only because it was found shortly "
        "before or after, %d left unchanged. Tracks: %d, the longest gap in one: %d frames.",
        clip.path.name,
        counts.total,
        counts.with_detections,
        counts.covered_without_detection,
        counts.unchanged,
        tracks.num_objects,
        tracks.longest_gap,
    )


def clamp_boxes(faces: Sequence[FoundFace], height: int, width: int) -> list[Box]:
    """Return the boxes of faces, clamped to at most one image size beyond the image.

    A box with NaN coordinates covers the whole image: covering too much is safer than covering nothing.
    """
    boxes = []
    for face in faces:
        edges = (0, 0, width, height) if np.isnan(face.box).any() else face.box
        left, right = (float(np.clip(x, -width, 2 * width)) for x in edges[::2])
        top, bottom = (float(np.clip(y, -height, 2 * height)) for y in edges[1::2])
        if left < right and top < bottom:
            boxes.append((left, top, right, bottom))
    return boxes
