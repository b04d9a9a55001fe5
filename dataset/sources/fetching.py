"""Make the bytes of a source a file while it is decoded. Files on disk cost nothing."""

import contextlib
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

from dataset.sources.media_source import MediaSource, PackedFile, Remote
from modules.errors import MediaError

PREFIX = "reelsmith-extracted-"  # of folders of copies
LEFTOVER_SECONDS = 86_400.0  # no clip is decoded for a day
_MAGIC = (
    (b"GIF8", ".gif"),
    (b"RIFF", ".webp"),
)  # of files without a suffix: they may be animations


@contextlib.contextmanager
def fetch(source: MediaSource) -> Iterator[MediaSource]:
    """Yield the source with local files that can be opened in the block.

    A source with local files is yielded unchanged. A file at an address is downloaded and kept. A file in a
    tar or table is copied to the system's folder for temporary files, one source at a time in each thread,
    and removed after the block; errors name the original location.

    Raises:
        MediaError: If a file is unavailable.
    """
    if not source.origins:
        yield source
        return
    with contextlib.ExitStack() as stack:
        path_of_copy: dict[Path, Path] = {}  # copy -> the path that errors name
        folder: Path | None = None  # of copies, made for the first one
        paths = []
        for path, origin in source.parts:
            if isinstance(origin, Remote):
                from dataset.sources.downloads import check_media, download  # only at addresses

                download(origin.address, path, check=check_media)
            elif origin is not None:
                if folder is None:
                    folder = _make_temporary_folder(stack)
                copy = _extract(origin, path, folder / str(len(path_of_copy)))
                path_of_copy[copy] = path
                path = copy
            paths.append(path)
        try:
            remaining = iter(paths)  # in the order of `source.parts`
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
                origins=(),
            )
        except MediaError as error:
            text = str(error)
            for copy, path in path_of_copy.items():
                text = text.replace(str(copy), str(path))
            raise type(error)(text) from error


@lru_cache(maxsize=4)
def _sweep(folder: str) -> None:
    for left in Path(folder).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < time.time() - LEFTOVER_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _make_temporary_folder(stack: contextlib.ExitStack) -> Path:
    """Make a temporary folder, removed with the stack; folders that killed runs left are removed first."""
    _sweep(tempfile.gettempdir())
    # Windows cannot remove a file that is still open: the next run does
    temporary = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
    return Path(stack.enter_context(temporary))


def _extract(origin: PackedFile, path: Path, copy: Path) -> Path:
    """Write a part of a file to `copy` with a suffix; returns that path."""
    try:
        pieces = origin.pieces()
        first = next(pieces, b"")
        suffix = path.suffix
        if not origin.has_suffix:
            suffix = next((suffix for magic, suffix in _MAGIC if first.startswith(magic)), "")
        copy = copy.with_name(copy.name + suffix)
        with copy.open("xb") as file:
            file.write(first)
            for piece in pieces:
                file.write(piece)
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from error
    return copy
