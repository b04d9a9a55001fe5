"""Write files atomically: to a temporary name in the same folder, flushed to disk, then renamed.

Temporary names, `.NAME.MARK.tmp`, name their writer. A mark has the machine, the process and a random number,
in hexadecimal. So the leftover of a killed process is recognized at once on its own machine, and a file that
another process is writing is never taken for one. On other machines that share the folder only the file's age
tells. Locks are not used: they do not work on all network folders.
"""

import contextlib
import errno
import functools
import math
import os
import platform
import re
import secrets
import shutil
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from modules.errors import OutputError
from modules.run_limits import reject_writing
from modules.text_files import real_path

LEFTOVER_SECONDS = 3600.0  # older temporary files are leftovers: a writer changes its file more often
SPARE_BYTES = 1 << 20  # what a volume needs beyond the data itself: header, directory entries
if sys.platform != "win32":
    replace_file = os.replace
else:
    from modules.open_files import replace_file as replace_file


@contextlib.contextmanager
def atomic_path(path: Path, size_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary path next to `path`; if the block succeeds, flush it to disk and rename it to `path`.

    The temporary name ends in `.tmp`, so that no pattern for finished files matches it. Old leftovers of
    killed runs are removed. `size_bytes` is the size of the full file, which is compared with the free space
    first.

    Raises:
        OutputError: If the folder cannot be written or the disk is full; an existing file then stays
            unchanged.
    """
    reject_writing(path)
    with explain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers_once(path.parent)
        check_space(path, size_bytes)
        temporary = temporary_name(path)
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            replace_file(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder next to `path`; if the block succeeds, rename it to `path`.

    An existing folder is moved aside and deleted last; `recover_folder` restores it if the process is killed
    between the two renames.

    Raises:
        OutputError: If the folder cannot be written.
    """
    reject_writing(path)
    with explain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(path)
        temporary = temporary_name(path)
        temporary.mkdir()
        try:
            yield temporary
            for path_written in temporary.rglob("*"):
                if path_written.is_file():
                    with path_written.open("rb+") as file:
                        os.fsync(file.fileno())
            flush_folder(temporary)
            aside = path.with_name(f".{path.name}.old")  # the name that `recover_folder` looks for
            if path.exists():
                replace_file(path, aside)
            replace_file(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            recover_folder(path)
            raise
        flush_folder(path.parent)
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def atomic_files(path: Path, size_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty temporary folder for files that belong together.

    If the block succeeds, move these files into the parent folder of `path`, in the order of their names, so
    that none appears before all are written. Existing files are never replaced. `size_bytes` is the total
    size of the files; it is compared with the free space first.

    Raises:
        OutputError: If the files cannot be written or one of their names is taken.
    """
    reject_writing(path)
    with explain_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers_once(path.parent)
        check_space(path, size_bytes)
        temporary = temporary_name(path)
        temporary.mkdir()
        try:
            yield temporary
            for file in sorted(temporary.iterdir()):
                place_new(file, path.parent / file.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        flush_folder(path.parent)


def place_new(file: Path, path: Path) -> None:
    """Move a finished file to an unused name on the same volume; other processes may want that name too.

    Raises:
        FileExistsError: If the name is taken by then.
        OSError: If the file cannot be moved.
    """
    if os.name == "nt":
        os.rename(file, path)  # on Windows this fails if the name is taken  # noqa: PTH104
        return
    try:
        os.link(file, path)  # noqa: PTH200
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.EXDEV):
            raise
        # the disk has no hard links (exFAT, some network drives): claim the name with an empty file
        path.open("xb").close()
        try:
            replace_file(file, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return
    file.unlink()


def make_folder(folder: Path, option: str) -> None:
    """Create an output folder before the work begins.

    Raises OutputError, with `option` in the message, if nothing can be written to the folder.
    """
    reject_writing(folder / "file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{option} {folder} cannot be created: {error.strerror}. Choose another folder."
        ) from error
    try:
        # not `tempfile`: it retries forever when Windows denies access
        trial = folder / f".trial.{secrets.token_hex(4)}.tmp"
        trial.touch(exist_ok=False)  # permissions are not enough: the disk may be read-only
        trial.unlink()
    except OSError as error:
        raise OutputError(
            f"{option} {folder}: nothing can be written there: {error.strerror}. Choose another folder."
        ) from error


@contextlib.contextmanager
def claim_name(path: Path) -> Iterator[bool]:
    """Claim the name `path` for the block; yields False if another block, in any process, has claimed it.

    The claim is a hidden file that contains the id of its process, so that `remove_leftovers` also removes
    the claim of a killed run.

    Raises:
        OutputError: If the file cannot be created.
    """
    # a name that no temporary file or folder of `path` has
    claim = path.with_name(f".{path.name}{_CLAIMED}")
    with explain_errors(path):
        try:
            claim.touch(exist_ok=False)
            has_claimed = True
        except FileExistsError:
            has_claimed = False
    try:
        if has_claimed:
            with explain_errors(path):
                claim.write_text(_make_writer_id(), encoding="ascii")
        yield has_claimed
    finally:
        if has_claimed:
            claim.unlink(missing_ok=True)


def recover_folder(path: Path) -> None:
    """Restore a folder if `atomic_folder` was killed between its two renames; remove partial folders."""
    aside = path.with_name(f".{path.name}.old")
    if aside.exists():
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            replace_file(aside, path)
    if path.parent.is_dir():
        remove_leftovers(path.parent, lambda name: name == path.name, 0)


def remove_leftovers(
    folder: Path,
    is_removable: Callable[[str], bool] = lambda name: True,
    older_seconds: float = LEFTOVER_SECONDS,
) -> None:
    """Remove temporary files and folders of killed runs, and old ones even if their process seems to run.

    `is_removable` takes the final name of a temporary file and returns whether it may be removed. If its name
    does not show whether the process that wrote it still runs, the file must have been unchanged for
    `older_seconds`. Machines that share the folder need clocks that agree to within an hour.
    """
    now = time.time()
    with os.scandir(folder) as entries:
        for entry in entries:
            temporary = _TEMPORARY.fullmatch(entry.name)
            if temporary is None or not is_removable(temporary["name"]):
                continue
            with contextlib.suppress(OSError):  # another process removed it, or has it open on Windows
                # the time of a folder changes when a file is added to it or removed from it
                changed = entry.stat(follow_symlinks=False).st_mtime
                owner = _read_claim(entry) or temporary  # both name the machine and the process
                if changed > now - _find_min_age(owner, older_seconds):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    Path(entry.path).unlink()


def _read_claim(entry: os.DirEntry[str]) -> re.Match[str] | None:
    """Match a claim file whose content is a process id; None for any other file, or if it is unreadable."""
    if not entry.name.endswith(_CLAIMED) or not entry.is_file(follow_symlinks=False):
        return None
    try:
        with Path(entry.path).open(encoding="ascii", errors="replace") as file:
            return _WRITER_ID.fullmatch(file.read(100))
    except OSError:
        return None


# once per run and folder: listing a large cache takes longer than one write
_remove_leftovers_once = lru_cache(maxsize=64)(remove_leftovers)


def give_name(file: Path, path: Path) -> None:
    """Rename a finished file to `path` in the same folder, replacing an existing file.

    Raises:
        OutputError: If it cannot be renamed.
    """
    with explain_errors(path):
        replace_file(file, path)
        flush_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically.

    Raises:
        OutputError: If the file cannot be written.
    """
    with atomic_path(path, len(data)) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` atomically.

    Raises:
        OutputError: If the file cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def append_text(path: Path, text: str) -> None:
    """Append `text` as UTF-8; if the process is killed while writing, the last line may be incomplete.

    Raises:
        OutputError: If the file cannot be written.
    """
    reject_writing(real_path(path))  # a link of this name is followed
    with explain_errors(path), path.open("ab") as file:
        file.write(text.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())


def replace_surrogates(text: str) -> str:
    r"""Return the text as valid UTF-8, for metadata: undecodable bytes of file names become `\udce9`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def free_bytes(folder: Path) -> int:
    """Return the free bytes on a folder's volume; the folder may not exist yet."""
    resolved = real_path(folder)
    return shutil.disk_usage(next(path for path in (resolved, *resolved.parents) if path.exists())).free


def check_space(path: Path, size_bytes: int) -> None:
    """Raise OutputError if the volume of `path` lacks space for `size_bytes`."""
    free = free_bytes(path.parent)
    if size_bytes and free < size_bytes + SPARE_BYTES:
        raise OutputError(
            f"{path}: the disk has {free / 1e6:,.1f} MB free and this takes {size_bytes / 1e6:,.1f} MB, with"
            f" {SPARE_BYTES / 1e6:.1f} MB to spare. Free some space and run again."
        )


def flush_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that the names of new files in it survive a power cut."""
    if os.name == "nt":  # Windows cannot open a folder; NTFS orders the rename itself
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def explain_errors(path: Path) -> Iterator[None]:
    """Convert an OSError while writing `path` to an OutputError with a remedy."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if is_full else error.strerror or str(error)
        remedy = "Choose another folder, and run again"
        if is_full:
            remedy = "Free some space or choose another folder, and run again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = f"Choose another folder, or make {path.parent} one that you may write in, and run again"
        raise OutputError(
            f"{path} cannot be written: {reason}. No partial file was kept. {remedy}."
        ) from error


# earlier versions used eight random digits, which do not identify the writer
_WRITER_ID = re.compile(r"[0-9a-f]{8}|(?P<machine>[0-9a-f]{8})(?P<process>[0-9a-f]{6})[0-9a-f]{4}")
_TEMPORARY = re.compile(rf"\.(?P<name>.+)\.(?:{_WRITER_ID.pattern})\.tmp")
_CLAIMED = f".claim.{'0' * 8}.tmp"  # the end of a claim's name, which is the same for all processes
_PROC = Path("/proc")


def temporary_name(path: Path) -> Path:
    """Return the path of the file that this process writes before it is renamed to `path`."""
    return path.with_name(f".{path.name}.{_make_writer_id()}.tmp")


def _make_writer_id() -> str:
    return f"{identify_machine():08x}{os.getpid() & 0xFFFFFF:06x}{secrets.token_hex(2)}"


def _find_min_age(owner: re.Match[str], older_seconds: float) -> float:
    """Return how many seconds a leftover must be unchanged before it may be removed."""
    # `owner` is the match of the writing process in the file's name. The result is -inf if that process has
    # ended, and `older_seconds` if it ran on another or an unknown machine.
    is_from_this_machine = owner["machine"] is not None and int(owner["machine"], 16) == identify_machine()
    if not is_from_this_machine or os.name == "nt":  # on Windows, os.kill would end the process
        return older_seconds
    try:
        os.kill(int(owner["process"], 16), 0)
    except ProcessLookupError:
        return -math.inf  # independent of the clock of the folder's machine
    except OSError:  # the process belongs to another user
        pass
    # another process may have the number now, so the age matters for living processes too
    return LEFTOVER_SECONDS


@functools.cache
def identify_machine() -> int:
    """Return a number that differs between machines, reboots and containers."""
    words = [platform.node()]
    try:
        words.append((_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii"))
        words.append(str((_PROC / "self/ns/pid").stat().st_ino))
    except OSError:
        words.append(str(uuid.getnode()))
    return zlib.crc32("\n".join(words).encode())
