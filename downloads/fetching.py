"""Download what a task needs: continue parts, compare size, checksum and kind, then give files their names.

huggingface_hub's own function starts again after an interruption, so the data are read by
`modules/downloading.py`.
"""

import contextlib
import glob
import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from downloads.catalogue import ReleasedFile
from downloads.hubs import RemoteFile, explain_status, find_file
from downloads.listing import describe_licenses, gigabytes, print_lines
from downloads.naming import DownloadOptions
from modules.atomic_write import give_name, make_folder
from modules.downloading import PIECE, Answer, DownloadRejected, RetryableError, ask_http, receive
from modules.errors import CheckpointError, DownloadError, OutputError
from modules.file_locks import only_one
from modules.limits import MAX_TOKENIZER_BYTES
from modules.progress import ProgressFile
from modules.text_files import parse_json, read_content, read_text, real_path

logger = logging.getLogger(__name__)

TRIES = 6  # attempts in a row that bring nothing, after which a download fails
FIRST_WAIT = 1.0  # seconds between the first two attempts
SPARE_BYTES = 1 << 30  # of the disk that stay free for other programs
_SENTENCEPIECE_START = b"\x0a"  # a SentencePiece model begins with the tag of its first piece


def run_download(options: DownloadOptions) -> None:
    """Download the files of a task and print its commands.

    Raises:
        DownloadError: If a file cannot be downloaded.
        OutputError: If a file cannot be stored.
    """
    [model] = options.sets()  # several only for --list
    print_lines(describe_licenses(model))  # first, because a site may ask for their acceptance
    files = [file for component in model.components for file in component.files]
    downloads = [_plan_download(file, options) for file in files]
    missing = [download for download in downloads if download is not None]  # others exist already
    if missing:
        make_folder(options.to, "--to")
        _require_space(missing, options.to)
    # Download files one after another, and record the progress of all of them
    progress = DownloadProgress(total=sum(remote.size_bytes for remote, _ in missing))
    for remote, target in missing:
        logger.info("%s (%s) from %s", target, gigabytes(remote.size_bytes), remote.page)
        try:
            download_file(remote, target, note=progress.note)
        except OSError as error:
            raise OutputError(
                f"{target} cannot be written: {error.strerror or error}. Choose another --to."
            ) from error
    logger.info("%d files are complete in %s", len(files), options.to)
    lines = ["", "These commands use the files:"]
    for command in model.typed_commands(options.to):
        lines += ["", command]
    print_lines(lines)


@dataclass
class DownloadProgress:
    """Record how many bytes of all files of a download have arrived."""

    total: int
    complete: int = 0  # bytes of the files that have arrived completely
    _file: ProgressFile = field(default_factory=ProgressFile)

    def note(self, have: int, size_bytes: int) -> None:
        """Record the progress of the current file: `have` of its `size_bytes` bytes have arrived."""
        self._file.note(self.complete + have, self.total, "B")
        if have == size_bytes:
            self.complete += size_bytes


class PlannedDownload(NamedTuple):
    """A file on a download site, and the path to store it at."""

    remote: RemoteFile
    target: Path


def _require_space(planned: Sequence[PlannedDownload], folder: Path) -> None:
    """Raise OutputError if the disk of a folder has too little free space for the remaining downloads."""
    missing = 0
    for remote, target in planned:
        missing += remote.size_bytes
        part = partial_path(remote, target)
        if part.exists():
            missing -= part.stat().st_size
    free = shutil.disk_usage(folder).free
    if free < missing + SPARE_BYTES:
        raise OutputError(
            f"--to {folder}: {gigabytes(missing)} are to be downloaded and {gigabytes(free)} are "
            "free. Free some space, or choose a folder on another disk."
        )


