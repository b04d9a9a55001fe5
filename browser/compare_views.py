"""Make the page of a comparison, and answer its button."""

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from browser.answers import Form, answer_form, answer_page
from browser.compare import Comparison, asked_cells, fill_cells, plan_jobs, read_comparison
from browser.jobs import JobQueue
from browser.runs import Runs
from browser.views import HERE, POLICY, FileNotes
from modules.atomic_write import write_text
from modules.command import as_typed
from modules.errors import OptionError, UserError
from modules.pages.page import render_page


def compare_page(
    runs: Runs, notes: FileNotes, queue: JobQueue, asked: Mapping[str, Sequence[str]], said: str = ""
) -> str:
    """Return the page of a comparison. said: what went wrong.

    Raises UserError if the queue cannot be read, OSError if a file vanishes.
    """
    comparison = Comparison()
    try:
        with runs.lock:
            comparison, found = read_comparison(runs, asked), runs.look()
    except OptionError as error:
        said, found = str(error), runs.look()
    cells = fill_cells(comparison, notes, asked_cells(queue))
    jobs = plan_jobs(comparison, cells)
    chosen = {source.run.id for source in comparison.sources}
    families = {source.run.model for source in comparison.sources}
    values: dict[str, Any] = {
        "comparison": comparison,
        "cells": cells,
        "chosen": {file.key for file in comparison.columns},
        "titles": [file.title for file in comparison.columns],
        "others": [run for run in found if run.id not in chosen and (not families or run.model in families)],
        "missing": sum(not cell.href and not cell.is_asked for _, *of_row in cells for cell in of_row),
        "commands": [as_typed(words) for words, *_ in jobs],
        "can_write": not queue.read_only,
        "said": said,
    }
    return render_page(HERE / "compare.html", "Compare", values, POLICY)


def compare_routes(runs: Runs, notes: FileNotes, queue: JobQueue) -> list[Route]:
    """Return the routes of comparisons."""

    def show(request: Request) -> Response:
        return answer({name: request.query_params.getlist(name) for name in request.query_params})

    def answer(asked: Form, said: str = "") -> Response:
        try:
            return answer_page(compare_page(runs, notes, queue, asked, said), 422 if said else 200)
        except (OSError, UserError) as error:
            return PlainTextResponse(str(error), 500)

    def make(_: Request, asked: Form) -> Response:
        try:
            with runs.lock:
                comparison = read_comparison(runs, asked)
            for words, path, text in plan_jobs(comparison, fill_cells(comparison, notes, asked_cells(queue))):
                write_text(path, text)
                queue.add(words, comparison.sources[0].working_folder)
        except (OSError, UserError) as error:
            return answer(asked, str(error))
        return RedirectResponse(f"/compare?{urlencode(asked, doseq=True)}", 303)

    return [Route("/compare", show), Route("/compare", answer_form(make), methods=["POST"])]
