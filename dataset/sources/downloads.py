"""Download remote files: http:// and https:// with requests, all others with fsspec.

A file is downloaded once, even if several processes ask for it, and appears under its name when it is
complete. Remote files are assumed not to change: a downloaded file is not downloaded again.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from modules.atomic_write import atomic_path, check_space
from modules.downloading import PIECE, Answer, DownloadRejected, RetryableError, ask_http, receive
from modules.errors import MediaError, OutputError
from modules.file_locks import only_one
from modules.limits import MAX_DOWNLOAD_BYTES
from modules.paths import get_scheme, hide_secrets, short_hash

TRIES = 3  # number of consecutive attempts that receive nothing, after which a download fails
FIRST_WAIT = 0.5  # seconds before the second attempt; twice as long before the third
NUM_LOCKS = 64  # lock files in a folder, which serve all downloads
# fsspec protocols that let the content of a file make fsspec open other URLs or local files
OPENS_OTHER_ADDRESSES = frozenset(
    [
        "reference", "filecache", "blockcache", "simplecache", "cached", "dir", "zip", "tar", "libarchive",
        "async_wrapper", "asyncwrapper", "generic", "data", "local", "git", "dbfs", "dask", "jupyter",
    ]
)  # fmt: skip
HTTP = frozenset({"http", "https"})


@lru_cache(maxsize=256)
def protocol_error(protocol: str) -> str | None:
    """Return why URLs of a protocol cannot be read, with the remedy; None if they can be read."""
    if protocol in HTTP:
        return None
    try:
        import fsspec
        from fsspec.registry import known_implementations
    except ImportError:
        return f"{protocol}:// addresses need the package fsspec: pip install fsspec"
    if protocol in OPENS_OTHER_ADDRESSES or protocol not in fsspec.available_protocols():
        return f"{protocol}:// addresses are not supported"
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        hint = known_implementations.get(protocol, {}).get("err") or str(error)
        return f"{protocol}:// addresses need another package: {hint}"
    return None


def download(
    address: str,
    target: Path,
    wait: Callable[[float], None] = time.sleep,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Download a URL to `target`, unless that file exists.

    Args:
        address: URL of the file.
        target: Path of the downloaded file.
        wait: Waits a number of seconds before another attempt.
        check: Checks the file before it gets its final name; if it raises MediaError, the file is discarded.

    Raises:
        MediaError: If the file cannot be downloaded, after retries if these may help.
        OutputError: If the disk is full.
    """
    if target.is_file():
        return
    problem = protocol_error(get_scheme(address))
    if problem is not None:
        raise MediaError(f"{hide_secrets(address)}: {problem}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # a few locks serve all files; the system frees one even if its process is killed
    lock_index = int(short_hash(target.name), 16) % NUM_LOCKS
    with only_one(target.with_name(f".downloads-{lock_index:02d}.lock")):
        if target.is_file():  # another process has just finished it
            return
        with atomic_path(target) as temporary:
            _download_to(temporary, address, wait)
            if check is not None:
                try:
                    check(temporary)
                except MediaError as error:
                    reason = str(error).replace(str(temporary), "it")
                    raise MediaError(f"{hide_secrets(address)}: {reason} Nothing of it is kept.") from None


def _download_to(path: Path, address: str, wait: Callable[[float], None]) -> None:
    """Download a URL to `path`, in several attempts; raise MediaError if it fails or is too large."""
    open_address = ask_http if get_scheme(address) in HTTP else _open_with_fsspec
    safe_address = hide_secrets(address)
    try:
        receive(
            functools.partial(open_address, address),
            path,
            tries=TRIES,
            wait=wait,
            first_wait=FIRST_WAIT,
            max_bytes=MAX_DOWNLOAD_BYTES,
            check=functools.partial(_reject_if_disk_is_full, path),
        )
    except DownloadRejected as refused:
        raise MediaError(f"{safe_address} cannot be downloaded: {refused}") from None
    except RetryableError as error:
        raise MediaError(f"{safe_address} cannot be downloaded: {error} ({TRIES} tries)") from None
    if path.stat().st_size > MAX_DOWNLOAD_BYTES:
        raise MediaError(
            f"{safe_address} sends more than {MAX_DOWNLOAD_BYTES >> 30} GiB; remove it from the table"
        )


def _reject_if_disk_is_full(path: Path, answer: Answer) -> None:
    """Raise DownloadRejected if the disk has too little room for the file to be downloaded to `path`."""
    if answer.size_bytes is None:
        return
    try:
        check_space(path, answer.size_bytes - answer.start)
    except OutputError:  # only reported: another file may have room
        size = f"{answer.size_bytes / 1e9:,.1f} GB"
        raise DownloadRejected(f"it says that it has {size}, for which the disk has no room") from None


def check_media(path: Path) -> None:
    """Raise MediaError if a downloaded file is not an image, clip or audio file in a supported format."""
    from modules.media.opening import require_media  # it loads decoders

    require_media(path)


# --- fsspec
# ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open_with_fsspec(address: str, num_received: int, version: str | None) -> Iterator[Answer]:
    """Open a remote file through fsspec, from its beginning or where an earlier attempt ended."""
    # num_received: Number of bytes received by earlier attempts.
    import fsspec

    with _convert_fsspec_errors():
        file_system, path = fsspec.core.url_to_fs(address)
        info = file_system.info(path)
        if info.get("type") == "directory":
            raise DownloadRejected("it is a folder, not a file")
        size = info.get("size")
        # storages have different keys for the version of a file
        version_stamps = [info.get(key) for key in ("ETag", "etag", "LastModified", "mtime", "updated")]
        current_version = str([size, *version_stamps])
        start = num_received if current_version == version else 0
        file = file_system.open(path, "rb")
        file.seek(start)
    try:
        yield Answer(start, size, current_version, _read_pieces(file))
    finally:
        file.close()


def _read_pieces(file: BinaryIO) -> Iterator[bytes]:
    """Yield the rest of an open file in chunks."""
    while True:
        with _convert_fsspec_errors():
            piece = file.read(PIECE)
        if not piece:
            return
        yield piece


@contextlib.contextmanager
def _convert_fsspec_errors() -> Iterator[None]:
    """Convert fsspec errors to DownloadRejected, or to RetryableError if another attempt may succeed."""
    try:
        yield
    except DownloadRejected:
        raise
    except FileNotFoundError:
        raise DownloadRejected("nothing is there") from None
    except PermissionError:
        raise DownloadRejected("not allowed; a login may be missing") from None
    except Exception as error:  # each storage has its own errors, whose messages may contain secrets
        raise RetryableError(f"it could not be read ({type(error).__name__})") from None
