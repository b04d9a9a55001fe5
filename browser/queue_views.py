"""Make the pages of the queue and of comparisons, and handle their buttons."""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil  # comes with accelerate
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from browser import compare
from browser.answers import Form, answer_form, answer_page
from browser.jobs import ENDED, ENTRY, QUEUE, WAITING, Job, JobQueue
from browser.launch import check_options, command_part, split_folder, split_words
from browser.runs import RUNNING, Glance, Runs, is_living
from browser.views import HERE, PLAYED, POLICY, FileNotes
from modules.atomic_write import write_text
from modules.command import as_typed
from modules.console import in_words
from modules.control_codes import escape_control_codes
from modules.errors import OptionError, UserError
from modules.pages.page import render_page

EXAMPLE = ["reelsmith run my_clips", "cd my_clips && " + as_typed(["python", "wan_train_network.py"])]
SHORT_SECONDS = 60  # the output of a job that ran no longer is shown without a click
NUMBER = re.compile(r"[0-9]{1,15}")  # of a job


def compare_routes(runs: Runs, notes: FileNotes, queue: JobQueue) -> list[Route]:
    """Return the routes of comparisons."""

    def page(asked: Form, said: str) -> str:
        """Return the page of a comparison. said: an error message to show.

        Raises UserError if the queue cannot be read, OSError if a file vanishes.
        """
        comparison = compare.Comparison()
        try:
            with runs.lock:
                comparison, found = compare.read_comparison(runs, asked), runs.look()
        except OptionError as error:
            said, found = str(error), runs.look()
        cells = compare.fill_cells(comparison, notes, compare.asked_cells(queue))
        chosen = {source.run.id for source in comparison.sources}
        families = {source.run.model for source in comparison.sources}
        others = [one for one in found if one.id not in chosen and (not families or one.model in families)]
        values: dict[str, Any] = {
            "comparison": comparison,
            "cells": cells,
            "chosen": {file.key for file in comparison.columns},
            "titles": [file.title for file in comparison.columns],
            "others": others,
            "missing": sum(not cell.href and not cell.is_asked for _, *of_row in cells for cell in of_row),
            "plays": any(cell.href.endswith(PLAYED) for of_row in cells for cell in of_row),
            "commands": [as_typed(words) for words, *_ in compare.plan_jobs(comparison, cells)],
            "is_of_here": all(source.run.is_of_here for source in comparison.sources),
            "can_write": not queue.read_only,
            "said": said,
        }
        return render_page(HERE / "compare.html", "Compare", values, POLICY)

    def answer(asked: Form, said: str = "") -> Response:
        try:
            return answer_page(page(asked, said), 422 if said else 200)
        except (OSError, UserError) as error:
            return PlainTextResponse(str(error), 500)

    def show(request: Request) -> Response:
        return answer({name: request.query_params.getlist(name) for name in request.query_params})

    def make(_: Request, asked: Form) -> Response:
        try:
            with runs.lock:
                comparison = compare.read_comparison(runs, asked)
            for words, path, text in compare.plan_jobs(
                comparison, compare.fill_cells(comparison, notes, compare.asked_cells(queue))
            ):
                write_text(path, text)
                queue.add(words, comparison.sources[0].working_folder)
        except (OSError, UserError) as error:
            return answer(asked, str(error))
        return RedirectResponse(f"/compare?{urlencode(asked, doseq=True)}", 303)

    return [Route("/compare", show), Route("/compare", answer_form(make), methods=["POST"])]


def is_of(run: Glance, job: Job) -> bool:
    """Return whether a job's process has started this running training."""
    if run.state != RUNNING or run.start is None or not job.process or not is_living(run.start.process):
        return False
    with contextlib.suppress(psutil.Error, KeyError):  # it has just ended
        parents = psutil.Process(run.start.process["number"]).parents()
        return job.process["number"] in {parent.pid for parent in parents}
    return False


def when_begun(job: Job) -> tuple[float, int]:
    return (job.process or {}).get("born", 0), job.id


