"""Run stages on a single picture, and read and write PNG files for videos too."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np

from modules.atomic_write import claim_name
from modules.media.reading import read_image
from modules.media.tags import read_tags, without_pictures
from modules.media.writing import write_png
from post.contract import Clip, Picture
from post.naming import FileJob
from post.pixels import to_bytes
from post.recording import add_done
from post.stages import NamedStage, lead_through, results

logger = logging.getLogger(__name__)

SECONDS = Fraction(1)  # that a single picture is shown; no tool for pictures reads it


def run_picture(stages: Sequence[NamedStage], job: FileJob, done: Sequence[str], hides: bool = False) -> None:
    """Let all stages work on a picture, and write a PNG. done: what they do, for its texts.

    hides: of a chain; texts that may hold a small copy of the picture are left out. Raises UserError.
    """
    pixels = read_image(job.source, alpha=True)
    if pixels.shape[2] == 4:
        logger.warning("%s: its transparency is dropped", job.source)
        pixels = np.ascontiguousarray(pixels[..., :3])
    height, width = pixels.shape[:2]
    clips = results(stages, Clip(job.source, width, height, None, 1, is_deep=False))
    made = list(lead_through(stages, iter([Picture(pixels, Fraction(0), SECONDS)]), clips))
    assert len(made) == 1, f"{len(made)} pictures of one"
    texts = read_tags(job.source)
    texts = without_pictures(job.source, texts) if hides else texts
    write_png(job.output, to_bytes(made[0].pixels), add_done(texts, done))
    logger.info("%s", job.output)


@contextmanager
def own_folder(path: Path) -> Iterator[Path]:
    """Reserve a name for a folder: append `_` until nothing has it and no other run has reserved it."""
    with ExitStack() as claims:
        while not claims.enter_context(claim_name(path)) or os.path.lexists(path):
            path = path.with_name(f"{path.name}_")
        yield path


def keep_pngs(pictures: Iterable[Picture], folder: Path) -> Iterator[Picture]:
    """Write each picture to `folder` as 000000.png and so on, and pass it on."""
    for index, picture in enumerate(pictures):
        write_png(folder / f"{index:06d}.png", to_bytes(picture.pixels))
        yield picture
