"""The page of the queue: its jobs, their buttons, and commands that are reviewed before they are added."""

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from browser.core.responses import Form, answer_form, answer_page, answer_text, answer_unknown
from browser.core.server_state import Site
from browser.core.templates import show_page
from browser.folders.folders import find_folder
from browser.jobs.jobs import ENDED, QUEUE, WAITING, JobQueue, list_earlier
from browser.jobs.typed_jobs import EXAMPLE, read_jobs
from browser.runs.run_start import TrackedRuns, is_started_by
from browser.runs.runs import RUNNING, Runs, RunSummary
from modules.control_codes import escape_control_codes
from modules.errors import UserError
from modules.pages.language import refusal, say, say_duration
from training.reports.present_files import current_commands

SHORT_SECONDS = 60  # the output of jobs that ran at most this long is shown without a click
JOB_NUMBER = re.compile(r"[0-9]{1,15}")  # number of a job


class EditedCommand(NamedTuple):
    """A command that the user edits, and the run from which it comes."""

    line: str = ""
    run: RunSummary | None = None


def find_edited_command(runs: Runs, query: Mapping[str, str]) -> EditedCommand:
    """Return the command line for the edit field of the Queue page; an empty one if the query names none.

    The query contains `run`, and either `command`, the index of one of the run's commands, or `line`, an
    edited command.
    """
    if "line" in query:
        return EditedCommand(query["line"], runs.find(query.get("run", "")))
    index_text = query.get("command", "")
    if not JOB_NUMBER.fullmatch(index_text):
        return EditedCommand()
    run = runs.find(query.get("run", ""))
    if run is None:
        return EditedCommand()
    with contextlib.suppress(OSError):
        commands = current_commands(runs.open(run).run_history, run.history.parent, run.name)
        index = int(index_text)
        if index < len(commands):
            return EditedCommand(escape_control_codes(commands[index].bash), run)
    return EditedCommand()


def queue_routes(site: Site) -> list[Route]:
    """Return the routes of the queue."""
    pages = QueuePages(site.runs, site.queue, site.tracked_runs)
    return [
        Route("/queue", pages.show),
        Route("/queue/{what}", answer_form(pages.change), methods=["POST"]),
    ]


class QueuePages:
    """Shows the Queue page, and handles its buttons."""

    def __init__(self, runs: Runs, queue: JobQueue, tracked_runs: TrackedRuns) -> None:
        self.runs = runs
        self.queue = queue
        self.tracked_runs = tracked_runs
        self.changes: dict[str, Callable[[int], None]] = {
            "up": lambda number: queue.move(number, -1),
            "down": lambda number: queue.move(number, 1),
            "stop": queue.stop,
            "retry": queue.retry,
            "remove": queue.remove,
        }

    def show(self, request: Request) -> Response:
        """Return the Queue page, with the command in the query for editing."""
        return self.answer("", request.query_params)

    def answer(self, error: str, query: Mapping[str, str]) -> Response:
        """Return the Queue page with an error; `query` may name a command to show for editing."""
        try:
            return answer_page(self.page(error, query), 422 if error else 200)
        except UserError as problem:
            return answer_text(str(problem), 422 if error else 500)

    def page(self, error: str, query: Mapping[str, str]) -> str:
        """Return the HTML of the Queue page. Raises UserError if the queue cannot be read."""
        queue_state = self.queue.now()
        jobs = queue_state.jobs
        worker = queue_state.worker  # the server that runs the jobs; "" if the queue is paused
        running_jobs = [job for job in jobs if job.state == RUNNING]
        ended_jobs = [job for job in jobs if job.state in ENDED]
        with self.runs.lock:
            # the active training run that each job has started
            trainings = {}
            for run in self.runs.list_all():
                for job in running_jobs:
                    if is_started_by(run, job):
                        trainings[job.id] = run
            edited_command = find_edited_command(self.runs, query)
        shown_runs = self.tracked_runs.find_job_states(jobs)
        values = {
            "running": running_jobs,
            "trainings": trainings,
            "shown_runs": shown_runs,
            "waiting": [job for job in jobs if job.state == WAITING],
            "ended": sorted(ended_jobs, key=lambda job: (job.born, job.id), reverse=True),
            "worker": worker,
            "can_write": not self.queue.read_only,
            "message": error or self.queue.problem,
            "file": self.queue.folder / QUEUE,
            "in_words": say_duration,
            "draft": edited_command.line,
            "draft_of": edited_command.run,
            "example": EXAMPLE,
            "here": Path.cwd(),
            "is_paused": worker == "",
            "short": SHORT_SECONDS,
        }
        return show_page("queue/queue.html", say("Queue"), values)

    def change(self, request: Request, form: Form) -> Response:
        """Handle a pressed button of the Queue page, and show the page again."""
        action = request.path_params["what"]
        line = "".join(form.get("line", ()))
        run_id = "".join(form.get("run", ()))
        try:
            number = "".join(form.get("id", ()))
            if not self.carry_out(action, number, line, run_id, "".join(form.get("within", ()))):
                return answer_unknown()
        except UserError as error:
            query = {"line": line, "run": run_id} if action == "add" else {}
            return self.answer(str(error), query)
        return RedirectResponse("/queue", 303)

    def add_jobs(self, lines: str, run_id: str, within: str) -> None:
        """Add command lines to the queue. The arguments are the same as for `carry_out`."""
        with self.runs.lock:
            run = self.runs.find(run_id)
        writable_folder = find_folder(self.runs, within)  # the jobs may write only below this folder
        if within and writable_folder is None:
            raise refusal("%(within)s: there is no such folder inside those that are shown.", within=within)
        for argv, folder in read_jobs(lines, run, list_earlier(self.queue.jobs())):
            self.queue.add(argv, folder, within=writable_folder)

    def carry_out(self, action: str, number: str, line: str, run_id: str, within: str) -> bool:
        """Handle a pressed button of the Queue page; return False if button or job number is not valid.

        Args:
            number: Number of a job, as text.
            line: Command line to add or to edit.
            run_id: Id of the run from which the line comes; "" if it was typed.
            within: Folder of the run.toml from which the line was made; "" if it was typed.

        Raises:
            UserError: If the change is rejected.
        """
        if action == "work":
            self.queue.begin_work()
        elif action == "pause":
            self.queue.end_work(pauses=True)
        elif action == "add":
            self.add_jobs(line, run_id, within)
        elif not JOB_NUMBER.fullmatch(number):  # all buttons below belong to a job
            return False
        elif action == "edit":
            self.queue.edit(int(number), line)
        elif action in self.changes:
            self.changes[action](int(number))
        else:
            return False
        return True
