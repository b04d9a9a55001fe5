"""Download a file: continue a part, compare size and checksum, then give it its name.

huggingface_hub's own function starts again after an interruption, so the data are read here.
"""

import contextlib
import glob
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests
from filelock import FileLock, Timeout
from tqdm import tqdm

from downloads.hubs import TIMEOUTS, RemoteFile, explain_status
from modules.atomic_write import give_name
from modules.control_codes import shorten
from modules.errors import DownloadError, OutputError

logger = logging.getLogger(__name__)

PIECE = 1 << 16  # bytes; a broken connection loses the last one
TRIES = 6  # in a row that bring nothing
LONGEST_WAIT = 30.0  # seconds between two


def download_file(remote: RemoteFile, target: Path, wait: Callable[[float], None] = time.sleep) -> None:
    """Download `remote` to `target`; do nothing if another run has just done it.

    A part that has arrived is kept beside the target in a hidden file, and a later call continues it. The
    target appears when size, checksum and kind are right. wait: called with seconds before a new attempt.
    Raises DownloadError if the connection stays broken, if the data are damaged twice, or if they are not of
    the kind that the name promises; OutputError if the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _only_one_run(target):
        if target.is_file() and target.stat().st_size == remote.size_bytes:
            return
        partial = partial_path(remote, target)
        for is_last in (False, True):
            _receive_all(remote, partial, wait)
            damage = find_damage(partial, remote)
            if damage is None:
                break
            partial.unlink()
            if is_last:
                raise DownloadError(
                    f"{remote.page}: {target.name} arrived damaged twice: {damage}. Nothing was kept. Try "
                    "another connection, or --source."
                )
            logger.warning("%s arrived damaged: %s. It is downloaded again.", target.name, damage)
        _check_kind(partial, target, remote)
        give_name(partial, target)
        for old in target.parent.glob(f".{glob.escape(target.name)}.*.part"):  # of other versions
            old.unlink(missing_ok=True)


def _check_kind(partial: Path, target: Path, remote: RemoteFile) -> None:
    """Raise DownloadError, and keep nothing, if a file does not fit its name."""
    from downloads.kinds import find_other_kind  # torch loads here, when there is something to look at

    problem = find_other_kind(partial, target.name)
    if problem is not None:
        partial.unlink()
        raise DownloadError(
            f"{remote.page}: what it sends as {target.name} is something else: {problem}. Nothing was kept. "
            "Look at that page, or try --source or another mirror."
        )


def partial_path(remote: RemoteFile, target: Path) -> Path:
    """Return where the data of an unfinished download are; other versions of the file have another place."""
    version = remote.sha256 or remote.git_sha1 or f"{remote.size_bytes:x}"
    return target.with_name(f".{target.name}.{version[:12]}.part")


def _shown(path: Path) -> str:
    """Return the name of the file that a partial one is for, or the name itself."""
    return path.name[1:].rsplit(".", 2)[0] if path.suffix == ".part" else path.name


def find_damage(path: Path, remote: RemoteFile) -> str | None:
    """Return the damage of a downloaded file, or None. Reads the whole file if there is a checksum."""
    size = path.stat().st_size
    if size != remote.size_bytes:
        return f"it has {size:,} bytes instead of {remote.size_bytes:,}"
    if remote.sha256 is not None:
        found = _hash_file(path, hashlib.sha256())
        return (
            None if found == remote.sha256 else f"its SHA-256 is {found[:12]}..., not {remote.sha256[:12]}..."
        )
    if remote.git_sha1 is not None:
        start = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        found = _hash_file(path, start)
        return (
            None
            if found == remote.git_sha1
            else f"its SHA-1 is {found[:12]}..., not {remote.git_sha1[:12]}..."
        )
    return None


def _hash_file(path: Path, digest: Any) -> str:
    with path.open("rb") as file, _bar(f"check {_shown(path)}", path.stat().st_size) as bar:
        while piece := file.read(PIECE):
            digest.update(piece)
            bar.update(len(piece))
    return str(digest.hexdigest())


@contextlib.contextmanager
def _only_one_run(target: Path) -> Iterator[None]:
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("%s: another run downloads it. Waiting for it to end ...", target.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
        if target.is_file():  # a run that waits for this lock finds the target and ends: nobody else needs it
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink(missing_ok=True)


def _receive_all(remote: RemoteFile, partial: Path, wait: Callable[[float], None]) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    if have:
        logger.info("%s: continuing after %.1f GB", _shown(partial), have / 1e9)
    failures, most = 0, have
    with _bar(_shown(partial), remote.size_bytes, have) as bar:
        partial.touch()  # also of an empty file
        while (have := partial.stat().st_size) < remote.size_bytes:
            problem = _try_to_receive(remote, partial, have, bar)
            # what is sent again is not new, nor are a few bytes: a site could go on so without end
            is_new = partial.stat().st_size >= min(most + PIECE, remote.size_bytes)
            failures, most = (0, partial.stat().st_size) if is_new else (failures + 1, most)
            if failures == TRIES:
                raise DownloadError(
                    f"{remote.page}: the connection broke {TRIES} times with little new data ({problem}).\n"
                    f"  {partial.stat().st_size / 1e9:.1f} GB are kept: run the same command again to go on."
                )
            if partial.stat().st_size < remote.size_bytes:
                wait(min(2.0**failures, LONGEST_WAIT))


def _try_to_receive(remote: RemoteFile, partial: Path, have: int, bar: Any) -> str:
    """Append a request's bytes; return why it ended early, if it did."""
    headers = {**remote.headers, "accept-encoding": "identity"}
    if have:
        headers["range"] = f"bytes={have}-"
    try:
        with requests.get(remote.url, headers=headers, stream=True, timeout=TIMEOUTS) as answer:
            if answer.status_code == 416:  # the file there is shorter than what is here
                _write(partial, 0, iter(()), remote.size_bytes, bar)
                return "the site cannot continue the file"
            if answer.status_code == 429 or answer.status_code >= 500:
                return f"the site answers {answer.status_code}"
            if not answer.ok:
                raise explain_status(answer.status_code, _shown(partial), remote.page, bool(remote.headers))
            start = _first_byte(answer, have, remote)
            _write(partial, start, answer.iter_content(PIECE), remote.size_bytes, bar)
    except requests.RequestException as error:
        return type(error).__name__
    except OSError as error:
        raise OutputError(
            f"{partial.parent}: {error.strerror or error}. What has arrived is kept: free some space and run "
            "the same command again."
        ) from error
    return "the answer was too short"


