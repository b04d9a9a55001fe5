"""Restore the faces of each picture: find, align, restore, segment, paste."""

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

from modules.media.encoding import Picture, Pixels, in_eight_bits, in_sixteen_bits
from post.contract import Clip, Stage, enlarged_clip, enlarged_size
from post.faces import restorers
from post.faces.boxes import TEMPLATE_SIZE, Detector, Matrix, alignment, crops, eye_distance, restorable
from post.faces.detectors import check_detector, load_detector, no_landmarks
from post.faces.onnx_header import may_be_onnx
from post.options import FacefixOptions

logger = logging.getLogger(__name__)


# as a part of the distance between the eyes: larger changes are motion, not trembling
MOVED = 0.1
Landmarks = NDArray[np.float32]  # 5 2


class SteadyLandmarks:
    """Damp the jitter of detected landmarks; only the faces of the last picture are remembered.

    Faces are pasted where they were cut out, so a slightly wrong landmark displaces nothing.
    """

    def __init__(self, strength: float) -> None:
        """strength: share of the last landmarks that a face at rest keeps: 0 (no damping) to below 1."""
        self._strength = strength
        self._last: list[Landmarks] = []

    def steady(self, found: Sequence[Landmarks]) -> list[Landmarks]:
        """Return the landmarks of the next picture's faces, damped the less the more they have moved."""
        far = {
            (new, old): _distance(found[new], self._last[old])
            for new, old in product(range(len(found)), range(len(self._last)))
        }
        steadied = list(found)
        olds: set[int] = set()
        news: set[int] = set()
        for (new, old), distance in sorted(far.items(), key=lambda item: item[1]):
            if distance < MOVED and new not in news and old not in olds:
                news.add(new)
                olds.add(old)
                kept = np.float32(self._strength * (1 - distance / MOVED))
                steadied[new] = found[new] + kept * (self._last[old] - found[new])
        self._last = steadied
        return list(steadied)


def _distance(new: Landmarks, old: Landmarks) -> float:
    """Return the distance of landmarks from earlier ones, in units of the distance between the eyes."""
    return float(np.hypot(*(new - old).T).mean()) / eye_distance(new)


# for masks of `TEMPLATE_SIZE`, in proportion for other sizes
BLUR, SIGMA, BLUR_TIMES = 101, 11.0, 2
FREE = 10  # pixels at the edge of a face that are never pasted
Plane = NDArray[np.float32]


@dataclass(frozen=True)
class Restored:
    """A restored face and the mask to paste it with."""

    face: Plane  # S S 3, RGB, 0..1
    mask: Plane  # S S, 0..1: how much of it is shown


