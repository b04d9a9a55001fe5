"""Show the media files of a folder: rows with thumbnails, captions to edit, and excluded files.

The responses have the format that `static/dataset.js` expects for a dataset. Only the headers of files in
view are read.
"""

import contextlib
import errno
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from browser.core.bin_folder import FOLDER as BIN
from browser.core.bin_folder import rename_into
from browser.core.page_root import add_root
from browser.core.responses import (
    NO_WRITING,
    NOT_FOUND,
    answer_body,
    answer_json,
    answer_not_found,
    answer_text,
)
from browser.core.short_names import short_digest
from browser.folders.captions import CaptionFiles, caption_values
from browser.folders.folders import MAX_ENTRIES, find_folder
from browser.folders.thumbnails import Thumbnails, answer_cacheable_jpeg, answer_placeholder, read_page_slice
from browser.runs.runs import Runs
from modules.atomic_write import explain_errors
from modules.errors import MediaError, OutputError, UserError
from modules.media.decoding import ANIMATION_SUFFIXES
from modules.media.labels import find_stem_label
from modules.media.opening import AUDIO_SUFFIXES
from modules.media.reading import IMAGE_SUFFIXES, VIDEO_SUFFIXES, image_size
from modules.media.streams import source_info
from modules.pages.language import refusal, say
from modules.pages.page import encode_address
from modules.text_files import parse_json, real_path

IMAGES = IMAGE_SUFFIXES | ANIMATION_SUFFIXES
MEDIA_SUFFIXES = IMAGES | VIDEO_SUFFIXES
LEFT_OUT = "left out"  # folder in BIN
MAX_HEADERS = 4000  # number of cached headers
MAX_COUNTED = 100  # maximum number of headers read to count damaged files


@dataclass(frozen=True)
class MediaHeader:
    """Width, height, frame count and frame rate that a media file's header states."""

    size: tuple[int, int] | None
    frames: int | None
    fps: float | None
    error: str  # why it cannot be read; "" if it can


def list_names(folder: Path) -> list[str]:
    """Return the sorted names of a folder's images, clips and audio files.

    Raises OSError if it cannot be read.
    """
    with os.scandir(folder) as entries:
        names = [
            entry.name
            for _, entry in zip(range(MAX_ENTRIES), entries, strict=False)
            if _is_listed(Path(entry.name))
        ]
    return sorted(names)


def _is_listed(path: Path) -> bool:
    is_media = path.suffix.lower() in MEDIA_SUFFIXES | AUDIO_SUFFIXES
    return is_media and path.name[0] != "." and find_stem_label(path.stem) is None


def find_caption_file(folder: Path, name: str) -> Path:
    """Return the path of a file's caption, which need not exist."""
    path = folder / name
    other = path.with_suffix(".caption")
    default = path.with_suffix(".txt")
    return other if other.exists() and not default.exists() else default


def list_uncaptioned(folder: Path, names: Sequence[str]) -> list[str]:
    """Return the media files in `names` whose caption file in the folder is missing or empty.

    Raises OSError if the folder cannot be listed.

    The folder is listed once, which is faster than checking thousands of files, because the page calls this
    whenever the user scrolls.
    """
    sizes: dict[str, int] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith((".txt", ".caption")):
                with contextlib.suppress(OSError):  # a broken link
                    sizes[entry.name] = entry.stat().st_size
    uncaptioned = []
    for name in names:
        stem = Path(name).stem
        size = sizes.get(f"{stem}.txt")  # a .txt takes precedence over a .caption, even if it is empty
        if size is None:
            size = sizes.get(f"{stem}.caption", 0)
        if size == 0:
            uncaptioned.append(name)
    return uncaptioned


