"""Captions of Fibo 2.0: JSON objects of nine keys, as the model was trained with. Standard library only.

Source: diffusers' BriaFibo2Pipeline (`_parse_prompt`, `_get_edit_prompt`) and the release's description.
"""

import json
import math
from typing import Any, NamedTuple

from modules.control_codes import shorten
from modules.errors import CaptionError
from modules.text_files import looks_like_object, read_object
from protocols.caption_formats import CaptionFormat, CaptionKey

DESCRIPTION, TEXTS = "short_description", "text_render"
DRAWING = "image_tokens"  # key of a text whose value stands for its drawing
CAPTION, INSTRUCTION = "structured_caption", "edit_instruction"
SCORES = ("aesthetic_score", "preference_score")  # never in trained captions
FORMAT = CaptionFormat(
    "Fibo 2.0",
    (
        CaptionKey(DESCRIPTION, str, "the whole picture in a few sentences: who, what, where, and its mood"),
        CaptionKey(
            "objects",
            list,
            "each thing and person that matters, at most five; of people also what the last parts say",
            (
                *("description", "location", "relationship", "relative_size", "shape_and_color", "texture"),
                *("appearance_details", "orientation", "number_of_objects", "pose", "expression", "clothing"),
                *("action", "gender", "skin_tone_and_texture"),
            ),
        ),
        CaptionKey("background_setting", str, "what is behind and around them"),
        CaptionKey("lighting", dict, "the light", ("conditions", "direction", "shadows")),
        CaptionKey(
            "aesthetics", dict, "how it is composed", ("composition", "color_scheme", "mood_atmosphere")
        ),
        CaptionKey(
            "photographic_characteristics",
            dict,
            "how it was taken",
            ("depth_of_field", "focus", "camera_angle", "lens_focal_length"),
        ),
        CaptionKey("style_medium", str, "such as photograph, oil painting, 3D render"),
        CaptionKey("context", str, "what kind of picture it is and what it is for"),
        CaptionKey("artistic_style", str, "the style in at most three words"),
        CaptionKey(
            TEXTS,
            list,
            "each text that is legible in the picture",
            ("text", "location", "size", "color", "font", "appearance_details"),
        ),
    ),
    ignored=SCORES,
    instruction=INSTRUCTION,
)
# key -> its empty value, in the order of training
EMPTY: dict[str, Any] = {key.name: key.kind() for key in FORMAT.keys if key.name != TEXTS}


class WrittenCaption(NamedTuple):
    """A caption as the text encoder gets it; a plain caption follows the JSON text `before`."""

    text: str
    before: str = ""
    is_plain: bool = False


def write_json(content: Any) -> str:
    """Return content as compact JSON, without escaping non-ASCII characters."""
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


# what guidance leads away from, and what a dropped caption becomes
NULL = write_json(EMPTY)


def _is_empty(value: Any) -> bool:
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str | dict | list) and not value)


def _clean(value: Any) -> Any:
    """Remove empty parts from a JSON value, at any depth."""
    if isinstance(value, dict):
        cleaned = {key: _clean(part) for key, part in value.items()}
        return {key: part for key, part in cleaned.items() if not _is_empty(part)}
    if isinstance(value, list):
        return [part for part in map(_clean, value) if not _is_empty(part)]
    return value


def clean_caption(caption: dict[str, Any]) -> dict[str, Any]:
    """Remove empty values and scores from a caption, as in the training data; keep the order of keys.

    A caption that has only a short description and texts keeps both, even if empty: an empty list of texts
    says that the image shows none.
    """
    cleaned: dict[str, Any] = {}
    for key, value in _clean(caption).items():
        if key in SCORES:
            continue
        if isinstance(value, dict):
            value = {name: part for name, part in value.items() if name not in SCORES}
        if value != {}:
            cleaned[key] = value
    if caption.keys() == {DESCRIPTION, TEXTS}:
        return {DESCRIPTION: cleaned.get(DESCRIPTION, ""), TEXTS: cleaned.get(TEXTS, [])}
    return cleaned


def read_caption(text: str) -> dict[str, Any] | None:
    """Parse a caption or prompt as a JSON object; return None for plain text.

    Raises CaptionError for text that begins like an object but is not valid JSON.
    """
    if not looks_like_object(text):
        return None
    try:
        return read_object(text)
    except ValueError as error:
        raise CaptionError(
            f"the caption {shorten(text, 60)}: {error}. Fix it; a plain text must not begin with {{"
        ) from None


