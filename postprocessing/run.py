"""Run tools on videos and images: read, process stage after stage, and write, as one stream."""

import gc
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
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
from postprocessing.chain_options import Chain, describe_tool
from postprocessing.contract import Clip
from postprocessing.naming import FileJob, is_image, log_suffix, plan_jobs
from postprocessing.stages import NamedStage, check_tools, make_stages, plan_clips, run_stages
from postprocessing.streaming import read_in_thread, write_in_thread

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
        # fails early if the only video cannot be read; with several files, the others are still processed
        source_info(jobs[0].source)
    run_jobs(chain, jobs, make_stages(chain.tools, chain.labels, device))


def run_jobs(chain: Chain, jobs: Sequence[FileJob], stages: Sequence[NamedStage]) -> None:
    """Postprocess the files one after another; with several files, report failures and continue.

    Raises:
        UserError: After the last file, if any failed; with their exit code if all failures share one.
    """
    descriptions = [describe_tool(tool, options) for tool, options in chain.tools]
    failures = Failures(strict=len(jobs) == 1)
    for job in jobs:
        with failures.collect_errors(str(job.source)):
            if job.is_image:
                run_image(stages, job, descriptions, chain.hides_content)
            else:
                run_video(stages, job, descriptions, chain.run.format, chain.hides_content)
        gc.collect()  # errors and their tracebacks form cycles that keep the memory of a file alive
    if len(jobs) > 1 and not failures.reasons:
        logger.info("All %d files are done", len(jobs))
    failures.raise_if_any(len(jobs), f"{chain.run.input}: ")


FRAMES_FOLDER = "frames"


def write_frames(path: Path, folder: Path, maximum: int | None) -> None:
    """Extract the frames of a video, or its first `maximum` frames, as PNG files into `folder`/frames.

    The folder appears only when all frames are written. The video is read no further than necessary, and few
    frames are in memory at a time.

    Raises:
        OutputError: If `folder`/frames exists.
        MediaError: If the file cannot be read.
    """
    if not path.exists():
        raise MediaError(f"--input {path} does not exist.{explain_missing(path)} Use a video.")
    if path.is_dir():
        raise MediaError(f"--input {path} is a folder. Use a video in it.")
    frames = folder / FRAMES_FOLDER
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
                read_in_thread(shown_frames(path, limit=maximum)) as images,
            ):
                for _ in save_pngs(images, temporary):
                    written += 1
                    bar.update()
    seconds = time.monotonic() - started
    logger.info("%s: %s in %s", frames, format_count(written, "frame"), format_duration(seconds))


# Run stages on a video: decode, stages and encode at the same time, with few images in memory.
def number_tool_tags(existing_tags: Iterable[str], descriptions: Sequence[str]) -> dict[str, str]:
    """Return metadata entries `post_N` that describe this run's tools; N continues the existing numbers."""
    numbers = [int(match[1]) for name in existing_tags if (match := TOOL_TAG.fullmatch(name)) is not None]
    first = max(numbers, default=0) + 1
    return {f"post_{first + index}": replace_surrogates(text) for index, text in enumerate(descriptions)}


SECONDS = Fraction(1)  # duration of a single image, which no tool for images reads


def run_image(
    stages: Sequence[NamedStage], job: FileJob, descriptions: Sequence[str], hides_content: bool = False
) -> None:
    """Run all stages on an image, and write a PNG.

    Tools process the colors of a transparent image. Its alpha channel is resized with it and kept.

    Args:
        stages: The loaded stages.
        job: File to read and file to write.
        descriptions: Descriptions of the tools, for the metadata.
        hides_content: Whether to omit metadata that may contain a thumbnail of the image.

    Raises:
        UserError: If the image cannot be read, processed or written.
    """
    pixels, alpha = split_alpha(read_image(job.source, alpha=True))
    is_opaque = alpha is None or int(alpha.min()) == 255
    height, width = pixels.shape[:2]
    clip = Clip(job.source, width, height, rate=None, frames=1, is_deep=False)
    clips = plan_clips(stages, clip)
    images = list(run_stages(stages, iter([OutputFrame(pixels, Fraction(0), SECONDS)]), clips))
    assert len(images) == 1, f"{len(images)} images of one"  # no stage adds images to a single one
    tags = read_tags(job.source)
    # a thumbnail in the metadata could show what a tool has hidden
    tags = without_images(job.source, tags) if hides_content else tags
    result = in_eight_bits(images[0].pixels)
    result = result if is_opaque else join_alpha(result, alpha)
    write_png(job.output, result, {**tags, **number_tool_tags(tags, descriptions)})
    logger.info("%s", job.output)


