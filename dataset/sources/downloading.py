"""Download files at addresses into a folder, each once, whatever number of processes ask for it.

http:// and https:// are read by requests, all others by fsspec. A file appears under its name when it is
whole. Files at addresses count as unchanging: a downloaded one is not asked for again.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import requests
import urllib3
from filelock import FileLock

from dataset.sources.stems import readable_stem
from modules.atomic_write import atomic_path, check_space
from modules.errors import MediaError, OutputError
from modules.paths import (
    address_identity,
    address_name,
    hide_secrets,
    protocol_of,
    short_hash,
    split_address,
)

logger = logging.getLogger(__name__)

TRIES = 3
FIRST_WAIT = 0.5  # seconds before the second try; before the third twice as long
LONGEST_WAIT = 60.0  # that a site may ask for
TIMEOUTS = (20.0, 30.0)  # seconds to connect, and without any data
PIECE = 1 << 16  # bytes; a broken connection loses the last one
SLOW_SECONDS, SLOW_BYTES = 60.0, 1 << 16  # a connection that brings less in that time is given up
MOST_BYTES = 1 << 38  # of a file: 256 GiB
NUM_LOCKS = 64  # files in a folder by which processes wait for one another
LONGEST_SUFFIX = 12
# of fsspec: they reach for other addresses, or for parts of this machine, by what a file says
INDIRECT = frozenset(
    {
        *("reference", "filecache", "blockcache", "simplecache", "cached", "dir", "zip", "tar", "libarchive"),
        *("async_wrapper", "asyncwrapper", "generic", "data", "local", "git", "dbfs", "dask", "jupyter"),
    }
)
HTTP = frozenset({"http", "https"})
# one at most: packed twice, a few bytes may be gigabytes
ENCODINGS = frozenset({"", "identity", "gzip", "x-gzip", "deflate"})
AGAIN = frozenset({408, 425, 429})  # answers of a site that may change soon; so may those from 500


class _Broken(Exception):
    """A try that failed and may succeed later; the text says how, without the address."""

    def __init__(self, reason: str, wait_seconds: float = 0.0, from_start: bool = False) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds
        self.from_start = from_start  # what has arrived cannot be continued


@dataclass(frozen=True)
class _Answer:
    """The answer of a site."""

    start: int  # place in the file of the first byte
    size_bytes: int | None  # of the whole file; None: not told
    version: str | None  # of the file; None: not told, so that a rest may be of another file
    pieces: Iterator[bytes]


def local_name(address: str) -> str:
    """Return the name of a downloaded file: the address's last part, readable, with a hash of the address,
    and its suffix.
    """
    stem, suffix = split_name(address)
    return f"{stem}-{short_hash(address_identity(address), 16)}{suffix}"


@lru_cache(maxsize=1024)  # asked for twice
def split_name(address: str) -> tuple[str, str]:
    """Return the last part of an address, readable, and its suffix; without one, the host."""
    stem, dot, end = address_name(address).rpartition(".")
    if not stem or not 0 < len(end) < LONGEST_SUFFIX or not end.isalnum():
        stem, dot, end = address_name(address), "", ""
    return readable_stem(stem or split_address(address).hostname or ""), dot + end


@lru_cache(maxsize=256)
def protocol_problem(protocol: str) -> str | None:
    """Return why addresses of a protocol cannot be read, and the package to install; None if they can."""
    if protocol in HTTP:
        return None
    try:
        import fsspec
        from fsspec.registry import known_implementations
    except ImportError:
        return f"{protocol}:// addresses need the package fsspec: pip install fsspec"
    if protocol in INDIRECT or protocol not in fsspec.available_protocols():
        return f"{protocol}:// addresses are not read"
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        told = known_implementations.get(protocol, {}).get("err") or str(error)
        return f"{protocol}:// addresses need another package: {told}"
    return None


def download(address: str, target: Path, wait: Callable[[float], None] = time.sleep) -> None:
    """Download `address` to `target`, unless it is there. wait: called with seconds before another try.

    Raises MediaError if the file cannot be had, after several tries if that may help; OutputError if the disk
    is full.
    """
    if target.is_file():
        return
    problem = protocol_problem(protocol_of(address))
    if problem is not None:
        raise MediaError(f"{hide_secrets(address)}: {problem}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock_of(target):
        if target.is_file():  # another process has just finished it
            return
        with atomic_path(target) as temporary:
            _receive(address, temporary, wait)


def _lock_of(target: Path) -> FileLock:
    """Return a lock that the system frees even if its process is killed. A few serve all files."""
    number = int(short_hash(target.name), 16) % NUM_LOCKS
    return FileLock(target.with_name(f".downloads-{number:02d}.lock"))


def _receive(address: str, path: Path, wait: Callable[[float], None]) -> None:
    ask = _ask_http if protocol_of(address) in HTTP else _ask_filesystem
    version: str | None = None
    path.touch()
    for number in range(1, TRIES + 1):
        try:
            have = path.stat().st_size if version is not None else 0
            with ask(address, have, version) as answer:
                version = answer.version
                _write(path, answer, hide_secrets(address))
            return
        except _Broken as error:
            if number == TRIES:
                raise MediaError(
                    f"{hide_secrets(address)} cannot be downloaded: {error} ({TRIES} tries)"
                ) from None
            version = None if error.from_start else version
            seconds = max(FIRST_WAIT * 2 ** (number - 1), min(error.wait_seconds, LONGEST_WAIT))
            logger.debug("%s: %s; again in %.1f s", hide_secrets(address), error, seconds)
            wait(seconds)


def _write(path: Path, answer: _Answer, shown: str) -> None:
    """Write a site's answer. Raises _Broken if it ends early or is too slow, MediaError if too long."""
    if answer.size_bytes is not None:
        try:
            check_space(path, answer.size_bytes - answer.start)
        except OutputError:  # only said: another file may well have room
            raise MediaError(
                f"{shown} cannot be downloaded: it says that it has {answer.size_bytes / 1e9:,.1f} GB, for "
                "which the disk has no room"
            ) from None
    with path.open("r+b") as file:
        file.truncate(answer.start)
        file.seek(answer.start)
        _copy(answer, file, shown)
        found = file.tell()
    if answer.size_bytes is not None and found != answer.size_bytes:
        raise _Broken(f"{found:,} of {answer.size_bytes:,} bytes arrived")


