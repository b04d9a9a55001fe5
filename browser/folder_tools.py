"""Run a tool on a folder for a page: a try in the background, the whole in the queue, stopped, continued."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from browser.background_jobs import name_background_job
from browser.datasets import find_places
from browser.described_folder import DATASET_FILE, is_described, read_own_file
from browser.folders import find_folder, is_closed, read_media_folder
from browser.jobs import ENDED, WAITING, Job, JobQueue
from browser.runs import FINISHED, RUNNING, Runs
from browser.site import Site
from modules.errors import OptionError
from modules.pages.language import say
from modules.text_files import parse_json, parse_toml

MEDIA_KEYS = ("image_directory", "video_directory")  # of a table of a dataset


def find_tool_job(queue: JobQueue, folder: Path, script: str) -> Job | None:
    """Return the newest job of the queue that runs a script in a folder; None if there is none."""
    jobs = [job for job in queue.jobs() if Path(job.folder) == folder and script in job.line]
    return jobs[-1] if jobs else None


def require_inside(runs: Runs, folder: Path) -> None:
    """Raise OptionError if the dataset of a described folder names files outside the roots."""
    path = folder / DATASET_FILE
    if not path.is_file():
        raise OptionError(say("It is not described yet: press Describe first."))
    outside = [place for place in find_places(path, folder) if not runs.is_below(place)]
    if outside:
        raise OptionError(
            say(
                "%(path)s names %(outside)s, which is outside the folders that are shown.",
                path=path,
                outside=outside[0],
            )
        )


def find_open_folder(runs: Runs, text: str) -> Path | None:
    """Return a folder below the roots that no program of ours writes; None for any other text."""
    folder = find_folder(runs, text)
    return None if folder is None or is_closed(runs, folder) else folder


def read_tables(config: Path) -> list[Mapping[str, Any]]:
    """Return the tables of a dataset's file; none if it cannot be read."""
    try:
        text = read_own_file(config).decode()
        tables = (parse_json(text) if config.suffix == ".json" else parse_toml(text))["datasets"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return [table for table in tables if isinstance(table, dict)] if isinstance(tables, list) else []


def list_table_folders(runs: Runs, config: Path, base: Path) -> list[Path]:
    """Return the real paths of the folders below the roots whose media a dataset's file takes, each once.

    base: where its relative paths begin.
    """
    folders = []
    for table in read_tables(config):
        for key in MEDIA_KEYS:
            folder = find_folder(runs, str(base / table[key])) if isinstance(table.get(key), str) else None
            if folder is not None and not is_closed(runs, folder) and read_media_folder(folder) is not None:
                folders.append(folder)
    return list(dict.fromkeys(folders))


def list_media_folders_of(runs: Runs, folder: Path) -> list[Path]:
    """Return the folders with the media of a folder: those that its dataset names, if it is described."""
    inner = list_table_folders(runs, folder / DATASET_FILE, folder) if is_described(folder) else []
    return inner or [folder]


@dataclass(frozen=True)
class FolderTool:
    """A tool and its jobs. kind: of its background jobs, which try it."""

    site: Site
    script: str
    kind: str

    def find_try(self, folder: Path) -> Job | None:
        return self.site.background_jobs.find(name_background_job(self.kind, folder))

    def find_job(self, folder: Path) -> Job | None:
        return find_tool_job(self.site.queue, folder, self.script)

    def start_try(self, folder: Path, words: Sequence[str]) -> None:
        """Start a try. Raises UserError."""
        self.site.background_jobs.start(name_background_job(self.kind, folder), words, folder, within=folder)

    def start(self, folder: Path, words: Sequence[str]) -> None:
        """Put the tool into the queue. Raises UserError, also if it is there already."""
        job = self.find_job(folder)
        if job is not None and job.state in (WAITING, RUNNING):
            raise OptionError(
                say("job %(id)s of the queue does this: wait until it has ended, or stop it", id=job.id)
            )
        self.site.queue.add_and_begin(words, folder, within=folder)

    def stop(self, folder: Path) -> None:
        """Stop the try and the job of a folder; what waits is taken out of the queue. Raises UserError."""
        self.site.background_jobs.stop(name_background_job(self.kind, folder))
        job = self.find_job(folder)
        if job is not None and job.state == RUNNING:
            self.site.queue.stop(job.id)
        elif job is not None and job.state == WAITING:
            self.site.queue.remove(job.id)

    def go_on(self, folder: Path) -> None:
        """Let a job that was stopped or died wait again: the tool leaves out what it has done."""
        job = self.find_job(folder)
        if job is None or job.state not in ENDED or job.state == FINISHED:
            raise OptionError(say("There is nothing to continue."))
        self.site.queue.retry(job.id)
        if self.site.queue.worker == "":
            self.site.queue.begin_work()


def name_target(folder: Path) -> str:
    """Return the word that names a folder to a tool that runs in it; a described one: its dataset file."""
    return DATASET_FILE if is_described(folder) else "."
