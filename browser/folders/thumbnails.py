"""Make small images of a folder's files, and answer with them."""

import io
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import escape
from PIL import Image
from starlette.responses import Response

from browser.core.upload_stream import DECODING
from modules.errors import MediaError
from modules.media.reading import first_frame
from modules.pages.language import say, show
from modules.pages.page import reduce_frame

LARGEST_SIDE = 448  # pixels of an image in the page
MAX_IMAGES = 1000  # images in memory, about 20 KB each
MAX_AT_ONCE = 200  # maximum number of files in an answer


def read_page_slice(query: Mapping[str, str]) -> slice:
    """Return the slice of a list that a query requests. Raises ValueError if a number is not valid."""
    first = max(0, int(query.get("from") or 0))
    count = min(max(0, int(query.get("count") or 0)), MAX_AT_ONCE)
    return slice(first, first + count)


def answer_cacheable_jpeg(jpeg: bytes) -> Response:
    """Return a thumbnail that browsers may cache forever, because its URL changes with its file."""
    headers = {"cache-control": "private, max-age=31536000, immutable"}
    return Response(jpeg, media_type="image/jpeg", headers=headers)


def answer_placeholder() -> Response:
    """Return a placeholder drawing for a file that cannot be read."""
    drawing = PLACEHOLDER_SVG % escape(show(say("cannot be read")))
    return Response(drawing, media_type="image/svg+xml", headers={"cache-control": "no-store"})


PLACEHOLDER_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="160" height="120"><rect width="160" height="120" '
    'fill="#777"/><text x="80" y="65" fill="#fff" font-family="sans-serif" font-size="14" '
    'text-anchor="middle">%s</text></svg>'
)
MAX_COPIED = 1 << 28  # maximum bytes of an archived file for a thumbnail


class Thumbnails:
    """Creates thumbnails of the first frames of files, and caches the most recent ones."""

    def __init__(self) -> None:
        self._images: OrderedDict[object, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def make(self, part: Mapping[str, Any], modified_ns: int) -> bytes:
        """Return a small JPEG of a file's first frame, from the cache if possible.

        Args:
            part: The file as the dataset report lists it, with its `path`.
            modified_ns: Modification time of the file in nanoseconds; a changed file is decoded again.

        Raises:
            MediaError: If the file cannot be decoded.
            OSError: If the file cannot be read.
        """
        key = part["path"], modified_ns
        with self._lock:
            if key in self._images:
                self._images.move_to_end(key)
                return self._images[key]
        with DECODING:
            thumbnail = reduce_frame(self._read_frame(part), LARGEST_SIDE)[..., :3]
        jpeg = io.BytesIO()
        Image.fromarray(thumbnail).save(jpeg, format="JPEG", quality=80)
        with self._lock:
            self._images[key] = jpeg.getvalue()
            while len(self._images) > MAX_IMAGES:
                self._images.popitem(last=False)
        return jpeg.getvalue()

    def _read_frame(self, part: Mapping[str, Any]) -> Any:
        """Return the first frame of a file in the dataset report, which may be a member of a tar."""
        # `part` contains the file's `path`. For a file in an archive, it also contains the archive `in`, and
        # in a tar the file's position and size, `offset` and `bytes`.
        path = Path(part["path"])
        is_archived = "in" in part
        if not is_archived:
            return first_frame(path)
        if "offset" not in part:  # a row of a Parquet table
            raise MediaError(say("%(path)s is in a table", path=path))
        if part["bytes"] > MAX_COPIED:
            raise MediaError(
                say("%(path)s has more than %(most_copied)s MiB", path=path, most_copied=MAX_COPIED >> 20)
            )
        # decoders open paths, so the member's bytes are copied out of the tar
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            copy = Path(folder) / f"copy{path.suffix}"
            with Path(part["in"]).open("rb") as archive, copy.open("wb") as target:
                archive.seek(part["offset"])
                target.write(archive.read(part["bytes"]))
            return first_frame(copy)