def _copy(answer: _Answer, file: BinaryIO, shown: str) -> None:
    since, at_start = time.monotonic(), file.tell()
    for piece in answer.pieces:
        file.write(piece)
        if file.tell() > MOST_BYTES:
            raise MediaError(f"{shown} sends more than {MOST_BYTES >> 30} GiB; remove it from the table")
        if time.monotonic() - since > SLOW_SECONDS:
            if file.tell() - at_start < SLOW_BYTES:
                raise _Broken(f"less than {SLOW_BYTES >> 10} KiB arrived in {SLOW_SECONDS:.0f} s")
            since, at_start = time.monotonic(), file.tell()


# --- http and https
# ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _session(thread: int) -> requests.Session:
    """Return a thread's connections, kept open between files. thread: its number."""
    return requests.Session()


@contextlib.contextmanager
def _ask_http(address: str, have: int, version: str | None) -> Iterator[_Answer]:
    headers = {"accept-encoding": "identity"}
    if have and version is not None:
        headers |= {"range": f"bytes={have}-", "if-range": version}
    try:
        with _session(threading.get_ident()).get(
            address, headers=headers, stream=True, timeout=TIMEOUTS
        ) as answer:
            _check_answer(address, answer)
            start = have if answer.status_code == 206 and _starts_at(answer, have) else 0
            # an encoded answer has another length than the file; a weak version may be of other bytes
            length = None if answer.headers.get("content-encoding") else _number(answer, "content-length")
            etag = answer.headers.get("etag", "")
            known = etag if etag.startswith('"') else answer.headers.get("last-modified")
            if start and known not in (None, version):  # some sites pay no heed to if-range
                raise _Broken("the file has changed meanwhile", from_start=True)
            yield _Answer(
                start,
                None if length is None else start + length,
                known or (version if start else None),  # the rest of a file need not say it again
                answer.iter_content(PIECE),
            )
    except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
        # the library lets some through as they are: redirects to no address, chunks of negative length
        if isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)):
            raise MediaError(f"{hide_secrets(address)} is no address that can be asked for") from None
        # not its text: it may hold the address
        what = "connection broke" if isinstance(error, requests.RequestException) else "answer is malformed"
        raise _Broken(f"the {what} ({type(error).__name__})") from None


