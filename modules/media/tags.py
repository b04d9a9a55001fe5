"""Read the texts that images and videos carry."""

from pathlib import Path

from modules.media.opening import open_image, open_video
from modules.media.reading import image_suffixes


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
