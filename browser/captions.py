"""Read and write caption files, undo saves, and refuse to overwrite changes of other programs.

The earlier contents of a file are kept in memory until the server ends; `save_all` alone writes backup files.
"""

import contextlib
import hashlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.atomic_write import write_bytes
from modules.backups import name_backup
from modules.errors import OutputError
from modules.file_batches import write_files
from modules.file_locks import only_one
from modules.pages.language import say
from modules.text_files import bad_character, read_content

BOM = b"\xef\xbb\xbf"
MAX_BYTES = 1 << 16  # largest caption file that can be edited; encoders read far less
LOCK = ".captions.lock"  # in the folder of the captions, while one is written
MAX_SAVES = 100  # how many saves of a file can be undone


@dataclass(frozen=True)
class CaptionText:
    """A caption and the form of its file: byte order mark, line ends, white space at both ends."""

    text: str = ""
    start: bytes = b""
    head: str = ""
    tail: str = ""
    newline: str = "\n"

    @classmethod
    def of(cls, content: bytes) -> "CaptionText":
        """Split a caption file's bytes into its text and what surrounds it, which is written back unchanged.

        Raises UnicodeDecodeError if they are not UTF-8.
        """
        start = BOM if content.startswith(BOM) else b""
        decoded = content[len(start) :].decode()
        newline = next((ending for ending in ("\r\n", "\r") if ending in decoded), "\n")
        decoded = decoded.replace("\r\n", "\n").replace("\r", "\n")
        text = decoded.strip()
        # white space before and after the caption
        position = decoded.index(text) if text else 0
        return cls(
            text=text,
            start=start,
            head=decoded[:position],
            tail=decoded[position + len(text) :],
            newline=newline,
        )

    def with_text(self, text: str) -> bytes:
        """Encode another caption with the byte order mark, line ends and white space of this file."""
        text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
        content = self.head + text + self.tail
        return self.start + content.replace("\n", self.newline).encode()


@dataclass(frozen=True)
class CaptionEdit:
    """A caption to write.

    Attributes:
        path: Caption file.
        text: The new caption.
        checksum: Checksum that `Captions.read` returned for the file. The edit is skipped if the file has
            changed since.
    """

    path: Path
    text: str
    checksum: str


class CaptionConflictError(Exception):
    """Raised if a caption file has changed since it was read."""


