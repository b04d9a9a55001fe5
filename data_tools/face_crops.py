"""Cut faces out of the images of a folder, upright on request, as tools/detect_face_rotate.py does."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from data_tools.folders import list_images
from data_tools.masks.places import FACE_FILE
from dataset.caching.prefetch import Failure, failure_error
from modules.atomic_write import make_folder
from modules.bars import track
from modules.console import Row, format_count, list_some, show_box
from modules.devices import select_device
from modules.errors import CheckpointError, DatasetError, MediaError, OptionError
from modules.limits import MAX_SIDE
from modules.media.reading import Frame, is_single_image, read_image, resize_frame
from modules.media.writing import write_png
from modules.options import Options, option
from modules.text_files import real_path
from postprocessing.faces.boxes import FoundFace
from postprocessing.faces.detectors import load_detector

logger = logging.getLogger(__name__)

FRAME_COLOR = (255, 0, 255)  # of the rectangle of --debug
_PAIR = re.compile(r"\s*(\d{1,5}(?:\.\d{1,4})?)\s*,\s*(\d{1,5}(?:\.\d{1,4})?)\s*")


class CropFacesOptions(Options, title="what to do"):
    """Options for cutting faces out of images."""

    src_dir: Path = option("folder of images", place="folder", required=True, by_place=True)
    dst_dir: Path = option("folder to write to", place="new folder", required=True, by_place=True)
    model: Path = option(
        "detector of faces: YuNet or RetinaFace, and without --rotate a YOLO for faces as ONNX, which drawn "
        "faces need",
        default=FACE_FILE,
    )
    least_score: float = option("how sure the detector has to be", default=0.5, minimum=0, maximum=1)
    rotate: bool = option("turn each image around the face, until the line between its eyes is level")
    resize_fit: bool = option("scale each image so that the crop just covers --crop_size", needs="crop_size")
    resize_face_size: int | None = option(
        "scale each image so that the longer side of its face has this many pixels",
        minimum=1,
        maximum=MAX_SIDE,
        excludes="resize_fit",
        why="both of them say by how much images are scaled",
    )
    crop_size: str | None = option("cut this size, with the face at its center", metavar="WIDTH,HEIGHT")
    crop_ratio: str | None = option(
        "cut these multiples of the face's width and height, with the face at its center",
        metavar="ACROSS,DOWN",
    )
    min_size: int | None = option("omit faces whose longer side is shorter, in pixels", minimum=1)
    max_size: int | None = option("omit faces whose longer side is this long or longer", minimum=1)
    multiple_faces: bool = option("write an image for each face, not for the largest one alone")
    debug: bool = option("draw a rectangle around the face")
    device: str | None = option("cuda, cuda:1, mps or cpu; default: the best one available")

    def __post_init__(self) -> None:
        self.crop_pixels()
        self.crop_factors()
        if self.min_size is not None and self.max_size is not None and self.min_size >= self.max_size:
            raise OptionError(
                f"--min_size {self.min_size} --max_size {self.max_size} leave no face: use a larger maximum"
            )

    def crop_pixels(self) -> tuple[int, int] | None:
        """Return width and height of --crop_size. Raises OptionError if it is not a pair of integers."""
        pair = _read_pair("--crop_size", self.crop_size, "512,512")
        if pair is None:
            return None
        width, height = map(int, pair)
        if (width, height) != pair or not 1 <= min(pair) <= max(pair) <= MAX_SIDE:
            raise OptionError(f"--crop_size {self.crop_size}: use whole pixels, from 1 to {MAX_SIDE}")
        return width, height

    def crop_factors(self) -> tuple[float, float] | None:
        """Return --crop_ratio's factors; None if unset. Raises OptionError if it is not two numbers."""
        pair = _read_pair("--crop_ratio", self.crop_ratio, "2,3")
        if pair is not None and min(pair) <= 0:
            raise OptionError(f"--crop_ratio {self.crop_ratio}: use numbers above 0, such as 2,3")
        return pair


