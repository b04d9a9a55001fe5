"""The stage that restores faces: find, align, restore, segment, paste."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modules.media.encoding import OutputFrame, Pixels, in_eight_bits, in_sixteen_bits
from modules.onnx_models import may_be_onnx
from postprocessing.contract import Clip, Stage, enlarged_clip, enlarged_size
from postprocessing.faces import restorers
from postprocessing.faces.boxes import (
    TEMPLATE_SIZE,
    Area,
    Detector,
    Matrix,
    alignment,
    crops,
    eye_distance,
    restorable,
)
from postprocessing.faces.detectors import check_detector, load_detector, no_landmarks
from postprocessing.options import FacefixOptions

logger = logging.getLogger(__name__)


# in units of the distance between the eyes: larger changes are motion, not jitter
MOVED = 0.1
Landmarks = NDArray[np.float32]  # 5 2


class LandmarkSmoother:
    """Smooth the landmarks of faces over time, using only the previous image.

    Faces are pasted back where they were cut out, so a slightly wrong landmark does not displace anything.
    """

    def __init__(self, strength: float) -> None:
        """Start with no faces tracked.

        Args:
            strength: Weight of the previous landmarks for a face at rest, from 0 (no damping) to below 1.
        """
        self._strength = strength
        self._last: list[Landmarks] = []

    def smooth(self, landmarks: Sequence[Landmarks]) -> list[Landmarks]:
        """Smooth the landmarks of the faces in the next image; large movements are smoothed less.

        Each face is matched with the nearest one of the previous image, and moved towards its landmarks.
        """
        distances = {
            (new, old): _measure_distance(landmarks[new], self._last[old])
            for new, old in product(range(len(landmarks)), range(len(self._last)))
        }
        damped = list(landmarks)
        matched_old: set[int] = set()
        matched_new: set[int] = set()
        # match the nearest pairs first
        for (new, old), distance in sorted(distances.items(), key=lambda item: item[1]):
            if distance < MOVED and new not in matched_new and old not in matched_old:
                matched_new.add(new)
                matched_old.add(old)
                # falls from `strength` for a face at rest to 0 at MOVED
                old_weight = np.float32(self._strength * (1 - distance / MOVED))
                damped[new] = landmarks[new] + old_weight * (self._last[old] - landmarks[new])
        self._last = damped
        return list(damped)  # a copy, since the next image is compared with `_last`


def _measure_distance(new: Landmarks, old: Landmarks) -> float:
    """Return how far landmarks have moved, relative to the distance between the eyes."""
    return float(np.hypot(*(new - old).T).mean()) / eye_distance(new)


# for masks of `TEMPLATE_SIZE`, in proportion for other sizes
BLUR, SIGMA, BLUR_TIMES = 101, 11.0, 2
FREE = 10  # width in pixels of the edge of a face crop that is never pasted
Plane = NDArray[np.float32]


@dataclass(frozen=True)
class Restored:
    """A restored face, and the mask for pasting it."""

    face: Plane  # S S 3, RGB, 0..1
    mask: Plane  # S S, 0..1: opacity of the face


def soften(is_face: NDArray[np.bool_]) -> Plane:
    """Blur the edges of a face mask: S S, 0..1.

    Args:
        is_face: Mask of the face, S S bool.
    """
    scale = len(is_face) / TEMPLATE_SIZE
    # BLUR is for the template size; the kernel size must be odd
    kernel = 2 * round(BLUR // 2 * scale) + 1
    mask = is_face.astype(np.float32)
    for _ in range(BLUR_TIMES):
        mask = cv2.GaussianBlur(mask, (kernel, kernel), SIGMA * scale)  # type: ignore[assignment]
    margin = max(1, round(FREE * scale))  # the edges of the crop stay as they are
    mask[:margin] = mask[-margin:] = 0
    mask[:, :margin] = mask[:, -margin:] = 0
    return mask


def enlarge(pixels: Pixels, upscale: float) -> Pixels:
    """Resize an image by `upscale`; return the same object if the factor is 1."""
    height, width = pixels.shape[:2]
    size = enlarged_size(width, height, upscale)
    if size == (width, height):
        return pixels
    # the sharp filter would alias where images shrink
    sharp_or_mean = cv2.INTER_LANCZOS4 if upscale > 1 else cv2.INTER_AREA
    result: Pixels = cv2.resize(pixels, size, interpolation=sharp_or_mean)  # type: ignore[assignment]
    return result


def paste(
    pixels: Pixels, matrices: Sequence[Matrix], faces: Iterable[Restored], size: int, upscale: float
) -> Pixels:
    """Paste restored faces into the enlarged image (H W 3); only pixels within the masks change.

    Of overlapping faces, the later one is on top. Values are rounded once.

    Args:
        pixels: The image, H W 3.
        matrices: Matrix from the image to each face of size x size.
        faces: Restored faces, read one at a time so that they need not all be in memory.
        size: Side of a face in pixels.
        upscale: Factor on the size of the image.
    """
    canvas = enlarge(pixels, upscale)
    to_canvas = _make_canvas_matrix(pixels, canvas)
    face_to_canvas = []
    for matrix in matrices:
        # a third row makes the 2 x 3 matrices 3 x 3, so that they can be multiplied
        to_image = np.vstack([cv2.invertAffineTransform(matrix), [[0.0, 0.0, 1.0]]])
        face_to_canvas.append(to_canvas @ to_image)
    regions = [_find_region(matrix, size, canvas) for matrix in face_to_canvas]
    changed = Area(
        left=min(region.left for region in regions),
        top=min(region.top for region in regions),
        right=max(region.right for region in regions),
        bottom=max(region.bottom for region in regions),
    )
    if changed.is_empty:
        return canvas
    white = float(np.iinfo(canvas.dtype).max)
    # only the rectangle around all faces is converted to float32
    changed_values = canvas[changed.slices()].astype(np.float32)
    for region, matrix, face in zip(regions, face_to_canvas, faces, strict=True):
        if not region.is_empty:
            region_values = changed_values[region.slices(changed)]
            _blend(region_values, face, matrix, region, white=white)
    result: Pixels = canvas.copy()  # the canvas may be the caller's image itself
    result[changed.slices()] = np.rint(changed_values).clip(0, white)
    return result


def _make_canvas_matrix(pixels: Pixels, canvas: Pixels) -> NDArray[np.float64]:
    """Return the matrix from the image's pixel coordinates to the pixel coordinates of its enlarged copy."""
    # Both refer to pixel centers.
    across = canvas.shape[1] / pixels.shape[1]
    down = canvas.shape[0] / pixels.shape[0]
    return np.array([[across, 0, (across - 1) / 2], [0, down, (down - 1) / 2], [0, 0, 1]])


