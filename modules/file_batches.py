"""Write many small files quickly. Standard library only."""

import contextlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from modules.atomic_write import explain_errors, flush_folder, replace_file, temporary_name
from modules.run_limits import reject_writing

MAX_FLUSHES = 16  # maximum number of concurrent flushes


def write_files(
    contents: Mapping[Path, bytes], on_written: Callable[[Path], None] = lambda path: None
) -> None:
    """Write many small files, each completely or not at all; flushes to disk overlap, which saves time.

    No file is replaced before all new contents are on the disk. Existing files keep their mode. `on_written`
    is called with each path once it has its new content. Raises OutputError, possibly after some files are
    replaced.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for path, data in contents.items():
            reject_writing(path)
            with explain_errors(path):
                temporary = temporaries[path] = temporary_name(path)
                temporary.write_bytes(data)
                with contextlib.suppress(FileNotFoundError):
                    temporary.chmod(path.stat().st_mode & 0o777)
        with ThreadPoolExecutor(MAX_FLUSHES) as threads:
            for _ in threads.map(_flush_file, temporaries.items()):
                pass
        for path, temporary in temporaries.items():
            with explain_errors(path):
                replace_file(temporary, path)
            on_written(path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
    for folder in {path.parent for path in contents}:
        with explain_errors(folder):
            flush_folder(folder)


def _flush_file(pair: tuple[Path, Path]) -> None:
    path, temporary = pair
    with explain_errors(path), temporary.open("rb+") as file:
        os.fsync(file.fileno())
