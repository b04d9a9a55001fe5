"""Hashes by which other programs identify a model file; the full file's hash is cached next to it."""

import contextlib
import hashlib
import re
from pathlib import Path

from modules.atomic_write import write_text
from modules.errors import UserError
from modules.text_files import read_text

_SHORT_HASH_START = 1 << 20  # offset of the bytes that the short hash covers
_SHORT_HASH_BYTES = 1 << 16
_ENTRY = re.compile(r"(\d+) (\d+) ([0-9a-f]{64})\n")  # size, time of the last change in ns, hash


def short_hash(path: Path) -> str:
    """Return the hash of 64 KiB at offset 1 MiB, by which early versions of A1111 identified checkpoints."""
    with path.open("rb") as file:
        file.seek(_SHORT_HASH_START)
        return hashlib.sha256(file.read(_SHORT_HASH_BYTES)).hexdigest()[:8]


def name_base(file: Path) -> str:
    """Return a base model's file name with a short hash, as adapter metadata stores it."""
    return f"{file.name} {short_hash(file)}" if file.is_file() else file.name


def full_hash(path: Path) -> str:
    """Return the SHA-256 hash of a file as hexadecimal digits.

    A checkpoint may have 7 GB, so the hash is cached in `.NAME.sha256` next to it, with its size and
    modification time. It is computed again if these differ, and each time if the folder is read-only.
    """
    file_stat = path.stat()
    size_and_time = f"{file_stat.st_size} {file_stat.st_mtime_ns}"
    entry_path = path.with_name(f".{path.name}.sha256")
    cached_entry = _read_entry(entry_path)
    if cached_entry is not None and cached_entry.startswith(f"{size_and_time} "):
        return cached_entry.split()[-1]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # a read-only folder or a full disk must not stop a training run
    with contextlib.suppress(UserError, OSError):
        write_text(entry_path, f"{size_and_time} {digest}\n")
    return digest


def _read_entry(path: Path) -> str | None:
    """Return size, time and hash in a cache file of `full_hash`; None if it is missing or malformed."""
    try:
        text = read_text(path, limit_bytes=1000)
    except (OSError, ValueError):
        return None
    return text if _ENTRY.fullmatch(text) else None
