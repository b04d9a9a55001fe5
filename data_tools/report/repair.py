"""Rewrite captions that are not UTF-8 as UTF-8; the old file stays beside it as .bak."""

from pathlib import Path

from dataset.config import DatasetConfig, DatasetTable
from dataset.options import GUESS
from dataset.sources.captions import SHOWN, guess_captions, read_caption
from dataset.sources.listing import find_sources
from modules.atomic_write import write_bytes, write_text
from modules.errors import DatasetError
from modules.limits import MAX_CAPTION_BYTES
from modules.text_encodings import EncodingGuess
from modules.text_files import bad_character, read_content

BACKUP = ".bak"


def repair_captions(config: DatasetConfig, encoding: str) -> tuple[list[str], int]:
    """Convert the captions of all tables that are not UTF-8. encoding: Python's name, or GUESS.

    A file of uncertain encoding is left as it is. Returns lines, and how many are left. Raises OutputError if
    a file cannot be written.
    """
    lines, left = [], 0
    for paths in map(_unreadable, config.datasets):
        guesses = guess_captions(paths) if encoding == GUESS else [_decode(path, encoding) for path in paths]
        for path, guess in zip(paths, guesses, strict=True):
            trouble = _why_not(path, guess)
            if trouble is not None or guess is None:
                left += 1
                lines.append(f"  {path}: left as it is, {trouble}")
                continue
            # the backup first, so that the old text is never lost
            write_bytes(path.with_name(path.name + BACKUP), read_content(path, MAX_CAPTION_BYTES))
            write_text(path, guess.text.removeprefix("\ufeff"))
            lines.append(f"  {path}: was {guess.name}, now UTF-8: {_first_words(guess)!r}")
    count = len(lines) - left
    summary = f"{count} captions converted to UTF-8 (the old files end in {BACKUP}), {left} left as they are"
    return [summary, *lines], left


def _unreadable(table: DatasetTable) -> list[Path]:
    """Return the caption files of a table that are there and not UTF-8 text."""
    try:
        sources = find_sources(table, captions=False, faults=[])
    except DatasetError:
        return []  # the check reports it
    found = []
    for path in (source.caption_path for source in sources):
        try:
            if path is not None:
                read_caption(path)
        except DatasetError:
            found += [path] if path is not None and path.is_file() else []
    return found


def _decode(path: Path, encoding: str) -> EncodingGuess | None:
    try:
        return EncodingGuess(encoding, read_content(path, MAX_CAPTION_BYTES).decode(encoding), is_sure=True)
    except (OSError, ValueError):
        return None


def _why_not(path: Path, guess: EncodingGuess | None) -> str | None:
    """Return why a file is not converted; None if it can be."""
    if guess is None or bad_character(guess.text):
        return "it is no text in that encoding"
    if not guess.is_sure:
        return (
            f"it may be {guess.name}: {_first_words(guess)!r}. If that is right, name it: "
            f"--repair_captions {guess.encoding}"
        )
    backup = path.with_name(path.name + BACKUP)
    return f"{backup.name} is there already; move it away" if backup.exists() else None


def _first_words(guess: EncodingGuess) -> str:
    return " ".join(guess.text.split())[:SHOWN]
