"""Caption files: a text file beside an image or a clip, and what a table adds to their text."""

import re
from collections.abc import Iterable
from pathlib import Path

from dataset.config import DatasetTable
from modules.errors import DatasetError
from modules.text_files import MAX_CAPTION_BYTES, bad_character, read_text


def caption_path(media: Path, extension: str) -> Path:
    """Return the path of a caption: the media's path with `extension` (with the dot) as its suffix."""
    return media.with_name(media.stem + extension)


def read_caption(path: Path) -> str | None:
    """The text of a caption file without white space at either end; None where there is no file.

    Raises DatasetError if it is no UTF-8 text, too large, no regular file, or cannot be read.
    """
    try:
        caption = read_text(path, MAX_CAPTION_BYTES).strip()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}: this caption is not UTF-8 text (byte {error.start}). Save it as UTF-8."
        ) from None
    except OSError as error:
        raise DatasetError(
            f"{path}: this caption cannot be read: {error.strerror}. Put a text file there."
        ) from error
    found = bad_character(caption)
    if found is not None:
        raise DatasetError(f"{path}: this caption holds {found}. Save it as UTF-8.")
    return caption


def captions_in(text: str, table: DatasetTable) -> tuple[str, ...]:
    """Return the captions in the text of a caption file, as they are encoded; at least one.

    With multi_caption each line that is not empty is one.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()] if table.multi_caption else [text]
    return complete_captions(lines or [""], table)


def complete_captions(captions: Iterable[str], table: DatasetTable) -> tuple[str, ...]:
    """Return captions with trigger word, prefix and suffix of their table, equal ones once."""
    return tuple(dict.fromkeys(_complete(caption, table) for caption in captions))


def _complete(caption: str, table: DatasetTable) -> str:
    """Return "prefix trigger, caption suffix"; a caption that has the trigger word keeps it where it is."""
    trigger = table.trigger_word
    if trigger and not re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption):
        caption = f"{trigger}, {caption}" if caption else trigger
    if not (table.caption_prefix or table.caption_suffix):
        return caption
    return " ".join(part for part in (table.caption_prefix, caption, table.caption_suffix) if part)
