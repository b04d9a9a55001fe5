"""State of released files in the models folder: tasks that use them, missing and unknown files.

Paths come from the catalogue alone; a page names tasks and parts, never files.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from browser.core.bin_folder import FOLDER as BIN
from browser.core.bin_folder import BinFolder
from browser.jobs.background_jobs import BackgroundJobs, name_background_job
from browser.jobs.command_lines import format_command
from browser.jobs.jobs import Job
from browser.runs.runs import RUNNING
from downloads.catalogue import Component, Licence, ModelSet, ReleasedFile, model_sets
from downloads.listing import gigabytes, total_bytes
from modules.errors import OutputError
from modules.pages.language import refusal, say
from modules.progress import read_progress
from modules.text_files import real_path

DOWNLOAD = "download"  # kind of background jobs
DEEPEST = 6  # maximum depth below the models folder
MAX_FILES = 2000  # maximum number of listed files that belong to no part
PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{1,12}\.part")  # see downloads/fetching.py


@dataclass(frozen=True)
class ModelPart:
    """A downloadable part of a model, such as a network or tokenizer, and its state on disk."""

    component: Component
    models: tuple[ModelSet, ...]  # models that use the part
    size_bytes: int  # on disk, including unfinished downloads
    is_there: bool  # all files exist
    has_other_size: bool  # the size of a file differs from the released one

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names, as `family task`, of the models that use the part."""
        return tuple(name_task(model) for model in self.models)

    @property
    def path(self) -> str:
        """Path of the part below the models folder; identifies the part in forms."""
        return str(self.component.path)

    @property
    def shown_size(self) -> str:
        """Size of the part on disk or, if it is missing, of its download."""
        size_bytes = self.size_bytes if self.is_there else self.component.size_bytes
        if size_bytes is None:
            return say("not known") if "LoRA" in self.component.role else say("a few MB")
        return gigabytes(size_bytes)

    @property
    def state(self) -> str:
        """Text about the part's state: on disk, partly on disk, to load, or not the released file."""
        if self.has_other_size:
            return say("judging by its size, a different file than the released one")
        if self.is_there:
            return say("ready")
        return (
            say("%(size_bytes)s of it on disk", size_bytes=gigabytes(self.size_bytes))
            if self.size_bytes
            else say("to download")
        )


@dataclass(frozen=True)
class TaskFiles:
    """A model of the catalogue, named by family and task, and the parts that it consists of."""

    model: ModelSet
    parts: tuple[ModelPart, ...]
    in_fp8: bool  # with text encoders in 8 bits

    @property
    def name(self) -> str:
        """Family and task."""
        return name_task(self.model)

    @property
    def is_there(self) -> bool:
        """Whether all parts are on disk."""
        return all(part.is_there for part in self.parts)

    @property
    def missing(self) -> list[ModelPart]:
        """Parts that are missing or incomplete on disk."""
        return [part for part in self.parts if not part.is_there]

    @property
    def size(self) -> str:
        """Total size of the model's files in GB, as text."""
        return gigabytes(total_bytes(self.model.components))

    @property
    def state(self) -> str:
        """Text that says whether the model's files are on disk, or how much is to be downloaded."""
        if self.is_there:
            return say("ready")
        if len(self.missing) == len(self.parts):
            return say("to download")
        return say(
            "%(total_bytes)s to download",
            total_bytes=gigabytes(total_bytes(part.component for part in self.missing)),
        )

    @property
    def licences(self) -> list[Licence]:
        """Distinct licenses of the model's parts."""
        return list(dict.fromkeys(part.component.licence for part in self.parts))

    def download_words(self, models: Path) -> list[str]:
        """Return the command that downloads the missing parts."""
        words = ["reelsmith", "download", "--family", self.model.family, "--task", self.model.task]
        words += ["--to", str(models.absolute())]
        return [*words, "--fp8_encoders"] if self.in_fp8 else words

    def shown_download(self, models: Path) -> str:
        """Return the download command as the user would type it."""
        return format_command(self.download_words(models))


def name_task(model: ModelSet) -> str:
    """Return the name of a task: its family and task."""
    return f"{model.family} {model.task}"


@functools.cache
def _list_uses() -> dict[tuple[ReleasedFile, ...], tuple[ModelSet, ...]]:
    """Return the models that use each network or tokenizer, by the component's files."""
    # Variants with 8-bit text encoders are included.
    uses: dict[tuple[ReleasedFile, ...], dict[str, ModelSet]] = {}
    for in_fp8 in (False, True):
        for model in model_sets(in_fp8):
            for component in model.components:
                uses.setdefault(component.files, {})[name_task(model)] = model
    return {files: tuple(by_name.values()) for files, by_name in uses.items()}


