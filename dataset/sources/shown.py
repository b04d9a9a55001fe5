"""Reference media that a row of a list names for its clip: images, clips and audio, in order.

`"references": [{"type": "image", "path": "style.png"}, {"type": "video", "path": "motion.mp4", "audio_path":
"motion.wav"}, {"type": "audio", "path": "voice.wav"}]`. The audio of a clip is in the file of `audio_path`,
or in the clip itself; with `"audio_path": null` it is left out.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.errors import DatasetError
from modules.paths import expand_path, is_address
from protocols.rules import ReferenceMedium

KINDS = ("image", "video", "audio")
KEYS = {"type", "path", "audio_path"}
MAX_SHOWN = 80  # characters of a value in a message


def read_row_references(value: Any, file: Path, position: str) -> tuple[ReferenceMedium, ...]:
    """Parse the value `references` of a row.

    A relative path is looked up in the working folder, then in the folder of the list.

    Args:
        value: `references` of the row.
        file: The list.
        position: Position of the row for messages, such as `list.jsonl, line 3`.

    Raises:
        DatasetError: If the value is not a list of references, or if a file does not exist.
    """
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        example = '[{"type": "image", "path": "a.png"}]'
        raise DatasetError(f"{position}: references = {_show(value)} is not a list such as {example}")
    return tuple(
        _read_medium(entry, file, f"{position}: references[{number}]") for number, entry in enumerate(value)
    )


def _read_medium(entry: Mapping[str, Any], file: Path, position: str) -> ReferenceMedium:
    """Read an entry of a row's `references`. Raises DatasetError for an unknown key, type or file."""
    kind = entry.get("type")
    if kind not in KINDS:
        raise DatasetError(f"{position}: type = {_show(kind)}: use one of {', '.join(KINDS)}")
    unknown = sorted(entry.keys() - KEYS)
    if unknown:
        raise DatasetError(f"{position}: unknown key {unknown[0]}; known keys: {', '.join(sorted(KEYS))}")
    if "audio_path" in entry and kind != "video":
        raise DatasetError(f"{position}: audio_path is for references of type video. Omit it")
    path = _locate(entry.get("path"), file, f"{position}: path")
    if entry.get("audio_path") is None:
        return ReferenceMedium(kind, path, is_silent="audio_path" in entry)
    return ReferenceMedium(
        kind, path, audio_path=_locate(entry["audio_path"], file, f"{position}: audio_path")
    )


def _locate(text: Any, file: Path, position: str) -> Path:
    """Return the path of a reference file: relative to the working folder, or to the folder of its list."""
    if not isinstance(text, str) or not text.strip():
        raise DatasetError(f"{position} = {_show(text)} is not a path in quotes")
    if is_address(text):
        raise DatasetError(f"{position}: references must be local files. Download it, and write its path")
    try:
        in_working_folder = expand_path(text, None)
        in_list_folder = expand_path(text, file.parent)
    except ValueError as error:
        raise DatasetError(f"{position} = {_show(text)}: {error}.") from None
    for path in (in_working_folder, in_list_folder):
        if path.exists():
            return path
    raise DatasetError(
        f"{position}: {in_working_folder}: no such file, nor in the folder of {file.name}. Correct the path"
    )


def _show(value: Any) -> str:
    """Return a value as text for a message, shortened if it is long."""
    return json.dumps(value, default=repr)[:MAX_SHOWN]
