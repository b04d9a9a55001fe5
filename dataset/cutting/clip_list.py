"""The list of clips, JSONL: one line a clip, as `video_jsonl_file` tables read it."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from modules.atomic_write import write_bytes
from modules.errors import OutputError
from modules.text_files import MAX_LINE_CHARACTERS, parse_json, read_lines


class ClipList:
    """The lines of a list. Those that are there stay as they are, with what users have added to them."""

    def __init__(self, path: Path) -> None:
        """Read the list if there is one. Raises OutputError if it cannot be read."""
        self._path = path
        self._kept: list[str] = []
        self._paths: dict[str, int] = {}  # of clips -> place of the line
        self._added: dict[int, list[str]] = {}  # place of the source -> lines
        self.was_there = path.exists()
        if self.was_there:
            self._read()

    def line_of(self, clip: Path) -> dict[str, Any] | None:
        """Return what the list says of a clip; None if that is nothing."""
        place = self._paths.get(str(clip))
        return None if place is None else _object(self._kept[place])

    def remove(self, clips: Iterable[Path]) -> None:
        """Leave out the lines of clips that are no more."""
        for clip in clips:
            place = self._paths.pop(str(clip), None)
            if place is not None:
                self._kept[place] = ""

    def add(self, place: int, facts: Sequence[dict[str, Any]]) -> None:
        """Add lines of the source at that place; a clip that has a line keeps it."""
        self._added[place] = [
            json.dumps(one, ensure_ascii=False) for one in facts if one["video_path"] not in self._paths
        ]

    def write(self) -> None:
        """Write the list, completely or not at all. Raises OutputError."""
        new = [line for place in sorted(self._added) for line in self._added[place]]
        lines = [*(line for line in self._kept if line), *new]
        if lines or self.was_there:
            write_bytes(self._path, "".join(f"{line}\n" for line in lines).encode("utf-8"))

    def _read(self) -> None:
        try:
            for line in read_lines(self._path, MAX_LINE_CHARACTERS):
                known = _object(line)
                if known is not None and isinstance(known.get("video_path"), str):
                    self._paths[known["video_path"]] = len(self._kept)
                self._kept.append(line)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise OutputError(
                f"--jsonl {self._path} is there and cannot be read: {reason}. Give another name."
            ) from error


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = parse_json(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
