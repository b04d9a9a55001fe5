"""Download a file: continue a part, compare size, checksum and kind, then give it its name.

huggingface_hub's own function starts again after an interruption, so the data are read by
`modules/downloading.py`.
"""

import contextlib
import glob
import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from downloads.hubs import RemoteFile, explain_status
from modules.atomic_write import give_name
from modules.downloading import PIECE, Answer, BrokenTry, RefusedBySite, ask_http, receive
from modules.errors import CheckpointError, DownloadError, OutputError
from modules.file_locks import only_one
from modules.limits import MAX_TOKENIZER_BYTES
from modules.text_files import parse_json, read_content, read_text

logger = logging.getLogger(__name__)

TRIES = 6  # in a row that bring nothing
FIRST_WAIT = 1.0  # seconds between the first two
_PIECES = b"\x0a"  # a SentencePiece model begins with its first piece


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
            _receive(remote, partial, wait)
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
        problem = find_other_kind(partial, target.name)
        if problem is not None:
            partial.unlink()
            raise DownloadError(
                f"{remote.page}: what it sends as {target.name} is something else: {problem}. Nothing was "
                "kept. Look at that page, or try --source or another mirror."
            )
        give_name(partial, target)
        for old in target.parent.glob(f".{glob.escape(target.name)}.*.part"):  # of other versions
            old.unlink(missing_ok=True)


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
    wanted = remote.sha256 or remote.git_sha1
    if wanted is None:
        return None
    of_git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    name, digest = ("SHA-1", of_git) if remote.sha256 is None else ("SHA-256", hashlib.sha256())
    with path.open("rb") as file, _bar(f"check {_shown(path)}", size) as bar:
        while piece := file.read(PIECE):
            digest.update(piece)
            bar.update(len(piece))
    found = digest.hexdigest()
    return None if found == wanted else f"its {name} is {found[:12]}..., not {wanted[:12]}..."


def find_other_kind(path: Path, name: str) -> str | None:
    """Return why a file is not of the kind that the end of `name` promises, or None if it is.

    Headers are read, and files of torch without running code. Other kinds of names are not judged.
    """
    from modules.checkpoints.containers import ONNX, PICKLE, ZIP, open_file  # torch loads here
    from modules.checkpoints.tokenizers import check_sentencepiece

    kind = name.rpartition(".")[2]
    try:
        if kind in ("safetensors", "pt", "pth"):
            opened = open_file(path)
            opened.close()
            if kind == "safetensors" and not opened.tensors:
                return "it holds no tensors"
        with path.open("rb") as file:
            start = file.read(16)
        match kind:
            case "safetensors" if start[8:9] != b"{":
                return "it is a file of torch, not of safetensors"
            case "pt" | "pth" if start[:4] != ZIP and start[:1] != PICKLE:
                return "it is not a file of torch"
            case "onnx" if not ONNX.match(start):
                return "it is not an ONNX file"
            case "json" if not isinstance(parse_json(read_text(path, MAX_TOKENIZER_BYTES)), dict):
                return "it is not a JSON table"
            case "model":
                if not start.startswith(_PIECES):
                    return "it is not a SentencePiece model"
                check_sentencepiece(read_content(path, MAX_TOKENIZER_BYTES))
    except (CheckpointError, OSError, ValueError) as error:
        # the message names the file that nobody is to use; what it is comes first
        return str(error).removeprefix(f"{path} ").partition(". ")[0].rstrip(".").splitlines()[0]
    return None


@contextlib.contextmanager
def _only_one_run(target: Path) -> Iterator[None]:
    lock = target.with_name(f".{target.name}.lock")
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(only_one(lock, waits=False))
        except BlockingIOError:
            logger.info("%s: another run downloads it. Waiting for it to end ...", target.name)
            held.enter_context(only_one(lock))
        yield


def _receive(remote: RemoteFile, partial: Path, wait: Callable[[float], None]) -> None:
    name, have = _shown(partial), partial.stat().st_size if partial.exists() else 0
    if have:
        logger.info("%s: continuing after %.1f GB", name, have / 1e9)

    def ask(have: int, _: str | None) -> AbstractContextManager[Answer]:
        # the checksum says whether it is one version: servers of a site may name it differently
        return ask_http(remote.url, have, None, remote.headers)

    size = remote.size_bytes
    try:
        with _bar(name, size, have) as bar:
            receive(
                ask,
                partial,
                TRIES,
                wait,
                FIRST_WAIT,
                size,
                size,
                seen=lambda n: bar.update(n - bar.n),
            )
    except RefusedBySite as refused:
        if refused.status is not None:
            raise explain_status(refused.status, name, remote.page, bool(remote.headers)) from None
        raise DownloadError(
            f"{remote.page}: {refused}. Try --source or another mirror. What has arrived is kept."
        ) from None
    except BrokenTry as error:
        raise DownloadError(
            f"{remote.page}: the connection broke {TRIES} times with little new data ({error}).\n"
            f"  {partial.stat().st_size / 1e9:.1f} GB are kept: run the same command again to go on."
        ) from None
    except OSError as error:
        raise OutputError(
            f"{partial.parent}: {error.strerror or error}. What has arrived is kept: free some space and run "
            "the same command again."
        ) from error


def _bar(name: str, total: int, done: int = 0) -> "tqdm[Any]":
    return tqdm(
        total=total, initial=done, desc=name[:50], unit="B", unit_scale=True, disable=None, mininterval=0.5
    )