def _plan_download(file: ReleasedFile, options: DownloadOptions) -> PlannedDownload | None:
    """Return the download of a file; None if the file exists and is complete."""
    target = options.to / file.name
    if not real_path(target.parent).is_relative_to(real_path(options.to)):
        raise OutputError(
            f"{target.parent} is a link that leads out of {options.to}. Download to another folder with "
            "--to, and move the files."
        )
    if target.is_dir():
        raise OutputError(f"{target} is a folder. Move it away, or choose another --to.")
    exists = target.is_file()
    if exists and not options.verify and file.size_bytes == target.stat().st_size:
        logger.info("%s exists and is complete", target)
        return None
    remote = find_file(file, options.source)
    if not options.accept_changed:
        # `remote` with the size and checksums that the catalogue records for `file`
        has_other_size = file.size_bytes not in (None, remote.size_bytes)
        has_other_content = file.sha256 is not None and remote.sha256 not in (None, file.sha256)
        if has_other_size or has_other_content:
            raise DownloadError(
                f"{remote.page} has another {file.file} than the one known to this program (size or "
                "SHA-256).\n"
                "  If the page says that it was replaced, add --accept_changed."
            )
        remote = replace(remote, sha256=file.sha256 or remote.sha256)
    if not exists:
        return PlannedDownload(remote, target)
    # without --verify only the size is compared
    expected_file = remote if options.verify else replace(remote, sha256=None, git_sha1=None)
    damage = find_damage(target, expected_file)
    if damage is not None:
        raise OutputError(
            f"{target} exists, but is a different file or damaged: {damage}.\n  Move it away and run again, "
            "or choose another --to."
        )
    logger.info("%s exists and is complete%s", target, ", SHA-256 compared" if options.verify else "")
    return None


# --- one file
# ------------------------------------------------------------------------------------------------------------


def download_file(
    remote: RemoteFile,
    target: Path,
    wait: Callable[[float], None] = time.sleep,
    note: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Download `remote` to `target`; do nothing if another run has just done it.

    A partial download is kept in a hidden file next to the target, and a later call continues it. The target
    appears once size, checksum and kind of file are verified.

    Args:
        remote: File to download.
        target: Path to store it at.
        wait: Waits for a number of seconds before a new attempt.
        note: Called with the number of bytes received and the size of the file.

    Raises:
        DownloadError: If the connection stays broken, if the data arrive damaged twice, or if the content
            does not match the suffix.
        OutputError: If the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name}.lock")
    with contextlib.ExitStack() as lock_stack:
        try:
            lock_stack.enter_context(only_one(lock, waits=False))
        except BlockingIOError:
            logger.info("%s: another run is downloading it. Waiting for it to finish ...", target.name)
            lock_stack.enter_context(only_one(lock))
        if target.is_file() and target.stat().st_size == remote.size_bytes:
            return
        partial = partial_path(remote, target)
        _receive_undamaged(remote, partial, wait, note)
        error = find_content_error(partial, target.name)
        if error is not None:
            partial.unlink()
            raise DownloadError(
                f"{remote.page}: the data it sends as {target.name} are something else: {error}. Nothing was "
                "kept. Look at that page, or try --source or another mirror."
            )
        give_name(partial, target)
        # partial downloads of other versions are no longer useful
        for old_partial in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
            old_partial.unlink(missing_ok=True)


def _receive_undamaged(
    remote: RemoteFile, partial: Path, wait: Callable[[float], None], note: Callable[[int, int], None]
) -> None:
    """Download the missing part of a file; if its checksum is wrong, download all of it once more."""
    name = _display_name(partial)
    for is_last in (False, True):
        _receive_remaining(remote, partial, wait, note)
        damage = find_damage(partial, remote)
        if damage is None:
            return
        partial.unlink()
        if is_last:
            raise DownloadError(
                f"{remote.page}: {name} arrived damaged twice: {damage}. Nothing was kept. Try another "
                "connection, or --source."
            )
        logger.warning("%s arrived damaged: %s. It is downloaded again.", name, damage)


def partial_path(remote: RemoteFile, target: Path) -> Path:
    """Return the path of an unfinished download; each version of the file has its own."""
    version = remote.sha256 or remote.git_sha1 or f"{remote.size_bytes:x}"
    return target.with_name(f".{target.name}.{version[:12]}.part")


def _display_name(path: Path) -> str:
    """Return the final file name of a partial download."""
    return path.name[1:].rsplit(".", 2)[0] if path.suffix == ".part" else path.name


def find_damage(path: Path, remote: RemoteFile) -> str | None:
    """Describe the damage of a downloaded file; None if its size and, if known, its checksum are right."""
    size = path.stat().st_size
    if size != remote.size_bytes:
        return f"it has {size:,} bytes instead of {remote.size_bytes:,}"
    expected_checksum = remote.sha256 or remote.git_sha1
    if expected_checksum is None:
        return None
    if remote.sha256 is not None:
        algorithm = "SHA-256"
        digest = hashlib.sha256()
    else:
        algorithm = "SHA-1"
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)  # as git computes it
    with path.open("rb") as file, _make_bar(f"check {_display_name(path)}", size) as bar:
        while piece := file.read(PIECE):
            digest.update(piece)
            bar.update(len(piece))
    checksum = digest.hexdigest()
    if checksum == expected_checksum:
        return None
    return f"its {algorithm} is {checksum[:12]}..., not {expected_checksum[:12]}..."


