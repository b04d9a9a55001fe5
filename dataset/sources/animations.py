"""GIF and WebP files of a folder: animated ones are clips, the others are images."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from dataset.config import DatasetTable
from modules.errors import MediaError
from modules.media.animations import ANIMATION_SUFFIXES, is_animation

logger = logging.getLogger(__name__)


def animation_suffixes(table: DatasetTable) -> frozenset[str]:
    """Return the suffixes that a table takes besides those of its kind; of images: .webp is one anyway."""
    return ANIMATION_SUFFIXES if table.kind == "video" else ANIMATION_SUFFIXES - {".webp"}


def find_animations(table: DatasetTable, entries: Sequence[Path], others: Sequence[Path]) -> list[Path]:
    """Return the GIF and WebP files among `entries` that belong to the table, besides `others`.

    A table of clips takes animations only; a table of images takes the first frame of each GIF. A file named
    like one of `others` but for the suffix is left out with a warning: both would have the same cache.
    """
    taken = {os.path.normcase(path.stem) for path in others}
    files = [path for path in entries if path.suffix.lower() in animation_suffixes(table) and path.is_file()]
    if table.kind == "image":
        animated = [path for path in (*others, *files) if _is_moving(path, if_damaged=False)]
        _warn(table, animated, "animated: only the first frame of each is used. video_directory takes clips")
    else:
        files = [path for path in files if _is_moving(path, if_damaged=True)]
    named = {path: os.path.normcase(path.stem) for path in files}
    hidden = [path for path in files if named[path] in taken]
    _warn(table, hidden, "ignored, because another file of the folder has the same name but for its suffix")
    return [path for path in files if named[path] not in taken]


def _is_moving(path: Path, if_damaged: bool) -> bool:
    """Return whether a file is an animation; `if_damaged` if it cannot be read, which decoding reports."""
    try:
        return is_animation(path)
    except MediaError:
        return if_damaged


def _warn(table: DatasetTable, paths: Sequence[Path], what: str) -> None:
    if paths:
        logger.warning("%s: %d files, such as %s, are %s.", table.name, len(paths), paths[0], what)
