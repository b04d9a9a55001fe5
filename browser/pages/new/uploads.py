"""Take dropped files into a folder below the roots: one at a time, checked by their content.

While a file arrives, it is written to a temporary folder next to its target, checked there, and then renamed,
so that an interrupted or rejected file leaves nothing behind. Its name is reserved meanwhile: if two files of
one name arrive at once, even at two servers, one is rejected.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from browser.core.responses import answer_json
from browser.core.short_names import number_names, short_digest
from browser.core.upload_stream import DECODING, write_arriving
from browser.folders.captions import MAX_BYTES as MAX_CAPTION_BYTES
from browser.folders.described_folder import FILES
from browser.folders.folders import CHECK_PAGE, find_folder, is_closed, read_media_folder
from browser.runs.runs import Runs
from modules.atomic_write import atomic_files, claim_name, explain_errors, free_bytes, remove_leftovers
from modules.console import format_size
from modules.control_codes import escape_control_codes
from modules.errors import MediaError, OptionError, OutputError, UserError
from modules.media.decoding import ANIMATION_SUFFIXES
from modules.media.opening import AUDIO_SUFFIXES
from modules.media.reading import IMAGE_SUFFIXES, VIDEO_SUFFIXES, first_frame, image_suffixes
from modules.media.remedies import find_remedy
from modules.media.samples import track_info
from modules.media.streams import source_info
from modules.output_files import fold_name, is_windows_device
from modules.pages.language import refusal, say
from modules.paths import complete_home
from modules.text_files import bad_character, read_content, real_path

ADDRESS = "/new/upload"
IMAGE, CLIP, SOUND, CAPTION = "picture", "clip", "sound", "caption"
CAPTION_SUFFIXES = frozenset({".txt", ".caption"})
MAX_DIGITS = 15  # maximum number of digits of a size
LONGEST_NAME = 200  # bytes; file systems allow 255, and a temporary name needs some of them
# characters not allowed in a file name: separators, drive letters, wildcards
FORBIDDEN = re.compile(r'[\\/:*?"<>|\x00-\x1f\x7f]')


@dataclass(frozen=True)
class UploadLimits:
    """Limits on the files that a user drops on a page to upload them."""

    file_bytes: int = 8 << 30
    folder_bytes: int = 200 << 30  # maximum size of all files of a folder together
    files: int = 20_000  # maximum number of files in a folder
    spare_bytes: int = 1 << 30  # left free on the disk


DEFAULT_LIMITS = UploadLimits()


class FileBusyError(OptionError):
    """Raised if another request is adding a file of the same name."""


@contextlib.contextmanager
def claim_file(folder: Path, name: str) -> Iterator[None]:
    """Reserve a file name in a folder while the `with` block runs, so that nothing else writes this file.

    A file whose name is a digest of the case-folded name serves as the lock. Raises FileBusyError if another
    request has reserved the name, OutputError if the folder cannot be written.
    """
    path = folder / short_digest(fold_name(name))
    with contextlib.ExitStack() as claims:
        for is_second_try in (False, True):
            folder.mkdir(parents=True, exist_ok=True)
            if claims.enter_context(claim_name(path)):
                break
            if is_second_try:
                raise FileBusyError(say("%(name)s is also being uploaded from another page", name=name))
            # a killed server may have left the lock file behind: remove it, and try once more
            remove_leftovers(folder, lambda claimed: claimed == f"{path.name}.claim")
        yield


def check_file_name(name: str) -> None:
    """Raise OptionError if a file or folder may not have this name."""
    forbidden = FORBIDDEN.search(name)
    reason = bad_character(name)
    if reason is None and escape_control_codes(name) != name:
        reason = say("a control code")
    if reason is None and forbidden is not None:
        reason = say("the character %(match)s", match=f"{forbidden[0]!r}")
    if reason is not None:
        raise refusal(
            "%(name)s contains %(reason)s: give the file a simpler name", name=f"{name!r}", reason=reason
        )
    if not name.strip() or name.startswith(".") or name != name.strip() or name.endswith("."):
        raise refusal(
            "%(name)s is empty, or begins or ends with a dot or a space: give the file a simpler name",
            name=f"{name!r}",
        )
    if len(name.encode()) > LONGEST_NAME:
        raise refusal(
            "%(name)s… has more than %(longest_name)s bytes: give it a shorter name",
            name=name[:40],
            longest_name=LONGEST_NAME,
        )
    if is_windows_device(name):
        raise refusal("%(name)s is the name of a device on Windows: give it another name", name=name)


def find_kind(name: str) -> str:
    """Return the kind of a file (clip, image, audio or caption) according to its name.

    Raises OptionError, with advice where possible, if the page does not accept such files.
    """
    suffix = Path(name).suffix.lower()
    if suffix in VIDEO_SUFFIXES:
        return CLIP
    if suffix in IMAGE_SUFFIXES | ANIMATION_SUFFIXES | image_suffixes():
        return IMAGE
    if suffix in AUDIO_SUFFIXES:
        return SOUND
    # prompts.txt, which `new` writes, ends in .txt too, but is not a caption
    if suffix in CAPTION_SUFFIXES and fold_name(name) not in FILES:
        return CAPTION
    remedy = find_remedy(suffix)
    if remedy is not None:
        raise refusal(
            "%(name)s: files of this kind are not read here. To use it, %(remedy)s", name=name, remedy=remedy
        )
    raise refusal(
        "%(name)s: only images, clips, audio files and captions in .txt files are accepted", name=name
    )


def check_content(path: Path, kind: str) -> None:
    """Raise UserError if the content of a file does not match its kind."""
    if kind == CAPTION:
        _check_caption(path)
        return
    with DECODING:
        if kind == IMAGE:
            first_frame(path)
        elif kind == CLIP:
            source_info(path)
        elif track_info(path) is None:
            raise MediaError(say("%(path)s has no sound", path=path))


def _check_caption(path: Path) -> None:
    """Raise OptionError if an uploaded file is not a caption: a short text in UTF-8."""
    try:
        text = read_content(path, MAX_CAPTION_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise refusal("%(path)s is not UTF-8: save it as UTF-8 text, then drop it again", path=path) from None
    except OSError:  # `read_content` raises it for larger files; this file was just written
        raise refusal(
            "%(path)s has more than %(most_caption_bytes)s KiB: it is not a caption",
            path=path,
            most_caption_bytes=MAX_CAPTION_BYTES >> 10,
        ) from None
    reason = bad_character(text)
    if reason is not None or "\0" in text:
        raise OptionError(f"{path} contains {reason or 'a null character'}: it is not text")


def name_upload_folder(top: Path, day: date) -> str:
    """Return an unused name for a new folder, made from the date: `2026-11-26`, `2026-11-26-2`."""
    return next(name for name in number_names(f"{day:%Y-%m-%d}") if not _has_files(top / name))


def answer_received(folder: Path) -> Response:
    """Return the response to a complete upload: the folder and its current content."""
    media_folder = read_media_folder(folder)
    words = "" if media_folder is None else media_folder.summary
    return answer_json({"folder": str(folder), "words": words})


def _has_files(folder: Path) -> bool:
    """Return whether a path exists and is not just a folder in which an upload has begun."""
    if folder.is_dir() and not folder.is_symlink():
        names = [path.name for path in folder.iterdir()]
        return not names or not all(name.startswith(".") for name in names)
    return folder.exists() or folder.is_symlink()


class FileUploads:
    """Receives files that a page uploads, checks them, and stores them in folders below the roots."""

    def __init__(self, runs: Runs, limits: UploadLimits = DEFAULT_LIMITS) -> None:
        self.runs = runs
        self.limits = limits

    async def take(self, request: Request) -> Response:
        """Receive one uploaded file: the body is its content, the query has `name` and the folder `into`."""
        name = request.query_params.get("name", "")
        try:
            size_text = request.headers.get("content-length", "")
            # the size is required to check the disk space before the upload
            if not (size_text.isascii() and size_text.isdecimal()) or len(size_text) > MAX_DIGITS:
                raise refusal("%(name)s was sent without its size, so there may be no room for it", name=name)
            size = int(size_text)
            folder = await run_in_threadpool(self.find_target, request.query_params.get("into", ""))
            await run_in_threadpool(self.check_upload, folder, name, size)
            await self.receive(request, folder / name, size)
        except (UserError, OSError) as error:
            return answer_json({"error": str(error)}, 422)
        return await run_in_threadpool(answer_received, folder)

    def find_target(self, into: str) -> Path:
        """Return the folder to which files are uploaded. `into` may name a new folder directly in a root.

        Raises OptionError if files may not be added to the folder.
        """
        folder = find_folder(self.runs, into)
        if folder is not None:
            if is_closed(self.runs, folder):
                raise refusal(
                    "%(folder)s is a folder that programs write into. Choose another one", folder=folder
                )
            return folder
        name = into.strip()
        typed_path = Path(complete_home(name))
        root = self.runs.root_folders[0]
        if typed_path.parent in self.runs.root_folders:  # an absolute path of a folder directly in a root
            root, name = typed_path.parent, typed_path.name
        check_file_name(name)
        path = real_path(root) / name
        if path.exists() or path.is_symlink():
            # an upload that began after the first look may have made it
            if find_folder(self.runs, into) is not None:
                return self.find_target(into)
            raise refusal("%(path)s is not inside the folders that are shown. Choose another name", path=path)
        if is_closed(self.runs, path):
            raise refusal(
                "%(name)s is the name of a folder that programs write into. Choose another one", name=name
            )
        return path

    def check_upload(self, folder: Path, name: str, size: int, arrived: int = 0) -> None:
        """Raise UserError if a file with this name and size is not accepted.

        `size` is in bytes; `arrived` is the number of bytes that are already in the folder.
        """
        check_file_name(name)
        find_kind(name)
        if fold_name(name) == CHECK_PAGE:
            raise refusal("%(name)s is written by a check. Give the file another name", name=name)
        limits = self.limits
        if size > limits.file_bytes:
            raise refusal(
                "%(name)s has more than %(file_bytes)s GiB, the largest size accepted",
                name=name,
                file_bytes=limits.file_bytes >> 30,
            )
        self._check_folder_limits(folder, name, size - arrived)
        self._check_free_space(folder, name, size - arrived)

    def _check_folder_limits(self, folder: Path, name: str, missing_bytes: int) -> None:
        """Raise OptionError if a folder contains a file with this name, or would exceed a limit."""
        limits = self.limits
        names, size_bytes = _measure(folder)
        reject_existing(name, names)
        if len(names) >= limits.files:
            raise refusal(
                "%(folder)s already has %(files)s files. Put this file into another folder",
                folder=folder,
                files=f"{limits.files:,}",
            )
        if size_bytes + missing_bytes > limits.folder_bytes:
            raise refusal(
                "%(folder)s would have more than %(folder_bytes)s GiB",
                folder=folder,
                folder_bytes=limits.folder_bytes >> 30,
            )

    def _check_free_space(self, folder: Path, name: str, missing_bytes: int) -> None:
        """Raise OutputError if the disk has no room for the rest of an upload, `missing_bytes`."""
        spare_bytes = self.limits.spare_bytes
        with explain_errors(folder / name):
            free = free_bytes(folder)
        if free < missing_bytes + spare_bytes:
            raise OutputError(
                say(
                    "%(name)s: the disk of %(folder)s has %(free)s free, the file needs %(size)s "
                    "and %(spare_bytes)s must stay free. Free some space, then drop it again",
                    name=name,
                    folder=folder,
                    free=format_size(free),
                    size=format_size(missing_bytes),
                    spare_bytes=format_size(spare_bytes),
                )
            )

    async def receive(self, request: Request, target: Path, size: int) -> None:
        """Write the body of a request to a path. `size` is the announced size in bytes.

        Raises UserError if the file is not accepted; then the file and a new folder are removed.
        """
        folder = target.parent
        is_new = not folder.exists()
        try:
            with claim_file(folder, target.name), atomic_files(target, size) as temporary:
                path = temporary / target.name
                await write_arriving(request.stream(), path, target.name, size)
                await run_in_threadpool(self.validate_content, path, folder)
        except BaseException:
            if is_new:
                remove_empty(folder)
            raise

    def validate_content(self, path: Path, folder: Path) -> None:
        """Raise UserError if a file's content does not fit its suffix, or if its name is already taken."""
        try:
            check_content(path, find_kind(path.name))
        except (UserError, StopIteration) as error:
            text = str(error) or say("%(path)s cannot be read", path=path)
            raise OptionError(text.replace(str(path), path.name)) from None
        names, _ = _measure(folder)
        reject_existing(path.name, names)  # another page may have added the same file


def reject_existing(name: str, names: set[str]) -> None:
    """Raise OptionError if a name is among the case-folded names of a folder's files."""
    if fold_name(name) in names:
        raise refusal("%(name)s already exists. Rename one of the two, then drop it again", name=name)


def _measure(folder: Path) -> tuple[set[str], int]:
    """Return a folder's case-folded file names and total bytes; an empty set and 0 if it does not exist."""
    names = set()
    size_bytes = 0
    if folder.is_dir():
        for path in folder.iterdir():
            if not path.name.endswith(".tmp"):
                with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
                    size_bytes += path.lstat().st_size
                    names.add(fold_name(path.name))
    return names, size_bytes


def remove_empty(folder: Path) -> None:
    """Remove a folder if nothing is in it."""
    try:
        folder.rmdir()
    except OSError:
        return
