"""Provide the files of a source on disk while it is decoded: download them, or copy them out of a tar."""

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

from dataset.sources.media_source import MediaSource, Origin, PackedFile, Remote
from modules.errors import MediaError

PREFIX = "reelsmith-extracted-"  # beginning of the names of temporary folders
LEFTOVER_SECONDS = 86_400.0  # age at which a temporary folder is a leftover, as no clip is decoded for a day
# first bytes of files without a suffix, and the suffix that animations need to be recognized
_MAGIC = (
    (b"GIF8", ".gif"),
    (b"RIFF", ".webp"),
)


@contextlib.contextmanager
def fetch(source: MediaSource) -> Iterator[MediaSource]:
    """Yield the item's files as local files, which can be opened in the block.

    If all files are on disk already, the source is yielded unchanged. A remote file is downloaded and kept. A
    file in a tar or table is copied to the system's folder for temporary files, and removed after the block;
    a MediaError that is raised in the block names the original location.

    Raises:
        MediaError: If a file is unavailable.
    """
    if not source.remote_or_packed:
        yield source
        return
    with contextlib.ExitStack() as stack:
        files = _LocalFiles(stack)
        paths = [files.provide(path, origin) for path, origin in source.latent_inputs]
        try:
            # the local files are in the order of `latent_inputs`
            remaining = iter(paths)
            yield dataclasses.replace(
                source,
                path=next(remaining),
                control=tuple(islice(remaining, len(source.control))),
                mask=None if source.mask is None else next(remaining),
                control_mask=None if source.control_mask is None else next(remaining),
                references=tuple(islice(remaining, len(source.references))),
                guides=tuple(islice(remaining, len(source.guides))),
                rejected=None if source.rejected is None else next(remaining),
                layers=tuple(remaining),
                remote_or_packed=(),
            )
        except MediaError as error:
            raise type(error)(files.name_originals(str(error))) from error


class _LocalFiles:
    """Provides an item's files on disk; temporary copies are deleted when the exit stack is closed."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._folder: Path | None = None  # temporary folder, made for the first copy
        self._original_paths: dict[Path, Path] = {}  # copy -> the path that errors name

    def provide(self, path: Path, origin: Origin | None) -> Path:
        """Return the path of a file on disk: the file itself, its download, or a temporary copy.

        Raises:
            MediaError: If the file is unavailable.
        """
        if origin is None:
            return path
        if isinstance(origin, Remote):
            from dataset.sources.downloads import check_media, download  # only for remote files

            download(origin.address, path, check=check_media)
            return path
        if self._folder is None:
            # deleted when the exit stack is closed
            _remove_leftovers(tempfile.gettempdir())
            # Windows cannot remove a file that is still open; a later run removes it as a leftover
            temporary = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
            self._folder = Path(self._stack.enter_context(temporary))
        copy = _extract(origin, path, self._folder / str(len(self._original_paths)))
        self._original_paths[copy] = path
        return copy

    def name_originals(self, message: str) -> str:
        """Return an error message with the original paths in place of the temporary copies'."""
        for copy, path in self._original_paths.items():
            message = message.replace(str(copy), str(path))
        return message


@lru_cache(maxsize=4)  # once for each folder
def _remove_leftovers(folder: str) -> None:
    """Remove temporary folders that killed runs left behind."""
    for leftover in Path(folder).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if leftover.stat().st_mtime < time.time() - LEFTOVER_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def _extract(origin: PackedFile, path: Path, copy: Path) -> Path:
    """Copy a file out of a tar or table to the path `copy` plus a suffix; return the resulting path."""
    # `path` names the original in errors.
    try:
        pieces = origin.pieces()
        first_piece = next(pieces, b"")
        suffix = path.suffix
        # the name says nothing about the format, so the first bytes decide
        if not origin.has_suffix:
            suffix = next((suffix for magic, suffix in _MAGIC if first_piece.startswith(magic)), "")
        copy = copy.with_name(copy.name + suffix)
        with copy.open("xb") as file:
            file.write(first_piece)
            for piece in pieces:
                file.write(piece)
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from error
    return copy
