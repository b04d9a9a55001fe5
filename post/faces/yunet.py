"""YuNet: a small detector of faces that OpenCV runs, free to use (MIT licence)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from modules.errors import CheckpointError
from post.faces.boxes import FoundFace, shrunk
from post.faces.onnx_header import OnnxHeader

OUTPUTS = {f"{kind}_{step}" for kind in ("cls", "obj", "bbox", "kps") for step in (8, 16, 32)}
MOST_OVERLAP = 0.3
MOST_BEFORE = 5000  # boxes, best first, among which the overlapping ones are left out
SMALLEST = 32  # pixels: a side of the picture that OpenCV makes of a smaller one


@dataclass(frozen=True)
class YuNetDetector:
    """YuNet in OpenCV. Pictures whose long side is longer than `side` are looked at in a smaller copy.

    It was trained for faces of about 10 to 300 pixels.
    """

    path: Path
    network: Any  # cv2.FaceDetectorYN
    side: int | None
    canvas: tuple[int, int] | None = None  # width and height that this OpenCV needs; None: any do

    def find(self, pixels: NDArray[np.uint8], least_score: float) -> Sequence[FoundFace]:
        """Return the faces in a picture (H W 3, RGB) with at least that score, best first."""
        height, width = pixels.shape[:2]
        factor = 1.0 if self.side is None else min(1.0, self.side / max(height, width))
        if self.canvas is not None:
            factor = min(factor, self.canvas[0] / width, self.canvas[1] / height)
        small = shrunk(pixels, factor)
        seen_height, seen_width = small.shape[:2]
        wide, high = self.canvas or (seen_width, seen_height)
        image = np.zeros((high, wide, 3), np.uint8)
        image[:seen_height, :seen_width] = small[..., ::-1]
        try:
            self.network.setInputSize((wide, high))
            self.network.setScoreThreshold(least_score)
            _, rows = self.network.detect(image)
        except cv2.error as error:
            raise _cannot_run(self.path, error) from error
        if rows is None:
            return []
        size = np.array([width / seen_width, height / seen_height], np.float32)
        found = []
        for row in sorted(rows, key=lambda row: -row[14]):
            left, top = (row[:2] * size).tolist()
            right, bottom = ((row[:2] + row[2:4]) * size).tolist()
            points = row[4:14].reshape(5, 2) * size  # in the order of `FoundFace`
            found.append(FoundFace((left, top, right, bottom), float(row[14]), points))
        return found


def is_yunet(header: OnnxHeader) -> bool:
    """Return whether an ONNX file is a YuNet that today's OpenCV knows."""
    return header.outputs.keys() >= OUTPUTS


def load_yunet(path: Path, content: bytes, header: OnnxHeader, side: int | None) -> YuNetDetector:
    """Load a YuNet and let it look once. Raises CheckpointError if this OpenCV cannot run it.

    Files are made for pictures of one size, or of any. OpenCV 4 runs both with any size; where OpenCV insists
    on the one size, pictures are put into a larger one of that.
    """
    bare = np.frombuffer(content, np.uint8)
    try:
        network = cv2.FaceDetectorYN.create(
            "onnx", bare, np.empty(0, np.uint8), (SMALLEST, SMALLEST), 0.5, MOST_OVERLAP, MOST_BEFORE
        )
    except cv2.error as error:
        raise _cannot_run(path, error) from error
    detector = YuNetDetector(path, network, side)
    try:
        for shape in ((96, 160, 3), (64, 64, 3)):  # pictures of another size must do, too
            YuNetDetector(path, network, None).find(np.zeros(shape, np.uint8), 0.5)
    except CheckpointError:
        taken = next(iter(header.inputs.values()), ())
        height, width = taken[-2:] if len(taken) == 4 else (None, None)
        if height is None or width is None:
            raise
        detector = YuNetDetector(path, network, side, (width, height))
        detector.find(np.zeros((64, 64, 3), np.uint8), 0.5)
    return detector


def _cannot_run(path: Path, error: cv2.error) -> CheckpointError:
    return CheckpointError(
        f"{path}: OpenCV {cv2.__version__} cannot run this YuNet ({first_line(error)}).\n  Give "
        "face_detection_yunet_2023mar.onnx to OpenCV 4, face_detection_yunet_2026may.onnx to OpenCV 5.",
        path,
    )


def first_line(error: cv2.error) -> str:
    """Return OpenCV's message of an error, without the place in its code."""
    text = str(getattr(error, "err", "") or error).strip()
    return text.splitlines()[0][:200] if text else "without a reason"
