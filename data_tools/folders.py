"""Walk through folders of images and clips, and list the images in one."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from modules.media.labels import MASK_FOLDERS
from modules.media.reading import image_suffixes


def walk_folders(folder: Path, is_recursive: bool) -> Iterator[Path]:
    """Yield a folder and, with `is_recursive`, its sorted subfolders, except hidden and mask folders."""
    yield folder
    if is_recursive:
        for parent, names, _ in os.walk(folder):
            names[:] = sorted(
                name for name in names if not name.startswith(".") and name.lower() not in MASK_FOLDERS
            )
            yield from (Path(parent, name) for name in names)


def list_images(folder: Path) -> list[Path]:
    """Return the visible files in a folder that have an image suffix, sorted.

    This includes animations, some of which have an image suffix.
    """
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in image_suffixes() and not path.name.startswith(".") and path.is_file()
    ]


def find_equal_stems(images: Sequence[Path]) -> tuple[Path, Path] | None:
    """Return the first two images whose names differ only in case or suffix; None if there are none."""
    by_stem: dict[str, Path] = {}
    for path in images:
        first = by_stem.setdefault(path.stem.casefold(), path)
        if first != path:
            return first, path
    return None
