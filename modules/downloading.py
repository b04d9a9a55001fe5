"""Download a file: resumed after broken connections, of limited size, and of a single version.

Every downloader asks in its own way (`RequestFile`) and says what an error means to its user.
`urllib3.Retry` would repeat a request, but not continue the data of one that broke.
"""

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from modules.control_codes import shorten
from modules.limits import MAX_WAIT_SECONDS
from modules.paths import get_scheme

if TYPE_CHECKING:
    import requests

logger = logging.getLogger(__name__)

TIMEOUTS = (20.0, 60.0)  # seconds to connect, and without any data
PIECE = 1 << 16  # bytes; a broken connection loses at most one piece
SLOW_SECONDS, SLOW_BYTES = 60.0, 1 << 16  # slower connections are closed
# one at most: compressed twice, a few bytes may become gigabytes
ACCEPTED_ENCODINGS = frozenset({"", "identity", "gzip", "x-gzip", "deflate"})
RETRY_STATUS_CODES = frozenset({408, 425, 429})  # HTTP statuses to retry, in addition to 500 and above


class RetryableError(Exception):
    """Raised if an attempt failed that may succeed later; the message is the reason, without the URL."""

    def __init__(self, reason: str, wait_seconds: float = 0.0, from_start: bool = False) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds
        self.from_start = from_start  # the received part cannot be continued


class DownloadRejected(Exception):
    """Raised if a server rejects a request, so that retrying is useless; the message is the reason."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status  # HTTP status, if that is the reason


@dataclass(frozen=True)
class Answer:
    """A server's HTTP response to the request for a file."""

    start: int  # offset of the first byte in the file
    size_bytes: int | None  # size of the whole file; None if not stated
    version: str | None  # version of the file; None: a rest may belong to another version
    pieces: Iterator[bytes]


# bytes received so far, and their version -> a site's answer, from there on or from the start
RequestFile = Callable[[int, str | None], AbstractContextManager[Answer]]


def receive(
    request: RequestFile,
    path: Path,
    tries: int,
    wait: Callable[[float], None],
    first_wait: float,
    max_bytes: int,
    size_bytes: int | None = None,
    check: Callable[[Answer], None] = lambda _: None,
    progress: Callable[[int], object] = lambda _: None,
) -> None:
    """Download to `path`, which may contain the beginning of a file of known size; stop beyond `max_bytes`.

    Args:
        request: Requests the file, from a position on.
        path: File to write.
        tries: Number of consecutive attempts that may make little progress.
        wait: Called with the seconds to wait before another attempt.
        first_wait: Seconds before the second attempt; doubled with each further attempt.
        max_bytes: Largest allowed size of the file.
        size_bytes: Size of the file; None if only the site knows it.
        check: Called with each answer before its data are read.
        progress: Called with the number of bytes in the file so far.

    Raises:
        RetryableError: If the last attempt fails.
        DownloadRejected: If the site rejects the request.
        OSError: If the file cannot be written.
    """
    path.touch()  # an empty file has to exist too
    retries = _Retries(first_wait, path.stat().st_size)
    version: str | None = None
    while True:
        can_continue = version is not None or size_bytes is not None
        num_bytes = path.stat().st_size if can_continue else 0
        if size_bytes is not None and num_bytes >= size_bytes:
            return
        try:
            with request(num_bytes, version) as answer:
                version = answer.version
                check(answer)
                received = _write_answer(path, answer, max_bytes, progress)
            expected = answer.size_bytes if size_bytes is None else size_bytes
            if received > max_bytes or expected in (None, received):
                return
            raise RetryableError(f"{received:,} of {expected:,} bytes arrived")
        except RetryableError as error:
            if error.from_start:
                version = None
                os.truncate(path, 0)
            retries.count_failure(path.stat().st_size)
            if retries.num_failures == tries:
                raise
            seconds = retries.choose_wait(error.wait_seconds)
            logger.debug("%s: %s; again in %.1f s", path.name, error, seconds)
            wait(seconds)


@dataclass
class _Retries:
    """Counts the failed attempts of a download since it last made progress."""

    first_wait: float  # seconds before the second attempt
    size_after_progress: int  # bytes
    num_failures: int = 0  # consecutive attempts with little progress

    def count_failure(self, num_bytes: int) -> None:
        """Count a failed attempt after which the file has `num_bytes` bytes."""
        # repeated data and a few bytes do not count as progress, or a site could continue endlessly
        if num_bytes >= self.size_after_progress + PIECE:
            self.num_failures = 0
            self.size_after_progress = num_bytes
        else:
            self.num_failures += 1

    def choose_wait(self, requested_seconds: float) -> float:
        """Return the seconds to wait before the next attempt: doubled each time, or as the site requests."""
        doubled_wait = self.first_wait * 2 ** max(0, self.num_failures - 1)
        return max(doubled_wait, min(requested_seconds, MAX_WAIT_SECONDS))


