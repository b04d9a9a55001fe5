"""List of this program's captions: a hidden file beside them that tells them from hand-written ones.

Each line of the list names a caption and has the hash of a text that was written for it. A caption whose text
has no line was written, or has been edited since, by a person. The line is written before the caption: after
a kill between the two it names a text that is not there, which changes nothing.
"""

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from modules.atomic_write import append_text
from modules.errors import DatasetError
from modules.text_files import parse_json, read_lines

NAME = ".captions_made.jsonl"


def hash_of(text: str) -> str:
    """Return the SHA-256 of a caption, without white space at its ends."""
    return hashlib.sha256(text.strip().encode("utf-8")).hexdigest()


class MadeCaptions:
    """The captions of a folder that this program wrote."""

    def __init__(self, folder: Path) -> None:
        """Read the list of a folder, if there is one. Raises DatasetError if it cannot be read."""
        self.path = folder / NAME
        self._hashes: defaultdict[str, set[str]] = defaultdict(set)
        self._pass: str | None = None  # of a run that makes captions anew and has not come to its end
        self._of_pass: set[str] = set()
        self._is_begun = False  # whether this run has written a line
        try:
            for line in read_lines(self.path):
                self._take(line)
        except FileNotFoundError:
            pass
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(
                f"{self.path} cannot be read: {error}. It says which captions this program wrote. Move it "
                "away: then all of them count as hand-written and are kept."
            ) from None

    def _take(self, line: str) -> None:
        try:
            entry = parse_json(line)
        except ValueError:  # the last line of a run that was killed
            return
        if not isinstance(entry, dict):
            return
        if isinstance(entry.get("name"), str) and isinstance(entry.get("sha256"), str):
            self._hashes[entry["name"]].add(entry["sha256"])
            self._of_pass.add(entry["name"])
        elif "begin" in entry:
            self._pass, self._of_pass = str(entry["begin"]), set()
        elif "end" in entry:
            self._pass = None

    def has(self, name: str, text: str) -> bool:
        """Return whether this program wrote a text as the caption of that name."""
        return hash_of(text) in self._hashes.get(name, ())

    def add(self, name: str, text: str) -> None:
        """Note that a caption is about to be written. Raises OutputError if that fails."""
        self._hashes[name].add(hash_of(text))
        self._append({"name": name, "sha256": hash_of(text)})

    def begin_pass(self, what: str) -> frozenset[str]:
        """Begin to make captions anew, or go on after a run that did not come to its end.

        what: identifies equal passes. Returns the names that the earlier run has made anew already.
        """
        if self._pass == what:
            return frozenset(self._of_pass)
        self._pass = what
        self._append({"begin": what})
        return frozenset()

    def done_before(self, what: str) -> frozenset[str]:
        """Return the result of `begin_pass`, and write nothing."""
        return frozenset(self._of_pass) if self._pass == what else frozenset()

    def end_pass(self) -> None:
        """Note that all captions have been made anew. Without a pass that has begun, do nothing."""
        if self._pass is not None:
            self._pass = None
            self._append({"end": True})

    def _append(self, entry: dict[str, Any]) -> None:
        # the last line may be an unfinished one of a killed run
        start = "" if self._is_begun else "\n"
        self._is_begun = True
        append_text(self.path, f"{start}{json.dumps(entry)}\n")
