"""Take images and clips that are dropped on a page: identified by their content, kept below a root."""

import contextlib
import hashlib
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

from browser.core.upload_stream import DECODING, write_arriving
from modules.atomic_write import check_space, explain_errors, remove_leftovers, replace_file, temporary_name
from modules.errors import MediaError
from modules.media.opening import open_image, open_video
from modules.pages.language import refusal
from modules.run_limits import reject_writing

FOLDER = "inputs"  # subfolder of the results folder
MAX_BYTES = 256 << 20  # maximum size of a file
MAX_FILES = 1000
LONGEST_NAME = 60  # characters
IMAGE_SUFFIXES = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "TIFF": ".tif",
}
CLIP_SUFFIXES = {"mov": ".mp4", "matroska": ".mkv", "avi": ".avi"}  # FFmpeg's format name -> suffix


class InputFolder:
    """The folder that stores files dropped on the Generate page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def receive(self, chunks: AsyncIterator[bytes], name: str) -> Path:
        """Write an upload to a temporary file, and return its path.

        Args:
            name: Name of the dropped file, for messages.

        Raises:
            OptionError: If the file is too large, or there are too many files.
            OutputError: If the file cannot be written.
        """
        path = temporary_name(self.folder / "input")
        reject_writing(path)
        target = self.folder / (clean_name(name) or "input")  # for messages and the disk check
        with explain_errors(target):
            self.folder.mkdir(parents=True, exist_ok=True)
            if sum(1 for _ in os.scandir(self.folder)) >= MAX_FILES:
                raise refusal(
                    "%(folder)s has %(most_files)s files: remove some of them first",
                    folder=self.folder,
                    most_files=f"{MAX_FILES:,}",
                )
            remove_leftovers(self.folder)
            check_space(target, 1)
            try:
                await write_arriving(chunks, path, "It", MAX_BYTES)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        return path

    def store(self, path: Path, name: str) -> Path:
        """Move an uploaded image or clip to its final name, and return the new path.

        The new name contains a digest of the content, so equal files with one name are stored once. `name` is
        the original name. Raises OptionError if the file is neither an image nor a clip; then it is deleted.
        """
        try:
            suffix = _find_image_suffix(path) or _find_clip_suffix(path)
            if suffix is None:
                raise refusal("It is not a readable image or clip")
            digest = hashlib.blake2s(path.read_bytes(), digest_size=6).hexdigest()
            target = self.folder / f"{clean_stem(name)}-{digest}{suffix}"
            with explain_errors(target):
                replace_file(path, target)
            return target
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise


def clean_name(name: str) -> str:
    """Return the last part of a file's path."""
    return re.split(r"[\\/]", name)[-1]


def clean_stem(name: str) -> str:
    """Return a file name without folders, suffix, and characters special to shells or file systems."""
    stem = clean_name(name).rpartition(".")[0]
    words = re.sub(r"[\W-]+", "-", stem).strip("-")[:LONGEST_NAME]
    return words or "input"


def _find_image_suffix(path: Path) -> str | None:
    """Return the suffix of an image; None if it is not one. Raises OptionError for an unsupported format."""
    try:
        with DECODING, open_image(path) as image:
            kind = image.format or ""
            if kind in IMAGE_SUFFIXES:
                image.load()  # decode all of it: a damaged image raises MediaError
    except MediaError:
        return None
    if kind not in IMAGE_SUFFIXES:
        raise refusal("It is a %(kind)s image: convert it to PNG, JPEG or WebP", kind=kind)
    return IMAGE_SUFFIXES[kind]


def _find_clip_suffix(path: Path) -> str | None:
    """Return the suffix of a clip; None if it is not one. Raises OptionError for an unsupported format."""
    try:
        with open_video(path) as (container, _):
            names = container.format.name.split(",")
    except MediaError:
        return None
    for name, suffix in CLIP_SUFFIXES.items():
        if name in names:
            return suffix
    raise refusal("It is a clip of the kind %(names)s: convert it to MP4 or MKV", names=names[0])
