"""Run a tagger's ONNX file on images and clips."""
# Letters: B images, S side of the network's input, T tags

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.captions.asking import (
    Captioner,
    CaptionInput,
    CaptionResults,
    NoCaptionError,
    ReadFrames,
    caption_in_batches,
)
from data_tools.captions.places import CaptionLocation
from data_tools.tags.labels import MAPPING_NAME, MODEL_FOLDER, Label, has_mapping, read_labels
from data_tools.tags.words import TagSelection
from modules.command import quote_command
from modules.errors import CheckpointError
from modules.limits import MAX_ONNX_MEMORY, MAX_PIXELS
from modules.media.reading import Frame
from modules.onnx_models import OnnxModel, load_onnx
from modules.options import Options, not_needed, option, unsupported

MODEL_NAME = "model.onnx"
FloatArray = NDArray[np.float32]
IMAGE_BYTES = 1 << 26  # memory for each image of a batch
_DOWNLOAD_COMMAND = ["python", "tools/download.py", "--family", "tools", "--task", "wd_tagger", "--to"]


class TaggerOptions(Options, title="the tagger"):
    """Folder, batch size and frames of the tagger."""

    model_dir: Path = option(
        "folder with model.onnx and selected_tags.csv, or tag_mapping.json: a WD14-like tagger",
        default=MODEL_FOLDER,
    )
    batch_size: int = option("images that the tagger sees at a time", default=1, minimum=1, maximum=1024)
    num_frames: int = option(
        "frames of a clip that are tagged, evenly spaced; their tags are joined",
        default=8,
        minimum=1,
        maximum=1024,
    )
    join_frames: str = option(
        "probability of a tag in a clip: the maximum over its frames, or their mean, which ignores what is "
        "visible only briefly",
        default="max",
        choices=("max", "mean"),
    )
    onnx = not_needed("the tagger is always run by onnxruntime")
    repo_id = unsupported(
        "tools/download.py --family tools --task wd_tagger downloads a tagger, with its size and license "
        "first; any other one is a folder for --model_dir",
        nargs="?",
    )
    force_download = unsupported("tools/download.py downloads taggers; --verify compares what is there")
    max_data_loader_n_workers = not_needed("files are always read ahead", nargs="?")