def find_draft(runs: Runs, asked: Mapping[str, str]) -> tuple[str, Glance | None]:
    """Return a command for the user to edit, "" if none is asked for, and the run that it is from.

    asked: `run`, and either `command`, the index of one of its commands, or `line`, the edited command.
    """
    if "line" in asked:
        return asked["line"], runs.find(asked.get("run", ""))
    place = asked.get("command", "")
    run = runs.find(asked.get("run", "")) if NUMBER.fullmatch(place) else None
    with contextlib.suppress(OSError):
        for command in runs.open(run).story.commands[int(place) :] if run else ():
            return escape_control_codes(command.bash), run
    return "", None


def read_jobs(text: str, run: Glance | None) -> list[tuple[list[str], Path]]:
    """Return the words and the folder of each command in a text; all are checked before the first is added.

    run: the run that the commands are from, if any. Raises UserError.
    """
    lines = [line.strip() for line in ENTRY.findall(text.replace("\r\n", "\n"))]
    jobs = []
    for line in lines:
        if line and not line.startswith("#"):
            words = split_words(command_part(line))
            base = compare.working_folder(run, compare.group_options(words)) if run else Path.cwd()
            _, folder = split_folder(line, base)
            jobs.append((words, folder))
    for words, folder in jobs:
        check_options(words, folder)
    return jobs


def queue_routes(runs: Runs, queue: JobQueue) -> list[Route]:
    changes = {
        "up": lambda number: queue.move(number, -1),
        "down": lambda number: queue.move(number, 1),
        **{"stop": queue.stop, "retry": queue.retry, "remove": queue.remove},
    }

    def answer(said: str, asked: Mapping[str, str] | None = None) -> Response:
        """Return the page of the queue. said: an error message to show. asked: see `find_draft`."""
        try:
            jobs = queue.jobs()
            ended = sorted((job for job in jobs if job.state in ENDED), key=when_begun, reverse=True)
            running = [job for job in jobs if job.state == RUNNING]
            with runs.lock:
                trainings = {job.id: run for run in runs.look() for job in running if is_of(run, job)}
                draft, draft_of = find_draft(runs, asked or {})
            values = {
                "running": running,
                "trainings": trainings,
                "waiting": [job for job in jobs if job.state == WAITING],
                "ended": ended,
                "worker": queue.worker,
                "can_write": not queue.read_only,
                "said": said or queue.problem,
                "file": queue.folder / QUEUE,
                "in_words": in_words,
                "draft": draft,
                "draft_of": draft_of,
                "example": EXAMPLE,
                "here": Path.cwd(),
                "is_paused": queue.worker == "",
                "short": SHORT_SECONDS,
            }
            page = render_page(HERE / "queue.html", "Queue", values, POLICY)
            return answer_page(page, 422 if said else 200)
        except UserError as error:
            return PlainTextResponse(str(error), 500)

    def show(request: Request) -> Response:
        return answer("", request.query_params)

    def change(request: Request, form: Form) -> Response:
        what = request.path_params["what"]
        number, text = ("".join(form.get(name, ())) for name in ("id", "line"))
        try:
            if what in ("work", "pause"):
                (queue.begin_work if what == "work" else queue.end_work)()
            elif what == "add":
                with runs.lock:
                    run = runs.find("".join(form.get("run", ())))
                for job in read_jobs(text, run):
                    queue.add(*job)
            elif what == "edit" and NUMBER.fullmatch(number):
                queue.edit(int(number), text)
            elif what in changes and NUMBER.fullmatch(number):
                changes[what](int(number))
            else:
                return PlainTextResponse("There is no such request.", 404)
        except UserError as error:
            refused = {"line": text, "run": "".join(form.get("run", ()))} if what == "add" else {}
            return answer(str(error), refused)
        return RedirectResponse("/queue", 303)

    return [Route("/queue", show), Route("/queue/{what}", answer_form(change), methods=["POST"])]
