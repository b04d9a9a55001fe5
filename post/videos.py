"""Run stages on a video: decode, stages and encode at the same time, with few pictures in memory."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from modules.atomic_write import atomic_folder
from modules.bars import FRAMES, Bar
from modules.console import as_size, count_of, in_words
from modules.errors import MediaError
from modules.media.encoding import settle_codec
from modules.media.options import FormatOptions
from modules.media.streams import shown_frames, source_info
from modules.media.tags import read_tags
from modules.media.writing import write_shown
from post.contract import Clip, Picture
from post.naming import FileJob
from post.pictures import keep_pngs, own_folder
from post.recording import number_done
from post.stages import NamedStage, lead_through, results
from post.streaming import read_ahead, write_behind

logger = logging.getLogger(__name__)


def check_video(path: Path) -> None:
    """Open a video and decode one frame. Raises MediaError if it cannot be read."""
    source_info(path)


def run_video(
    stages: Sequence[NamedStage], job: FileJob, done: Sequence[str], form: FormatOptions, hides: bool = False
) -> None:
    """Let all stages work on a video. done: what they do, for its metadata. hides: of a chain.

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