@dataclass(frozen=True)
class Tagger:
    """A loaded tagging network, with its labels and image size."""

    model: OnnxModel
    labels: tuple[Label, ...]
    image_size: int  # S
    is_channels_first: bool
    returns_logits: bool  # its colors are -1..1 and its outputs logits, else 0..255 and probabilities
    fixed_batch: int | None  # number of images that it takes, if only one number is possible
    batch_size: int
    averages_frames: bool  # the probability for a clip is the mean of its frames, else their maximum
    max_frames: int

    def make_captioner(self, selection: TagSelection, separator: str) -> Captioner:
        """Return the function that yields (location, tags); a location's tags are joined by `separator`."""

        def tag_locations(locations: Sequence[CaptionLocation], read_frames: ReadFrames) -> CaptionResults:
            """Yield (location, tags) for each location."""
            yield from caption_in_batches(
                locations,
                lambda location: tuple(map(self.pad_and_resize, read_frames(location))),
                batch_size=self.batch_size,
                item_bytes=3 * self.image_size**2 * self.max_frames,
                caption_batch=lambda batch: self._tag_batch(batch, selection, separator),
            )

        return tag_locations

    def _tag_batch(
        self, batch: Sequence[CaptionInput], selection: TagSelection, separator: str
    ) -> list[tuple[CaptionLocation, str | Exception]]:
        """Return (location, tags) for each input of a batch, or an error if no tag is probable enough."""
        # The probabilities of all frames of a clip are combined before tags are selected.
        all_frames = [frame for _, frames in batch for frame in frames]
        probabilities = self.predict_probabilities(all_frames)
        results: list[tuple[CaptionLocation, str | Exception]] = []
        start = 0
        for location, frames in batch:
            by_frame = probabilities[start : start + len(frames)]
            start += len(frames)
            combined = by_frame.mean(axis=0) if self.averages_frames else by_frame.max(axis=0)
            tags = selection.select_tags(self.labels, combined.tolist())
            if tags:
                results.append((location, separator.join(tags)))
            else:
                results.append((location, NoCaptionError("no tag is as probable as --thresh requires")))
        return results

    def predict_probabilities(self, frames: Sequence[Frame]) -> FloatArray:
        """Return the probability of each tag, B T, for frames prepared by `pad_and_resize`.

        Raises:
            CheckpointError: If the network fails.
            MemoryPlanError: If memory runs out.
        """
        # some networks are exported for one batch size only
        size = self.fixed_batch or self.batch_size
        batches = []
        for start in range(0, len(frames), size):
            images = [self.to_model_input(frame) for frame in frames[start : start + size]]
            num_images = len(images)
            if self.fixed_batch is not None:  # the network takes no smaller batch: fill the last one up
                images += [images[-1]] * (size - num_images)
            batches.append(self._predict_batch(np.stack(images))[:num_images])
        return np.concatenate(batches)

    def pad_and_resize(self, frame: Frame) -> Frame:
        """Pad a frame, H W 3 RGB, to a white square and resize it to the network's size: S S 3 BGR."""
        target_size = (self.image_size, self.image_size)
        height, width = frame.shape[:2]
        side = max(height, width)
        if side * side > MAX_PIXELS:  # the square of a long strip would take gigabytes: reduce it first
            scale = self.image_size / side
            height = max(1, round(height * scale))
            width = max(1, round(width * scale))
            frame = np.asarray(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
            side = self.image_size

        square = np.full((side, side, 3), 255, np.uint8)
        top = (side - height) // 2
        left = (side - width) // 2
        square[top : top + height, left : left + width] = frame[..., ::-1]  # RGB to BGR

        if side > self.image_size:
            return np.asarray(cv2.resize(square, target_size, interpolation=cv2.INTER_AREA), np.uint8)
        if side < self.image_size:
            return np.asarray(Image.fromarray(square).resize(target_size, Image.Resampling.LANCZOS))
        return square

    def to_model_input(self, square: Frame) -> FloatArray:
        """Convert a frame prepared by `pad_and_resize` to the network's input: S S 3 or 3 S S."""
        pixels = square.astype(np.float32)
        if self.returns_logits:
            pixels = pixels / np.float32(127.5) - np.float32(1)
        return pixels.transpose(2, 0, 1) if self.is_channels_first else pixels

    def _predict_batch(self, images: FloatArray) -> FloatArray:
        """Return the probability of each tag for each image, B T; NaN becomes 0."""
        output = self.model.run(images)[0]
        if output.shape != (len(images), len(self.labels)):
            raise CheckpointError(
                f"--model_dir: the tagger gives {output.shape}, but its list has {len(self.labels)} tags. "
                "Use both files from the same release."
            )
        if self.returns_logits:
            output = np.asarray(1 / (1 + np.exp(-output)), np.float32)
        return np.nan_to_num(output, nan=0.0)  # otherwise NaN would pass every threshold


def load_tagger(
    folder: Path, batch_size: int, averages_frames: bool, max_frames: int, option: str = "--model_dir"
) -> Tagger:
    """Load a tagger: an ONNX network and its list of labels.

    Args:
        folder: Folder of its files.
        batch_size: Number of images per batch, if the network accepts any number.
        averages_frames: Whether a tag's probability for a clip is the mean over its frames, not the maximum.
        max_frames: Maximum number of frames of a clip that are tagged, to plan memory.
        option: Option that names the folder, for messages.

    Raises:
        CheckpointError: If the folder has no model file, or if the model is not a tagger.
        InstallationError: If onnxruntime is missing.
    """
    path = folder / MODEL_NAME
    if not path.is_file():
        target = folder.parent if folder.name == MODEL_FOLDER.name else MODEL_FOLDER.parent
        command = quote_command([*_DOWNLOAD_COMMAND, str(target)])
        raise CheckpointError(
            f"{option} {folder}: there is no {MODEL_NAME}. {command} downloads a tagger, after its size and "
            "license",
            folder,
        )
    labels = read_labels(folder)
    model = load_onnx(path, batch_size * IMAGE_BYTES, may_use_cuda=True)
    image_size, is_channels_first = _read_input_layout(model, path)
    fixed_batch = model.input_shape[0]
    # an image takes 3 channels of 4 bytes; half of the memory is left for the network
    if fixed_batch is not None and 12 * image_size**2 * fixed_batch > MAX_ONNX_MEMORY // 2:
        raise CheckpointError(
            f"{path} requires batches of {fixed_batch:,} images of {image_size} x {image_size} pixels, "
            "which do not fit into memory. Export it with a dynamic batch size",
            path,
        )
    return Tagger(
        model=model,
        labels=labels,
        image_size=image_size,
        is_channels_first=is_channels_first,
        returns_logits=has_mapping(folder),  # taggers with a JSON mapping of labels return logits
        fixed_batch=fixed_batch,
        batch_size=batch_size,
        averages_frames=averages_frames,
        max_frames=max_frames,
    )


def _read_input_layout(model: OnnxModel, path: Path) -> tuple[int, bool]:
    """Return the side S of a network's input, and whether its layout is B 3 S S instead of B S S 3."""
    shape = model.input_shape  # None: any size
    is_channels_first = len(shape) == 4 and shape[1] == 3
    sides = shape[2:] if is_channels_first else shape[1:3]
    is_square = len(shape) == 4 and 3 in (shape[1], shape[3]) and sides[0] == sides[1]
    if not is_square or sides[0] is None:
        raise CheckpointError(
            f"{path} requires input of shape {list(shape)}, not square images of one size: it is not a "
            f"tagger for selected_tags.csv or {MAPPING_NAME}",
            path,
        )
    return sides[0], is_channels_first
