"""List the results of all days below the roots, and read the settings that each file holds."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from browser.recipes import RESULTS
from browser.runs import Runs

SUFFIXES = {".png", ".mp4", ".mkv", ".wav"}
DEEPEST = 8  # folders below a root
# folders that are not looked into
CLOSED = {"sample", "cache", "node_modules"}


@dataclass(frozen=True)
class Result:
    """A picture, clip or sound that was made."""

    path: Path
    changed: float  # when, in seconds since 1970

    @property
    def id(self) -> str:
        return hashlib.blake2s(os.fsencode(self.path), digest_size=8).hexdigest()

    @property
    def address(self) -> str:
        return f"/result/{self.id}{self.path.suffix}"


def list_results(runs: Runs) -> list[Result]:
    """Return all results in folders called `generated` below the roots, the newest first."""
    results = {}
    for top in dict.fromkeys(runs.tops):
        for folder in _find_folders(top, DEEPEST):
            for result in _list_folder(folder):
                results[result.path] = result
    return sorted(results.values(), key=lambda result: (-result.changed, str(result.path)))


def _find_folders(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the folders of results at or below a folder. Links are not followed."""
    if folder.name == RESULTS:
        yield folder
    if not depth:
        return
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            is_open = not entry.name.startswith(".") and entry.name not in CLOSED
            if is_open and entry.is_dir(follow_symlinks=False):
                yield from _find_folders(Path(entry.path), depth - 1)


def _list_folder(folder: Path) -> Iterator[Result]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            is_media = path.suffix.lower() in SUFFIXES and not path.stem.startswith("latent_preview")
            if is_media and not path.stem.endswith("_progress") and entry.is_file(follow_symlinks=False):
                yield Result(path, entry.stat(follow_symlinks=False).st_mtime)