def _read_pair(name: str, text: str | None, example: str) -> tuple[float, float] | None:
    """Parse an option that consists of two numbers; None if unset. Raises OptionError if it is malformed."""
    if text is None:
        return None
    match = _PAIR.fullmatch(text)
    if match is None:
        raise OptionError(f"{name} {text[:40]}: use two numbers with a comma between them, such as {example}")
    return float(match[1]), float(match[2])


@dataclass
class Portrait:
    """An image with the position and size of one face in it."""

    image: Frame  # H W 3
    center: tuple[float, float]  # x, y of the face in pixels
    size: tuple[float, float]  # width and height of the face in pixels

    def rotate(self, degrees: float) -> None:
        """Rotate the image around the face, counterclockwise for positive angles, without resizing it.

        Corners outside the original image repeat its edge pixels.
        """
        height, width = self.image.shape[:2]
        matrix = cv2.getRotationMatrix2D(self.center, degrees, 1)
        turned = cv2.warpAffine(
            self.image, matrix, (width, height), flags=cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REPLICATE
        )
        self.image = np.asarray(turned, np.uint8)

    def scale(self, factor: float) -> None:
        """Resize the image. Raises MediaError if a side would be too long."""
        height, width = self.image.shape[:2]
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        if size == (width, height):
            return
        if max(size) > MAX_SIDE:
            raise MediaError(
                f"the face is so small that the scaled image would have {size[0]}x{size[1]} pixels"
            )
        self.image = resize_frame(self.image, size, "area" if factor < 1 else "lanczos4")
        across, down = size[0] / width, size[1] / height
        self.center = (self.center[0] * across, self.center[1] * down)
        self.size = (self.size[0] * across, self.size[1] * down)

    def crop(self, width: int, height: int) -> None:
        """Crop a rectangle around the face, moved inside the image where possible."""
        image_height, image_width = self.image.shape[:2]
        width, height = min(width, image_width), min(height, image_height)
        left = min(max(0, round(self.center[0] - width / 2)), image_width - width)
        top = min(max(0, round(self.center[1] - height / 2)), image_height - height)
        self.image = self.image[top : top + height, left : left + width].copy()
        self.center = (self.center[0] - left, self.center[1] - top)


def crop_faces(options: CropFacesOptions) -> None:
    """Crop the faces in a folder's images; the new file names contain the position of the face.

    --face_crop_aug_range of a training run reads these names.

    Raises:
        DatasetError: If the folder has no images; at the end, if images could not be read.
        CheckpointError: If the detector cannot be used.
        OptionError: If the results would be written among the images.
    """
    source, target = real_path(options.src_dir), real_path(options.dst_dir)
    if source == target:
        raise OptionError(f"--dst_dir {options.dst_dir} is the folder of the images. Pass another folder")
    images = [path for path in list_images(source) if is_single_image(path)]
    if not images:
        raise DatasetError(f"{options.src_dir} has no images. Subfolders are not searched")
    if not options.model.is_file():
        raise CheckpointError(
            f"--model {options.model}: no such file. Pass YuNet or RetinaFace; python tools/download.py "
            "--family tools --task yunet --to models downloads one, after its size and license.",
            options.model,
        )
    detector = load_detector(options.model, select_device(options.device))
    make_folder(target, "--dst_dir")
    failures: list[Failure] = []
    num_faces: dict[str, int] = {}  # by file name of the image
    for path in track(images, "Faces", len(images), unit="image"):
        try:
            image = read_image(path)
            faces = _select_faces(detector.find(image, options.least_score), options)
            _write_faces(path, target, image, faces, options)
            num_faces[path.name] = len(faces)
        except MediaError as error:
            failures.append(Failure(path, reason=str(error), table=0, stem=path.stem))
    _show_results(num_faces, options.dst_dir)
    if failures:
        raise failure_error(failures, format_count(len(images), "image"))


