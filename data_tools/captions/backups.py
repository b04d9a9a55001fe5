"""Keep a person's text before it is replaced."""

import itertools
import shutil
from pathlib import Path

from modules.atomic_write import atomic_path

BACKUP = ".bak"


def keep_backup(path: Path) -> Path:
    """Copy a file to the first free name of NAME.bak, NAME.2.bak, NAME.3.bak, ..., and return it.

    No older backup is replaced. Raises OutputError if the copy cannot be written.
    """
    names = itertools.chain(
        [f"{path.name}{BACKUP}"], (f"{path.name}.{n}{BACKUP}" for n in itertools.count(2))
    )
    backup = next(place for place in map(path.with_name, names) if not place.exists())
    with atomic_path(backup, path.stat().st_size) as temporary:
        shutil.copyfile(path, temporary)
    return backup
