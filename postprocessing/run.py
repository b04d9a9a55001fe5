"""Run tools on videos and images: read, process stage after stage, and write, as one stream."""

import gc
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

from modules.atomic_write import atomic_folder, claim_name, make_folder, replace_surrogates
from modules.bars import FRAMES, Bar
from modules.console import format_count, format_duration, format_size
from modules.devices import Failures, freeze_libraries, select_device
from modules.errors import MediaError, OutputError
from modules.media.encoding import OutputFrame, in_eight_bits, resolve_codec
from modules.media.options import FormatOptions
from modules.media.reading import (
    TOOL_TAG,
    join_alpha,
    read_image,
    read_tags,
    split_alpha,
    without_images,
)
from modules.media.streams import shown_frames, source_info
from modules.media.writing import write_png, write_timed_video
from modules.output_files import Answer, ask_at_console
from modules.paths import explain_missing
from postprocessing.chain_options import Chain, tool_in_words
from postprocessing.contract import Clip
from postprocessing.naming import FileJob, is_image, log_suffix, plan_jobs
from postprocessing.stages import NamedStage, check_tools, make_stages, results, run_stages
from postprocessing.streaming import read_ahead, write_behind

logger = logging.getLogger(__name__)


def run_chain(chain: Chain, ask: Callable[[str], Answer | None] = ask_at_console) -> None:
    """Run the postprocessing tools of a command line on its input files."""
    freeze_libraries()
    jobs = plan_jobs(chain, ask)
    device = select_device(chain.run.device)
    # wrong files and folders are reported before networks are loaded
    check_tools(chain.tools, chain.labels, device)
    if not jobs:
        return
    log_suffix(chain, jobs)
    for folder in sorted({job.output.parent for job in jobs}):
        make_folder(folder, "--output")
    if chain.run.format.keep_pngs:
        for folder in sorted({job.source.parent for job in jobs if not job.is_image}):
            make_folder(folder, "--keep_pngs")
    if len(jobs) == 1 and not jobs[0].is_image:
        # raises if the only video cannot be read; of several files, one may fail
        source_info(jobs[0].source)
    run_jobs(chain, jobs, make_stages(chain.tools, chain.labels, device))


def run_jobs(chain: Chain, jobs: Sequence[FileJob], stages: Sequence[NamedStage]) -> None:
    """Postprocess the files one after another; if one of several fails, report it and continue.

    Raises:
        UserError: After the last file, if any failed; with their exit code if all failures share one.
    """
    descriptions = [tool_in_words(tool, options) for tool, options in chain.tools]
    failures = Failures(strict=len(jobs) == 1)
    for job in jobs:
        with failures.collect_errors(str(job.source)):
            if job.is_image:
                run_image(stages, job, descriptions, chain.hides)
            else:
                run_video(stages, job, descriptions, form=chain.run.format, hides=chain.hides)
        gc.collect()  # errors and their tracebacks form cycles that keep the memory of a file alive
    if len(jobs) > 1 and not failures.reasons:
        logger.info("All %d files are done", len(jobs))
    failures.raise_if_any(len(jobs), f"{chain.run.input}: ")


FOLDER = "frames"


def write_frames(path: Path, folder: Path, maximum: int | None) -> None:
    """Extract the frames of a video, or its first `maximum` frames, as PNG files into `folder`/frames.

    The folder appears only when all frames are written. No more of the video is read than necessary, and few
    frames are in memory.

    Raises:
        OutputError: If `folder`/frames exists.
        MediaError: If the file cannot be read.
    """
    if not path.exists():
        raise MediaError(f"--input {path} does not exist.{explain_missing(path)} Give a video.")
    if path.is_dir():
        raise MediaError(f"--input {path} is a folder. Give a video in it.")
    frames = folder / FOLDER
    if os.path.lexists(frames):
        raise OutputError(f"{frames} exists already. Move it away, or choose another --output.")
    is_single = is_image(path)
    # with --max_frames, the frames of the whole file are not counted: its end may be damaged
    total = maximum if is_single or maximum is not None else source_info(path).frames
    make_folder(folder, "--output")
    started = time.monotonic()
    written = 0
    with atomic_folder(frames) as temporary:
        if is_single:
            write_png(temporary / "000000.png", read_image(path, alpha=True))
            written = 1
        else:
            with (
                Bar(total, path.name, FRAMES) as bar,
                read_ahead(shown_frames(path, limit=maximum)) as images,
            ):
                for _ in keep_pngs(images, temporary):
                    written += 1
                    bar.update()
    seconds = time.monotonic() - started
    logger.info("%s: %s in %s", frames, format_count(written, "frame"), format_duration(seconds))


