"""From a source to the items that are encoded: decode once, keep and resize frames, choose the bucket, cut spans."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dataset.frames import Span
from dataset.sources import Source
from modules.buckets import Size
from modules.media import Frame


@dataclass(frozen=True)
class Item:
    """One thing to encode: an image, or a span of a clip."""

    source: Source
    key: str  # for messages: "clip_00000-017" or "pic"
    span: Span  # first kept frame, number of frames; (0, 1) for images
    size: Size  # of the original, upright
    bucket: Size  # of the frames

    @property
    def name_size(self) -> Size:
        """The size that stands in the cache name: the original's for images, the bucket for videos."""
        return self.size if self.source.table.kind == "image" else self.bucket


@dataclass(frozen=True)
class DecodedSource:
    """The kept frames of one source, resized to its bucket. Images have one frame."""

    source: Source
    size: Size
    bucket: Size
    frames: tuple[Frame, ...]  # each H W 3
    control: tuple[tuple[Frame, ...], ...]  # per control image or clip: as many frames; C = 4 where a control image has alpha
    spans: tuple[Span, ...]
    reason: str | None  # why there is no span: "12 frames, the shortest target_frames is 17"

    @property
    def items(self) -> tuple[Item, ...]:
        """One item per span."""
        raise NotImplementedError

    def crop(self, span: Span) -> NDArray[np.uint8]:
        """F H W 3 of a span, copied."""
        raise NotImplementedError

    def control_crops(self, span: Span) -> tuple[NDArray[np.uint8], ...]:
        """F H W C of a span, for each control, copied."""
        raise NotImplementedError


def decode_source(source: Source, fps: float, step: int = 16, frame_step: int = 4) -> DecodedSource:
    """Read a source and its control media; the whole clip lies in memory at bucket size, larger frames only one at a time.

    fps: the family's rate, reached by dropping frames where the table has source_fps. step, frame_step: of the family's LatentSpec.
    Raises MediaError (unreadable, too small), DatasetError (a resolution that is no multiple of `step`).
    """
    raise NotImplementedError


def plan_source(source: Source, fps: float, step: int = 16, frame_step: int = 4) -> DecodedSource:
    """As `decode_source`, but from headers alone and without frames: for `--check`. A clip whose header has no count is decoded.

    Raises as `decode_source`, as far as headers tell.
    """
    raise NotImplementedError


def check_unique(names: Iterable[tuple[str, Item]]) -> None:
    """Raise DatasetError where two items would write one cache file; `names` are (file name, item)."""
    raise NotImplementedError