class LeftOut:
    """Excludes files from training: moves them and their captions out of the dataset folder, and back.

    This is not a `BinFolder`, whose entries are named by the time of removal and are not restored by any
    page. Excluded files are stored under the name of their folder, whose page lists them.
    """

    def __init__(self, runs: Runs) -> None:
        self.runs = runs

    def find_storage(self, folder: Path) -> Path:
        """Return the folder that stores a folder's excluded files. Raises OutputError if it is a link."""
        top = real_path(self.runs.find_top(folder))
        left_out_folder = top / BIN / LEFT_OUT / f"{folder.name} {short_digest(folder, 4)}"
        if os.path.normcase(real_path(left_out_folder)) != os.path.normcase(left_out_folder):
            raise OutputError(f"{left_out_folder} is a link, or below one. Remove the link")
        return left_out_folder

    def list_names(self, folder: Path) -> list[str]:
        """Return the names of a folder's excluded files; [] if they cannot be listed."""
        try:
            return list_names(self.find_storage(folder))
        except (OSError, OutputError):
            return []

    def leave_out(self, folder: Path, name: str) -> None:
        """Move a file out of its folder, so that no run trains on it. Raises UserError if that fails."""
        self._move(folder, self.find_storage(folder), name)

    def put_back(self, folder: Path, name: str) -> None:
        """Move an excluded file back into its folder. Raises UserError if that fails."""
        left_out_folder = self.find_storage(folder)
        self._move(left_out_folder, folder, name)
        with contextlib.suppress(OSError):  # the folder is not empty
            left_out_folder.rmdir()

    def _move(self, source: Path, target: Path, name: str) -> None:
        """Move a media file and its caption files to another folder."""
        path = source / name
        if Path(name).name != name or not path.is_file():
            raise refusal("%(name)s: the file does not exist", name=name)
        moved_paths = [path, *_list_exclusive_captions(path)]
        for moved_path in moved_paths:
            if os.path.lexists(target / moved_path.name):
                raise refusal(
                    "%(target)s already exists. Rename one of the two", target=target / moved_path.name
                )
        with explain_errors(target / name):
            try:
                for moved_path in moved_paths:
                    rename_into(moved_path, target / moved_path.name, target)
            except OSError as error:
                if error.errno != errno.EXDEV:  # EXDEV: renaming cannot move a file to another disk
                    raise
                raise OutputError(f"{path} is on a different disk than {target}. Move it by hand") from None


def _list_exclusive_captions(path: Path) -> list[Path]:
    """Return a media file's caption files; [] if another media file with the same stem shares them."""
    same_stem = [name for name in list_names(path.parent) if Path(name).stem == path.stem]
    if len(same_stem) != 1:
        return []
    captions = [path.with_suffix(suffix) for suffix in (".txt", ".caption")]
    return [caption for caption in captions if caption.is_file()]


