"""Run tools on videos and pictures: read, stage after stage, write, as one stream."""

import gc
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from modules.atomic_write import atomic_folder, make_folder
from modules.bars import FRAMES, Bar
from modules.console import count_of, in_words
from modules.devices import Failures, choose_device
from modules.errors import MediaError, OutputError
from modules.media.reading import read_image
from modules.media.streams import source_info
from modules.media.writing import write_png
from modules.output_files import Answer, ask_at_console
from post.chain_options import Chain, tool_in_words
from post.naming import FileJob, is_picture, plan_jobs, tell_suffix
from post.stages import NamedStage, check_tools, make_stages
from post.streaming import read_ahead
from post.videos import check_video, keep_pngs, read_pictures, run_picture, run_video

logger = logging.getLogger(__name__)


def run_chain(chain: Chain, ask: Callable[[str], Answer | None] = ask_at_console) -> None:
    """Run a command line. Raises UserError; wrong names fail before networks load."""
    jobs = plan_jobs(chain, ask)
    device = choose_device(chain.run.device)
    check_tools(chain.tools, chain.labels, device)
    if not jobs:
        return
    tell_suffix(chain, jobs)
    for folder in sorted({job.output.parent for job in jobs}):
        make_folder(folder, "--output")
    if chain.run.format.keep_pngs:
        for folder in sorted({job.source.parent for job in jobs if not job.is_picture}):
            make_folder(folder, "--keep_pngs")
    if len(jobs) == 1 and not jobs[0].is_picture:
        check_video(jobs[0].source)
    run_jobs(chain, jobs, make_stages(chain.tools, chain.labels, device))


def run_jobs(chain: Chain, jobs: Sequence[FileJob], stages: Sequence[NamedStage]) -> None:
    """Work on file after file. Of several, one that fails is reported and the others go on.

    Raises UserError at the end if one failed, with the exit code of the failures if they share one.
    """
    done = [tool_in_words(tool, options) for tool, options in chain.tools]
    failures = Failures(strict=len(jobs) == 1)
    for job in jobs:
        with failures.note_errors(str(job.source)):
            if job.is_picture:
                run_picture(stages, job, done, chain.hides)
            else:
                run_video(stages, job, done, chain.run.format, chain.hides)
        gc.collect()  # errors and their tracebacks hold each other, and with them what a file took
    if len(jobs) > 1 and not failures.reasons:
        logger.info("All %d files are done", len(jobs))
    failures.raise_if_any(len(jobs), f"{chain.run.input}: ")


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
