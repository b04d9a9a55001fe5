"""Describe captions that are JSON objects, for the forms that edit their keys.

The pages New and Datasets show these forms.
"""

import json
from pathlib import Path
from typing import Any

from browser.folders.described_folder import is_described, read_described
from modules.pages.language import say, show_all
from project.options import find_caption_format
from protocols.caption_formats import CaptionFormat
from protocols.families import caption_formats


def find_folder_caption_format(folder: Path | None) -> str:
    """Return the family whose JSON format the captions of a folder with a run.toml have.

    Returns "" if they are plain sentences.
    """
    if folder is None or not is_described(folder):
        return ""
    try:
        return find_caption_format(read_described(folder).commands)
    except (OSError, ValueError):
        return ""


def describe_formats() -> str:
    """Return the keys of all JSON caption formats as JSON, with labels in the page's language."""
    formats = {name: _describe(format) for name, format in caption_formats().items()}
    return json.dumps(show_all(formats), ensure_ascii=False)


def name_key(name: str) -> str:
    """Return the label of a caption key in a form."""
    return name.replace("_", " ")


def _describe(format: CaptionFormat) -> dict[str, Any]:
    keys = []
    for key in format.keys:
        parts = [{"name": part, "label": say(name_key(part))} for part in key.parts]
        label = say(name_key(key.name))
        keys.append({"name": key.name, "label": label, "kind": key.kind.__name__, "parts": parts})
    return {"title": format.title, "keys": keys}
