"""Caption files: a text file beside an image or a clip."""

from pathlib import Path

from modules.errors import DatasetError


def caption_path(media: Path, extension: str) -> Path:
    """Return the path of a caption: the media's path with `extension` (with the dot) as its suffix."""
    return media.with_name(media.stem + extension)


def read_caption(path: Path) -> str | None:
    """Read a caption file, without white space at either end; None if there is no file.

    Raises DatasetError if it is not UTF-8 or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig").strip()
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
