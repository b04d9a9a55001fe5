"""The line below the links of every page: running processes, graphics cards, and free disk space."""

import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from browser.core.graphics_cards import EVERY_SECONDS, CardReader, GraphicsCard
from browser.core.responses import answer_template
from browser.core.server_command import make_server_argv
from browser.core.server_state import Site
from browser.core.state_names import name_state
from browser.jobs.command_lines import format_command
from browser.jobs.jobs import WAITING
from browser.jobs.model_files import list_downloads
from browser.runs.run_start import is_started_by, read_preparation_state, read_run_state
from browser.runs.runs import DIED, FINISHED, RUNNING, STOPPED, RunSummary, is_process_alive
from downloads.listing import gigabytes
from modules.atomic_write import free_bytes
from modules.errors import UserError
from modules.pages.language import join, say, say_count
from training.reports.history import BEFORE_TRAINING

RECENT_SECONDS = 600.0  # for which pages report that a run has ended
MAX_LINE_LENGTH = 60  # characters of a command or a name


@dataclass(frozen=True)
class RunningThing:
    """A running process as the status line describes it, and the page that shows its progress."""

    text: str
    address: str


@dataclass(frozen=True)
class MachineInfo:
    """State of this machine's GPUs and processes, for the status line on every page."""

    running: Sequence[RunningThing] = ()
    cards: Sequence[GraphicsCard] = ()
    free: str = ""  # free space on the disk of the first root
    ended: Sequence[tuple[str, str]] = ()  # runs ended in the last minutes: key and description
    command: str = ""  # command that starts the page again with the same options


@dataclass
class MachineLine:
    """Collects the GPUs and running processes for the status line of each page."""

    site: Site
    cards: CardReader = field(default_factory=lambda: CardReader(shutil.which("nvidia-smi")))
    _info: MachineInfo = field(default_factory=MachineInfo)
    _next: float = 0.0
    _mark: Sequence[tuple[str, str, str]] = ()  # state of each run in `_info`
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def show(self, _: Request) -> Response:
        """Respond with the HTML of the status line about GPUs and running processes."""
        values = {"facts": self.read()}
        return answer_template("machine/machine.html", "", values)

    def read(self) -> MachineInfo:
        """Return the state of the machine.

        GPU values may be a few seconds old; runs are up to date.
        """
        with self._lock:
            mark = [(run.id, run.state, run.doing) for run in self.site.runs.list_all()]
            if time.monotonic() >= self._next or mark != self._mark:
                self._mark = mark
                self._info = self._gather()
                self._next = time.monotonic() + EVERY_SECONDS
            return self._info

    def _gather(self) -> MachineInfo:
        """Collect the content of the status line: processes, GPUs, free disk space and ended runs."""
        try:
            free = gigabytes(free_bytes(self.site.runs.root_folders[0]))
        except OSError:
            free = ""
        command = format_command(make_server_argv(self.site), Path.cwd())
        runs = self.site.runs.list_all()
        return MachineInfo(
            running=self.list_running(runs),
            cards=self.cards.read(),
            free=free,
            ended=list_ended(runs, time.time()),
            command=command,
        )

    def list_running(self, all_runs: Sequence[RunSummary]) -> list[RunningThing]:
        """Return this machine's active work: training runs, other queued jobs, render jobs and downloads."""
        active_runs = [run for run in all_runs if run.state == RUNNING and run.start is not None]
        runs = [run for run in active_runs if run.start and is_process_alive(run.start.process)]
        active_work = [_describe_run(run) for run in runs]
        active_work += self._list_jobs(runs)
        render_job = self.site.render_worker.current
        if render_job is not None:
            parts = [say("making with %(title)s", title=render_job.shown_title)]
            if render_job.steps:
                parts.append(
                    say(
                        "step %(done)s of %(steps)s",
                        done=render_job.done,
                        steps=render_job.steps,
                    )
                )
            active_work.append(RunningThing(join(", ", parts), "/generate"))
        for download in list_downloads(self.site.background_jobs, self.site.models):
            if download.state == RUNNING:
                text = say(
                    "loading %(title)s%(progress_words)s",
                    title=say(download.files.model.title),
                    progress_words=download.progress_words,
                )
                active_work.append(RunningThing(text, "/models#loading"))
        return active_work

    def _list_jobs(self, runs: Sequence[RunSummary]) -> list[RunningThing]:
        """Describe the running jobs that are not among `runs`, and the waiting jobs of a paused queue."""
        try:
            queue_state = self.site.queue.now()
        except UserError:  # the queue's page reports it
            return []
        active_work = []
        for job in queue_state.jobs:
            if job.state == RUNNING and not any(is_started_by(run, job) for run in runs):
                active_work.append(
                    RunningThing(
                        say("job %(id)s: %(line)s", id=job.id, line=_shorten_line(job.line)),
                        f"/queue#j{job.id}",
                    )
                )
        num_waiting = sum(job.state == WAITING for job in queue_state.jobs)
        if queue_state.worker == "" and num_waiting:
            text = say_count(
                num_waiting, "%(n)s waits: the queue is paused", "%(n)s wait: the queue is paused"
            )
            active_work.append(RunningThing(text, "/queue"))
        return active_work


def list_ended(runs: Sequence[RunSummary], now: float) -> list[tuple[str, str]]:
    """Return (key, text) for each run that ended in the last minutes; the text contains its name and state.

    `now` is the time in seconds since 1970.
    """
    return [
        (
            f"{run.id} {run.changed:.0f}",
            join(": ", (run.name.removesuffix(BEFORE_TRAINING), name_state(run.state))),
        )
        for run in runs
        if now - run.changed < RECENT_SECONDS and run.state in (FINISHED, STOPPED, DIED)
    ]


def _describe_run(run: RunSummary) -> RunningThing:
    """Describe an active training run, or the downloads and caching before it, with a link to its page."""
    title = _shorten_line(run.name.removesuffix(BEFORE_TRAINING))
    if run.name.endswith(BEFORE_TRAINING):
        return RunningThing(
            join(", ", (title, read_preparation_state(run).text)),
            f"/run/{run.id}/",
        )
    parts = [title]
    if run.step or not run.doing:
        parts.append(
            say("step %(step)s of %(total_steps)s", step=f"{run.step:,}", total_steps=f"{run.total_steps:,}")
        )
    if run.doing:
        parts.append(read_run_state(run).text)
    elif run.left:
        parts.append(say("%(left)s left", left=run.left))
    return RunningThing(join(", ", parts), f"/run/{run.id}/")


def _shorten_line(text: str) -> str:
    """Return the beginning of a text as one line."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_LINE_LENGTH else f"{line[:MAX_LINE_LENGTH]} …"


def machine_routes(site: Site) -> list[Route]:
    """Return the routes of the status line."""
    return [Route("/machine", MachineLine(site).show)]
