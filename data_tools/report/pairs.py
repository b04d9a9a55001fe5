"""Draw the reference pictures of an image for its card, beside the image itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from markupsafe import Markup

from data_tools.report.looks import StripSize, draw_crop
from dataset.sources.fetching import fetch
from dataset.sources.media_source import MediaSource
from dataset.sources.references import fit_reference
from modules.control_codes import escape_control_codes
from modules.errors import MediaError
from modules.media.buckets import Fit, fit_cover
from modules.media.reading import read_image
from modules.pages.page import embed_picture


@dataclass(frozen=True)
class ShownReference:
    """A reference picture, or another control image, as a card shows it."""

    name: str
    picture: Markup | None = None
    text: str = ""  # its size and what becomes of it, or why it cannot be used
    is_bad: bool = False


def show_references(source: MediaSource, image: Fit | None, shown: StripSize) -> Sequence[ShownReference]:
    """Read the control images of an image; none of clips. image: how that is fitted; None: it is unreadable.

    shown: the height of a picture is used.
    """
    if source.table.kind == "video" or not source.control:
        return ()
    names = [escape_control_codes(path.name) for path in source.control]
    try:
        with fetch(source) as here:
            pairs = zip(here.control, names, strict=True)
            return [_show_one(source, path, name, image, shown) for path, name in pairs]
    except MediaError as error:  # a download
        return [ShownReference(name, text=str(error), is_bad=True) for name in names]


def _show_one(
    source: MediaSource, path: Path, name: str, image: Fit | None, shown: StripSize
) -> ShownReference:
    try:
        frame = read_image(path)
        size = (frame.shape[1], frame.shape[0])
        fit = None if source.table.references is None else fit_reference(source.table, size, path)
    except MediaError as error:
        return ShownReference(name, text=str(error), is_bad=True)
    if fit is None and image is not None:
        fit = fit_cover(size, image.bucket)
    text = f"{size[0]} x {size[1]}"
    height = shown.picture_height
    width = min(max(1, round(size[0] * height / size[1])), shown.width)
    small = np.asarray(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    if fit is not None:
        small, text = draw_crop(small, fit), f"{text} → {fit.bucket[0]} x {fit.bucket[1]}"
    return ShownReference(name, embed_picture(small, name, shown.width, quality=shown.quality), text)
