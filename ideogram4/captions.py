"""Captions of Ideogram 4: JSON objects with boxes, which the model reads exactly as they are written.

A box is [top, left, bottom, right] in thousandths of the image's height and width. Boxes follow their image
to its bucket. Source: the maker's checker of captions, as open trainers have it.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from modules.media.buckets import Fit, Size
from modules.text_files import read_object
from protocols.caption_formats import CaptionFormat, CaptionKey, has_text

DESCRIPTION, STYLE, COMPOSITION = (
    "high_level_description",
    "style_description",
    "compositional_deconstruction",
)
BACKGROUND, ELEMENTS, BOX, PALETTE = "background", "elements", "bbox", "color_palette"
# keys of a style in the order of training: of a photograph, and of anything else
PHOTO_STYLE = ("aesthetics", "lighting", "photo", "medium", PALETTE)
ART_STYLE = ("aesthetics", "lighting", "medium", "art_style", PALETTE)
# keys of an element in the order of training, by its type
ELEMENT_KEYS = {
    "obj": ("type", BOX, "desc", PALETTE),
    "text": ("type", BOX, "text", "desc", PALETTE),
}
MAX_STYLE_COLORS, MAX_ELEMENT_COLORS = 16, 5
BOX_SIDES, FULL = 4, 1000  # numbers of a box, and the number of the far edge
_COLOR = re.compile(r"#[0-9A-F]{6}")
FORMAT = CaptionFormat(
    "Ideogram 4",
    (
        CaptionKey(DESCRIPTION, str, "the whole picture in a few sentences"),
        CaptionKey(
            STYLE,
            dict,
            'how it looks; "photo" for photographs alone, "art_style" for anything else; "medium" is one of '
            'photograph, illustration, 3d_render, painting, graphic_design; "color_palette" is a list '
            "of at most "
            "16 colors such as #1A2B3C",
            tuple(dict.fromkeys((*PHOTO_STYLE[:-1], *ART_STYLE))),
        ),
        CaptionKey(
            COMPOSITION,
            dict,
            'what is where: "background" is a text; "elements" is a list of objects with "type" (obj, '
            'or text for writing), "bbox" ([top, left, bottom, right], whole numbers of 0 to 1000), '
            '"text" (what is written, of a text alone) and "desc" (a text)',
            (BACKGROUND, ELEMENTS),
        ),
    ),
)


def find_caption_errors(text: str) -> list[str]:
    """Return how a JSON caption differs from those that the model was trained with; [] if it does not."""
    try:
        caption = read_object(text)
    except ValueError as error:
        return [str(error)]
    errors = FORMAT.find_key_errors(caption)
    if re.search(r"\\u[0-9a-fA-F]{4}", text):
        errors.append(
            "it escapes characters (\\u...), which the model reads as they stand: write them plainly"
        )
    errors += _find_order_error("it", caption, (DESCRIPTION, STYLE, COMPOSITION))
    style, composition = caption.get(STYLE), caption.get(COMPOSITION)
    if isinstance(style, dict):
        keys = ART_STYLE if "art_style" in style else PHOTO_STYLE
        errors += _find_part_errors(STYLE, style, keys, needed=keys[:-1])
        errors += _find_color_errors(STYLE, style.get(PALETTE), MAX_STYLE_COLORS)
    if composition is None:
        return [*errors, f"{COMPOSITION} is missing"]
    if isinstance(composition, dict):
        errors += _find_part_errors(COMPOSITION, composition, (BACKGROUND, ELEMENTS), needed=(BACKGROUND,))
        elements = composition.get(ELEMENTS)
        if not isinstance(elements, list):
            return [*errors, f"{COMPOSITION}: {ELEMENTS} is not a list"]
        for number, element in enumerate(elements, 1):
            errors += _find_element_errors(f"element {number}", element)
    return errors


def _find_element_errors(name: str, element: Any) -> Iterator[str]:
    """Yield the errors in one entry of the elements."""
    kind = element.get("type") if isinstance(element, dict) else None
    if kind not in ELEMENT_KEYS:
        yield f"{name}: type {kind!r}, which is one of {', '.join(ELEMENT_KEYS)}"
        return
    keys = ELEMENT_KEYS[kind]
    texts = tuple(key for key in keys if key in ("text", "desc"))
    yield from _find_part_errors(name, element, keys, needed=texts)
    yield from _find_color_errors(name, element.get(PALETTE), MAX_ELEMENT_COLORS)
    if BOX in element:
        yield from _find_box_errors(name, element[BOX])


def _find_part_errors(
    name: str, part: Mapping[str, Any], keys: Sequence[str], needed: Sequence[str]
) -> Iterator[str]:
    """Yield the unknown keys of an object, those of `needed` without a text, and a wrong order."""
    unknown = [key for key in part if key not in keys]
    if unknown:
        yield f"{name}: {', '.join(unknown)} is not among {', '.join(keys)}"
    for key in needed:
        if not has_text(part.get(key)):
            yield f"{name}: {key} is missing"
    yield from _find_order_error(name, part, keys)


def _find_order_error(name: str, part: Mapping[str, Any], keys: Sequence[str]) -> Iterator[str]:
    known = [key for key in part if key in keys]
    if known != [key for key in keys if key in part]:
        yield f"{name} has its keys in another order than {', '.join(key for key in keys if key in part)}"


def _find_color_errors(name: str, palette: Any, maximum: int) -> Iterator[str]:
    if palette is None:
        return
    colors = palette if isinstance(palette, list) else [palette]
    wrong = [color for color in colors if not isinstance(color, str) or not _COLOR.fullmatch(color)]
    if wrong or not isinstance(palette, list):
        yield f"{name}: {PALETTE} is a list of colors such as #1A2B3C, in capital letters"
    if len(colors) > maximum:
        yield f"{name}: {PALETTE} has {len(colors)} colors, at most {maximum} are usual"


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == BOX_SIDES and all(type(side) is int for side in box)


def _find_box_errors(name: str, box: Any) -> Iterator[str]:
    if not _is_box(box):
        yield f"{name}: its {BOX} is not four whole numbers"
        return
    top, left, bottom, right = box
    if top >= bottom or left >= right:
        yield f"{name}: {BOX} {box} ends before it begins; it is [top, left, bottom, right]"
    elif min(box) < 0 or max(box) > FULL:
        yield f"{name}: {BOX} {box} leaves the image, whose sides count from 0 to {FULL}"


def fit_caption(text: str, size: Size, fit: Fit) -> str:
    """Return a JSON caption with its boxes in thousandths of the image's bucket; other texts are unchanged.

    Boxes are clipped at the edges of the bucket; elements that are cropped away are left out. A caption whose
    image is not cropped is returned as it is, to the character.

    Args:
        text: The caption.
        size: Width and height of the image.
        fit: How the image was resized and cropped.
    """
    if fit.resized == fit.bucket:  # without a crop, thousandths stay the same
        return text
    try:
        caption = read_object(text)
    except ValueError:
        return text
    composition = caption.get(COMPOSITION)
    if not isinstance(composition, dict) or not isinstance(composition.get(ELEMENTS), list):
        return text
    elements = composition[ELEMENTS]
    fitted = []
    for element in elements:
        if isinstance(element, dict) and _is_box(element.get(BOX)):
            box = _fit_box(element[BOX], fit)
            if box[0] >= box[2] or box[1] >= box[3]:
                continue
            element = {**element, BOX: box}
        fitted.append(element)
    if fitted == elements:
        return text
    written = {**caption, COMPOSITION: {**composition, ELEMENTS: fitted}}
    # the model reads spaces too, so they stay as they were
    is_spaced = re.search(r'"\s*:\s', text) is not None
    return json.dumps(written, ensure_ascii=False, separators=None if is_spaced else (",", ":"))


def _fit_box(box: Sequence[int], fit: Fit) -> list[int]:
    """Convert a box from thousandths of the whole image to those of its crop."""
    fitted = []
    for place, side in enumerate(box):
        axis = 1 - place % 2  # top and bottom are along the height, sizes have the width first
        along = side / FULL * fit.resized[axis] - fit.crop[axis]
        fitted.append(round(FULL * min(max(along / fit.bucket[axis], 0.0), 1.0)))
    return fitted
