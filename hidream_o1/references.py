"""References of an edit: their sizes for the patches and for the vision tower, and boxes of a layout.

Source: the released code of HiDream-O1-Image.
"""
# Letters: n tokens of an image for the vision tower, K values of a token

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from hidream_o1.configs import PATCH
from hidream_o1.options import SIDE, LayoutBox
from modules.errors import OptionError
from modules.media.buckets import Size, fit_to_area
from modules.media.reading import Frame, fit_frame, image_size, read_image, resize_frame, resize_stretched
from protocols.requests import Prepared, Prompt, Prompts
from protocols.rules import ReferenceRules

MAX_REFERENCES = 10
# (largest number of references, side in 64ths of the target's longer side); a layout counts as a reference
SIDES_BY_COUNT = ((1, 64), (2, 48), (4, 32), (8, 24), (MAX_REFERENCES + 1, 16))
RULES = ReferenceRules(
    MAX_REFERENCES,
    step=PATCH,
    seen_by_text=True,
    text_sees_vae_input=True,
    sides_by_count=SIDES_BY_COUNT,
)
# (largest number of references, side of the square whose area each has for the vision tower)
SHOWN_SIDES = ((4, 384), (8, 288), (MAX_REFERENCES + 1, 192))
SHOWN_STEP = 32  # pixels along each side of a token of the vision tower
# the image processor of Qwen3-VL enlarges images of fewer pixels. Source: its preprocessor_config.json
LEAST_SHOWN_AREA = 256 * 256
MAX_BOXES = 5  # that a layout draws
COLORS = (
    *((255, 0, 0), (0, 180, 0), (0, 0, 255), (204, 180, 0), (255, 0, 255)),
    *((0, 255, 255), (128, 0, 0), (0, 128, 0), (0, 0, 128), (128, 128, 0)),
)
FRAME_SHARE = 0.04  # width of a reference's frame, as a share of the square root of its area
LINE_SHARE, LEAST_LINE = 0.05, 5  # width of a box's lines, as a share and in pixels

Color = tuple[int, int, int]


@dataclass(frozen=True)
class ReferenceImage:
    """An image file as a reference."""

    path: Path
    side: int  # of the square whose area it has
    frame_color: Color | None = None  # of a frame around it; None: there is no layout

    def read(self) -> Frame:
        """Read the reference in its size, H W 3; raise MediaError if it cannot be read."""
        image = _fit(read_image(self.path), self.side)
        if self.frame_color is None:
            return image
        framed = image.copy()
        width = int(math.sqrt(image.shape[0] * image.shape[1]) * FRAME_SHARE)
        for edge in (numpy.s_[:width], numpy.s_[-width:], numpy.s_[:, :width], numpy.s_[:, -width:]):
            if width:
                framed[edge] = self.frame_color
        return _fit(framed, self.side)