def soften(is_face: NDArray[np.bool_]) -> Plane:
    """Return a mask with soft edges, S S, 0..1. is_face: S S, True inside the face."""
    scale = len(is_face) / TEMPLATE_SIZE
    kernel = 2 * round(BLUR // 2 * scale) + 1
    mask = is_face.astype(np.float32)
    for _ in range(BLUR_TIMES):
        mask = cv2.GaussianBlur(mask, (kernel, kernel), SIGMA * scale)  # type: ignore[assignment]
    free = max(1, round(FREE * scale))
    mask[:free] = mask[-free:] = 0
    mask[:, :free] = mask[:, -free:] = 0
    return mask


def enlarge(pixels: Pixels, upscale: float) -> Pixels:
    """Scale a picture by `upscale`; returns the same object for 1."""
    height, width = pixels.shape[:2]
    size = enlarged_size(width, height, upscale)
    if size == (width, height):
        return pixels
    # the sharp filter would alias where pictures shrink
    sharp_or_mean = cv2.INTER_LANCZOS4 if upscale > 1 else cv2.INTER_AREA
    result: Pixels = cv2.resize(pixels, size, interpolation=sharp_or_mean)  # type: ignore[assignment]
    return result


def paste(
    pixels: Pixels, matrices: Sequence[Matrix], faces: Iterable[Restored], size: int, upscale: float
) -> Pixels:
    """Return the enlarged picture (H W 3) with faces in it; where all masks are 0 no value changes.

    matrices: from the picture to each face, size x size. faces: read one at a time, so that not all must be
    in memory. Of overlapping faces, the later one lies on top. Values are rounded once.
    """
    canvas = enlarge(pixels, upscale)
    across, down = canvas.shape[1] / pixels.shape[1], canvas.shape[0] / pixels.shape[0]
    # from places in the picture to those in the enlarged one; pixels have centres
    to_canvas = np.array([[across, 0, (across - 1) / 2], [0, down, (down - 1) / 2], [0, 0, 1]])
    back, areas = [], []
    for matrix in matrices:
        back.append(to_canvas @ np.vstack([cv2.invertAffineTransform(matrix), [[0.0, 0.0, 1.0]]]))
        corners = np.array([[-1, -1, 1], [size, -1, 1], [-1, size, 1], [size, size, 1]]) @ back[-1][:2].T
        x0, y0 = (max(0, math.floor(value)) for value in corners.min(axis=0))
        x1, y1 = (math.ceil(value) + 1 for value in corners.max(axis=0))
        areas.append((x0, y0, min(canvas.shape[1], x1), min(canvas.shape[0], y1)))
    left, top = (min(area[side] for area in areas) for side in (0, 1))
    right, bottom = (max(area[side] for area in areas) for side in (2, 3))
    if left >= right or top >= bottom:
        return canvas
    most = float(np.iinfo(canvas.dtype).max)
    region = canvas[top:bottom, left:right].astype(np.float32)
    for (x0, y0, x1, y1), there, face in zip(areas, back, faces, strict=True):
        if x0 >= x1 or y0 >= y1:
            continue
        here = there[:2] - np.array([[0, 0, x0], [0, 0, y0]])
        shown = cv2.warpAffine(face.mask, here, (x1 - x0, y1 - y0))[..., None]
        colours = cv2.warpAffine(face.face, here, (x1 - x0, y1 - y0)) * most
        part = region[y0 - top : y1 - top, x0 - left : x1 - left]
        part[:] = shown * colours + (1 - shown) * part
    # a copy: the picture itself belongs to whoever gave it
    result: Pixels = canvas.copy()
    result[top:bottom, left:right] = np.rint(region).clip(0, most)
    return result


LEAST_SCORE, LEAST_SCORE_ONNX = 0.97, 0.8  # of a face; YuNet's scores are lower
# in one pass of the networks: a crowd must not take more memory than that
FACES_AT_ONCE = 4


@dataclass(frozen=True)
class Facefix:
    """Restore faces with loaded networks. Nothing is remembered from one `run` to the next."""

    options: FacefixOptions
    detector: Detector
    restorer: restorers.Restorer
    device: torch.device
    least_score: float
    name: str = "facefix"

    def result(self, clip: Clip) -> Clip:
        """Return the clip with its new size. Raises OptionError for a size that no file can have."""
        return enlarged_clip(clip, self.options.upscale, "--upscale")

    def run(self, pictures: Iterator[Picture], clip: Clip) -> Iterator[Picture]:
        """Yield the pictures with restored faces; pictures without a face are only scaled."""
        steady = SteadyLandmarks(self.options.smooth)
        seen = changed = faces = 0
        for picture in pictures:
            found = self.detector.find(in_eight_bits(picture.pixels), self.least_score)
            if any(face.landmarks is None for face in found):
                raise no_landmarks(f"--detection_model {self.options.detection_model}")
            size = picture.pixels.shape[1], picture.pixels.shape[0]
            shown = restorable(found, size, self.options.only_center)
            landmarks = steady.steady([face.landmarks for face in shown if face.landmarks is not None])
            placed = (alignment(points, self.restorer.size) for points in landmarks)
            matrices = [matrix for matrix in placed if matrix is not None]
            seen, changed, faces = seen + 1, changed + bool(matrices), faces + len(matrices)
            pixels = self._restore(picture.pixels, matrices, clip.is_deep)
            yield picture if pixels is picture.pixels else replace(picture, pixels=pixels)
        if faces:
            logger.info("%s: %d faces restored in %d of %d pictures", clip.path.name, faces, changed, seen)
        elif seen:
            logger.warning(
                "%s: no face was found with a score of %g or more; nothing was restored. A lower "
                "--detection_threshold finds more.",
                clip.path.name,
                self.least_score,
            )

    def _restore(self, pixels: Pixels, matrices: Sequence[Matrix], is_deep: bool) -> Pixels:
        if not matrices and self.options.upscale == 1:
            return pixels
        pixels = in_sixteen_bits(pixels) if is_deep else pixels
        if not matrices:
            return enlarge(pixels, self.options.upscale)
        # on a CPU a batch is no faster, and rounds a face differently; compiled code is for one size
        at_once = 1 if self.device.type == "cpu" or self.options.network.compile else FACES_AT_ONCE
        parts = (matrices[first : first + at_once] for first in range(0, len(matrices), at_once))
        restored = chain.from_iterable(self._restore_some(pixels, part) for part in parts)
        return paste(pixels, matrices, restored, self.restorer.size, self.options.upscale)

    @torch.inference_mode()
    def _restore_some(self, pixels: Pixels, matrices: Sequence[Matrix]) -> list[Restored]:
        cut = torch.from_numpy(crops(pixels, matrices, self.restorer.size)).to(self.device)
        faces: Tensor = self.restorer.restore(cut).clamp(-1, 1)
        parts = restorers.face_parts(self.restorer.parse(faces)).cpu().numpy()
        shown = ((faces + 1) / 2).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        strength = np.float32(self.options.strength)
        return [Restored(face, soften(part) * strength) for face, part in zip(shown, parts, strict=True)]


def check_facefix(options: FacefixOptions) -> None:
    """Read the headers of the model files. Raises CheckpointError or OptionError if they do not fit."""
    model, parsenet, detector = restorers.find_files(options)
    restorers.load_both(options, model, parsenet, torch.device("meta"), torch.float32)
    check_detector(detector, "--detection_model", needs_landmarks=True)


def make_facefix(options: FacefixOptions, device: torch.device) -> Stage:
    """Load the networks. Raises as `check_facefix`."""
    model, parsenet, path = restorers.find_files(options)
    restorer = restorers.load_restorer(options, model, parsenet, device)
    # float32 whatever --dtype says: scores are compared with a limit, and landmarks must not tremble
    detector = load_detector(path, device, torch.float32, option="--detection_model")
    least = options.detection_threshold or (LEAST_SCORE_ONNX if may_be_onnx(path) else LEAST_SCORE)
    return Facefix(options, detector, restorer, device, least)
