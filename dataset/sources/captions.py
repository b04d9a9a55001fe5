"""Caption files: text beside an image or a clip."""

from pathlib import Path

from modules.errors import DatasetError
from modules.text_files import MAX_CAPTION_BYTES, bad_character, read_text


def caption_path(media: Path, extension: str) -> Path:
    """Where the caption of `media` lies: its path without suffix plus `extension` (with the dot)."""
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