# parts whose state on disk is already known, by their files
PartCache = dict[tuple[ReleasedFile, ...], ModelPart]


def list_tasks(models: Path, in_fp8: bool = False, part_cache: PartCache | None = None) -> list[TaskFiles]:
    """Return all models of the catalogue, each for one task, with their state in the models folder.

    Args:
        in_fp8: Whether to use the 8-bit text encoders where a model has them.
        part_cache: Cache of the parts that were read earlier; new parts are added to it.
    """
    part_cache = {} if part_cache is None else part_cache  # many tasks share a part
    return [_read_task(model, models, in_fp8, part_cache) for model in model_sets(in_fp8)]


def find_task(
    models: Path, family: str, task: str, in_fp8: bool = False, part_cache: PartCache | None = None
) -> TaskFiles | None:
    """Return the catalogue's model for a task with the state of its files in `models`; None if unknown.

    `in_fp8` selects the 8-bit text encoders; `part_cache` holds the parts that were read earlier.
    """
    part_cache = {} if part_cache is None else part_cache
    for model in model_sets(in_fp8):
        if (model.family, model.task) == (family, task):
            return _read_task(model, models, in_fp8, part_cache)
    return None


def _read_task(model: ModelSet, models: Path, in_fp8: bool, part_cache: PartCache) -> TaskFiles:
    parts = []
    for component in model.components:
        if component.files not in part_cache:
            part_cache[component.files] = read_model_part(component, models)
        part = part_cache[component.files]
        parts.append(replace(part, component=component))  # its option depends on the family
    return TaskFiles(model, tuple(parts), in_fp8)


def read_model_part(component: Component, models: Path) -> ModelPart:
    """Return a downloadable part of a model, such as the VAE, with its size and state on disk."""
    sizes = {file: _read_size(models / file.name) for file in component.files}  # None: the file is missing
    paths = [*(models / file.name for file in component.files), *_list_partial_paths(component, models)]
    # unknown sizes do not count
    has_other_size = any(
        size != file.size_bytes
        for file, size in sizes.items()
        if size is not None and file.size_bytes is not None
    )
    return ModelPart(
        component=component,
        models=_list_uses().get(component.files, ()),
        size_bytes=sum(_read_size(path) or 0 for path in paths),
        is_there=None not in sizes.values(),
        has_other_size=has_other_size or _is_cut_off(component, list(sizes.values())),
    )


def _is_cut_off(component: Component, sizes: Sequence[int | None]) -> bool:
    """Return whether a component's only file is smaller than its tensors; `sizes` are its files' bytes."""
    if len(sizes) != 1 or sizes[0] is None or component.tensor_bytes is None:
        return False
    return sizes[0] < component.tensor_bytes


def _read_size(path: Path) -> int | None:
    """Return the size of a file in bytes, with links followed; None if it does not exist."""
    with contextlib.suppress(OSError):
        if path.is_file():
            return path.stat().st_size
    return None


def _list_partial_paths(component: Component, models: Path) -> list[Path]:
    """Return the paths of a component's unfinished downloads in the models folder."""
    paths = []
    for file in component.files:
        target = models / file.name
        with contextlib.suppress(OSError):
            for path in target.parent.glob(".*.part"):
                match = PARTIAL.fullmatch(path.name)
                if match is not None and match[1] == target.name:
                    paths.append(path)
    return paths


def list_parts_on_disk(models: Path, part_cache: PartCache) -> list[ModelPart]:
    """Return all model parts with files on disk, even unfinished ones, the largest first.

    `part_cache` holds the parts that were read earlier; new parts are added to it.
    """
    parts: PartCache = {}
    for in_fp8 in (False, True):
        for files in list_tasks(models, in_fp8, part_cache):
            parts |= {part.component.files: part for part in files.parts if part.size_bytes}
    return sorted(parts.values(), key=lambda part: -part.size_bytes)


@dataclass(frozen=True)
class UnknownFile:
    """A file in the models folder that no model of the catalogue uses."""

    path: Path  # relative to the models folder
    size_bytes: int