def _show_results(num_faces: Mapping[str, int], folder: Path) -> None:
    """Show how many faces were written to a folder, and log which images have none."""
    without_face = [name for name, count in num_faces.items() if not count]
    if without_face:
        logger.warning(
            "%s without a face that is large and certain enough: %s. A lower --least_score finds more.",
            format_count(len(without_face), "image"),
            list_some(without_face),
        )
    num_written = sum(num_faces.values())
    rows: list[Row] = [("written", format_count(num_written, "image")), ("folder", str(folder))]
    show_box("Faces", rows)


def _select_faces(found: Sequence[FoundFace], options: CropFacesOptions) -> list[FoundFace]:
    """Return the faces to crop, the largest first."""
    faces = []
    for face in found:
        longest = max(_measure(face))
        is_small = options.min_size is not None and longest < options.min_size
        is_large = options.max_size is not None and longest >= options.max_size
        if not is_small and not is_large and min(_measure(face)) > 0:
            faces.append(face)
    faces.sort(key=lambda face: -max(_measure(face)))
    return faces if options.multiple_faces else faces[:1]


def _measure(face: FoundFace) -> tuple[float, float]:
    """Return width and height of a face in pixels."""
    left, top, right, bottom = face.box
    return right - left, bottom - top


def _write_faces(
    path: Path, folder: Path, image: Frame, faces: Sequence[FoundFace], options: CropFacesOptions
) -> None:
    """Write one cropped image for each face in an image."""
    for number, face in enumerate(faces, start=1):
        portrait = make_portrait(image, face, options)
        if options.debug:
            # a rectangle around the face
            (x, y), (width, height) = portrait.center, portrait.size
            corners = (
                (round(x - width / 2), round(y - height / 2)),
                (round(x + width / 2), round(y + height / 2)),
            )
            portrait.image = np.ascontiguousarray(portrait.image)
            cv2.rectangle(portrait.image, *corners, FRAME_COLOR, thickness=max(1, round(width / 20)))
        which = f"_{number}" if options.multiple_faces else ""
        places = "_".join(f"{max(0, round(value)):04d}" for value in (*portrait.center, *portrait.size))
        write_png(folder / f"{path.stem}{which}_{places}.png", portrait.image)


def make_portrait(image: Frame, face: FoundFace, options: CropFacesOptions) -> Portrait:
    """Return the portrait of a face: the image, rotated, scaled and cropped according to the options.

    Raises:
        CheckpointError: With --rotate, if the detector finds no eyes.
        MediaError: If the image would become too large.
    """
    left, top, right, bottom = face.box
    portrait = Portrait(image, ((left + right) / 2, (top + bottom) / 2), _measure(face))
    if options.rotate:
        if face.landmarks is None:
            raise CheckpointError(
                f"--model {options.model} says where faces are, but not where their eyes are, which --rotate "
                "needs. Pass YuNet or RetinaFace, or omit --rotate."
            )
        portrait.rotate(_measure_tilt(face.landmarks))
    if options.resize_face_size is not None:
        portrait.scale(options.resize_face_size / max(portrait.size))
    factors = options.crop_factors()  # of the face's size; then `crop_size` is in pixels
    if factors is not None:
        face_width, face_height = portrait.size
        portrait.crop(
            width=max(1, round(face_width * factors[0])), height=max(1, round(face_height * factors[1]))
        )
    crop_size = options.crop_pixels()
    if crop_size is not None:
        crop_width, crop_height = crop_size
        if options.resize_fit:
            height, width = portrait.image.shape[:2]
            # the image covers the crop completely
            portrait.scale(max(crop_width / width, crop_height / height))
        portrait.crop(crop_width, crop_height)
    return portrait


def _measure_tilt(landmarks: NDArray[np.float32]) -> float:
    """Return the tilt of the line between the eyes in degrees; positive if its right end is lower."""
    across, down = (landmarks[1] - landmarks[0]).tolist()
    return math.degrees(math.atan2(down, across))