def _write_answer(path: Path, answer: Answer, max_bytes: int, progress: Callable[[int], object]) -> int:
    """Write a server's response to the file, from the response's start position on."""
    # Return the end position.
    with path.open("r+b") as file:
        file.truncate(answer.start)
        file.seek(answer.start)
        progress(answer.start)
        # the speed is measured over intervals of SLOW_SECONDS
        interval_start = time.monotonic()
        position_at_start = file.tell()
        try:
            for piece in answer.pieces:
                file.write(piece)
                progress(file.tell())
                if file.tell() > max_bytes:
                    break
                if time.monotonic() - interval_start > SLOW_SECONDS:
                    if file.tell() - position_at_start < SLOW_BYTES:
                        raise RetryableError(
                            f"less than {SLOW_BYTES >> 10} KiB arrived in {SLOW_SECONDS:.0f} s"
                        )
                    interval_start = time.monotonic()
                    position_at_start = file.tell()
        finally:
            file.flush()
            os.fsync(file.fileno())
        return file.tell()


@lru_cache(maxsize=256)
def _get_session(thread: int) -> "requests.Session":
    """Return the HTTP session of a thread, whose connections stay open between files."""
    import requests

    return requests.Session()


@contextlib.contextmanager
def ask_http(
    address: str, have: int, version: str | None, headers: Mapping[str, str] | None = None
) -> Iterator[Answer]:
    """Request a file by HTTP or HTTPS and yield the response; `headers` are added, such as a token.

    `have` is the number of bytes already downloaded, `version` the ETag or date received with them.
    """
    import requests  # takes 0.1 s, which only downloads need
    import urllib3

    request_headers = {**(headers or {}), "accept-encoding": "identity"}
    if have:
        request_headers["range"] = f"bytes={have}-"
    if have and version is not None:
        request_headers["if-range"] = version
    try:
        session = _get_session(threading.get_ident())
        with session.get(address, headers=request_headers, stream=True, timeout=TIMEOUTS) as response:
            _check_answer(address, response)
            # Read the headers of a response to the request for a file from byte `have` on
            start = _find_first_byte(response, have)
            size_bytes = _read_size(response, start)
            new_version = _read_version(response)
            if start and version is not None and new_version not in (None, version):
                # some servers ignore if-range
                raise RetryableError("the file has changed meanwhile", from_start=True)
            if start:  # partial answers may omit the version
                new_version = new_version or version
            yield Answer(start, size_bytes, new_version or None, _read_pieces(response))
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema):
        raise DownloadRejected("it is not a valid address") from None
    # messages do not include the error's text, which may contain the address
    except requests.RequestException as error:
        raise RetryableError(f"the connection broke ({type(error).__name__})") from None
    # errors that requests does not convert: redirects without an address, chunks of negative length
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        raise RetryableError(f"the answer is malformed ({type(error).__name__})") from None


def _read_version(response: "requests.Response") -> str | None:
    """Return a file's strong ETag, else its Last-Modified date; None if the response has neither."""
    etag = response.headers.get("etag", "")
    # a weak ETag does not guarantee equal bytes
    return etag if etag.startswith('"') else response.headers.get("last-modified")


def _read_size(response: "requests.Response", start: int) -> int | None:
    """Return the size of the whole file, given a response with its bytes from `start` on; None if unknown."""
    if response.headers.get("content-encoding"):  # the stated length is the compressed one
        return None
    length = _read_number(response, "content-length")
    return None if length is None else start + length


def _read_pieces(answer: "requests.Response") -> Iterator[bytes]:
    """Yield the data of an HTTP response as soon as they arrive."""
    # `iter_content` waits for a full chunk, which takes hours if a byte arrives every five seconds.
    read = getattr(answer.raw, "read1", None)  # urllib3 has it since 2.1
    if read is None:
        yield from answer.iter_content(PIECE)
        return
    while piece := read(PIECE, decode_content=True):
        yield piece


def _check_answer(address: str, answer: "requests.Response") -> None:
    """Raise RetryableError if a new attempt may succeed, DownloadRejected if the response is not the file."""
    code = answer.status_code
    hops = [response.url.lower() for response in (*answer.history, answer)]
    if get_scheme(address) == "https" and not all(url.startswith("https:") for url in hops):
        raise DownloadRejected("the site redirects to an address without encryption")
    if code in RETRY_STATUS_CODES or code >= 500:
        raise RetryableError(f"the site answers {code}", _read_number(answer, "retry-after") or 0.0)
    if code == 416:  # range not satisfiable: the site's file is now shorter than the part on this disk
        raise RetryableError("the site cannot continue the file", from_start=True)
    if code not in (200, 206):
        meaning = {401: ": a password is needed", 403: ": not allowed", 404: ": not found"}
        raise DownloadRejected(f"the site answers {code}{meaning.get(code, '')}", code)
    if answer.headers.get("content-encoding", "").strip().lower() not in ACCEPTED_ENCODINGS:
        raise DownloadRejected("the site uses a content encoding that was not requested")


def _find_first_byte(answer: "requests.Response", have: int) -> int:
    """Return the offset in the file at which a response's data begin: `have` (bytes downloaded before) or 0.

    Raises:
        DownloadRejected: If they begin elsewhere.
    """
    if answer.status_code != 206:  # partial content; another answer is the whole file
        return 0
    sent = answer.headers.get("content-range", "")
    if sent.startswith(f"bytes {have}-"):
        return have
    match = re.fullmatch(r"bytes 0-(\d{1,15})/(\d{1,15})", sent, re.ASCII)
    if match and int(match[1]) + 1 == int(match[2]):  # an unrequested range
        return 0
    raise DownloadRejected(f"requested from byte {have} on, the site sends {shorten(sent, 60)!r}")


def _read_number(answer: "requests.Response", name: str) -> int | None:
    text = answer.headers.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else None
