"""Match control files with the images or clips of a folder."""

import bisect
import difflib
import itertools
import os
import re
from collections.abc import Container, Sequence
from pathlib import Path

from modules.errors import DatasetError
from modules.media.animations import ANIMATION_SUFFIXES
from modules.media.reading import VIDEO_SUFFIXES, image_suffixes

MOST_NAMES = 10_000  # of a folder, among which one like a missing one is searched


class ControlFolder:
    """Contents of a `control_directory`, listed once and sorted, so that a file is found without a scan."""

    def __init__(self, folder: Path, stems: Container[str]) -> None:
        """stems: of all images or clips of the table. Raises DatasetError if the folder cannot be listed."""
        self._folder = folder
        self._stems = stems
        entries = list_folder(folder, "control_directory")
        self._by_name = {path.name: path for path in entries}
        # of equal names the first is kept
        self._clips = {
            path.stem: path
            for suffixes in (ANIMATION_SUFFIXES, VIDEO_SUFFIXES)
            for path in reversed(entries)
            if path.suffix.lower() in suffixes
        }
        self._images = sorted(
            (path for path in entries if path.suffix.lower() in image_suffixes()), key=lambda path: path.stem
        )
        self._image_stems = [path.stem for path in self._images]

    def for_image(self, stem: str, count: int) -> tuple[Path, ...]:
        """Return the first `count` control images of an image.

        `<stem>.*` comes first, the others follow by the number after the last underscore. Raises DatasetError
        if there are fewer, or if a name that begins with `stem` has no number.
        """
        ranked = self._images_of(stem)
        if len(ranked) < count:
            wanted = f"{stem}.png" if count == 1 else f"{count} images {stem}_0.png, {stem}_1.png, ..."
            raise DatasetError(
                f"{self._folder} has {len(ranked)} control images for {stem}; needed: {wanted} (or another "
                "image type)"
            )
        return tuple(ranked[:count])

    def beyond(self, stem: str, count: int) -> list[Path]:
        """Return an image's control images after the first `count`, except those named like another image."""
        return [path for path in self._images_of(stem)[count:] if path.stem not in self._stems]

    def _images_of(self, stem: str) -> list[Path]:
        # begin with `stem`
        first, end = (bisect.bisect_left(self._image_stems, text) for text in (stem, stem + chr(0x10FFFF)))
        ranked = [
            (self._rank(path, stem), path) for path in self._images[first:end] if self._may_belong(path, stem)
        ]
        return [path for _, path in sorted(ranked)]

    def for_video(self, video: Path) -> Path:
        """Return the control clip of a video.

        It has the same file name, or is a folder `<stem>` of images, or `<stem>` with another video suffix,
        in this order. Raises DatasetError if there is none.
        """
        same, folder = self._by_name.get(video.name), self._by_name.get(video.stem)
        found = same or (folder if folder is not None and folder.is_dir() else self._clips.get(video.stem))
        if found is None:
            raise DatasetError(
                f"{self._folder} has no control clip for {video.name}: neither {video.name} nor a folder "
                f"{video.stem}"
            )
        return found

    def _may_belong(self, path: Path, stem: str) -> bool:
        """Whether an image whose name begins with `stem` belongs to it, not to a longer stem (`pic_10`)."""
        if re.fullmatch(r"(_\d+)?", path.stem[len(stem) :]):
            return True
        return not any(
            path.stem[:length] in self._stems for length in range(len(stem) + 1, len(path.stem) + 1)
        )

    def _rank(self, path: Path, stem: str) -> int:
        if path.stem == stem:
            return -1
        number = path.stem.rsplit("_", 1)[-1]
        if not number.isdecimal():
            raise DatasetError(
                f"{path}: a control image of {stem} must be named {stem}{path.suffix} or "
                f"{stem}_<number>{path.suffix}"
            )
        return int(number)


def list_folder(folder: Path, key: str) -> Sequence[Path]:
    """List a folder, sorted, without names that begin with a dot.

    Raises DatasetError, naming `key`, if the folder cannot be listed.
    """
    return [folder / entry.name for entry in list_entries(folder, key)]


def list_entries(folder: Path, key: str) -> Sequence["os.DirEntry[str]"]:
    """Do as `list_folder` without a Path for each name: there may be a million."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if entry.name[0] != "."]
        return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        looked = "" if folder.is_absolute() else f" (looked in {Path.cwd()})"
        near = _near_name(folder) if isinstance(error, FileNotFoundError) else None
        hint = "Correct the path." if near is None else f"Did you mean {near}?"
        raise DatasetError(f"{key} = {folder}: {error.strerror}{looked}. {hint}") from error


def _near_name(folder: Path) -> Path | None:
    """Return the existing folder whose name is most like that of a missing one, if there is one."""
    missing = next((one for one in (folder, *folder.parents) if one.parent.is_dir()), folder)
    try:
        with os.scandir(missing.parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, MOST_NAMES) if entry.is_dir()]
    except OSError:
        return None
    near = difflib.get_close_matches(missing.name, names, 1)
    return missing.with_name(near[0]) / folder.relative_to(missing) if near else None
