"""Walk through folders of pictures and clips."""

import os
from collections.abc import Iterator
from pathlib import Path

from modules.media.labels import MASK_FOLDERS


def walk_folders(folder: Path, is_recursive: bool) -> Iterator[Path]:
    """Yield a folder and, with `is_recursive`, its subfolders, sorted; skips hidden folders and masks."""
    yield folder
    if is_recursive:
        for parent, names, _ in os.walk(folder):
            names[:] = sorted(
                name for name in names if not name.startswith(".") and name.lower() not in MASK_FOLDERS
            )
            yield from (Path(parent, name) for name in names)
