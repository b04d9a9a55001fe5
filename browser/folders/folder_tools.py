"""Run a tool on a folder for a page: try it in the background, run it in the queue, stop and continue it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from browser.core.server_state import Site
from browser.folders.captioning import read_tries
from browser.jobs.background_jobs import name_background_job
from browser.jobs.jobs import ENDED, WAITING, Job
from browser.runs.runs import FINISHED, RUNNING
from modules.pages.language import refusal


def find_tool_job(jobs: Sequence[Job], folder: Path, script: str) -> Job | None:
    """Return the newest job of the queue that runs a script in a folder; None if there is none."""
    folder_jobs = [job for job in jobs if Path(job.folder) == folder and script in job.line]
    return folder_jobs[-1] if folder_jobs else None


@dataclass(frozen=True)
class FolderTool:
    """A command-line tool, such as the tagger, and its jobs in folders. `kind` names its dry-run jobs."""

    site: Site
    script: str
    kind: str

    def find_job(self, folder: Path) -> Job | None:
        """Return the newest job of the queue that runs the tool in a folder; None if there is none."""
        return find_tool_job(self.site.queue.jobs(), folder, self.script)

    def collect_progress(self, folder: Path) -> dict[str, Any]:
        """Return the template values about the tool's last dry run and queued job in a folder."""
        try_job = self.site.background_jobs.find(name_background_job(self.kind, folder))
        return {
            "try_job": try_job,
            "tries": read_tries(try_job, folder),
            "job": self.find_job(folder),
            "is_paused": self.site.queue.worker == "",
            "queue_problem": self.site.queue.problem,
        }

    def handle_button(self, folder: Path, action: str, make_argv: Callable[[bool], Sequence[str]]) -> bool:
        """Start, try, stop or resume a tool on a folder; return False if `action` is none of these.

        `make_argv` returns the command line; its argument is True for a dry run. Raises UserError if the
        command cannot be started.
        """
        match action:
            case "try":
                name = name_background_job(self.kind, folder)
                self.site.background_jobs.start(name, make_argv(True), folder, within=folder)
            case "write":
                self.start(folder, make_argv(False))
            case "stop":
                self.stop(folder)
            case "go_on":
                self.resume(folder)
            case _:
                return False
        return True

    def start(self, folder: Path, argv: Sequence[str]) -> None:
        """Add the tool's command to the queue. Raises UserError, for example if it is already queued."""
        job = self.find_job(folder)
        if job is not None and job.state in (WAITING, RUNNING):
            raise refusal(
                "job %(id)s of the queue is already doing this: wait until it has ended, or stop it",
                id=job.id,
            )
        self.site.queue.add_and_begin(argv, folder, within=folder)

    def stop(self, folder: Path) -> None:
        """Stop the tool's dry run and its queued job in a folder; a waiting job is removed from the queue.

        Raises UserError if the queue cannot be changed.
        """
        self.site.background_jobs.stop(name_background_job(self.kind, folder))
        job = self.find_job(folder)
        if job is not None and job.state == RUNNING:
            self.site.queue.stop(job.id)
        elif job is not None and job.state == WAITING:
            self.site.queue.remove(job.id)

    def resume(self, folder: Path) -> None:
        """Queue a stopped or failed job again; the tool skips files that it has already processed."""
        job = self.find_job(folder)
        if job is None or job.state not in ENDED or job.state == FINISHED:
            raise refusal("There is nothing to continue.")
        self.site.queue.retry(job.id)
        if self.site.queue.worker == "":
            self.site.queue.begin_work()
