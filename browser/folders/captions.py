"""Read and write caption files, undo saves, and refuse to overwrite changes of other programs.

The earlier contents of a file are kept in memory until the server ends; `save_all` alone writes backup files.
"""

import contextlib
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
LOCK = ".captions.lock"  # in the captions' folder, while a caption is written
MAX_SAVES = 100  # how many saves of a file can be undone


@dataclass(frozen=True)
class CaptionText:
    """A caption, and its file's byte order mark, line endings and white space, which edits preserve."""

    text: str = ""
    byte_order_mark: bytes = b""
    leading_space: str = ""
    trailing_space: str = ""
    newline: str = "\n"

    @classmethod
    def parse(cls, content: bytes) -> "CaptionText":
        """Split the bytes of a caption file into its text and the bytes around it.

        Raises UnicodeDecodeError if the bytes are not UTF-8.
        """
        byte_order_mark = BOM if content.startswith(BOM) else b""
        decoded = content[len(byte_order_mark) :].decode()
        newline = next((ending for ending in ("\r\n", "\r") if ending in decoded), "\n")
        decoded = decoded.replace("\r\n", "\n").replace("\r", "\n")
        text = decoded.strip()
        text_start = decoded.index(text) if text else 0
        text_end = text_start + len(text)
        return cls(
            text=text,
            byte_order_mark=byte_order_mark,
            leading_space=decoded[:text_start],
            trailing_space=decoded[text_end:],
            newline=newline,
        )

    def with_text(self, text: str) -> bytes:
        """Encode another caption with the byte order mark, line ends and white space of this file."""
        text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
        content = self.leading_space + text + self.trailing_space
        return self.byte_order_mark + content.replace("\n", self.newline).encode()


@dataclass(frozen=True)
class CaptionEdit:
    """A caption to write.

    Attributes:
        path: Caption file.
        text: The new caption.
        checksum: Checksum that `CaptionFiles.read` returned for the file. The edit is skipped if the file has
            changed since.
    """

    path: Path
    text: str
    checksum: str


class CaptionConflictError(Exception):
    """Raised if a caption file has changed since it was read."""