def write_caption(text: str, mark: str | None = None) -> WrittenCaption:
    """Return a caption in the JSON form of the training data; an empty one becomes the null caption.

    `mark` is added to each text that is drawn for the text encoder, where the drawing belongs; "": it is not
    shown yet; None: texts are not drawn.

    Raises CaptionError for text that begins like an object but is not valid JSON.
    """
    if not text.strip():
        return WrittenCaption(NULL)
    caption = read_caption(text)
    if caption is None:
        return _wrap_plain(DESCRIPTION, text)
    cleaned = _split_caption(caption)[0]
    return WrittenCaption(write_json(_mark_texts(cleaned, mark) or {}))


def write_edit(text: str, mark: str | None = None) -> WrittenCaption:
    """Write the JSON of an edit without its opening brace, which the prompt has before the images.

    `mark` as in `write_caption`. Raises CaptionError for invalid JSON, and if an object has no instruction.
    """
    content = read_caption(text)
    if content is None:
        # a plain text becomes the instruction
        wrapped_text = _wrap_plain(INSTRUCTION, text)
        return wrapped_text._replace(text=wrapped_text.text[1:], before=wrapped_text.before[1:])
    error = find_edit_error(content)
    if error:
        raise CaptionError(f"the edit {shorten(text, 60)}: {error}")
    caption, instruction = _split_caption(content)
    edit = {CAPTION: _mark_texts(caption, mark)} if caption else {}
    return WrittenCaption(write_json({**edit, INSTRUCTION: instruction})[1:])


def list_drawn_texts(text: str) -> list[str]:
    """Return the texts in the image that a JSON caption lists, which the release draws for the encoder."""
    return [entry["text"] for entry in _list_entries(_split_caption(read_caption(text) or {})[0])]


def _list_entries(caption: Any) -> list[dict[str, Any]]:
    """Return the entries of a cleaned caption's text_render that have a text."""
    entries = caption.get(TEXTS) if isinstance(caption, dict) else None
    return [
        entry
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict) and isinstance(entry.get("text"), str) and entry["text"]
    ]


def _mark_texts(caption: Any, mark: str | None) -> Any:
    """Return a cleaned caption with `mark` in each text that is drawn, after its other keys."""
    if mark is not None:
        for entry in _list_entries(caption):
            entry[DRAWING] = mark
    return caption


def _wrap_plain(key: str, text: str) -> WrittenCaption:
    return WrittenCaption(write_json({key: text}), f'{{"{key}":"', is_plain=True)


def _split_caption(content: dict[str, Any]) -> tuple[dict[str, Any] | str | None, Any]:
    """Split an edit's JSON into its cleaned caption and its instruction."""
    caption: Any = {key: value for key, value in content.items() if key != INSTRUCTION}
    if CAPTION in caption:
        caption = caption[CAPTION]
    cleaned = clean_caption(caption) if isinstance(caption, dict) else caption
    return cleaned or None, content.get(INSTRUCTION)


def find_edit_error(content: dict[str, Any]) -> str:
    """Return the error in the JSON object of an edit; "" if it is valid."""
    if not isinstance(content.get(INSTRUCTION), str) or not content[INSTRUCTION].strip():
        return f"it has no {INSTRUCTION}, a text that says what is changed"
    if CAPTION not in content:
        return ""
    if not isinstance(content[CAPTION], dict | str):
        return f"{CAPTION} is neither an object nor a text"
    others = sorted(content.keys() - {CAPTION, INSTRUCTION})
    return f"next to {CAPTION} it has {', '.join(others)}: move that into {CAPTION}" if others else ""


def find_caption_errors(text: str) -> list[str]:
    """Return the missing and misspelled keys of a JSON caption; [] if there are none."""
    try:
        content = read_object(text)
    except ValueError as error:
        return [str(error)]
    if CAPTION in content or INSTRUCTION in content:
        fault = find_edit_error(content)
        caption = content.get(CAPTION, {key: content[key] for key in content.keys() - {INSTRUCTION}})
        errors = [fault] if fault else []
        return errors + (FORMAT.find_key_errors(caption) if isinstance(caption, dict) else [])
    return FORMAT.find_errors(content)