@dataclass(frozen=True)
class LayoutImage:
    """A black image with boxes, the largest first, which follows the references that belong into them."""

    boxes: tuple[tuple[tuple[int, int, int, int], Color], ...]  # left, top, right, bottom, all inside
    size: Size  # of the result
    side: int  # of the square whose area it has

    def read(self) -> Frame:
        """Draw the image, H W 3."""
        image = Image.new("RGB", self.size)
        draw = ImageDraw.Draw(image)
        widest = int(math.sqrt(self.size[0] * self.size[1]) * LINE_SHARE)
        thinner = max(1, widest // MAX_BOXES)
        for index, (box, color) in enumerate(self.boxes):
            draw.rectangle(box, outline=color, width=max(widest - index * thinner, LEAST_LINE))
        return _fit(numpy.array(image), self.side)


Reference = ReferenceImage | LayoutImage


def _fit(frame: Frame, side: int) -> Frame:
    return fit_frame(frame, fit_to_area((frame.shape[1], frame.shape[0]), side, PATCH))


def find_own_size(path: Path) -> Size:
    """Return the size of a reference, and of the result, with --keep_original_aspect."""
    return fit_to_area(image_size(path), SIDE, PATCH).bucket


def make_references(
    paths: Sequence[Path], boxes: Sequence[LayoutBox], size: Size, side: int | None = None
) -> tuple[Reference, ...]:
    """Return the references of a request, followed by its layout if there are boxes.

    Args:
        paths: Their files.
        boxes: Boxes for the references in the same order, of which a layout draws the five largest.
        size: Width and height of the result.
        side: Side of the square whose area each reference has; None: by the number of references.

    Raises:
        OptionError: If a box has no pixels.
    """
    number = len(paths) + bool(boxes)
    side = side or RULES.find_side(number, size)
    assert side is not None
    corners = [_find_corners(box, size) for box in boxes]
    # stable: of equal boxes, the first one comes first
    by_area = sorted(range(len(corners)), key=lambda index: -_area(corners[index]))[:MAX_BOXES]
    color_by_box = {index: COLORS[place] for place, index in enumerate(by_area)}
    references: list[Reference] = []
    for index, path in enumerate(paths):
        color = color_by_box.get(index, COLORS[index % len(COLORS)]) if boxes else None
        references.append(ReferenceImage(path, side, color))
    if boxes:
        drawn = tuple((corners[index], color_by_box[index]) for index in by_area)
        references.append(LayoutImage(drawn, size, side))
    return tuple(references)


def _area(corners: tuple[int, int, int, int]) -> int:
    left, top, right, bottom = corners
    return (right - left) * (bottom - top)


def _find_corners(box: LayoutBox, size: Size) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a box in pixels of the result."""
    width, height = size
    left, right = (min(width - 1, round(share * width)) for share in (box.left, box.right))
    top, bottom = (min(height - 1, round(share * height)) for share in (box.top, box.bottom))
    if left >= right or top >= bottom:
        raise OptionError(
            f"--layout_bboxes: the box {list(box)} is thinner than a pixel of {width} x {height}. Correct "
            "its numbers"
        )
    return left, top, right, bottom


def show_references(prepared: Prepared, references: tuple[Reference, ...]) -> Prepared:
    """Return the request with the references in front of all its prompts."""

    # without a negative prompt, guidance compares with an empty text and the same images
    def with_references(prompt: Prompt | None) -> Prompt:
        return replace(prompt or Prompt(""), media_before_text=references)

    texts = prepared.prompts[0]  # an image has a single section
    shown = Prompts(
        with_references(texts.positive),
        negative=with_references(texts.negative),
        blank=with_references(texts.blank),
        nag=None if texts.nag is None else with_references(texts.nag),
    )
    return replace(prepared, prompts={0: shown})


def shrink_for_tower(frame: Frame, number: int) -> Frame:
    """Return the small copy of a reference that the vision tower gets, H W 3; its sides are multiples of 32.

    Args:
        frame: The reference in its own size.
        number: Number of references.
    """
    height, width = frame.shape[:2]
    side = next((side for most, side in SHOWN_SIDES if number <= most), SHOWN_SIDES[-1][1])
    ratio = width / height
    wide = math.sqrt(side * side * ratio)
    size = tuple(max(int(length / SHOWN_STEP), 1) * SHOWN_STEP for length in (wide, wide / ratio))
    small = resize_frame(frame, (size[0], size[1]), "lanczos")
    if math.prod(size) >= LEAST_SHOWN_AREA:
        return small
    scale = math.sqrt(LEAST_SHOWN_AREA / math.prod(size))
    larger = [math.ceil(length * scale / SHOWN_STEP) * SHOWN_STEP for length in size]
    return resize_stretched(small, (larger[0], larger[1]))


def cut_tokens(frame: Frame) -> Tensor:
    """Cut a small copy, H W 3 uint8, into the pixels of its tokens, n K uint8, rows first."""
    step = SHOWN_STEP
    return rearrange(torch.from_numpy(frame), "(h p) (w q) c -> (h w) (p q c)", p=step, q=step)
