"""Choose the files that a run works on, and the names of its results."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from modules.console import format_count
from modules.errors import MediaError, OptionError, OutputError
from modules.media.decoding import is_animation
from modules.media.reading import VIDEO_SUFFIXES, image_suffixes
from modules.output_files import Answer
from postprocessing.chain_options import Chain

logger = logging.getLogger(__name__)

IMAGE_SUFFIX = ".png"
# suffixes of videos, including those from phones, cameras and broadcasts
VIDEOS = VIDEO_SUFFIXES | {".3gp", ".mts", ".m2ts", ".ts", ".vob", ".ogv"}
CAPTIONS = (".txt", ".caption")  # caption files next to the images and clips of datasets
MAX_NAMED_FILES = 3  # maximum number of files that a message names


@dataclass(frozen=True)
class FileJob:
    """An input file and the path of its result."""

    source: Path
    output: Path
    is_image: bool


def plan_jobs(chain: Chain, ask: Callable[[str], Answer | None]) -> list[FileJob]:
    """Return the jobs sorted by name; empty if results exist and the user does not want to replace them.

    Args:
        chain: The run with its tools.
        ask: Asks the user about existing results; returns None if there is nobody to ask.

    Raises:
        OptionError: If a file is missing, or if a result would replace an input or another result.
        MediaError: If an input is not a supported file.
        OutputError: If results exist and there is nobody to ask.
    """
    sources = list_sources(chain)
    # results next to the files of a dataset would become part of it
    if chain.run.output is None:
        for path in sources:
            _check_caption(path, chain)
    jobs = [FileJob(path, name_output(chain, path), is_image(path)) for path in sources]
    if chain.needs_video and any(job.is_image for job in jobs):
        tool = next(tool for tool, _ in chain.tools if tool.needs_video)
        raise OptionError(
            f"{tool.name} works between the frames of a video, and --input {chain.run.input} is a single "
            "image. Use a video."
        )
    for job in jobs:
        _check_output(job, jobs)
    # Raise OptionError if two results would be written to the same file
    source_by_output: dict[str, Path] = {}
    for job in jobs:
        # file systems of Windows and macOS ignore case
        earlier = source_by_output.setdefault(str(job.output).casefold(), job.source)
        if earlier is not job.source:
            raise OutputError(
                f"{earlier.name} and {job.source.name} would both be written to {job.output}. "
                "Rename one of them, or move it to another folder."
            )
    return jobs if chain.run.yes else resolve_existing(jobs, ask)


def _check_caption(path: Path, chain: Chain) -> None:
    """Raise OptionError if a file has a caption: results must not be written into a dataset's folder."""
    caption = next(filter(Path.is_file, map(path.with_suffix, CAPTIONS)), None)
    if caption is not None:
        raise OptionError(
            f"{path} has a caption, {caption.name}: its folder looks like a data set, and a training "
            "would take the results too. Pass another folder: --output "
            f"{path.parent.name or 'made'}_{chain.name_suffix}/"
        )


def _check_output(job: FileJob, jobs: Sequence[FileJob]) -> None:
    """Raise OutputError if a result would replace an input or a folder, even under a different name."""
    if job.output.is_dir():
        raise OutputError(f"{job.output} is a folder. Choose another --output.")
    if not job.output.exists():
        return
    for input_job in jobs:
        if job.output.samefile(input_job.source):
            name = "the input" if input_job is job else f"the input {input_job.source}"
            raise OutputError(f"{job.output} is {name}, which is never overwritten. Choose another --output.")


def _list_media_files(folder: Path) -> list[Path]:
    """Return the videos, GIFs and images of a folder, sorted; hidden files are left out."""
    suffixes = VIDEOS | {".gif"} | image_suffixes()
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes]
    return [path for path in files if path.is_file() and not path.name.startswith(".")]


