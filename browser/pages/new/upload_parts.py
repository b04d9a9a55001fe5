"""Take a large file in pieces, so that an interrupted upload continues from where it stopped.

The pieces are joined in a hidden file in the target folder, whose name contains the file's name, size and
time. The complete file is checked and renamed like any dropped file. An abandoned upload is removed after a
day, when the next file arrives in that folder. Across all servers, one request at a time appends to a file.
"""

import contextlib
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from browser.core.responses import answer_json
from browser.core.short_names import short_digest
from browser.pages.new.uploads import (
    MAX_DIGITS,
    FileBusyError,
    FileUploads,
    answer_received,
    check_file_name,
    claim_file,
    remove_empty,
)
from modules.atomic_write import atomic_files, replace_file
from modules.errors import UserError
from modules.pages.language import refusal

ADDRESS = "/new/piece"
PIECE_BYTES = 16 << 20
SUFFIX = ".reelsmith.part"  # suffix that no other program uses
OLD_SECONDS = 60 * 60 * 24


@dataclass(frozen=True)
class PartialUpload:
    """A file that is uploaded in pieces. `size` is the size of the complete file in bytes."""

    folder: Path
    name: str
    size: int
    changed: str  # modification time reported by the browser

    @property
    def partial_path(self) -> Path:
        """Path of the file in which the pieces are joined."""
        digest = short_digest(repr((self.name, self.size, self.changed)))
        return self.folder / f".{self.name[:100]}.{digest}{SUFFIX}"

    def count_bytes(self) -> int:
        """Return the number of bytes received so far.

        Raises OptionError if a link or folder has the name of the partial file.
        """
        try:
            status = self.partial_path.lstat()
        except FileNotFoundError:
            return 0
        if not stat.S_ISREG(status.st_mode):
            raise refusal("%(path)s is in the way: remove it", path=self.partial_path)
        return status.st_size


@dataclass(frozen=True)
class LastWrite:
    """Time of the last write to an upload: of the monotonic clock, and the file's modification time."""

    monotonic: float
    modified_ns: int


class PieceUploads:
    """Receives files that a page uploads in pieces, one piece after another."""

    def __init__(self, uploads: FileUploads) -> None:
        self.uploads = uploads
        self._last_writes: dict[Path, LastWrite] = {}  # keyed by the file that collects the pieces

    async def take(self, request: Request) -> Response:
        """Add the piece of a file in the body, and respond with the number of bytes received so far.

        After the last piece, the response lists the folder's files instead. The query contains the file's
        name, folder, size and modification time, and the offset of the piece.
        """
        upload = None
        try:
            upload = await run_in_threadpool(self.find, request)
            offset = _read_integer_field(request, "at")
            with claim_file(upload.folder, upload.partial_path.name):
                num_received = await run_in_threadpool(upload.count_bytes)
                # otherwise a piece was lost or is repeated, and the page continues after the received bytes
                is_next_piece = offset == num_received
                if is_next_piece:
                    await run_in_threadpool(self.remove_old, upload)
                    num_received = await self.add(request, upload)
                if not is_next_piece or num_received < upload.size:
                    return answer_json({"at": num_received, "folder": str(upload.folder)})
                await run_in_threadpool(self.finish, upload)
        except FileBusyError as error:
            return answer_json({"error": str(error)}, 503)  # the page tries again
        except (UserError, OSError) as error:
            if upload is not None:
                remove_empty(upload.folder)
            return answer_json({"error": str(error)}, 422)
        return await run_in_threadpool(answer_received, upload.folder)

    def show(self, request: Request) -> Response:
        """Respond with the number of bytes that have arrived, where the browser resumes the upload."""
        try:
            upload = self.find(request)
            return answer_json({"at": upload.count_bytes(), "folder": str(upload.folder)})
        except (UserError, OSError) as error:
            return answer_json({"error": str(error)}, 422)

    def find(self, request: Request) -> PartialUpload:
        """Return the file that a request names. Raises UserError if it is not accepted."""
        query = request.query_params
        upload = PartialUpload(
            folder=self.uploads.find_target(query.get("into", "")),
            name=query.get("name", ""),
            size=_read_integer_field(request, "size"),
            changed=query.get("changed", "")[:MAX_DIGITS],
        )
        check_file_name(upload.name)
        arrived = upload.count_bytes()
        self.uploads.check_upload(upload.folder, upload.name, upload.size, arrived)
        return upload

    async def add(self, request: Request, upload: PartialUpload) -> int:
        """Append the body of a request, and return the number of bytes received so far.

        If the body is cut off, the bytes received until then stay in the file.
        """
        with upload.partial_path.open("ab") as file:
            with contextlib.suppress(ClientDisconnect):
                async for chunk in request.stream():
                    num_missing = upload.size - file.tell()
                    await run_in_threadpool(file.write, chunk[:num_missing])
                    await run_in_threadpool(file.flush)
            modified_ns = os.fstat(file.fileno()).st_mtime_ns
            self._last_writes[upload.partial_path] = LastWrite(time.monotonic(), modified_ns)
            return file.tell()

    def finish(self, upload: PartialUpload) -> None:
        """Check a complete file and move it to its final name. A rejected file is deleted (UserError)."""
        target = upload.folder / upload.name
        with claim_file(upload.folder, upload.name), atomic_files(target) as temporary:
            path = temporary / upload.name
            replace_file(upload.partial_path, path)
            self._last_writes.pop(upload.partial_path, None)
            self.uploads.validate_content(path, upload.folder)

    def remove_old(self, upload: PartialUpload) -> None:
        """Remove other uploads to the same folder that were abandoned more than a day ago."""
        folder = upload.folder
        for path in folder.glob(
            f".*.{'[0-9a-f]' * 16}{SUFFIX}"
        ):  # as `PartialUpload.partial_path` names them
            if path == upload.partial_path:
                continue
            with contextlib.suppress(FileBusyError, FileNotFoundError), claim_file(folder, path.name):
                if path.is_file() and self.is_old(path):
                    path.unlink()

    def is_old(self, path: Path) -> bool:
        """Return whether a file has not grown for a day, ignoring changes to the system clock."""
        status = path.lstat()
        last_write = self._last_writes.get(path)
        if last_write is not None and last_write.modified_ns == status.st_mtime_ns:
            return time.monotonic() - last_write.monotonic > OLD_SECONDS
        return status.st_mtime < time.time() - OLD_SECONDS


def _read_integer_field(request: Request, name: str) -> int:
    text = request.query_params.get(name, "")
    if not (text.isascii() and text.isdecimal()) or len(text) > MAX_DIGITS:
        raise refusal("A piece of a file was sent without %(name)s", name=name)
    return int(text)