def _find_region(matrix: NDArray[np.float64], size: int, canvas: Pixels) -> Area:
    """Return the rectangle of the canvas that a face may change; `matrix` maps the face to the canvas."""
    face_corners = np.array([[-1, -1, 1], [size, -1, 1], [-1, size, 1], [size, size, 1]])
    corners = face_corners @ matrix[:2].T
    left, top = corners.min(axis=0)
    right, bottom = corners.max(axis=0)
    return Area(
        left=max(0, math.floor(left)),
        top=max(0, math.floor(top)),
        right=min(canvas.shape[1], math.ceil(right) + 1),
        bottom=min(canvas.shape[0], math.ceil(bottom) + 1),
    )


def _blend(values: Plane, face: Restored, matrix: NDArray[np.float64], region: Area, white: float) -> None:
    """Blend a restored face into the pixel values of its region; `white` is the largest value."""
    to_region = matrix[:2] - np.array([[0, 0, region.left], [0, 0, region.top]])
    extent = (region.right - region.left, region.bottom - region.top)
    shown = cv2.warpAffine(face.mask, to_region, extent)[..., None]
    colors = cv2.warpAffine(face.face, to_region, extent) * white
    values[:] = shown * colors + (1 - shown) * values


MIN_SCORE, MIN_SCORE_ONNX = 0.97, 0.8  # default minimum score of a face; YuNet's scores are lower
# number of faces per pass of the networks, which bounds the memory for crowds
FACES_AT_ONCE = 4


