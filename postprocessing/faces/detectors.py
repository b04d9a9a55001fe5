"""Open the file of a detector, whichever kind it is."""

import logging
import zipfile
import zlib
from pathlib import Path

import torch

from checkpoints.containers import PICKLE
from checkpoints.opening import open_checkpoint
from modules.devices import replace_slow_float16
from modules.errors import CheckpointError
from modules.limits import MAX_PICKLE_BYTES
from modules.onnx_models import OnnxModel, load_onnx, may_be_onnx, shapes_text
from postprocessing.faces.boxes import Detector
from postprocessing.faces.retinaface import RELEASED_FILES, load_retinaface, read_retinaface
from postprocessing.faces.yolo import OUTPUTS, YoloLayout, load_yolo, load_yunet, read_layout

logger = logging.getLogger(__name__)

SIDE = 640  # side of the downscaled copy in which large images are searched


def check_detector(path: Path, option: str = "--model", needs_landmarks: bool = False) -> None:
    """Raise CheckpointError if a file is not a usable detector.

    ONNX files are loaded; of other files only the header is read.

    Args:
        path: Path of the file.
        option: The option that names the file, for messages.
        needs_landmarks: Whether to reject detectors whose file says that they find no landmarks.

    Raises:
        CheckpointError: If the file is damaged or not a detector.
    """
    if may_be_onnx(path):
        layout = _read_yolo_layout(path, load_onnx(path), None, option)
        # without a number of classes, a file does not say whether it has landmarks
        if needs_landmarks and layout is not None and layout.classes is not None and not layout.landmarks:
            raise no_landmarks(f"{option} {path}")
        return
    # called only to raise errors: on the meta device, no weights are read
    load_detector(path, torch.device("meta"), option=option)


def load_detector(
    path: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    side: int | None = SIDE,
    option: str = "--model",
) -> Detector:
    """Load a YOLO, YuNet or RetinaFace detector; the content of its file shows which kind it is.

    Many YOLO files accept only one size; those that accept any size get squares of `side`.

    Args:
        path: Path of the file.
        device: Device of the run.
        dtype: Dtype of the computation; ONNX files run on the CPU in their own dtype.
        side: Short side (for YuNet, long side) to which larger images are downscaled for detection; None for
            the full size.
        option: Option that names the file, for messages.

    Raises:
        CheckpointError: If the file is damaged or not a detector.
    """
    if may_be_onnx(path):
        model = load_onnx(path)
        yolo_layout = _read_yolo_layout(path, model, side, option)
        if dtype != torch.float32 or device.type != "cpu":
            logger.info("%s runs on the CPU in float32, by onnxruntime.", path.name)
        return load_yunet(model, side) if yolo_layout is None else load_yolo(model, yolo_layout)
    _reject_pickled_yolo(path, option)
    with open_checkpoint(path) as checkpoint:
        load_plan = read_retinaface(checkpoint, option)
        dtype = replace_slow_float16(device, dtype, "RetinaFace")
        return load_retinaface(load_plan, device, dtype, side=side, option=option)


def no_landmarks(detector: str) -> CheckpointError:
    """Return the error for a detector that finds no landmarks.

    Args:
        detector: The detector as the user named it.
    """
    return CheckpointError(
        f"{detector} says where faces are, but not where their eyes are, which restoring needs. Pass "
        "RetinaFace or YuNet."
    )


def _read_yolo_layout(path: Path, model: OnnxModel, side: int | None, option: str) -> YoloLayout | None:
    """Return the layout of a YOLO's output; None for a YuNet. Raises CheckpointError for other files."""
    if model.outputs.keys() >= OUTPUTS:  # a YuNet of 2023 or later
        return None
    layout = read_layout(path, model, side)
    if layout is None:
        raise CheckpointError(
            f"{path} is an ONNX file, but neither a YuNet nor a YOLO for boxes: its outputs are "
            f"{shapes_text(model.outputs)}.\n  Pass {RELEASED_FILES} to {option}.",
            path,
        )
    return layout


def _reject_pickled_yolo(path: Path, option: str) -> None:
    """Raise CheckpointError for a pickled ultralytics model, since loading it would execute its code."""
    try:
        start = _read_pickle(path)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError):
        return  # the code that opens the file next reports the error
    if b"ultralytics" in start or b"models.yolo" in start:
        raise CheckpointError(
            f"{path} is a YOLO in the format of ultralytics (AGPL-3.0): only that program can open it.\n  "
            f"Export it where that is installed, with yolo export model={path.name} format=onnx, and "
            f"pass the .onnx file to {option}.",
            path,
        )


def _read_pickle(path: Path) -> bytes:
    """Return the first bytes of the pickle in a model file; empty if the file contains none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
            return b"" if name is None else archive.open(name).read(MAX_PICKLE_BYTES)
    with path.open("rb") as file:
        start = file.read(MAX_PICKLE_BYTES)
    return start if start[:1] == PICKLE else b""