def find_content_error(path: Path, name: str) -> str | None:
    """Return the reason why a file's content does not match the suffix of `name`; None if it does.

    Reads headers only, and torch files without running their code. Unknown suffixes are not checked.
    """
    try:
        # Why a file is not of a kind, such as "safetensors", or None; errors of readers are passed on
        kind = name.rpartition(".")[2]
        from checkpoints.containers import PICKLE, ZIP  # torch loads here
        from checkpoints.first_bytes import ONNX
        from checkpoints.opening import open_file
        from checkpoints.tokenizers import check_sentencepiece

        if kind in ("safetensors", "pt", "pth"):
            opened = open_file(path)
            opened.close()
            if kind == "safetensors" and not opened.tensors:
                return "it contains no tensors"
        with path.open("rb") as file:
            start = file.read(16)
        match kind:
            # a safetensors file begins with the size of its header in 8 bytes, followed by the header as JSON
            case "safetensors" if start[8:9] != b"{":
                return "it is a PyTorch file, not a safetensors file"
            case "pt" | "pth" if start[:4] != ZIP and start[:1] != PICKLE:
                return "it is not a PyTorch file"
            case "onnx" if not ONNX.match(start):
                return "it is not an ONNX file"
            case "json" if not isinstance(parse_json(read_text(path, MAX_TOKENIZER_BYTES)), dict):
                return "it is not a JSON object"
            case "model":
                if not start.startswith(_SENTENCEPIECE_START):
                    return "it is not a SentencePiece model"
                check_sentencepiece(read_content(path, MAX_TOKENIZER_BYTES))
        return None
    except (CheckpointError, OSError, ValueError) as error:
        # the message names the partial file, which nobody should use; only its description is taken
        return str(error).removeprefix(f"{path} ").partition(". ")[0].rstrip(".").splitlines()[0]


def _receive_remaining(
    remote: RemoteFile, partial: Path, wait: Callable[[float], None], note: Callable[[int, int], None]
) -> None:
    """Download the bytes that `partial` still lacks, in several tries if the connection breaks."""
    # `wait` and `note` are the arguments of `download_file`.
    name = _display_name(partial)
    num_bytes = partial.stat().st_size if partial.exists() else 0
    if num_bytes:
        logger.info("%s: continuing after %.1f GB", name, num_bytes / 1e9)
    try:
        _receive_with_bar(remote, partial, _make_bar(name, remote.size_bytes, num_bytes), wait, note)
    except DownloadRejected as rejection:
        if rejection.status is not None:
            raise explain_status(rejection.status, name, remote.page, bool(remote.headers)) from None
        raise DownloadError(
            f"{remote.page}: {rejection}. Try --source or another mirror. The data received so far are kept."
        ) from None
    except RetryableError as error:
        raise DownloadError(
            f"{remote.page}: the connection broke {TRIES} times with little new data ({error}).\n"
            f"  {gigabytes(partial.stat().st_size)} are kept: run the same command again to continue."
        ) from None
    except OSError as error:
        raise OutputError(
            f"{partial.parent}: {error.strerror or error}. The data received so far are kept: free some "
            "space and run the same command again."
        ) from error


def _receive_with_bar(
    remote: RemoteFile,
    partial: Path,
    bar: "tqdm[Any]",
    wait: Callable[[float], None],
    note: Callable[[int, int], None],
) -> None:
    """Append the missing bytes to `partial`; report the progress to the progress bar and to `note`."""

    def request(start: int, _: str | None) -> AbstractContextManager[Answer]:
        # the version tag is not compared: a site's servers may have different ones for equal files
        return ask_http(remote.url, start, None, remote.headers)

    def show(num_bytes: int) -> None:
        bar.update(num_bytes - bar.n)
        note(num_bytes, remote.size_bytes)

    with bar:
        receive(
            request,
            partial,
            tries=TRIES,
            wait=wait,
            first_wait=FIRST_WAIT,
            max_bytes=remote.size_bytes,
            size_bytes=remote.size_bytes,
            progress=show,
        )


def _make_bar(name: str, total: int, done: int = 0) -> "tqdm[Any]":
    """Return a progress bar that counts bytes; without a terminal it prints nothing."""
    return tqdm(
        total=total, initial=done, desc=name[:50], unit="B", unit_scale=True, disable=None, mininterval=0.5
    )
