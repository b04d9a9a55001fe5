"""Keep a copy of a file that a person wrote before it is changed."""

import shutil
from pathlib import Path

from modules.atomic_write import atomic_path

BACKUP = ".bak"


def name_backup(path: Path) -> Path:
    """Return the first unused name of NAME.bak, NAME.2.bak, NAME.3.bak, ..."""
    backup = path.with_name(path.name + BACKUP)
    number = 1
    while backup.exists():
        number += 1
        backup = path.with_name(f"{path.name}.{number}{BACKUP}")
    return backup


def keep_backup(path: Path) -> None:
    """Copy a file to the first unused name of NAME.bak, NAME.2.bak, NAME.3.bak, ...

    Older backups are kept.

    Raises:
        OutputError: If the copy cannot be written.
    """
    backup = name_backup(path)
    with atomic_path(backup, path.stat().st_size) as temporary:
        shutil.copyfile(path, temporary)
