"""Hashes by which other programs know a model's file. That of the whole file is kept next to it."""

import contextlib
import hashlib
import re
from pathlib import Path

from modules.atomic_write import write_text
from modules.errors import UserError
from modules.text_files import read_text

_START, _BYTES = 1 << 20, 1 << 16  # of the short hash
_ENTRY = re.compile(r"(\d+) (\d+) ([0-9a-f]{64})\n")


def short_hash(path: Path) -> str:
    """Return the hash by which early versions of A1111 named checkpoints (of 64 KiB at offset 1 MiB)."""
    with path.open("rb") as file:
        file.seek(_START)
        return hashlib.sha256(file.read(_BYTES)).hexdigest()[:8]


def name_base(file: Path) -> str:
    """Return the name and short hash of a model's file, by which an adapter's metadata name its base."""
    return f"{file.name} {short_hash(file)}" if file.is_file() else file.name


def full_hash(path: Path) -> str:
    """Return the SHA-256 of a file.

    A checkpoint may have 7 GB, so the hash is cached in `.NAME.sha256` next to the file, with the file's size
    and time, and computed again if these differ. If the folder is read-only, it is computed each time.
    """
    info = path.stat()
    size_and_time = f"{info.st_size} {info.st_mtime_ns}"
    entry_path = path.with_name(f".{path.name}.sha256")
    entry = _read_entry(entry_path)
    if entry is not None and entry.startswith(f"{size_and_time} "):
        return entry.split()[-1]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # a folder that others share, or a full disk: no reason to end a training
    with contextlib.suppress(UserError, OSError):
        write_text(entry_path, f"{size_and_time} {digest}\n")
    return digest


def _read_entry(path: Path) -> str | None:
    try:
        text = read_text(path, limit_bytes=1000)
    except (OSError, ValueError):
        return None
    return text if _ENTRY.fullmatch(text) else None