@dataclass
class Captions:
    """Reads and saves caption files, and stores their earlier contents so that saves can be undone."""

    _before: dict[Path, deque[bytes | None]] = field(default_factory=dict)  # None: there was no file
    _first: dict[Path, bytes | None] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, path: Path) -> tuple[CaptionText, str, int]:
        """Return a caption, the checksum of its file, and the number of saves that can be undone.

        Raises:
            OSError: If the file cannot be read.
            UnicodeDecodeError: If the file is not UTF-8.
        """
        content = _read_content(path)
        return CaptionText.of(content or b""), compute_checksum(content), len(self._before.get(path, ()))

    def describe(self, path: Path, where: str, remedy: str) -> dict[str, Any]:
        """Return a caption as the JSON values that a page shows.

        Args:
            path: Caption file.
            where: Reason why the caption cannot be edited on this page; "" if it can.
            remedy: Advice to show if the file is not UTF-8.
        """
        try:
            caption, checksum, saves = self.read(path)
        except UnicodeDecodeError:
            return caption_values(say("It is not UTF-8: %(remedy)s", remedy=remedy))
        except OSError as error:
            return caption_values(f"It cannot be read: {error.strerror or error}")
        return caption_values(where, caption.text, checksum, saves)

    def change(self, path: Path, query: Mapping[str, Any]) -> tuple[int, str]:
        """Save or undo a caption, and return the HTTP status and the reason if nothing was done.

        Args:
            path: Caption file.
            query: Request of the page: `what` (save, undo or back), `have` (checksum of the file) and `text`.
        """
        action = str(query.get("what", ""))
        checksum = str(query.get("have", ""))
        try:
            if action == "save":
                self.save(path, str(query.get("text", "")), checksum)
            elif action in ("undo", "back"):
                self.undo(path, checksum, is_all=action == "back")
            else:
                return 404, say("There is no such request.")
        except CaptionConflictError:
            return 409, say("The file has changed since it was read.")
        except LookupError:
            return 409, say("There is nothing to undo.")
        except (OSError, OutputError) as problem:
            return 500, str(problem)
        except ValueError as problem:
            return 400, str(problem)
        return 200, ""

    def save(self, path: Path, text: str, checksum: str) -> None:
        """Write a caption, and store the file's earlier content so that the save can be undone.

        Args:
            path: Caption file; it need not exist.
            text: The new caption.
            checksum: Checksum that `read` returned for the file.

        Raises:
            CaptionConflictError: If the file has changed since.
            ValueError: If the text cannot be stored.
            OSError: If the file cannot be read.
            OutputError: If the file cannot be written.
        """
        with self._lock, _only_one_writes(path):
            old_content = self._require_unchanged(path, checksum)
            new_content = _encode(text, old_content or b"")
            if new_content != old_content:
                _write(path, new_content)
                self._first.setdefault(path, old_content)
                self._before.setdefault(path, deque(maxlen=MAX_SAVES)).append(old_content)

    def save_all(self, edits: Sequence["CaptionEdit"], checksums: dict[Path, str]) -> None:
        """Write many captions with a .bak copy of each old file, skipping files that have changed.

        Args:
            edits: Captions to write, each with the checksum that its file had when it was read.
            checksums: Filled with the new checksum of each written file. If an error ends the writing early,
                for example a full disk, it holds the files written until then.

        Raises:
            ValueError: If a text cannot be stored. Then no file is written.
            OSError: If a file cannot be read.
            OutputError: If a file cannot be written.
        """
        with self._lock, _only_one_writes_in({edit.path.parent for edit in edits}):
            before: dict[Path, bytes] = {}
            contents: dict[Path, bytes] = {}
            for edit in edits:
                present = _read_content(edit.path)
                # files changed since then are left unchanged
                if present is not None and compute_checksum(present) == edit.checksum:
                    contents[edit.path] = _encode(edit.text, present)
                    before[edit.path] = present
            write_files({name_backup(path): content for path, content in before.items()})

            def note(path: Path) -> None:
                """Store the earlier content of a written file, so that the save can be undone."""
                self._first.setdefault(path, before[path])
                self._before.setdefault(path, deque(maxlen=MAX_SAVES)).append(before[path])
                checksums[path] = compute_checksum(contents[path])

            write_files(contents, note)

    def undo_all(self, checksums: Mapping[Path, str]) -> int:
        """Undo the last save of many captions; return the number of files skipped because they have changed.

        Args:
            checksums: Checksum that each file had after `save_all` wrote it.

        Raises:
            OSError: If a file cannot be read.
            OutputError: If a file cannot be written.
        """
        with self._lock, _only_one_writes_in({path.parent for path in checksums}):
            contents = {}
            for path, checksum in checksums.items():
                earlier = self._before[path][-1] if path in self._before else None
                if earlier is not None and compute_checksum(_read_content(path)) == checksum:
                    contents[path] = earlier
            write_files(contents, self._forget_last)
            return len(checksums) - len(contents)

    def _forget_last(self, path: Path) -> None:
        before = self._before[path]
        before.pop()
        if not before:
            del self._before[path], self._first[path]

    def undo(self, path: Path, checksum: str, is_all: bool = False) -> None:
        """Undo the last save of a caption; with `is_all`, undo all of them.

        Raises LookupError if there is no save to undo, CaptionConflictError if the file has changed since.
        """
        with self._lock, _only_one_writes(path):
            before = self._before[path]
            content = self._require_unchanged(path, checksum)
            earlier_content = self._first[path] if is_all else before[-1]  # None: there was no file
            if earlier_content is None and content is not None:
                path.unlink()
            elif earlier_content is not None and earlier_content != content:
                _write(path, earlier_content)
            before.pop()
            if is_all or not before:
                del self._before[path], self._first[path]

    def _require_unchanged(self, path: Path, checksum: str) -> bytes | None:
        now = _read_content(path)
        if compute_checksum(now) != checksum:
            raise CaptionConflictError
        return now


def caption_values(where: str, text: str = "", mark: str = "", saves: int = 0) -> dict[str, Any]:
    """Return the JSON values of a caption. `where` is the reason why it cannot be edited; "" if it can."""
    return {"text": text, "can_edit": not where, "where": where, "mark": mark, "saves": saves}


def compute_checksum(content: bytes | None) -> str:
    """Return a checksum of a file's content; "" for None, a missing file."""
    return "" if content is None else hashlib.blake2s(content, digest_size=12).hexdigest()


def _encode(text: str, now: bytes) -> bytes:
    """Return the new bytes of a caption file with `text` in place of the caption in its bytes `now`.

    Raises ValueError if the text cannot be stored.
    """
    reason = bad_character(text)
    if reason is not None:
        raise ValueError(say("a caption cannot hold %(reason)s", reason=reason))
    new = CaptionText.of(now).with_text(text)
    if len(new) > MAX_BYTES:
        raise ValueError(
            say("a caption of more than %(max_bytes)s KiB cannot be edited here", max_bytes=MAX_BYTES >> 10)
        )
    return new


@contextlib.contextmanager
def _only_one_writes_in(folders: Iterable[Path]) -> Iterator[None]:
    """Let no other server write captions in these folders, locked in one order to avoid deadlocks."""
    with contextlib.ExitStack() as locks:
        for folder in sorted(folders):
            locks.enter_context(only_one(folder / LOCK))
        yield


def _only_one_writes(path: Path) -> AbstractContextManager[None]:
    """Let one server at a time compare and write captions of a folder, so that it sees every save."""
    return only_one(path.with_name(LOCK))


def _read_content(path: Path) -> bytes | None:
    try:
        return read_content(path, MAX_BYTES)
    except FileNotFoundError:
        return None


def _write(path: Path, content: bytes) -> None:
    mode = None
    with contextlib.suppress(OSError):
        mode = path.stat().st_mode & 0o777
    write_bytes(path, content)
    if mode is not None:
        path.chmod(mode)
