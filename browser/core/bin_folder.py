"""Move files that pages remove into a bin: only emptying the bin deletes them."""

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from browser.core.short_names import number_names, short_digest
from modules.atomic_write import explain_errors, place_new
from modules.errors import OutputError
from modules.pages.language import refusal, say

FOLDER = "reelsmith-bin"
LONGEST_TITLE = 80  # characters of a title in the name of a folder


@dataclass(frozen=True)
class BinEntry:
    """One folder in the bin, with files that were removed together."""

    path: Path
    size_bytes: int
    num_files: int


class BinFolder:
    """A bin for removed files: moves files into it, lists its content, and deletes it permanently."""

    def __init__(self, *folders: Path) -> None:
        """Use a bin that has one of these folders on each disk.

        A removed file goes to the first folder on its own disk, because renaming within a disk takes no time
        and no space. Folders are created when something is removed.
        """
        self.folders = tuple(dict.fromkeys(folders))

    def list_entries(self) -> list[BinEntry]:
        """Return the entries of the bin, the newest first."""
        entries = []
        for bin_folder in self.folders:
            if bin_folder.is_symlink():
                continue
            with contextlib.suppress(OSError):
                entries += [_measure(path) for path in bin_folder.iterdir()]
        return sorted(entries, key=lambda entry: entry.path.name, reverse=True)

    def compute_checksum(self) -> str:
        """Return a checksum of the paths and sizes in the bin."""
        return _compute_checksum(self.list_entries())

    def move_in(self, title: str, base: Path, paths: Sequence[Path]) -> Path:
        """Move files or folders into a new folder of the bin, and return that folder.

        Args:
            title: Description of the files, which becomes part of the new folder's name.
            base: Folder of the files. In the new folder, they keep their paths relative to it.
            paths: Files and folders to move.

        Raises:
            OutputError: If a path cannot be moved. The paths before it have already been moved.
        """
        safe_title = re.sub(r"[^\w.-]+", "_", title)[:LONGEST_TITLE]
        entry_name = next(
            free_name
            for free_name in number_names(f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{safe_title}")
            if not any(os.path.lexists(bin_folder / free_name) for bin_folder in self.folders)
        )
        used_folder = self.folders[0]  # the bin has a folder on each disk; the last one used is returned
        for path in paths:
            used_folder = self._move_to_own_disk(path, Path(entry_name, path.relative_to(base)))
        return used_folder / entry_name

    def _move_to_own_disk(self, path: Path, relative_target: Path) -> Path:
        """Move a file or folder into the bin's folder on the same disk, and return this folder."""
        # `relative_target` is the new path below the bin's folder.
        for bin_folder in self.folders:
            wanted = bin_folder / relative_target
            paths = map(wanted.with_name, number_names(wanted.name))
            target = next(free for free in paths if not os.path.lexists(free))
            with explain_errors(target):
                try:
                    rename_into(path, target, bin_folder)
                except OSError as error:
                    if error.errno != errno.EXDEV:  # on another disk: try the next folder of the bin
                        raise
                else:
                    return bin_folder
        raise OutputError(
            say(
                "%(path)s is on a different disk than %(places)s. Delete it by hand",
                path=path,
                places=self.folders[0],
            )
        )

    def find_folder(self, path: Path) -> Path:
        """Return the bin's folder on the same disk as a file, or the first folder if there is none."""
        with contextlib.suppress(OSError):
            disk = path.lstat().st_dev
            for bin_folder in self.folders:
                if (bin_folder if bin_folder.exists() else bin_folder.parent).stat().st_dev == disk:
                    return bin_folder
        return self.folders[0]

    def empty(self, checksum: str) -> int:
        """Permanently delete the content of the bin, and return the number of deleted bytes.

        Args:
            checksum: Checksum of the content that the user saw, as `compute_checksum` returned it.

        Raises:
            OptionError: If the content has changed since.
            OutputError: If a file cannot be deleted.
        """
        entries = self.list_entries()  # once: files that another page adds meanwhile were not shown
        if checksum != _compute_checksum(entries):
            raise refusal("The bin has changed in the meantime. Review it again.")
        size_bytes = 0
        for entry in entries:
            with explain_errors(entry.path):
                if entry.path.is_dir() and not entry.path.is_symlink():
                    shutil.rmtree(entry.path)
                else:
                    entry.path.unlink()
            size_bytes += entry.size_bytes
        return size_bytes


def _compute_checksum(entries: Sequence[BinEntry]) -> str:
    rows = [f"{entry.path}\0{entry.size_bytes}\0{entry.num_files}" for entry in entries]
    return short_digest("\n".join(rows))


def rename_into(path: Path, target: Path, bin_folder: Path) -> None:
    """Move a file or folder into a folder of the bin by renaming, which copies no data.

    Args:
        target: New path below `bin_folder`.
        bin_folder: Folder of a bin. Missing parent folders of `target` are created; if they stay empty, they
            are removed again.

    Raises:
        OutputError: If `bin_folder` or a folder in it is a link.
        OSError: If the path cannot be renamed; EXDEV if `bin_folder` is on another disk.
    """
    if bin_folder.is_symlink():
        raise OutputError(f"{bin_folder} is a link: replace it with a folder")
    is_new = not bin_folder.exists()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and not path.is_symlink():
            place_new(path, target)  # another page may have taken the name since it was found free
        else:
            path.rename(target)
    except OSError:
        # also remove the bin's folder if this call has created it
        _remove_empty(target.parent, bin_folder.parent if is_new else bin_folder)
        raise


def _measure(path: Path) -> BinEntry:
    """Return a file or folder with its size and number of files; a link counts as a file of 0 bytes."""
    size_bytes = num_files = 0
    unvisited = [path]
    while unvisited:
        entry = unvisited.pop()
        with contextlib.suppress(OSError):
            if entry.is_symlink():
                num_files += 1
            elif entry.is_dir():
                unvisited += entry.iterdir()
            else:
                num_files += 1
                size_bytes += entry.stat().st_size
    return BinEntry(path, size_bytes, num_files)


def _remove_empty(folder: Path, end: Path) -> None:
    """Remove a folder and its parents below `end`, as long as they are empty."""
    while folder != end and folder.is_relative_to(end):
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent
