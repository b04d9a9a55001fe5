"""Detectors in ONNX files: the YOLO family (v8 and later), and YuNet for faces.

None of the makers' code is used; the layout follows from the inputs and outputs of a file.
"""

import ast
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from modules.errors import CheckpointError
from modules.integers import round_up
from modules.limits import MAX_NOTE_CHARACTERS
from modules.onnx_models import OnnxModel, Shape
from postprocessing.faces.boxes import FoundFace, Numbers, select_best, shrunk

logger = logging.getLogger(__name__)

DEFAULT_SIDE = 640  # side of the square image, if the file does not fix it
STEPS = (8, 16, 32)  # strides of the detection grids, in pixels
VARIANT_STEPS = ((4, *STEPS), (*STEPS, 64))  # of variants for small and for large objects
GRAY = 114  # gray around images that are not square
MAX_OVERLAP = 0.7
MAX_FOUND = 300
BOX, POINTS = 4, 5  # values in a box; landmarks of a face
SELECTED_ROW_WIDTHS = (6, 6 + 3 * POINTS)  # values per row in files that already suppress overlapping boxes
TASKS = ("detect", "pose", "segment")
CLASSES_SHOWN = 8


@dataclass(frozen=True)
class YoloLayout:
    """Input size, classes and landmarks of a YOLO network, which decide the columns of its output rows."""

    input_size: int  # side of the square input image
    classes: int | None  # None: the file does not say
    landmarks: int  # values in each landmark; 0: no face landmarks


class _Faces(NamedTuple):
    """Faces that YuNet has detected, in pixels of the input image."""

    boxes: Numbers  # N 4
    scores: Numbers  # N
    points: Numbers  # landmarks in the order of `FoundFace`, N 5 2


class _Rows(NamedTuple):
    """Detections of a YOLO network, in pixels of its square input."""

    boxes: Numbers  # N 4
    scores: Numbers  # N
    points: Numbers | None  # landmarks, N 5 2