def list_unknown_files(models: Path) -> list[UnknownFile]:
    """Return at most MAX_FILES files in `models` that no known model uses, the largest first."""
    known_names = set()
    for model in (*model_sets(), *model_sets(fp8_encoders=True)):
        for component in model.components:
            known_names |= {file.name for file in component.files}
    files = []
    for path in _walk(models, DEEPEST):
        relative_path = path.relative_to(models)
        if relative_path.as_posix() in known_names or path.name.startswith("."):
            continue
        size = _read_size(path)
        if size is not None:
            files.append(UnknownFile(relative_path, size))
        if len(files) == MAX_FILES:
            break
    return sorted(files, key=lambda file: -file.size_bytes)


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the files of a folder and its subfolders. Links to folders are not followed."""
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if not entry.is_dir(follow_symlinks=False):
            yield Path(entry.path)
        elif depth and entry.name != BIN and not entry.name.startswith("."):
            yield from _walk(Path(entry.path), depth - 1)


def remove_parts(models: Path, files: TaskFiles, chosen: Sequence[str], bin_folder: BinFolder) -> Path:
    """Move parts of a model into the bin, and return the bin's folder that contains them now.

    Args:
        chosen: Paths of the parts to remove, as in `ModelPart.path`.

    Raises:
        OptionError: If a path is not a part of the model, or is not on disk.
        OutputError: If a file cannot be moved.
    """
    parts = {part.path: part for part in files.parts if part.size_bytes}
    for name in chosen:
        if name not in parts:
            raise refusal(
                "%(name)s is not one of the parts of %(title)s on disk. Look at it again.",
                name=name,
                title=say(files.model.title),
            )
    if not chosen:
        raise refusal("Tick what to remove.")
    paths = []
    for name in chosen:
        component = parts[name].component
        paths += [models / file.name for file in component.files]
        paths += _list_partial_paths(component, models)
    paths = [path for path in paths if os.path.lexists(path)]
    for path in paths:
        if not real_path(path.parent).is_relative_to(real_path(models)):
            raise OutputError(f"{path.parent} is a link to a different place than {models}: remove it there")
    folder = bin_folder.move_in(f"models {files.name}", models, paths)
    for path in paths:
        _remove_empty(path.parent, models)
    return folder


def _remove_empty(folder: Path, models: Path) -> None:
    """Remove `folder` and its parents below `models`, as far as they are empty."""
    while folder != models:
        with contextlib.suppress(OSError):
            for lock in folder.glob(".*.lock"):  # lock files of downloads
                lock.unlink()
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


# --- downloads


@dataclass(frozen=True)
class Download:
    """The most recently started download of a model's files, with its progress."""

    files: TaskFiles
    job: Job

    @property
    def family(self) -> str:
        """Family of the model."""
        return self.files.model.family

    @property
    def task(self) -> str:
        """Name of the model's task within its family."""
        return self.files.model.task

    @property
    def state(self) -> str:
        """State of the background job that downloads."""
        return self.job.state

    @property
    def progress_words(self) -> str:
        """Downloaded amount, such as `, 3.1 of 11.2 GB`; "" if it is not known."""
        progress = read_progress(self.job.log.with_suffix(".progress"))
        if progress is None or not progress.total:
            return ""
        return say(
            ", %(done)s of %(total)s GB",
            done=f"{progress.done / 1e9:.1f}",
            total=f"{progress.total / 1e9:.1f}",
        )

    @property
    def fraction(self) -> float | None:
        """Downloaded fraction, from 0 to 1; None if it is not known."""
        progress = read_progress(self.job.log.with_suffix(".progress"))
        return None if progress is None or not progress.total else progress.done / progress.total


def name_download(models: Path, family: str, task: str) -> str:
    """Return the name of the background job that downloads the model of a family's task."""
    return name_background_job(DOWNLOAD, models / family / task)


def find_download(background_jobs: BackgroundJobs, files: TaskFiles, models: Path) -> Download | None:
    """Return the last download of a model's files; None if none was started."""
    job = background_jobs.find(name_download(models, files.model.family, files.model.task))
    return None if job is None else Download(files, job)


def list_downloads(background_jobs: BackgroundJobs, models: Path) -> list[Download]:
    """Return the downloads of this models folder, running ones first."""
    names = _list_logs(background_jobs)
    if not names:
        return []
    downloads = []
    for model in model_sets():
        name = name_download(models, model.family, model.task)
        if name in names:
            download = find_download(background_jobs, TaskFiles(model, (), in_fp8=False), models)
            if download is not None:
                downloads.append(download)
    return sorted(downloads, key=lambda download: download.state != RUNNING)


def _list_logs(background_jobs: BackgroundJobs) -> set[str]:
    """Return the names of all downloads that were ever started."""
    with contextlib.suppress(OSError):
        return {path.stem for path in background_jobs.folder.glob(f"{DOWNLOAD}-*.json")}
    return set()