def list_sources(chain: Chain) -> list[Path]:
    """Return the input file, or the media files of the input folder, except results of the same tools."""
    folder = chain.run.input
    if not folder.is_dir():
        return [folder]
    ending = f"_{chain.name_suffix}"
    media_files = _list_media_files(folder)
    if chain.needs_video:
        media_files = [path for path in media_files if not _is_still(path)]
    # `_rename_outputs` appends underscores to the names of results
    sources = [path for path in media_files if not path.stem.rstrip("_").endswith(ending)]
    if not sources:
        kinds = "video" if chain.needs_video else "video or image"
        results = f", except {len(media_files)} with {ending}, which are results" if media_files else ""
        raise MediaError(f"--input {folder} is a folder without a {kinds}{results}. Pass another folder.")
    num_results = len(media_files) - len(sources)
    if num_results:
        logger.info(
            "%s with names in %s: left out because they are results",
            format_count(num_results, "file"),
            ending,
        )
    return sources


def is_image(path: Path) -> bool:
    """Return whether a file is a single image, judged by its suffix; animations count as videos."""
    try:
        return path.suffix.lower() in image_suffixes() and not is_animation(path)
    except MediaError:  # reading the file will report what is wrong
        return True


def _is_still(path: Path) -> bool:
    try:
        return path.suffix.lower() not in VIDEOS and not is_animation(path)
    except MediaError:
        return is_image(path)


def name_output(chain: Chain, source: Path) -> Path:
    """Return the path of the result for an input file.

    Raises:
        OptionError: If the result cannot be written to --output.
    """
    run = chain.run
    suffix = IMAGE_SUFFIX if is_image(source) else run.format.suffix
    default_name = f"{source.stem}_{chain.name_suffix}{suffix}"
    output = run.output_path
    if output is None:
        return source.with_name(default_name)
    if output.is_dir() or run.is_output_folder:
        return output / default_name
    has_media_suffix = output.suffix.lower() in VIDEOS | image_suffixes()
    if run.input.is_dir():
        if has_media_suffix or output.exists():
            raise OptionError(
                f"--output {output} is a file, and --input {run.input} a folder. Pass a folder to --output."
            )
        return output / default_name
    # the output format determines the suffix, even if the user typed another one
    return output.with_suffix(suffix) if has_media_suffix else output.with_name(f"{output.name}{suffix}")


def log_suffix(chain: Chain, jobs: Sequence[FileJob]) -> None:
    """Log a message if results get a different suffix than the user typed."""
    output_format = chain.run.format
    output = chain.run.output_path
    if any(not job.is_image for job in jobs) and output_format.suffix != f".{output_format.container}":
        logger.warning(
            "--codec %s is written as %s because %s does not support it",
            output_format.codec,
            output_format.suffix,
            output_format.container,
        )
    if output is None or len(jobs) != 1 or jobs[0].output.parent != output.parent:
        return
    if jobs[0].output.name != output.name:
        reason = "images are PNG files" if jobs[0].is_image else f"--container is {output_format.container}"
        logger.info("The result is written to %s: %s", jobs[0].output, reason)


def resolve_existing(jobs: Sequence[FileJob], ask: Callable[[str], Answer | None]) -> list[FileJob]:
    """Ask the user about existing results, and return the jobs to run.

    Raises:
        OutputError: If a result exists and there is nobody to ask.
    """
    jobs_with_result = [job for job in jobs if os.path.lexists(job.output)]
    if not jobs_with_result:
        return list(jobs)
    # The paths of the first few output files, for a message
    names = ", ".join(str(job.output) for job in jobs_with_result[:MAX_NAMED_FILES])
    names = (
        f"{names} and {len(jobs_with_result) - MAX_NAMED_FILES} more"
        if len(jobs_with_result) > MAX_NAMED_FILES
        else names
    )
    is_one = len(jobs_with_result) == 1
    exist = f"{names} exists already" if is_one else f"{names} exist already"
    answer = ask(f"{exist}. Overwrite")
    if answer is None:
        raise OutputError(f"{exist}. Use --yes to overwrite, or choose another --output.")
    if answer == "overwrite":
        return list(jobs)
    if answer == "leave":
        logger.info("%s %s as before", names, "stays" if is_one else "stay")
        return [job for job in jobs if job not in jobs_with_result]
    # the third answer: write under other names
    # The jobs with new names for results that exist already
    used_outputs = {job.output for job in jobs if job not in jobs_with_result}
    renamed = []
    for job in jobs:
        output = job.output
        while job in jobs_with_result and (os.path.lexists(output) or output in used_outputs):
            output = output.with_name(f"{output.stem}_{output.suffix}")
        used_outputs.add(output)
        renamed.append(replace(job, output=output))
    return renamed