@dataclass(frozen=True)
class YoloDetector:
    """Detects objects with a loaded YOLO, regardless of their class."""

    path: Path
    network: OnnxModel
    layout: YoloLayout

    def find(self, pixels: NDArray[np.uint8], least_score: float) -> Sequence[FoundFace]:
        """Detect objects in an image (H W 3, RGB) with at least this score, best first."""
        image, factor, offset = letterbox(pixels, self.layout.input_size)
        outputs = self.network.run(image.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255))
        rows = self._decode(self._find_box_output(outputs), least_score)
        shift = np.array(offset, np.float32)
        boxes = ((rows.boxes.reshape(-1, 2, 2) - shift) / factor).reshape(-1, 4)
        points = None if rows.points is None else (rows.points - shift) / factor
        faces = []
        for index in select_best(boxes, rows.scores, MAX_OVERLAP, MAX_FOUND):
            box = tuple(boxes[index].tolist())
            landmarks = None if points is None else points[index]
            faces.append(FoundFace(box, float(rows.scores[index]), landmarks))
        return faces

    def _find_box_output(self, outputs: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Return the box rows of the output, without the mask output (four axes) of segmentation models."""
        for output in outputs:
            if output.ndim == 3 and output.shape[0] == 1:
                if np.isnan(output).any():
                    raise CheckpointError(
                        f"The result of {self.path} is NaN: what it missed would be unknown. The file "
                        "may be damaged: export it again, without half precision.",
                        self.path,
                    )
                return output[0]
        shapes = ", ".join(str(list(output.shape)) for output in outputs)
        raise _other_layout(self.path, shapes)

    def _decode(self, output: NDArray[np.float32], least_score: float) -> _Rows:
        """Decode the YOLO's output to detections with at least `least_score`."""
        # Versions differ: candidates are rows or columns, or the file has selected the best boxes already.
        # possible candidate counts: one for each cell of the grids, whose steps depend on the version
        candidate_counts = []
        for steps in (STEPS, *VARIANT_STEPS):
            cells = [(self.layout.input_size // step) ** 2 for step in steps]
            candidate_counts.append(sum(cells))
        num_rows, num_columns = output.shape
        if num_columns in SELECTED_ROW_WIDTHS and num_rows not in candidate_counts:
            # Decode rows of corners, score, class and landmarks, after non-maximum suppression in the network
            rows = output
            rows = rows[rows[:, BOX] >= least_score]
            points = _read_points(rows[:, BOX + 2 :], values_per_point=3)
            return _Rows(boxes=rows[:, :BOX], scores=rows[:, BOX], points=points)
        if num_columns in candidate_counts:  # candidates are columns
            output = output.T
        num_rows, num_columns = output.shape
        if num_rows not in candidate_counts or num_columns <= BOX:
            raise _other_layout(self.path, str(list(output.shape)))
        return self._decode_candidates(output, least_score)

    def _decode_candidates(self, rows: NDArray[np.float32], least_score: float) -> _Rows:
        """Decode rows of center, width and height of a box, the score of each class, then landmarks."""
        num_classes, values_per_point = self._split_columns(rows.shape[1])
        scores = rows[:, BOX : BOX + num_classes].max(axis=1)
        is_likely = scores >= least_score
        rows = rows[is_likely]
        centers = rows[:, :2]
        half_sizes = rows[:, 2:BOX] / 2
        boxes = np.concatenate([centers - half_sizes, centers + half_sizes], axis=1)
        points = _read_points(rows[:, BOX + num_classes :], values_per_point)
        return _Rows(boxes, scores[is_likely], points)

    def _split_columns(self, width: int) -> tuple[int, int]:
        """Return the number of classes, and of values per landmark, in an output row of `width` values."""
        if self.layout.classes is not None:
            return self.layout.classes, self.layout.landmarks
        is_face = width == BOX + 1 + 3 * POINTS
        return (1, 3) if is_face else (width - BOX, 0)


def read_layout(path: Path, model: OnnxModel, side: int | None) -> YoloLayout | None:
    """Return the layout of a YOLO's output rows; None if the model does not look like a YOLO.

    Raises CheckpointError for a YOLO without boxes.

    Args:
        path: Path of the file.
        model: The loaded file.
        side: Side of the square input, for files that accept any size.
    """
    if not _looks_like_yolo(model):
        return None
    task = model.notes.get("task")
    if task is not None and task not in TASKS:
        raise CheckpointError(
            f"{path} is a YOLO for {task}, which returns no upright boxes. Pass one for detect, segment or "
            "pose.",
            path,
        )
    _, _, height, width = model.input_shape
    if height != width:
        raise CheckpointError(
            f"{path} requires images of {width or 'any width'} x {height or 'any height'} pixels. Export "
            f"it for square ones: imgsz={DEFAULT_SIDE}.",
            path,
        )
    names = _parse_literal(model.notes.get("names"))
    points = _parse_literal(model.notes.get("kpt_shape"))
    is_face = isinstance(points, list) and len(points) == 2 and points[0] == POINTS
    return YoloLayout(
        input_size=height or round_up(side or DEFAULT_SIDE, max(STEPS)),
        classes=(len(names) if isinstance(names, (dict, list)) and names else None),
        landmarks=(points[1] if is_face else 0),
    )


def _looks_like_yolo(model: OnnxModel) -> bool:
    """Return whether a model takes images of three channels and was exported as a YOLO."""
    # Exporters note the task; files without notes are recognized by the shape of their output.
    shape = model.input_shape
    takes_images = len(shape) == 4 and shape[1] in (3, None)
    if not takes_images or "task" in model.notes:
        return takes_images
    return any(len(output) == 3 and output[0] in (1, None) for output in model.outputs.values())


def load_yolo(model: OnnxModel, layout: YoloLayout) -> YoloDetector:
    """Return a YOLO detector after a test run; warn if its file finds several classes of objects.

    Raises:
        CheckpointError: If it cannot be run.
    """
    detector = YoloDetector(model.path, model, layout)
    # test run with a black image, neither square nor of the network's size
    detector.find(np.zeros((64, 96, 3), np.uint8), 0.5)
    class_names = _parse_literal(model.notes.get("names"))
    if isinstance(class_names, dict) and len(class_names) > 1:
        first_names = ", ".join(str(name) for name in list(class_names.values())[:CLASSES_SHOWN])
        others = f" and {len(class_names) - CLASSES_SHOWN} more" if len(class_names) > CLASSES_SHOWN else ""
        logger.warning(
            "%s finds several kinds of objects, %s%s: all of them count.",
            model.path.name,
            first_names,
            others,
        )
    return detector


def letterbox(pixels: NDArray[np.uint8], side: int) -> tuple[NDArray[np.uint8], float, tuple[int, int]]:
    """Scale an image (H W 3) to fit into a square with `side` pixels, and pad it with gray.

    Returns:
        The square, the scale factor, and the position (left, top) of the image in the square.
    """
    height, width = pixels.shape[:2]
    factor = min(side / height, side / width)
    fitted_height, fitted_width = max(1, round(height * factor)), max(1, round(width * factor))
    interpolation = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    fitted = cv2.resize(pixels, (fitted_width, fitted_height), interpolation=interpolation)
    left, top = (side - fitted_width) // 2, (side - fitted_height) // 2
    square = np.full((side, side, 3), GRAY, np.uint8)
    square[top : top + fitted_height, left : left + fitted_width] = fitted
    return square, factor, (left, top)


def _read_points(numbers: Numbers, values_per_point: int) -> Numbers | None:
    """Return landmarks, N 5 2, from rows of (x, y) or (x, y, visibility); None without landmarks."""
    if values_per_point not in (2, 3) or numbers.shape[1] < values_per_point * POINTS:
        return None
    points: Numbers = numbers[:, : values_per_point * POINTS].reshape(-1, POINTS, values_per_point)[..., :2]
    return points


def _parse_literal(text: str | None) -> Any:
    """Parse a metadata entry, a Python literal; None if it is malformed."""
    if len(text or "") > MAX_NOTE_CHARACTERS:
        return None
    try:
        return ast.literal_eval(text or "None")
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _other_layout(path: Path, shapes: str) -> CheckpointError:
    return CheckpointError(
        f"{path} gives {shapes}: this is not the output format of YOLO v8 and later. v5 and v7 are not "
        "supported.",
        path,
    )


# YuNet: a small detector of faces, free to use (MIT license).
WIDTHS = {"cls": 1, "obj": 1, "bbox": 4, "kps": 2 * POINTS}  # values per grid cell
OUTPUTS = {f"{kind}_{step}" for kind in WIDTHS for step in STEPS}
MAX_LOG_SIDE = 20.0  # limit of a box's log side, which keeps invalid values finite
MAX_OVERLAP_YUNET = 0.3
MAX_CANDIDATES = 5000  # best boxes that enter non-maximum suppression
SIDE_MULTIPLE = 32  # pixels: sides are multiples of it


@dataclass(frozen=True)
class YuNetDetector:
    """Finds faces with a loaded YuNet; large images are reduced to a long side of `side`.

    YuNet was trained for faces of about 10 to 300 pixels.
    """

    path: Path
    network: OnnxModel
    input_size: int | None
    canvas: tuple[int, int] | None = None  # width and height that the file requires; None for any size

    def find(self, pixels: NDArray[np.uint8], least_score: float) -> Sequence[FoundFace]:
        """Return the faces in an image (H W 3, RGB) with at least `least_score`, best first."""
        height, width = pixels.shape[:2]
        reduced = shrunk(pixels, self._choose_scale(height, width))
        small_height, small_width = reduced.shape[:2]
        candidates = self._find_candidates(reduced)
        # back to the pixels of the image
        scale = np.array([width / small_width, height / small_height], np.float32)
        # comparing all candidates with each other would take long, so only the most likely ones are kept
        likely = np.flatnonzero(candidates.scores >= least_score)
        likely = likely[np.argsort(-candidates.scores[likely], kind="stable")[:MAX_CANDIDATES]]
        boxes = candidates.boxes[likely]
        scores = candidates.scores[likely]
        faces = []
        for index in select_best(boxes, scores, MAX_OVERLAP_YUNET):
            left, top = (boxes[index, :2] * scale).tolist()
            right, bottom = (boxes[index, 2:] * scale).tolist()
            points = candidates.points[likely[index]] * scale
            faces.append(FoundFace((left, top, right, bottom), float(scores[index]), points))
        return faces

    def _find_candidates(self, pixels: NDArray[np.uint8]) -> _Faces:
        """Return a face candidate for each grid cell of an image (H W 3, RGB), without a score threshold."""
        height, width = pixels.shape[:2]
        canvas_width, canvas_height = self.canvas or (
            round_up(width, SIDE_MULTIPLE),
            round_up(height, SIDE_MULTIPLE),
        )
        image = np.zeros((1, 3, canvas_height, canvas_width), np.float32)
        image[0, :, :height, :width] = pixels[..., ::-1].transpose(2, 0, 1)  # blue first
        outputs = dict(zip(self.network.outputs, self.network.run(image), strict=True))
        steps = [self._decode_grid(outputs, step, canvas_width, canvas_height) for step in STEPS]
        return _Faces(
            np.concatenate([step.boxes for step in steps]),
            np.concatenate([step.scores for step in steps]),
            np.concatenate([step.points for step in steps]),
        )

    def _decode_grid(self, outputs: Mapping[str, Numbers], step: int, width: int, height: int) -> _Faces:
        """Decode the YuNet output grid with a cell every `step` pixels to face candidates."""
        rows, columns = height // step, width // step
        num_cells = rows * columns
        class_score = self._read_output(outputs, "cls", step, num_cells).clip(0, 1)
        object_score = self._read_output(outputs, "obj", step, num_cells).clip(0, 1)
        box = self._read_output(outputs, "bbox", step, num_cells)
        point_offsets = self._read_output(outputs, "kps", step, num_cells).reshape(-1, POINTS, 2)

        # positions are relative to the cell, in cells; sizes are logarithms
        cells = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2)
        center_offsets, log_sizes = box[:, :2], box[:, 2:]
        centers = (cells + center_offsets) * step
        half_sizes = np.exp(np.minimum(log_sizes, MAX_LOG_SIDE)) * step / 2
        boxes = np.concatenate([centers - half_sizes, centers + half_sizes], axis=1)
        points = (point_offsets + cells[:, None]) * step
        # as in OpenCV's FaceDetectorYN: the geometric mean of the scores for the class and the object
        scores = np.sqrt(class_score * object_score)[:, 0]
        return _Faces(boxes.astype(np.float32), scores, points.astype(np.float32))

    def _read_output(self, outputs: Mapping[str, Numbers], kind: str, step: int, cells: int) -> Numbers:
        """Return one output of YuNet with a row per cell. Raises CheckpointError if its shape is wrong."""
        output = outputs[f"{kind}_{step}"]
        columns = WIDTHS[kind]
        if output.size != cells * columns or not np.isfinite(output).all():
            raise CheckpointError(
                f"{self.path} gives {list(output.shape)} as {kind}_{step}: it is not a YuNet, or is "
                "damaged. Download it again.",
                self.path,
            )
        return output.reshape(cells, columns)

    def _choose_scale(self, height: int, width: int) -> float:
        """Return the factor that reduces an image for detection."""
        factor = 1.0 if self.input_size is None else min(1.0, self.input_size / max(height, width))
        if self.canvas is not None:
            factor = min(factor, self.canvas[0] / width, self.canvas[1] / height)
        return factor


def load_yunet(model: OnnxModel, side: int | None) -> YuNetDetector:
    """Return a YuNet detector after a test run.

    Some files accept a single image size, to which images are fitted; others accept any size. Larger images
    are reduced to `side` pixels; None searches them in full size.

    Raises:
        CheckpointError: If the network cannot be run.
    """
    canvas = _read_canvas(model.input_shape)
    if canvas is not None and (side is None or side > max(canvas)):
        logger.info(
            "%s is made for images of %d x %d pixels: larger ones are searched in a copy of that size.",
            *(model.path.name, *canvas),
        )
    detector = YuNetDetector(model.path, model, side, canvas)
    # test run with a black image, neither square nor of the canvas size, to raise errors before real work
    detector.find(np.zeros((64, 96, 3), np.uint8), 0.5)
    return detector


def _read_canvas(shape: Shape) -> tuple[int, int] | None:
    """Return the (width, height) that a YuNet file requires; None if any size is possible."""
    if len(shape) != 4:
        return None
    height, width = shape[-2:]
    return None if height is None or width is None else (width, height)
