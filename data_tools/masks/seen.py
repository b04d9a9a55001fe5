"""Find the foreground, faces or a color in a picture."""
# Letters: h w the network's grid, H W the picture, S side of the network's input

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.masks.options import IS_COLOR
from data_tools.masks.shaping import Values
from modules.control_codes import shorten
from modules.devices import select_device
from modules.errors import CheckpointError
from modules.media.reading import Frame
from post.faces.boxes import Detector
from post.faces.detectors import load_detector
from post.faces.onnx_header import read_onnx

# of ImageNet, by which networks of this kind see pictures
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]  # 1 3 S S -> 1 1 h w


@dataclass(frozen=True)
class BackgroundFinder:
    """A loaded U2Net-like network."""

    path: Path
    run: Run
    side: int  # S

    def find(self, frame: Frame) -> Values:
        """Return what stands before the background of a picture, H W 3: h w, from 0 to 1 in each picture.

        Raises:
            CheckpointError: If the network fails.
        """
        output = self.run(self.as_input(frame))
        if output.ndim < 2 or not np.isfinite(output).all():
            raise CheckpointError(f"{self.path} gives no numbers for a picture: it may be damaged", self.path)
        values = output.reshape(-1, *output.shape[-2:])[0]
        low, high = values.min(), values.max()
        return ((values - low) / max(high - low, np.finfo(np.float32).tiny)).astype(np.float32)

    def as_input(self, frame: Frame) -> NDArray[np.float32]:
        """Return a picture, H W 3, as the network takes it: 1 3 S S, divided by its brightest value."""
        small = Image.fromarray(frame).resize((self.side, self.side), Image.Resampling.LANCZOS)
        pixels = np.asarray(small, np.float32)
        normal = (pixels / max(float(pixels.max()), 1e-6) - MEAN) / DEVIATION
        return np.ascontiguousarray(normal.transpose(2, 0, 1)[None], np.float32)


def load_background_finder(path: Path) -> BackgroundFinder:
    """Load a U2Net-like ONNX file: by onnxruntime if it is installed, else by OpenCV.

    Raises:
        CheckpointError: If it is none, or if neither of the two can run it.
    """
    _require_file("--background", path)
    header, content = read_onnx(path)
    shapes = list(header.inputs.values())
    shape = shapes[0] if len(shapes) == 1 else ()
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or not shape[2]:
        raise CheckpointError(
            f"--background {path} takes {list(shape)}, and not square pictures of one size: it is no "
            "U2Net-like network",
            path,
        )
    try:
        import onnxruntime  # optional
    except ImportError:
        return BackgroundFinder(path, _load_by_opencv(path, content), shape[2])
    return BackgroundFinder(path, _load_by_onnxruntime(path, content, onnxruntime), shape[2])


def _load_by_onnxruntime(path: Path, content: bytes, onnxruntime: Any) -> Run:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors
    try:
        session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes have no common base
        raise _cannot_run(path, error) from None
    names = [session.get_outputs()[0].name], session.get_inputs()[0].name

    def run(pictures: NDArray[np.float32]) -> NDArray[np.float32]:
        try:
            return np.asarray(session.run(names[0], {names[1]: pictures})[0], np.float32)
        except Exception as error:  # as above
            raise _cannot_run(path, error) from None

    return run


def _load_by_opencv(path: Path, content: bytes) -> Run:
    try:
        network = cv2.dnn.readNetFromONNX(np.frombuffer(content, np.uint8))
    except cv2.error as error:
        raise _cannot_run(path, error, " Run: pip install onnxruntime") from None
    first = network.getUnconnectedOutLayersNames()[0]

    def run(pictures: NDArray[np.float32]) -> NDArray[np.float32]:
        try:
            network.setInput(pictures)
            return np.asarray(network.forward(first), np.float32)
        except cv2.error as error:
            raise _cannot_run(path, error, " Run: pip install onnxruntime") from None

    return run


def _cannot_run(path: Path, error: Exception, remedy: str = "") -> CheckpointError:
    why = shorten(" ".join(str(error).split()), 300)
    return CheckpointError(f"--background {path} cannot be run: {why}.{remedy}", path)


def _require_file(option: str, path: Path) -> None:
    """Raise CheckpointError if a file is missing; for a released file the message names its download."""
    if not path.is_file():
        raise CheckpointError(f"{option} {path}: no such file", path)


@dataclass(frozen=True)
class FaceFinder:
    """A loaded detector of boxes."""

    detector: Detector
    least_score: float

    def find(self, frame: Frame) -> Values:
        """Return the boxes of faces in a picture, H W 3: H W, 1 inside, also where a box covers a part."""
        values = np.zeros(frame.shape[:2], np.float32)
        for face in self.detector.find(frame, self.least_score):
            left, top = (max(0, math.floor(side)) for side in face.box[:2])
            right, bottom = (max(0, math.ceil(side)) for side in face.box[2:])
            values[top:bottom, left:right] = 1
        return values


def load_face_finder(path: Path, least_score: float, device: str | None) -> FaceFinder:
    """Load a detector of faces.

    Raises:
        CheckpointError: If the file is none.
    """
    _require_file("--faces", path)
    chosen = select_device(device)
    return FaceFinder(load_detector(path, chosen, option="--faces"), least_score)


@dataclass(frozen=True)
class ColorFinder:
    """Finds a color, given in 0..1, and all colors within a distance of it."""

    colour: tuple[float, float, float]
    distance: float

    def find(self, frame: Frame) -> Values:
        """Return a map, H W, that is 1 at pixels of an image, H W 3, that have the color."""
        difference = frame.astype(np.float32) / 255 - np.array(self.colour, np.float32)
        return (np.sqrt((difference**2).sum(axis=2)) <= self.distance).astype(np.float32)


def make_color_finder(text: str, distance: float) -> ColorFinder:
    """Return the finder of a color. `text` is six hexadecimal digits, which the options have checked."""
    digits = IS_COLOR.fullmatch(text)
    assert digits is not None
    red, green, blue = bytes.fromhex(digits[1])
    return ColorFinder((red / 255, green / 255, blue / 255), distance)