# Run stages on a video: decode, stages and encode at the same time, with few images in memory.
def number_done(names: Iterable[str], done: Sequence[str]) -> dict[str, str]:
    """Return metadata entries `post_N` for this run's tools; the numbers continue those in `names`."""
    numbers = [int(match[1]) for name in names if (match := TOOL_TAG.fullmatch(name)) is not None]
    first = max(numbers, default=0) + 1
    return {f"post_{first + index}": replace_surrogates(text) for index, text in enumerate(done)}


SECONDS = Fraction(1)  # duration of a single image, which no tool for images reads


def run_image(
    stages: Sequence[NamedStage], job: FileJob, descriptions: Sequence[str], hides: bool = False
) -> None:
    """Run all stages on an image, and write a PNG.

    Tools process the colors of a transparent image. Its alpha channel is resized with it and kept.

    Args:
        stages: The loaded stages.
        job: File to read and file to write.
        descriptions: Descriptions of the tools, for the metadata.
        hides: Whether to omit metadata that may contain a thumbnail of the image.

    Raises:
        UserError: If the image cannot be read, processed or written.
    """
    pixels, alpha = split_alpha(read_image(job.source, alpha=True))
    is_opaque = alpha is None or int(alpha.min()) == 255
    height, width = pixels.shape[:2]
    clip = Clip(job.source, width, height, rate=None, frames=1, is_deep=False)
    clips = results(stages, clip)
    images = list(run_stages(stages, iter([OutputFrame(pixels, Fraction(0), SECONDS)]), clips))
    assert len(images) == 1, f"{len(images)} pictures of one"  # no stage adds images to a single one
    texts = read_tags(job.source)
    # a thumbnail in the metadata could show what a tool has hidden
    texts = without_images(job.source, texts) if hides else texts
    result = in_eight_bits(images[0].pixels)
    result = result if is_opaque else join_alpha(result, alpha)
    write_png(job.output, result, {**texts, **number_done(texts, descriptions)})
    logger.info("%s", job.output)


def keep_pngs(pictures: Iterable[OutputFrame], folder: Path) -> Iterator[OutputFrame]:
    """Yield images, and write each one as a PNG file named by its index."""
    for index, image in enumerate(pictures):
        write_png(folder / f"{index:06d}.png", in_eight_bits(image.pixels))
        yield image


def run_video(
    stages: Sequence[NamedStage],
    job: FileJob,
    descriptions: Sequence[str],
    form: FormatOptions,
    hides: bool = False,
) -> None:
    """Run all stages on a video, and write the result.

    Reading and writing run in separate threads. The output appears only when it is complete.

    Args:
        stages: The loaded stages.
        job: File to read and file to write.
        descriptions: Descriptions of the tools, for the metadata.
        form: Format of the output.
        hides: Whether a tool hides image content, so that the cover image of the input is not kept.

    Raises:
        UserError: If the video cannot be read, processed or written.
    """
    started = time.monotonic()
    info = source_info(job.source)
    first = Clip(
        job.source, info.width, info.height, rate=info.rate, frames=info.frames, is_deep=form.is_deep
    )
    clips = results(stages, first)
    codec = resolve_codec(form.codec, clips[-1].width, clips[-1].height)
    tags = number_done(read_tags(job.source), descriptions)
    rate = clips[-1].rate or info.rate

    def write(pictures: Iterator[OutputFrame]) -> None:
        """Write the video while frames arrive, and with --keep_pngs also each frame."""
        with ExitStack() as opened:
            if form.keep_pngs:
                name = job.source.with_name("frames")
                # repeat until the name is unused and not reserved by another run
                while not opened.enter_context(claim_name(name)) or os.path.lexists(name):
                    name = name.with_name(f"{name.name}_")
                pictures = keep_pngs(pictures, opened.enter_context(atomic_folder(name)))
            write_timed_video(
                job.output,
                pictures,
                rate,
                codec,
                copied_video=job.source,
                with_images=not hides,
                tags=tags,
            )
        if form.keep_pngs:
            logger.info("Frames: %s", name)

    frames = 0
    with (
        Bar(clips[-1].frames, job.source.name, FRAMES) as bar,
        read_ahead(shown_frames(job.source, form.is_deep)) as pictures,
        write_behind(write) as put,
    ):
        for image in run_stages(stages, pictures, clips):
            put(image)
            del image  # written and forgotten while the next one is made
            frames += 1
            bar.update()
        if not frames:
            raise MediaError(f"{job.source}: no frame is left to write. Give a longer video.")
    seconds = time.monotonic() - started
    logger.info(
        "%s: %s in %s, %.3g a second, %s",
        job.output,
        format_count(frames, "frame"),
        format_duration(seconds),
        frames / seconds,
        format_size(job.output.stat().st_size),
    )
