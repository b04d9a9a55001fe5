"""Write the frames of a video as PNG files."""

import logging
import os
import time
from pathlib import Path

from modules.atomic_write import atomic_folder, make_folder
from modules.bars import FRAMES, Bar
from modules.console import count_of, in_words
from modules.errors import MediaError, OutputError
from modules.media.reading import read_image
from modules.media.streams import source_info
from modules.media.writing import write_png
from post.naming import is_picture
from post.pictures import keep_pngs
from post.streaming import read_ahead
from post.videos import read_pictures

logger = logging.getLogger(__name__)

FOLDER = "frames"


def write_frames(path: Path, folder: Path, most: int | None) -> None:
    """Write a video's frames, or the first `most` of them, to `folder`/frames; of a picture a single PNG.

    The folder appears when all are written. Reads no further than necessary, with few frames in memory.
    Raises OutputError if `folder`/frames is there already; MediaError if the file cannot be read.
    """
    if not path.exists():
        raise MediaError(f"--input {path} does not exist. Give a video.")
    if path.is_dir():
        raise MediaError(f"--input {path} is a folder. Give a video in it.")
    frames = folder / FOLDER
    if os.path.lexists(frames):
        raise OutputError(f"{frames} exists already. Move it away, or choose another --output.")
    is_single = is_picture(path)
    # of a damaged file the beginning may still be wanted
    total = most if is_single or most is not None else source_info(path).frames
    make_folder(folder, "--output")
    started, written = time.monotonic(), 0
    with atomic_folder(frames) as temporary:
        if is_single:
            write_png(temporary / "000000.png", read_image(path))
            written = 1
        else:
            with (
                Bar(total, path.name, FRAMES) as bar,
                read_ahead(read_pictures(path, deep=False, most=most)) as pictures,
            ):
                for _ in keep_pngs(pictures, temporary):
                    written += 1
                    bar.update()
    seconds = time.monotonic() - started
    logger.info("%s: %s in %s", frames, count_of(written, "frame"), in_words(seconds))
