"""Run a tagger's ONNX file on pictures and clips."""
# Letters: B images, S side of the network's input, T tags

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.captions.asking import Answers, Look, NoCaptionError, Shown, answer_in_batches
from data_tools.captions.places import CaptionLocation
from data_tools.tags.labels import MAPPING, Label, has_mapping, read_labels
from data_tools.tags.options import MODEL_FOLDER
from data_tools.tags.words import TagChoice
from modules.command import quote_command
from modules.errors import CheckpointError
from modules.limits import MAX_ONNX_MEMORY, MAX_PIXELS
from modules.media.reading import Frame
from modules.onnx_models import OnnxModel, load_onnx

MODEL = "model.onnx"
Numbers = NDArray[np.float32]
IMAGE_BYTES = 1 << 26  # memory for each image of a batch
_TYPED = ["python", "tools/download.py", "--family", "tools", "--task", "wd_tagger", "--to"]


@dataclass(frozen=True)
class Tagger:
    """A tagging network that is loaded, with its labels and image size."""

    model: OnnxModel
    labels: tuple[Label, ...]
    side: int  # S
    is_channels_first: bool
    is_of_logits: bool  # its colors are -1..1 and its outputs logits, else 0..255 and probabilities
    fixed_batch: int | None  # number of images that it takes, if it takes no other
    batch_size: int
    joins_by_mean: bool
    max_frames: int

    def answerer(self, choice: TagChoice, separator: str) -> Any:
        """Return the function that tags locations; a location's tags are joined by `separator`."""

        def answer(locations: Sequence[CaptionLocation], look: Look) -> Answers:
            """Yield (location, tags) for each location."""
            yield from answer_in_batches(
                locations,
                lambda location: tuple(map(self.fit, look(location))),
                batch_size=self.batch_size,
                item_bytes=3 * self.side**2 * self.max_frames,
                answer_batch=lambda batch: self._answer_batch(batch, choice, separator),
            )

        return answer

    def _answer_batch(
        self, batch: Sequence[Shown], choice: TagChoice, separator: str
    ) -> list[tuple[CaptionLocation, str | Exception]]:
        """Choose the tags of each location in a batch; return an error if no tag is probable enough.

        The probabilities of all frames of a clip are combined before tags are chosen.
        """
        frames = [frame for _, shown in batch for frame in shown]
        probabilities = self.probabilities(frames)
        answers: list[tuple[CaptionLocation, str | Exception]] = []
        start = 0
        for location, shown in batch:
            of_frames = probabilities[start : start + len(shown)]
            start += len(shown)
            joined = of_frames.mean(axis=0) if self.joins_by_mean else of_frames.max(axis=0)
            tags = choice.choose(self.labels, joined.tolist())
            if tags:
                answers.append((location, separator.join(tags)))
            else:
                answers.append((location, NoCaptionError("no tag is as probable as --thresh asks")))
        return answers

    def probabilities(self, frames: Sequence[Frame]) -> Numbers:
        """Return the probability of each tag, B T, for frames prepared by `fit`, in batches of `batch_size`.

        Raises:
            CheckpointError: If the network fails.
            MemoryPlanError: If memory runs out.
        """
        # some networks are exported for one batch size only
        size = self.fixed_batch or self.batch_size
        parts = []
        for start in range(0, len(frames), size):
            images = [self.as_input(frame) for frame in frames[start : start + size]]
            count = len(images)
            if self.fixed_batch is not None:  # the network takes no smaller batch: fill the last one up
                images += [images[-1]] * (size - count)
            parts.append(self._run(np.stack(images))[:count])
        return np.concatenate(parts)

    def fit(self, frame: Frame) -> Frame:
        """Pad a frame, H W 3 RGB, to a white square and resize it to the network's size: S S 3 BGR."""
        height, width = frame.shape[:2]
        side = max(height, width)
        if side * side > MAX_PIXELS:  # the square of a long strip would take gigabytes: reduce it first
            scale = self.side / side
            height = max(1, round(height * scale))
            width = max(1, round(width * scale))
            frame = np.asarray(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
            side = self.side

        square = np.full((side, side, 3), 255, np.uint8)
        top = (side - height) // 2
        left = (side - width) // 2
        square[top : top + height, left : left + width] = frame[..., ::-1]  # RGB to BGR

        if side > self.side:
            small = cv2.resize(square, (self.side, self.side), interpolation=cv2.INTER_AREA)
            return np.asarray(small, np.uint8)
        if side < self.side:
            lanczos = Image.Resampling.LANCZOS
            return np.asarray(Image.fromarray(square).resize((self.side, self.side), lanczos))
        return square

    def as_input(self, square: Frame) -> Numbers:
        """Convert a frame prepared by `fit` to the network's input: S S 3 or 3 S S."""
        numbers = square.astype(np.float32)
        if self.is_of_logits:
            numbers = numbers / np.float32(127.5) - np.float32(1)
        return numbers.transpose(2, 0, 1) if self.is_channels_first else numbers

    def _run(self, pictures: Numbers) -> Numbers:
        """Return the probability of each tag for each image, B T; NaN becomes 0.

        Raises:
            CheckpointError: If the network does not return one value per tag of the list.
        """
        output = self.model.run(pictures)[0]
        if output.shape != (len(pictures), len(self.labels)):
            raise CheckpointError(
                f"--model_dir: the tagger gives {output.shape}, but its list has {len(self.labels)} tags. "
                "Take both files from the same release."
            )
        if self.is_of_logits:
            output = np.asarray(1 / (1 + np.exp(-output)), np.float32)
        return np.nan_to_num(output, nan=0.0)


def load_tagger(
    folder: Path, batch_size: int, joins_by_mean: bool, max_frames: int, option: str = "--model_dir"
) -> Tagger:
    """Load a tagger: an ONNX network and its list of labels.

    Args:
        folder: Folder of its files.
        batch_size: Number of images per batch, if the network accepts any number.
        joins_by_mean: Whether a clip's probability of a tag is the mean of its frames, else the highest.
        max_frames: Number of frames of a clip that are tagged at most, to plan memory.
        option: Option that names the folder, for messages.

    Raises:
        CheckpointError: If the folder has no model file, or if the model is not a tagger.
        InstallationError: If onnxruntime is missing.
    """
    path = folder / MODEL
    if not path.is_file():
        target = folder.parent if folder.name == MODEL_FOLDER.name else MODEL_FOLDER.parent
        raise CheckpointError(
            f"{option} {folder}: there is no {MODEL}. {quote_command([*_TYPED, str(target)])} downloads a "
            "tagger, "
            "after its size and license",
            folder,
        )
    labels = read_labels(folder)
    model = load_onnx(path, batch_size * IMAGE_BYTES, may_use_cuda=True)
    shape = model.input_shape
    is_channels_first = len(shape) == 4 and shape[1] == 3
    sides = shape[2:] if is_channels_first else shape[1:3]
    is_square = len(shape) == 4 and 3 in (shape[1], shape[3]) and sides[0] == sides[1]
    if not is_square or sides[0] is None:
        raise CheckpointError(
            f"{path} takes {list(shape)}, and not square pictures of one size: it is no tagger that goes "
            f"with selected_tags.csv or {MAPPING}",
            path,
        )
    fixed_batch = shape[0]
    # an image takes 3 channels of 4 bytes; half of the memory is left for the network
    if fixed_batch is not None and 12 * sides[0] ** 2 * fixed_batch > MAX_ONNX_MEMORY // 2:
        raise CheckpointError(
            f"{path} takes {fixed_batch:,} pictures of {sides[0]} x {sides[0]} pixels at once: more than "
            "memory holds. Export it with an open number of pictures",
            path,
        )
    return Tagger(
        model=model,
        labels=labels,
        side=sides[0],
        is_channels_first=is_channels_first,
        is_of_logits=has_mapping(folder),  # taggers with a JSON mapping of labels return logits
        fixed_batch=fixed_batch,
        batch_size=batch_size,
        joins_by_mean=joins_by_mean,
        max_frames=max_frames,
    )