@dataclass
class CaptionFiles:
    """Reads and saves caption files, and stores their earlier contents so that saves can be undone."""

    # contents of each edited file before its last saves, the newest last; None: there was no file
    _undo_stacks: dict[Path, deque[bytes | None]] = field(default_factory=dict)
    _original_contents: dict[Path, bytes | None] = field(default_factory=dict)  # before the first save
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, path: Path) -> tuple[CaptionText, str, int]:
        """Return a caption, the checksum of its file, and the number of saves that can be undone.

        Raises:
            OSError: If the file cannot be read.
            UnicodeDecodeError: If the file is not UTF-8.
        """
        content = _read_content(path)
        num_saves = len(self._undo_stacks.get(path, ()))
        return CaptionText.parse(content or b""), compute_checksum(content), num_saves

    def describe(self, path: Path, read_only_reason: str, remedy: str) -> dict[str, Any]:
        """Return a caption as the JSON values that a page shows.

        Args:
            read_only_reason: Reason why the caption cannot be edited on this page; "" if it can.
            remedy: Advice to show if the file is not UTF-8.
        """
        try:
            caption, checksum, num_saves = self.read(path)
        except UnicodeDecodeError:
            return caption_values(say("It is not UTF-8: %(remedy)s", remedy=remedy))
        except OSError as error:
            return caption_values(f"It cannot be read: {error.strerror or error}")
        return caption_values(read_only_reason, caption.text, checksum, num_saves)

    def change(self, path: Path, query: Mapping[str, Any]) -> tuple[int, str]:
        """Save a caption or undo saves, and return the HTTP status and, if that failed, the reason.

        Args:
            query: Request of the page: `what` (save, undo or back), `have` (checksum of the file) and `text`.
        """
        action = str(query.get("what", ""))
        checksum = str(query.get("have", ""))
        try:
            if action == "save":
                self.save(path, str(query.get("text", "")), checksum)
            elif action == "undo":
                self.undo(path, checksum)
            elif action == "back":
                self.restore_original(path, checksum)
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
            checksum: Checksum that `read` returned for the file.

        Raises:
            CaptionConflictError: If the file has another checksum now.
            ValueError: If the text cannot be stored.
            OSError: If the file cannot be read.
            OutputError: If the file cannot be written.
        """
        with self._lock, _lock_caption_folder(path):
            old_content = self._require_unchanged(path, checksum)
            new_content = _encode(text, old_content or b"")
            if new_content != old_content:
                _write(path, new_content)
                self._push_undo(path, old_content)

    def save_all(self, edits: Sequence["CaptionEdit"], on_saved: Callable[[Path, str], None]) -> None:
        """Write many captions with a .bak copy of each old file, skipping files that have changed.

        Args:
            edits: CaptionFiles to write, each with the checksum that its file had when it was read.
            on_saved: Called after each written file with its path and new checksum, because an error may
                leave the remaining files unwritten.

        Raises:
            ValueError: If a text cannot be stored. Then no file is written.
            OSError: If a file cannot be read.
            OutputError: If a file cannot be written.
        """
        with self._lock, _lock_folders({edit.path.parent for edit in edits}):
            old_contents: dict[Path, bytes] = {}
            new_contents: dict[Path, bytes] = {}
            for edit in edits:
                content = _read_content(edit.path)
                is_unchanged = compute_checksum(content) == edit.checksum
                if content is not None and is_unchanged:
                    new_contents[edit.path] = _encode(edit.text, content)
                    old_contents[edit.path] = content
            write_files({name_backup(path): content for path, content in old_contents.items()})

            def record_written(path: Path) -> None:
                self._push_undo(path, old_contents[path])
                on_saved(path, compute_checksum(new_contents[path]))

            write_files(new_contents, record_written)

    def undo_all(self, checksums: Mapping[Path, str]) -> int:
        """Undo the last save of many captions, and return how many were skipped because they have changed.

        Args:
            checksums: Checksum that each file had after `save_all` wrote it.

        Raises:
            OSError: If a file cannot be read.
            OutputError: If a file cannot be written.
        """
        with self._lock, _lock_folders({path.parent for path in checksums}):
            contents = {}
            for path, checksum in checksums.items():
                earlier_content = self._undo_stacks[path][-1] if path in self._undo_stacks else None
                if earlier_content is None:
                    continue
                is_unchanged = compute_checksum(_read_content(path)) == checksum
                if is_unchanged:
                    contents[path] = earlier_content
            write_files(contents, self._pop_undo)
            return len(checksums) - len(contents)

    def undo(self, path: Path, checksum: str) -> None:
        """Undo the last save of a caption.

        Raises LookupError if there is no save to undo, CaptionConflictError if the file has changed since.
        """
        with self._lock, _lock_caption_folder(path):
            self._restore(path, self._undo_stacks[path][-1], checksum)
            self._pop_undo(path)

    def restore_original(self, path: Path, checksum: str) -> None:
        """Undo all saves of a caption.

        Raises LookupError if there is no save to undo, CaptionConflictError if the file has changed since.
        """
        with self._lock, _lock_caption_folder(path):
            self._restore(path, self._original_contents[path], checksum)
            del self._undo_stacks[path], self._original_contents[path]

    def _push_undo(self, path: Path, content: bytes | None) -> None:
        """Store a file's content from before a save, for undo; None means that there was no file."""
        self._original_contents.setdefault(path, content)
        self._undo_stacks.setdefault(path, deque(maxlen=MAX_SAVES)).append(content)

    def _pop_undo(self, path: Path) -> None:
        """Remove the last save of a file from its undo history."""
        self._undo_stacks[path].pop()
        if not self._undo_stacks[path]:
            del self._undo_stacks[path], self._original_contents[path]

    def _restore(self, path: Path, earlier_content: bytes | None, checksum: str) -> None:
        """Write the earlier content of a file, or delete the file if it is None."""
        content = self._require_unchanged(path, checksum)
        if earlier_content is None and content is not None:
            path.unlink()
        elif earlier_content is not None and earlier_content != content:
            _write(path, earlier_content)

    def _require_unchanged(self, path: Path, checksum: str) -> bytes | None:
        content = _read_content(path)
        if compute_checksum(content) != checksum:
            raise CaptionConflictError
        return content


def caption_values(
    read_only_reason: str, text: str = "", checksum: str = "", num_saves: int = 0
) -> dict[str, Any]:
    """Return the JSON values of a caption. `num_saves` is the number of saves that can be undone."""
    return {
        "text": text,
        "can_edit": not read_only_reason,
        "where": read_only_reason,
        "mark": checksum,
        "saves": num_saves,
    }


def compute_checksum(content: bytes | None) -> str:
    """Return a checksum of a file's content; "" for None, a missing file."""
    return "" if content is None else hashlib.blake2s(content, digest_size=12).hexdigest()


def _encode(text: str, old_content: bytes) -> bytes:
    """Return the new bytes of a caption file with the caption in `old_content` replaced by `text`."""
    reason = bad_character(text)
    if reason is not None:
        raise ValueError(say("a caption cannot contain %(reason)s", reason=reason))
    new_content = CaptionText.parse(old_content).with_text(text)
    if len(new_content) > MAX_BYTES:
        raise ValueError(
            say("a caption of more than %(max_bytes)s KiB cannot be edited here", max_bytes=MAX_BYTES >> 10)
        )
    return new_content


@contextlib.contextmanager
def _lock_folders(folders: Iterable[Path]) -> Iterator[None]:
    """Let no other server write captions in these folders, locked in one order to avoid deadlocks."""
    with contextlib.ExitStack() as locks:
        for folder in sorted(folders):
            locks.enter_context(only_one(folder / LOCK))
        yield


def _lock_caption_folder(path: Path) -> AbstractContextManager[None]:
    """Let one server at a time compare and write captions of a folder, so that no save is lost."""
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