def _check_answer(address: str, answer: requests.Response) -> None:
    """Raise _Broken or MediaError if the answer is not the file."""
    shown, code = hide_secrets(address), answer.status_code
    if protocol_of(address) == "https" and any(
        not one.url.lower().startswith("https:") for one in (*answer.history, answer)
    ):
        raise MediaError(f"{shown} cannot be downloaded: the site passes it on without encryption")
    if code in AGAIN or code >= 500:
        raise _Broken(f"the site answers {code}", _number(answer, "retry-after") or 0.0)
    if code == 416:  # what is there now is shorter than what is here
        raise _Broken("the site cannot continue the file", from_start=True)
    if code not in (200, 206):
        meaning = {401: ": a password is needed", 403: ": not allowed", 404: ": nothing is there"}
        raise MediaError(f"{shown} cannot be downloaded: the site answers {code}{meaning.get(code, '')}")
    if answer.headers.get("content-encoding", "").strip().lower() not in ENCODINGS:
        raise MediaError(f"{shown} cannot be downloaded: the site packs it in a way that was not asked for")


def _starts_at(answer: requests.Response, have: int) -> bool:
    return answer.headers.get("content-range", "").startswith(f"bytes {have}-")


def _number(answer: requests.Response, name: str) -> int | None:
    text = answer.headers.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else None


# --- what fsspec knows
# ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _ask_filesystem(address: str, have: int, version: str | None) -> Iterator[_Answer]:
    import fsspec

    shown = hide_secrets(address)
    with _explain_filesystem(shown):
        system, path = fsspec.core.url_to_fs(address)
        info = system.info(path)
        if info.get("type") == "directory":
            raise MediaError(f"{shown} is a folder, not a file")
        size = info.get("size")
        now = str([size, *(info.get(key) for key in ("ETag", "etag", "LastModified", "mtime", "updated"))])
        start = have if now == version else 0
        file = system.open(path, "rb")
        file.seek(start)
    try:
        yield _Answer(start, size, now, _pieces(file, shown))
    finally:
        file.close()


def _pieces(file: BinaryIO, shown: str) -> Iterator[bytes]:
    while True:
        with _explain_filesystem(shown):
            piece = file.read(PIECE)
        if not piece:
            return
        yield piece


@contextlib.contextmanager
def _explain_filesystem(shown: str) -> Iterator[None]:
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError:
        raise MediaError(f"{shown} cannot be downloaded: nothing is there") from None
    except PermissionError:
        raise MediaError(f"{shown} cannot be downloaded: not allowed; a login may be missing") from None
    except Exception as error:  # each storage has its own; their texts may hold secrets
        raise _Broken(f"it could not be read ({type(error).__name__})") from None


def find_remote(pattern: str) -> list[str]:
    """Return the addresses that match one with `*`, `?` or `[`, sorted. http and https have no lists.

    Raises MediaError if they cannot be listed.
    """
    shown, protocol = hide_secrets(pattern), protocol_of(pattern)
    problem = protocol_problem(protocol)
    if problem is not None:
        raise MediaError(f"{shown}: {problem}")
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(pattern)
        return sorted(system.unstrip_protocol(found) for found in system.glob(path))
    except Exception as error:  # as above
        raise MediaError(f"{shown} cannot be listed ({type(error).__name__})") from None
