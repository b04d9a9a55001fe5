"""Layouts: captions that are JSON objects with boxes, in pixels of their image, counted from its center.

A box is [top, left, bottom, right]. Boxes follow their image to its bucket. Source: the prompts of the
release, as ComfyUI and SimpleTuner write them.
"""

import json
from typing import Any

from modules.media.buckets import Fit, Size
from modules.text_files import read_object

LABELS = ("object", "character", "text")
CANVASES = ("single", "multi_panel", "collage")
SPACE, FORMAT = "abs_centralized", "yxyx"  # how the boxes are written
BOX_SIDES = 4


def find_layout_errors(text: str, size: Size) -> list[str]:
    """Return the errors in a JSON layout of an image of this size (width, height); [] if it is valid."""
    try:
        layout = read_object(text)
    except ValueError as error:
        return [str(error)]
    errors = []
    summary = layout.get("summary")
    if not isinstance(summary, dict) or not _is_text(summary.get("caption")):
        errors.append("summary.caption is missing")
    elif summary.get("canvas", CANVASES[0]) not in CANVASES:
        errors.append(f"canvas {summary['canvas']!r}: one of {', '.join(CANVASES)}")
    for name, default in (("bbox_coord_space", SPACE), ("bbox_format", FORMAT)):
        if layout.get(name, default) != default:
            errors.append(f"{name} is {layout[name]!r}, the model was trained with {default}")
    items = layout.get("items", [])
    if not isinstance(items, list):
        return [*errors, "items is not a list"]
    for number, item in enumerate(items, 1):
        errors += [f"item {number}: {fault}" for fault in _find_item_errors(item, size)]
    return errors


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _find_item_errors(item: Any, size: Size) -> list[str]:
    """Return the errors in one item of a JSON layout."""
    if not isinstance(item, dict):
        return ["it is not a JSON object"]
    errors = []
    label = item.get("label")
    if label not in LABELS:
        errors.append(f"label {label!r}: one of {', '.join(LABELS)}")
    if not _is_text(item.get("caption")):
        errors.append("its caption is missing")
    if label == "text" and not _is_text(item.get("text")):
        errors.append("its text is missing")
    return errors + _find_box_errors(item.get("bbox"), size)


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == BOX_SIDES and all(type(side) in (int, float) for side in box)


def _find_box_errors(box: Any, size: Size) -> list[str]:
    """Return the errors in a box [top, left, bottom, right]: reversed edges, or edges outside the image."""
    # The origin is the image's center.
    if not _is_box(box):
        return ["its bbox is not four numbers"]
    top, left, bottom, right = box
    if top >= bottom or left >= right:
        return [f"bbox {box}: it ends before it begins; it is [top, left, bottom, right]"]
    width, height = size
    # one pixel of tolerance
    is_inside = max(-left, right) <= width / 2 + 1 and max(-top, bottom) <= height / 2 + 1
    if is_inside:
        return []
    return [f"bbox {box} extends beyond the image, {width} x {height} pixels around its center"]


def fit_layout(text: str, size: Size, fit: Fit) -> str:
    """Convert a JSON layout's boxes to pixels of the image's bucket; return other texts unchanged.

    `size` is the image's width and height. Boxes are clipped at the edges of the bucket; items that are
    cropped away are left out.
    """
    try:
        layout = read_object(text)
    except ValueError:
        return text
    if fit.resized == size == fit.bucket:  # neither resized nor cropped
        return text
    items = layout.get("items")
    if not isinstance(items, list):
        return text
    fitted_items = []
    for item in items:
        if isinstance(item, dict) and _is_box(item.get("bbox")):
            box = _fit_box(item["bbox"], size, fit)
            if box[0] >= box[2] or box[1] >= box[3]:
                continue
            item = {**item, "bbox": box}
        fitted_items.append(item)
    return json.dumps({**layout, "items": fitted_items}, ensure_ascii=False, separators=(",", ":"))


def _fit_box(box: list[float], size: Size, fit: Fit) -> list[int]:
    """Convert a box from the original image to pixels of the cropped one, relative to its center."""
    fitted = []
    for place, side in enumerate(box):
        axis = 1 - place % 2  # top and bottom are along the height, sizes have the width first
        half = fit.bucket[axis] / 2
        along = (side + size[axis] / 2) * fit.resized[axis] / size[axis] - fit.crop[axis]
        fitted.append(round(min(max(along - half, -half), half)))
    return fitted
