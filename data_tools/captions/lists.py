"""Put captions into a JSONL list: nothing else of its lines changes, and at any moment the list is whole.

A caption goes to a hidden file beside the list first, so that nothing is lost if the run is killed. From time
to time, and at the end, the list is written anew with the captions that wait there. A later run puts in a
file that is left over.
"""

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.captions.backups import BACKUP, keep_backup
from data_tools.captions.made import hash_of
from modules.atomic_write import append_text, atomic_path
from modules.errors import DatasetError, OutputError
from modules.paths import address_identity, is_address, short_hash
from modules.text_files import parse_json, read_lines

SHARE = 50  # writing the list takes at most one part in this many of the time
TRIES = 5
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
Change = Callable[[dict[str, Any]], dict[str, Any]]  # an object of the list -> its keys with new values


@dataclass(frozen=True)
class WaitingCaption:
    """A caption that waits to be put into the list."""

    caption: str
    old: str | None  # hash of the caption that it replaces; None: there is none
    is_foreign: bool  # a person wrote that one


class CaptionList:
    """A list whose captions are written."""

    def __init__(self, path: Path, key: str, now: Callable[[], float] = time.monotonic) -> None:
        """key: of the paths, video_path or image_path. Raises DatasetError if waiting ones are damaged."""
        self.path, self._key, self._now = path, key, now
        self._journal = path.with_name(f".{path.name}.captions")
        self.waiting = _read_journal(self._journal)
        self.kept: list[str] = []  # entries that somebody has written a caption for meanwhile
        self._merged, self._took = now(), 0.0

    def put(self, entry: str, caption: str, old: str | None, is_foreign: bool = False) -> None:
        """Note the caption of a line; it is in the list after the next `merge`, which happens now and then.

        entry: the path in the line. old: the caption that is to be replaced; a line with another one is left
        alone. is_foreign: a person wrote the old one. Raises OutputError if it cannot be written.
        """
        found = WaitingCaption(caption, None if old is None else hash_of(old), is_foreign)
        line = json.dumps({"path": line_key(entry), **vars(found)}, ensure_ascii=False)
        # the last line may be an unfinished one of a killed run
        append_text(self._journal, f"{line}\n" if self.waiting else f"\n{line}\n")
        self.waiting[line_key(entry)] = found
        if self._now() - self._merged >= SHARE * self._took:
            self.merge()

    def merge(self) -> None:
        """Write the list with all captions that wait. Raises OutputError if that fails.

        The first time, the list as it was is kept as .bak; later ones keep it only if they replace a person's
        text.
        """
        if not self.waiting:
            return
        start = self._now()
        if (
            any(one.is_foreign for one in self.waiting.values())
            or not self.path.with_name(self.path.name + BACKUP).exists()
        ):
            keep_backup(self.path)
        late: list[str] = []

        def change(record: dict[str, Any]) -> dict[str, Any]:
            found = self.waiting.get(line_key(str(record.get(self._key))))
            if found is None or record.get("caption") == found.caption:
                return {}
            there = record.get("caption")
            if (None if there is None else hash_of(str(there))) != found.old:
                late.append(line_key(str(record[self._key])))
                return {}
            return {"caption": found.caption}

        rewrite_lines(self.path, change)
        self._journal.unlink(missing_ok=True)
        self.kept += late
        self.waiting = {}
        self._merged = self._now()
        self._took = self._merged - start


def line_key(entry: str) -> str:
    """Return a line's path, or of an address a hash: it may hold a secret."""
    return short_hash(address_identity(entry)) if is_address(entry) else entry


def _read_journal(path: Path) -> dict[str, WaitingCaption]:
    waiting: dict[str, WaitingCaption] = {}
    try:
        for line in read_lines(path):
            try:
                entry = parse_json(line)
            except ValueError:  # the last line of a run that was killed
                continue
            texts = (entry.get("path"), entry.get("caption")) if isinstance(entry, dict) else ()
            if texts and all(isinstance(text, str) for text in texts):
                waiting[str(texts[0])] = WaitingCaption(
                    str(texts[1]), entry.get("old"), bool(entry.get("is_foreign"))
                )
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{path} cannot be read: {error}. It holds captions of a run that was interrupted; move it away "
            "to make them again."
        ) from None
    return waiting


def rewrite_lines(path: Path, change: Change) -> None:
    """Write a JSONL list anew with other values of some keys; all else stays as it is, to the byte.

    Raises OutputError if it cannot be written, or if another program writes it all the time.
    """
    path = path.resolve()  # a link stays one
    for _ in range(TRIES):
        with contextlib.suppress(_Changed):
            before = _stamp(path)
            with atomic_path(path, path.stat().st_size) as temporary:
                with (
                    path.open(encoding="utf-8", newline="") as old,
                    temporary.open("w", encoding="utf-8", newline="") as new,
                ):
                    new.writelines(_rewrite(line, change) for line in old)
                shutil.copymode(path, temporary)
                if _stamp(path) != before:
                    raise _Changed
            return
    raise OutputError(f"{path}: another program keeps writing this list. Close it, then run again.")


class _Changed(Exception):
    """The list has changed since it was read."""


def _stamp(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_mtime_ns, state.st_size


def _rewrite(line: str, change: Change) -> str:
    content = line.lstrip("\ufeff").rstrip("\r\n")
    try:
        record = parse_json(content)
    except ValueError:
        return line
    values = change(record) if isinstance(record, dict) else {}
    if not values:
        return line
    start = len(line) - len(line.lstrip("\ufeff"))
    changed = content
    for key, value in values.items():
        changed = set_value(changed, key, value)
    return line[:start] + changed + line[start + len(content) :]


def set_value(line: str, key: str, value: Any) -> str:
    """Return a JSON object's text with another value of a key, or with the key added at its end.

    All other characters stay: numbers keep their digits and keys their order. Of a key that is there several
    times the last one counts, as for JSON parsers.
    """
    text = json.dumps(value, ensure_ascii=False)
    place, end = None, _skip(line, 0) + 1
    for name, start, end in _members(line):
        if name == key:
            place = start, end
    if place is None:
        return f"{line[:end]}, {json.dumps(key)}: {text}{line[end:]}"
    return line[: place[0]] + text + line[place[1] :]


def _members(line: str) -> Iterator[tuple[str, int, int]]:
    """Yield the key of each member of a well-formed JSON object, and where its value begins and ends."""
    place = _skip(line, _skip(line, 0) + 1)
    while line[place] != "}":
        name, place = _DECODER.raw_decode(line, place)
        start = _skip(line, _skip(line, place) + 1)  # behind the colon
        _, end = _DECODER.raw_decode(line, start)
        yield name, start, end
        place = _skip(line, end)
        if line[place] == ",":
            place = _skip(line, place + 1)


def _skip(line: str, place: int) -> int:
    found = _SPACE.match(line, place)
    assert found is not None
    return found.end()
