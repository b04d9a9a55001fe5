"""Make the bytes of a source a file for as long as it is decoded. What is on disk costs nothing."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dataset.sources.downloading import download
from dataset.sources.media_source import MediaSource
from dataset.sources.origin import Remote, TarMember, member_pieces
from modules.errors import MediaError


@contextlib.contextmanager
def fetch(source: MediaSource) -> Iterator[MediaSource]:
    """Yield the source with files that can be opened until the block ends; if it has them, it is the same.

    What is at an address is downloaded and stays. What is in a tar is copied to the system's folder for
    temporary files, one source at a time in each thread, and removed; errors name the tar instead.
    Raises MediaError if something cannot be had.
    """
    if not source.origins:
        yield source
        return
    with contextlib.ExitStack() as stack:
        places: dict[Path, Path] = {}  # of copies: what they are called
        paths = []
        for path, origin in source.parts:
            if isinstance(origin, TarMember):
                if not places:
                    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reelsmith-")))
                copy = folder / f"{len(places)}{path.suffix}"
                _extract(origin, path, copy)
                places[copy] = path
                paths.append(copy)
            else:
                if isinstance(origin, Remote):
                    download(origin.address, path)
                paths.append(path)
        try:
            yield _with_paths(source, paths)
        except MediaError as error:
            text = str(error)
            for copy, path in places.items():
                text = text.replace(str(copy), str(path))
            raise MediaError(text) from error


def _with_paths(source: MediaSource, paths: list[Path]) -> MediaSource:
    count = len(source.control)
    mask = None if source.mask is None else paths[1 + count]
    return dataclasses.replace(
        source, path=paths[0], control=tuple(paths[1 : 1 + count]), mask=mask, origins=()
    )


def _extract(origin: TarMember, path: Path, copy: Path) -> None:
    try:
        with copy.open("xb") as file:
            for piece in member_pieces(origin):
                file.write(piece)
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from error
