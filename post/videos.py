"""Run stages on a video: decode, stages and encode at the same time, with few pictures in memory."""

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np

from modules.atomic_write import atomic_folder, claim_name, make_storable
from modules.bars import FRAMES, Bar
from modules.console import as_size, count_of, in_words
from modules.errors import MediaError
from modules.media.encoding import settle_codec
from modules.media.options import FormatOptions
from modules.media.reading import read_image
from modules.media.streams import shown_frames, source_info
from modules.media.tags import TOOL_TAG, read_tags, without_pictures
from modules.media.writing import write_png, write_shown
from post.contract import Clip, Picture
from post.naming import FileJob
from post.pixels import to_bytes
from post.stages import NamedStage, lead_through, results
from post.streaming import read_ahead, write_behind

logger = logging.getLogger(__name__)


def number_done(names: Iterable[str], done: Sequence[str]) -> dict[str, str]:
    """Return the steps done as post_1, post_2, counted on from the names that a file already has."""
    numbers = [int(found[1]) for name in names if (found := TOOL_TAG.fullmatch(name)) is not None]
    first = max(numbers, default=0) + 1
    return {f"post_{first + index}": make_storable(text) for index, text in enumerate(done)}


def add_done(said: Mapping[str, str], done: Sequence[str]) -> dict[str, str]:
    """Return a file's earlier metadata, and the steps done since."""
    return {**said, **number_done(said, done)}


SECONDS = Fraction(1)  # that a single picture is shown; no tool for pictures reads it


def run_picture(stages: Sequence[NamedStage], job: FileJob, done: Sequence[str], hides: bool = False) -> None:
    """Let all stages work on a picture, and write a PNG. done: their work in words, for its texts.

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


def check_video(path: Path) -> None:
    """Open a video and decode one frame. Raises MediaError if it cannot be read."""
    source_info(path)


def run_video(
    stages: Sequence[NamedStage], job: FileJob, done: Sequence[str], form: FormatOptions, hides: bool = False
) -> None:
    """Let all stages work on a video. done: their work in words, for its metadata. hides: of a chain.

    Reading and writing have a thread each. Nothing appears under the output's name before all of it is
    written. Raises UserError.
    """
    started = time.monotonic()
    info = source_info(job.source)
    first = Clip(job.source, info.width, info.height, info.rate, info.frames, form.is_deep)
    clips = results(stages, first)
    codec = settle_codec(form.codec, clips[-1].width, clips[-1].height)
    tags = number_done(read_tags(job.source), done)
    rate = clips[-1].rate or info.rate

    def write(pictures: Iterator[Picture]) -> None:
        with ExitStack() as opened:
            if form.keep_pngs:
                name = opened.enter_context(own_folder(job.source.with_name("frames")))
                pictures = keep_pngs(pictures, opened.enter_context(atomic_folder(name)))
            write_shown(
                *(job.output, pictures, rate, codec),
                companions_of=job.source,
                covers=not hides,
                tags=tags,
            )
        if form.keep_pngs:
            logger.info("Frames: %s", name)

    frames = 0
    with (
        Bar(clips[-1].frames, job.source.name, FRAMES) as bar,
        read_ahead(read_pictures(job.source, form.is_deep)) as pictures,
        write_behind(write) as put,
    ):
        for picture in lead_through(stages, pictures, clips):
            put(picture)
            del picture  # written and forgotten while the next one is made
            frames += 1
            bar.update()
        if not frames:
            raise MediaError(f"{job.source}: no frame is left to write. Give a longer video.")
    seconds = time.monotonic() - started
    logger.info(
        "%s: %s in %s, %.3g a second, %s",
        *(job.output, count_of(frames, "frame"), in_words(seconds), frames / seconds),
        as_size(job.output.stat().st_size),
    )


def read_pictures(path: Path, deep: bool, most: int | None = None) -> Iterator[Picture]:
    """Yield the pictures of a video, or the first `most`, with their times.

    deep: with 16 bits a channel if the file has more than 8.
    """
    for frame in shown_frames(path, deep, most):
        yield Picture(frame.pixels, frame.start, frame.seconds)
