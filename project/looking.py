"""Look at the clips and pictures of a folder: how large and long they are, and which lack a caption."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from dataset.sources.captions import caption_path, read_caption
from modules.errors import DatasetError, MediaError
from modules.media.animations import ANIMATION_SUFFIXES, is_animation
from modules.media.reading import VIDEO_SUFFIXES, image_size, image_suffixes
from modules.media.streams import source_info

CAPTIONS = ".txt"
# sub-folders of a training's own, and of what belongs to media
NOT_MEDIA = {"cache", "output", "control", "mask", "masks"}


@dataclass(frozen=True)
class Media:
    """A clip or a picture."""

    path: Path
    is_clip: bool
    size: tuple[int, int]  # width, height
    seconds: Fraction | None  # None: a picture, or a clip whose file does not say
    caption: str | None  # on one line; None: there is none


def look_at(folder: Path, problems: list[str]) -> list[Media]:
    """Return the media of a folder and of its sub-folders; what cannot be read becomes a problem.

    Raises DatasetError if there are none.
    """
    places = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] != "."]
    suffixes = VIDEO_SUFFIXES | image_suffixes() | ANIMATION_SUFFIXES
    media = []
    for place in (folder, *(path for path in places if path.name.lower() not in NOT_MEDIA)):
        for path in sorted(place.iterdir()):
            if path.suffix.lower() in suffixes and path.name[0] != "." and path.is_file():
                try:
                    media.append(_measure(path))
                except (MediaError, DatasetError) as error:
                    problems.append(str(error))
    if not media:
        raise DatasetError(f"{folder} has no clip and no picture that can be read. Give a folder that has.")
    return media


def _measure(path: Path) -> Media:
    text = read_caption(caption_path(path, CAPTIONS))
    caption = None if text is None else " ".join(text.split())
    if path.suffix.lower() not in VIDEO_SUFFIXES and not is_animation(path):
        return Media(path, False, image_size(path), None, caption)
    info = source_info(path)
    seconds = None if info.frames is None else info.frames / info.rate
    return Media(path, True, (info.width, info.height), seconds, caption)
