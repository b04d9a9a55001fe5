"""The list of clips, JSONL: one line a clip, as `video_jsonl_file` tables read it."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from modules.atomic_write import write_bytes
from modules.errors import OutputError
from modules.text_files import MAX_LINE_CHARACTERS, parse_json, read_lines


class ClipList:
    """The lines of a list. Those that are there stay as they are, with what users have added to them.

    Cutting takes hours, in which captions may be written into the list: what has changed in it since it was
    read is read again before it is written.
    """

    def __init__(self, path: Path) -> None:
        """Read the list if there is one. Raises OutputError if it cannot be read."""
        self._path = path
        self._kept: list[str] = []
        self._paths: dict[str, int] = {}  # of clips -> place of the line
        self._removed: set[str] = set()  # paths of clips
        self._added: dict[int, dict[str, str]] = {}  # place of the source -> path of a clip -> line
        self._written: set[str] = set()  # paths of clips whose lines were added to the file
        self._stamp = _stamp_of(path)
        self.was_there = self._stamp is not None
        if self.was_there:
            self._read()

    def line_of(self, clip: Path) -> dict[str, Any] | None:
        """Return the list's line for a clip; None if that is nothing."""
        place = self._paths.get(str(clip))
        return None if place is None else _object(self._kept[place])

    def remove(self, clips: Iterable[Path]) -> None:
        """Leave out the lines of clips that are no more."""
        self._removed |= set(map(str, clips))
        self._leave_out()

    def add(self, place: int, facts: Sequence[dict[str, Any]]) -> None:
        """Add lines of the source at that place; a clip that has a line keeps it."""
        lines = {one["video_path"]: json.dumps(one, ensure_ascii=False) for one in facts}
        self._removed -= lines.keys()
        self._added[place] = {path: line for path, line in lines.items() if path not in self._paths}

    def write(self) -> None:
        """Write the list, completely or not at all, also one without lines.

        Raises OutputError, also if it cannot be read again.
        """
        if _stamp_of(self._path) not in (self._stamp, None):
            self._read_again()
        new = [line for place in sorted(self._added) for line in self._added[place].values()]
        lines = [*(line for line in self._kept if line), *new]
        write_bytes(self._path, "".join(f"{line}\n" for line in lines).encode("utf-8"))
        self._written = {path for added in self._added.values() for path in added}
        self._stamp = _stamp_of(self._path)

    def _read_again(self) -> None:
        """Read lines that others have written meanwhile; a line removed in this run stays out."""
        self._kept, self._paths = [], {}
        self._read()
        self._leave_out()
        known = self._paths.keys() | self._written
        self._added = {
            place: {path: line for path, line in added.items() if path not in known}
            for place, added in self._added.items()
        }

    def _leave_out(self) -> None:
        for path in self._removed & self._paths.keys():
            self._kept[self._paths.pop(path)] = ""

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


def _stamp_of(path: Path) -> tuple[int, int] | None:
    """Return values that change with a file; None if it is not there."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_mtime_ns, state.st_size


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = parse_json(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