@dataclass(frozen=True)
class Facefix:
    """Restore faces with loaded networks; no state carries over from one `run` to the next."""

    options: FacefixOptions
    detector: Detector
    restorer: restorers.Restorer
    device: torch.device
    least_score: float
    name: str = "facefix"

    def plan_output(self, clip: Clip) -> Clip:
        """Return the clip with its new size.

        Raises:
            OptionError: If no file can have this size.
        """
        return enlarged_clip(clip, self.options.upscale, "--upscale")

    def run(self, frames: Iterator[OutputFrame], clip: Clip) -> Iterator[OutputFrame]:
        """Yield images with restored faces; images without faces are only scaled."""
        smoother = LandmarkSmoother(self.options.smooth)
        num_frames = 0
        num_changed = 0
        num_faces = 0
        for frame in frames:
            # a matrix aligns each detected face that is to be restored to the template
            faces = self.detector.find(in_eight_bits(frame.pixels), self.least_score)
            if any(face.landmarks is None for face in faces):
                raise no_landmarks(f"--detection_model {self.options.detection_model}")
            size = frame.pixels.shape[1], frame.pixels.shape[0]
            chosen = restorable(faces, size, self.options.only_center)
            landmarks = smoother.smooth([face.landmarks for face in chosen if face.landmarks is not None])
            alignments = (alignment(points, self.restorer.size) for points in landmarks)
            matrices = [matrix for matrix in alignments if matrix is not None]
            num_frames += 1
            num_changed += bool(matrices)
            num_faces += len(matrices)
            pixels = self._restore(frame.pixels, matrices, clip.is_deep)
            yield frame if pixels is frame.pixels else replace(frame, pixels=pixels)
        if num_faces:
            logger.info(
                "%s: %d faces restored in %d of %d images",
                clip.path.name,
                num_faces,
                num_changed,
                num_frames,
            )
        elif num_frames:
            logger.warning(
                "%s: no face was found with a score of %g or more; nothing was restored. A lower "
                "--detection_threshold finds more.",
                clip.path.name,
                self.least_score,
            )

    def _restore(self, pixels: Pixels, matrices: Sequence[Matrix], is_deep: bool) -> Pixels:
        """Restore the faces that `matrices` align, in batches, and paste them into the upscaled frame."""
        if not matrices and self.options.upscale == 1:
            return pixels
        pixels = in_sixteen_bits(pixels) if is_deep else pixels
        if not matrices:
            return enlarge(pixels, self.options.upscale)
        # on a CPU a batch is no faster, and rounds a face differently; compiled code is for one size
        at_once = 1 if self.device.type == "cpu" or self.options.network.compile else FACES_AT_ONCE
        parts = (matrices[first : first + at_once] for first in range(0, len(matrices), at_once))
        restored = chain.from_iterable(self._restore_some(pixels, part) for part in parts)
        return paste(pixels, matrices, restored, size=self.restorer.size, upscale=self.options.upscale)

    @torch.inference_mode()
    def _restore_some(self, pixels: Pixels, matrices: Sequence[Matrix]) -> list[Restored]:
        cut = torch.from_numpy(crops(pixels, matrices, self.restorer.size)).to(self.device)
        faces: Tensor = self.restorer.restore(cut).clamp(-1, 1)
        parts = restorers.face_parts(self.restorer.parse(faces)).cpu().numpy()
        shown = ((faces + 1) / 2).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        strength = np.float32(self.options.strength)
        return [Restored(face, soften(part) * strength) for face, part in zip(shown, parts, strict=True)]


def check_facefix(options: FacefixOptions) -> None:
    """Read the headers of the model files. Raises CheckpointError or OptionError if a file is unusable."""
    files = restorers.find_files(options)
    restorers.load_networks(
        options, files.model, files.parsenet, device=torch.device("meta"), dtype=torch.float32
    )
    check_detector(files.detector, "--detection_model", needs_landmarks=True)


def make_facefix(options: FacefixOptions, device: torch.device) -> Stage:
    """Load the networks of face restoration. Raises CheckpointError or OptionError if a file is unusable."""
    files = restorers.find_files(options)
    restorer = restorers.load_restorer(options, files.model, files.parsenet, device)
    # always float32, regardless of --dtype: scores are compared with a limit, and landmarks must not jitter
    detector = load_detector(files.detector, device, torch.float32, option="--detection_model")
    default_least = MIN_SCORE_ONNX if may_be_onnx(files.detector) else MIN_SCORE
    minimum = options.detection_threshold or default_least
    return Facefix(options, detector, restorer, device=device, least_score=minimum)