def save_pngs(frames: Iterable[OutputFrame], folder: Path) -> Iterator[OutputFrame]:
    """Yield frames, and write each one as a PNG file named after its index."""
    for index, frame in enumerate(frames):
        write_png(folder / f"{index:06d}.png", in_eight_bits(frame.pixels))
        yield frame


def run_video(
    stages: Sequence[NamedStage],
    job: FileJob,
    descriptions: Sequence[str],
    output_format: FormatOptions,
    hides_content: bool = False,
) -> None:
    """Run all stages on a video, and write the result.

    Reading and writing run in separate threads. The output appears only when it is complete.

    Args:
        stages: The loaded stages.
        job: File to read and file to write.
        descriptions: Descriptions of the tools, for the metadata.
        output_format: Format of the output.
        hides_content: Whether a tool hides image content, so that the cover image of the input is not kept.

    Raises:
        UserError: If the video cannot be read, processed or written.
    """
    started = time.monotonic()
    info = source_info(job.source)
    is_deep = output_format.is_deep
    clip = Clip(job.source, info.width, info.height, rate=info.rate, frames=info.frames, is_deep=is_deep)
    clips = plan_clips(stages, clip)
    output_clip = clips[-1]
    write = partial(
        _write_video,
        job=job,
        output_format=output_format,
        codec=resolve_codec(output_format.codec, output_clip.width, output_clip.height),
        rate=output_clip.rate or info.rate,
        keeps_cover=not hides_content,
        tags=number_tool_tags(read_tags(job.source), descriptions),
    )
    num_frames = 0
    with (
        Bar(output_clip.frames, job.source.name, FRAMES) as bar,
        read_in_thread(shown_frames(job.source, is_deep)) as frames,
        write_in_thread(write) as put,
    ):
        for frame in run_stages(stages, frames, clips):
            put(frame)
            del frame  # so that it can be freed while the next one is made
            num_frames += 1
            bar.update()
        if not num_frames:
            raise MediaError(f"{job.source}: no frame is left to write. Use a longer video.")
    _log_result(job.output, num_frames, time.monotonic() - started)


def _log_result(output: Path, num_frames: int, seconds: float) -> None:
    """Log the length and the size of a written video, and how long it took."""
    logger.info(
        "%s: %s in %s, %.3g a second, %s",
        output,
        format_count(num_frames, "frame"),
        format_duration(seconds),
        num_frames / seconds,
        format_size(output.stat().st_size),
    )


def _write_video(
    frames: Iterator[OutputFrame],
    job: FileJob,
    output_format: FormatOptions,
    codec: str,
    rate: Fraction,
    keeps_cover: bool,
    tags: Mapping[str, str],
) -> None:
    """Write the video of a job while frames arrive, and with --keep_pngs also each frame as a PNG file."""
    with ExitStack() as stack:
        if output_format.keep_pngs:
            # A path next to a video that is unused and not reserved by another run: frames, frames_, ...
            folder = job.source.with_name(FRAMES_FOLDER)
            while not stack.enter_context(claim_name(folder)) or os.path.lexists(folder):
                folder = folder.with_name(f"{folder.name}_")
            png_folder = folder
            frames = save_pngs(frames, stack.enter_context(atomic_folder(png_folder)))
        write_timed_video(
            job.output,
            frames,
            rate,
            codec,
            copied_video=job.source,
            with_images=keeps_cover,
            tags=tags,
        )
    if output_format.keep_pngs:
        logger.info("Frames: %s", png_folder)
