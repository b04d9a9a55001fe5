"""Find the foreground, faces or a color in an image."""
# Letters: h w the network's grid, H W the image, S side of the network's input

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.masks.places import IS_COLOR
from data_tools.masks.shaping import ScoreMap
from modules.devices import select_device
from modules.errors import CheckpointError
from modules.media.reading import Frame
from modules.onnx_models import load_onnx
from postprocessing.faces.boxes import Detector
from postprocessing.faces.detectors import load_detector

# mean and deviation of ImageNet's colors, with which such networks normalize images
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
Network = Callable[[NDArray[np.float32]], NDArray[np.float32]]  # 1 3 S S -> 1 1 h w


@dataclass(frozen=True)
class BackgroundFinder:
    """Finds the foreground with a loaded network like U2Net."""

    path: Path
    network: Network
    image_size: int  # S

    def score(self, frame: Frame) -> ScoreMap:
        """Score how likely each region of an image, H W 3, is foreground: h w, scaled to 0..1.

        Raises:
            CheckpointError: If the network fails.
        """
        output = self.network(self.to_model_input(frame))
        if output.ndim < 2 or not np.isfinite(output).all():
            raise CheckpointError(
                f"{self.path} returns NaN or infinite values for an image: it may be damaged", self.path
            )
        scores = output.reshape(-1, *output.shape[-2:])[0]
        low, high = scores.min(), scores.max()
        return ((scores - low) / max(high - low, np.finfo(np.float32).tiny)).astype(np.float32)

    def to_model_input(self, frame: Frame) -> NDArray[np.float32]:
        """Resize an image, H W 3, to the network's input, 1 3 S S, divided by its brightest value."""
        size = (self.image_size, self.image_size)
        small = Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)
        pixels = np.asarray(small, np.float32)
        normal = (pixels / max(float(pixels.max()), 1e-6) - MEAN) / DEVIATION
        return np.ascontiguousarray(normal.transpose(2, 0, 1)[None], np.float32)


def load_background_finder(path: Path) -> BackgroundFinder:
    """Load a background remover: an ONNX file of a network like U2Net.

    Raises:
        CheckpointError: If the network does not take square RGB images of one size.
    """
    _require_file("--background", path)
    model = load_onnx(path)
    shape = model.input_shape
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or not shape[2]:
        raise CheckpointError(
            f"--background {path} requires input of shape {list(shape)}, not square images of one size: "
            "it is not a U2Net-like network",
            path,
        )
    return BackgroundFinder(path, lambda images: model.run(images)[0], shape[2])


def _require_file(option: str, path: Path) -> None:
    """Raise CheckpointError if a model file is missing; say how to download it if it is a released file."""
    if not path.is_file():
        raise CheckpointError(f"{option} {path}: no such file", path)


@dataclass(frozen=True)
class FaceFinder:
    """Finds faces with a loaded detector, as boxes."""

    detector: Detector
    least_score: float

    def score(self, frame: Frame) -> ScoreMap:
        """Return a map, H W, that is 1 at each pixel of an image, H W 3, that a face's box touches."""
        scores = np.zeros(frame.shape[:2], np.float32)
        for face in self.detector.find(frame, self.least_score):
            left, top = (max(0, math.floor(edge)) for edge in face.box[:2])
            right, bottom = (max(0, math.ceil(edge)) for edge in face.box[2:])
            scores[top:bottom, left:right] = 1
        return scores


def load_face_finder(path: Path, least_score: float, device: str | None) -> FaceFinder:
    """Load a face detector.

    Raises:
        CheckpointError: If the file is missing or is not a face detector.
    """
    _require_file("--faces", path)
    chosen = select_device(device)
    return FaceFinder(load_detector(path, chosen, option="--faces"), least_score)


@dataclass(frozen=True)
class ColorFinder:
    """Selects all pixels whose color is within a distance (0..1) of a given color."""

    colour: tuple[float, float, float]
    distance: float

    def score(self, frame: Frame) -> ScoreMap:
        """Return a map, H W, that is 1 at pixels of an image, H W 3, that have the color."""
        difference = frame.astype(np.float32) / 255 - np.array(self.colour, np.float32)
        return (np.sqrt((difference**2).sum(axis=2)) <= self.distance).astype(np.float32)


def make_color_finder(text: str, distance: float) -> ColorFinder:
    """Return the finder for a color given as six hexadecimal digits."""
    digits = IS_COLOR.fullmatch(text)
    assert digits is not None
    red, green, blue = bytes.fromhex(digits[1])
    return ColorFinder((red / 255, green / 255, blue / 255), distance)