def _first_byte(answer: requests.Response, have: int, remote: RemoteFile) -> int:
    """Return where an answer's data begin: behind the `have` bytes that are here, or at 0.

    Raises DownloadError if the site sends another part of the file than it was asked for.
    """
    if answer.status_code != 206:
        return 0
    sent = answer.headers.get("content-range", "")
    if sent.startswith(f"bytes {have}-"):
        return have
    if sent.startswith(f"bytes 0-{remote.size_bytes - 1}/"):  # the whole file, not asked for
        return 0
    raise DownloadError(
        f"{remote.page}: asked for a file from byte {have} on, the site sends {shorten(sent, 60)!r}. Try "
        "--source or another mirror. What has arrived is kept."
    )


def _write(partial: Path, start: int, pieces: Iterator[bytes], most: int, bar: Any) -> None:
    """Write pieces at `start`; ends behind `most` bytes, which no right answer has."""
    with partial.open("r+b") as file:
        file.truncate(start)
        file.seek(start)
        bar.n = start
        bar.refresh()
        try:
            for piece in pieces:
                file.write(piece)
                bar.update(len(piece))
                if file.tell() > most:
                    break
        finally:
            file.flush()
            os.fsync(file.fileno())


def _bar(name: str, total: int, done: int = 0) -> "tqdm[Any]":
    return tqdm(
        total=total, initial=done, desc=name[:50], unit="B", unit_scale=True, disable=None, mininterval=0.5
    )
