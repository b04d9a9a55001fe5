"""Restore the faces of each picture: find, align, restore, tell the parts, paste."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modules.devices import choose_compute_dtype
from modules.errors import CheckpointError
from post.contract import Clip, Picture, Pixels, Stage
from post.faces.alignment import Matrix, alignment, crops, restorable
from post.faces.contract import Detector
from post.faces.detectors import check_detector, load_detector, no_landmarks
from post.faces.model_folder import find_detector, find_model, find_parsenet
from post.faces.onnx_header import may_be_onnx
from post.faces.options import FacefixOptions
from post.faces.parsenet import face_parts
from post.faces.pasting import Restored, deepen, enlarge, paste, soften
from post.faces.restorers import Restorer, check_restorer, load_restorer
from post.faces.steadying import SteadyLandmarks
from post.pixels import to_bytes
from post.sizes import enlarged_clip

logger = logging.getLogger(__name__)

LEAST_SCORE, LEAST_SCORE_ONNX = 0.97, 0.8  # of a face; YuNet's scores are lower
# in one pass of the networks: a crowd must not take more memory than that
FACES_AT_ONCE = 4


@dataclass(frozen=True)
class Facefix:
    """Restores faces with loaded networks. What it remembers of a clip belongs to one `run`."""

    options: FacefixOptions
    detector: Detector
    restorer: Restorer
    device: torch.device
    least_score: float
    name: str = "facefix"

    def result(self, clip: Clip) -> Clip:
        """Return the clip with its new size. Raises OptionError for a size that no file can have."""
        return enlarged_clip(clip, self.options.upscale, "--upscale")

    def run(self, pictures: Iterator[Picture], clip: Clip) -> Iterator[Picture]:
        """Yield the pictures with restored faces; one without a face passes as it is, unless it is scaled."""
        steady = SteadyLandmarks(self.options.smooth)
        seen = changed = faces = 0
        for picture in pictures:
            matrices = self._faces(picture.pixels, steady)
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

    def _faces(self, pixels: Pixels, steady: SteadyLandmarks) -> list[Matrix]:
        """Return how the faces to restore in the next picture are cut out."""
        found = self.detector.find(to_bytes(pixels), self.least_score)
        if any(face.landmarks is None for face in found):
            raise no_landmarks(f"--detection_model {self.options.detection_model}")
        faces = restorable(found, (pixels.shape[1], pixels.shape[0]), self.options.only_center)
        landmarks = steady.steady([face.landmarks for face in faces if face.landmarks is not None])
        matrices = [alignment(points, self.restorer.size) for points in landmarks]
        return [matrix for matrix in matrices if matrix is not None]

    def _restore(self, pixels: Pixels, matrices: Sequence[Matrix], is_deep: bool) -> Pixels:
        if not matrices and self.options.upscale == 1:
            return pixels
        pixels = deepen(pixels) if is_deep else pixels
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
        parts = face_parts(self.restorer.parse(faces)).cpu().numpy()
        shown = ((faces + 1) / 2).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        strength = np.float32(self.options.strength)
        return [Restored(face, soften(part) * strength) for face, part in zip(shown, parts, strict=True)]


def check_facefix(options: FacefixOptions) -> None:
    """Read the headers of the model files. Raises CheckpointError or OptionError if they do not fit."""
    choose_compute_dtype(options.network.dtype, "--dtype", torch.float32)
    model, parsenet, detector = _files(options)
    check_restorer(options, model, parsenet)
    check_detector(detector, "--detection_model", needs_landmarks=True)


def make_facefix(options: FacefixOptions, device: torch.device) -> Stage:
    """Load the networks. Raises as `check_facefix`."""
    model, parsenet, path = _files(options)
    restorer = load_restorer(options, model, parsenet, device)
    # float32 whatever --dtype says: scores are compared with a limit, and landmarks must not tremble
    detector = load_detector(path, device, torch.float32, option="--detection_model")
    least = options.detection_threshold or (LEAST_SCORE_ONNX if may_be_onnx(path) else LEAST_SCORE)
    return Facefix(options, detector, restorer, device, least)


def _files(options: FacefixOptions) -> tuple[Path, Path, Path]:
    """Return the paths of the model, ParseNet and the detector. Raises CheckpointError if one is missing."""
    model = find_model(options.network.model, options.mode)
    if not model.exists():
        raise CheckpointError(f"--model {model}: there is no such file or folder.", model)
    detector = find_detector(model, options.mode, options.detection_model)
    return model, find_parsenet(model, options.mode), detector
