"""Read the texts that images and videos carry."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from modules.media.opening import open_image, open_video
from modules.media.reading import image_suffixes

logger = logging.getLogger(__name__)

# metadata of cameras and editors, which hold a small picture written as letters, and any text like that
_OF_PICTURES = re.compile(r"xmp|exif|raw profile|thumb|coverart|metadata_block_picture", re.IGNORECASE)
# what a tool did to a finished file, counted on; mkv stores names in upper case
TOOL_TAG = re.compile(r"post_(\d{1,6})", re.IGNORECASE)
LONGEST = 1 << 18  # letters that are looked through
_CODED = re.compile(r"(?:[A-Za-z0-9+/=_-]{40,}\s){9}|[A-Za-z0-9+/=_-]{400}")


def read_tags(path: Path) -> dict[str, str]:
    """Return the text stored in a PNG or a video, {} if there is none.

    Keys of videos are lower case, because mkv stores them in upper case.
    Raises MediaError if the file cannot be read.
    """
    if path.suffix.lower() in image_suffixes():
        with open_image(path) as image:
            return {str(name): str(value) for name, value in getattr(image, "text", {}).items()}
    with open_video(path) as (container, _):
        return {name.lower(): value for name, value in container.metadata.items()}


def without_pictures(path: Path, tags: Mapping[str, str]) -> dict[str, str]:
    """Return tags but for those that may hold a picture, such as XMP with its thumbnails; they are logged.

    path: of the file that has them.
    """
    left_out = [
        name
        for name, text in tags.items()
        if _OF_PICTURES.search(name) or len(text) > LONGEST or _CODED.search(text)
    ]
    if left_out:
        logger.warning("%s: left out, because there may be a picture in it: %s", path, ", ".join(left_out))
    return {name: text for name, text in tags.items() if name not in left_out}
