"""Store the input of the form Generate in small files, one for each open page."""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from modules.atomic_write import explain_errors, write_text
from modules.text_files import parse_json, read_text

FOLDER = "drafts"  # in the folder of the render jobs
NAME = re.compile(r"[0-9a-f]{16}")
MAX_DRAFTS = 40
MAX_BYTES = 1 << 20

Fields = Mapping[str, Sequence[str]]


class Drafts:
    """Reads and writes the fields of forms by the names of their drafts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    @staticmethod
    def new_name() -> str:
        """Return a random name for a new draft."""
        return secrets.token_hex(8)

    def read(self, name: str) -> dict[str, list[str]] | None:
        """Return the fields of a draft; None if there is no draft with this name, or it is damaged."""
        if not NAME.fullmatch(name):
            return None
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            row = parse_json(read_text(self._path(name), MAX_BYTES))
            return {str(key): [str(text) for text in texts] for key, texts in row.items()}
        return None

    def newest(self) -> dict[str, list[str]] | None:
        """Return the fields of the draft that was changed last; None if there are no drafts."""
        names = self._names()
        return self.read(names[0]) if names else None

    def write(self, name: str, fields: Fields) -> None:
        """Write the fields of a form. Raises OutputError if that fails; an invalid name is ignored."""
        if not NAME.fullmatch(name):
            return
        with explain_errors(self._path(name)):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self._path(name), json.dumps({key: list(texts) for key, texts in fields.items()}))
            others = [other for other in self._names() if other != name]  # the clock may have changed
            for old in others[MAX_DRAFTS - 1 :]:
                self._path(old).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _names(self) -> list[str]:
        """Return the names of all drafts, the most recently changed first."""
        changed = {}
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                name = entry.name.removesuffix(".json")
                if NAME.fullmatch(name) and entry.name != name:
                    with contextlib.suppress(FileNotFoundError):  # another page has just removed it
                        changed[name] = entry.stat().st_mtime_ns
        return sorted(changed, key=lambda name: -changed[name])