class FolderFiles:
    """Handles the requests of pages for the files of a media folder."""

    def __init__(self, runs: Runs, read_only: bool) -> None:
        self.runs = runs
        self.read_only = read_only
        self.captions = CaptionFiles()
        self.thumbnails = Thumbnails()
        self.left_out = LeftOut(runs)
        self._headers: OrderedDict[tuple[str, int], MediaHeader] = OrderedDict()

    def address(self, folder: Path) -> str:
        """Return the URL from which the script `dataset.js` requests the list of a folder's files."""
        return f"/new/rows/{os.fsencode(folder).hex()}/"

    def find(self, request: Request) -> Path | None:
        """Return the folder that a request's URL names; None if it may not be shown."""
        try:
            text = os.fsdecode(bytes.fromhex(request.path_params["place"]))
        except ValueError:
            return None
        return find_folder(self.runs, text)

    def show_items(self, request: Request) -> Response:
        """Respond with a range of a folder's files as JSON; the query has `text`, `only`, `from`, `count`."""
        folder = self.find(request)
        if folder is None:
            return answer_json({"state": "gone", "error": NOT_FOUND})
        try:
            return answer_json(self.list_files(folder, request.query_params))
        except OSError as error:
            return answer_json({"state": "gone", "error": f"{folder}: {error.strerror or error}"})
        except ValueError:
            return answer_text("from and count are numbers of files.", 400)

    def list_files(self, folder: Path, query: Mapping[str, str]) -> dict[str, Any]:
        """Return the range of a folder's files that a page shows at once, as JSON values.

        In the query, `text` and `only` filter the files; `from` and `count` are the range.

        Raises:
            OSError: If the folder cannot be read.
            ValueError: If `from` or `count` is not a number.
        """
        page_slice = read_page_slice(query)
        names = list_names(folder)
        uncaptioned = list_uncaptioned(folder, names)
        chosen_names = uncaptioned if query.get("only") == "uncaptioned" else names
        search_terms = query.get("text", "").lower().split()
        if search_terms:
            chosen_names = [name for name in chosen_names if self._contains_terms(folder, name, search_terms)]
        return {
            "state": "ready",
            "version": folder.stat().st_mtime_ns,
            "how": "",
            "counts": {"": len(names), "uncaptioned": len(uncaptioned)},
            "chosen": len(chosen_names),
            "files": [self.show(folder, name) for name in chosen_names[page_slice]],
        }

    def _contains_terms(self, folder: Path, name: str, search_terms: Sequence[str]) -> bool:
        """Return whether a file's name or caption contains every search term."""
        text = f"{name}\n{self.caption(folder, name)['text']}".lower()
        return all(word in text for word in search_terms)

    def show(self, folder: Path, name: str) -> dict[str, Any]:
        """Return the JSON values of a media file without a dataset report.

        The keys are the same as in a report's items; values that only a report knows are empty.
        """
        header = self.read_header(folder / name)
        suffix = Path(name).suffix.lower()
        address = None
        if suffix in MEDIA_SUFFIXES and not header.error:
            address = picture_address(folder / name)
        return {
            "id": short_digest(name),
            "table": "",
            "kind": "video" if suffix in VIDEO_SUFFIXES else "image",
            "size": header.size,
            "frames": header.frames,
            "fps": header.fps,
            "fit": None,
            "cut_percent": 0,
            "lengths": [],
            "dropped": "",
            "short": "",
            "captions": [],
            "faults": [header.error] if header.error else [],
            "remarks": [],
            "has_mask": False,
            "caches": None,
            "pictures": [{"name": name, "address": address}],
            "caption": self.caption(folder, name),
        }

    def read_header(self, path: Path) -> MediaHeader:
        """Return a media file's header, which is cached until the file changes."""
        if not self.runs.is_below(path):
            return MediaHeader(
                None, None, None, error=say("it does not exist, or is outside the folders that are shown")
            )
        try:
            key = str(path), path.stat().st_mtime_ns
        except OSError as error:
            return MediaHeader(None, None, None, error=error.strerror or str(error))
        if key not in self._headers:
            self._headers[key] = _read_media_header(path)
            while len(self._headers) > MAX_HEADERS:
                self._headers.popitem(last=False)
        return self._headers[key]

    def count_unreadable(self, folder: Path) -> int:
        """Return the number of files that cannot be read.

        Returns 0 for a folder with more than MAX_COUNTED files.
        """
        return len(self.list_unreadable(folder))

    def list_unreadable(self, folder: Path) -> list[str]:
        """Return the names of files that cannot be read; [] if the folder has more than MAX_COUNTED files."""
        try:
            names = list_names(folder)
        except OSError:
            return []
        if len(names) > MAX_COUNTED:
            return []
        return [name for name in names if self.read_header(folder / name).error != ""]

    def caption(self, folder: Path, name: str) -> dict[str, Any]:
        """Return the JSON values of a file's caption, with the reason if this page cannot edit it."""
        path = find_caption_file(folder, name)
        if path.is_symlink() and not self.runs.is_below(path):
            reason = say("It cannot be read: it is a link to a place outside the folders that are shown")
            return caption_values(reason)
        remedy = say("Convert to UTF-8, above, or save it as UTF-8 elsewhere.")
        return self.captions.describe(path, NO_WRITING if self.read_only else "", remedy)

    def write(self, request: Request, body: bytes) -> Response:
        """Save a file's caption, or undo a save, as the request's JSON body says (`CaptionFiles.change`)."""
        folder = self.find(request)
        try:
            query = parse_json(body.decode())
            names = {} if folder is None else {short_digest(name): name for name in list_names(folder)}
            name = names.get(request.path_params["item"])
            if folder is None or name is None or not isinstance(query, dict):
                return answer_json({"error": NOT_FOUND}, 404)
        except (OSError, ValueError) as error:
            return answer_json({"error": str(error)}, 400)
        status, message = self._write_caption(folder, name, query)
        return answer_json({"error": message, "file": self.show(folder, name)}, status)

    def _write_caption(self, folder: Path, name: str, query: Mapping[str, Any]) -> tuple[int, str]:
        """Return the HTTP status and the message for a request to write a caption."""
        path = find_caption_file(folder, name)
        if path.is_symlink():
            if not self.runs.is_below(path):
                return 400, say("Its caption is a link to a place outside the folders that are shown.")
            path = real_path(path)
        return self.captions.change(path, query)

    def move(self, request: Request, body: bytes) -> Response:
        """Exclude a media file from a dataset, or put it back.

        The JSON body contains `name`, and `what`: "out" or "back".
        """
        folder = self.find(request)
        try:
            query = parse_json(body.decode())
            if folder is None or not isinstance(query, dict):
                return answer_json({"error": NOT_FOUND}, 404)
            name = str(query.get("name", ""))
            if query.get("what") == "back":
                self.left_out.put_back(folder, name)
            else:
                self.left_out.leave_out(folder, name)
        except (UserError, OSError, ValueError) as error:
            return answer_json({"error": str(error)}, 422)
        return answer_json({"error": "", "left_out": self.left_out.list_names(folder)})

    def show_image(self, request: Request) -> Response:
        """Respond with a thumbnail of an image or clip below the roots."""
        path = Path(request.query_params.get("path", ""))
        is_media = path.suffix.lower() in MEDIA_SUFFIXES and path.is_absolute()
        try:
            if not is_media or not self.runs.is_inside(path):
                return answer_not_found()
            image = self.thumbnails.make({"path": str(real_path(path))}, path.stat().st_mtime_ns)
        except (MediaError, StopIteration):
            return answer_placeholder()
        except (OSError, ValueError):
            return answer_not_found()
        return answer_cacheable_jpeg(image)


def _read_media_header(path: Path) -> MediaHeader:
    suffix = path.suffix.lower()
    try:
        if suffix in IMAGES:
            return MediaHeader(image_size(path), None, None, error="")
        if suffix in VIDEO_SUFFIXES:
            info = source_info(path)
            return MediaHeader((info.width, info.height), info.frames, round(float(info.rate), 2), error="")
    except (MediaError, OSError) as error:
        return MediaHeader(None, None, None, error=str(error).replace(f"{path} ", ""))
    return MediaHeader(None, None, None, error="")


def picture_address(path: Path) -> str | None:
    """Return the URL of a file's thumbnail; None if the file has been removed."""
    try:
        stamp = path.stat().st_mtime_ns
    except OSError:
        return None
    return add_root(f"/new/picture?{encode_address({'path': str(path), 'stamp': stamp})}")


def file_routes(files: FolderFiles) -> list[Route]:
    """Return the routes for the files of a media folder."""
    return [
        Route("/new/picture", files.show_image),
        Route("/new/rows/{place}/items", files.show_items),
        Route("/new/rows/{place}/caption/{item}", answer_body(files.write), methods=["POST"]),
        Route("/new/rows/{place}/move", answer_body(files.move), methods=["POST"]),
    ]
