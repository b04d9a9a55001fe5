"""The page Compare: samples and clips of selected files, and jobs that generate the missing clips."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from browser import compare
from browser.command_lines import format_command
from browser.jobs import JobQueue
from browser.responses import Form, answer_form, answer_page, answer_text, read_query
from browser.run_views import HERE, PLAYED, POLICY, FileNotes
from browser.runs import Runs, RunSummary
from modules.atomic_write import write_text
from modules.errors import OptionError, UserError
from modules.pages.language import say
from modules.pages.page import render_page

FIELDS = ("run", "file", "prompt", "more")  # fields of the form


class ComparePages:
    """Shows comparisons, and queues the jobs that generate their clips."""

    def __init__(self, runs: Runs, notes: FileNotes, queue: JobQueue) -> None:
        self.runs = runs
        self.notes = notes
        self.queue = queue

    def show(self, request: Request) -> Response:
        """Return the page of the comparison in the query of the address."""
        return self.answer(read_query(request))

    def make(self, _: Request, form: Form) -> Response:
        """Queue jobs that generate the missing clips of a comparison, and show its page again."""
        try:
            with self.runs.lock:
                comparison = compare.read_comparison(self.runs, form)
            if not comparison.rows:
                raise OptionError(say("Tick a prompt, or type one, to see what each file makes of it."))
            for job in compare.plan_jobs(comparison, self.fill_cells(comparison)):
                write_text(job.prompt_file, job.prompts)
                # the options come from a history, which another person may have written
                source = comparison.sources[0]
                self.queue.add(job.argv, source.working_folder, within=source.run.history.parent)
        except (OSError, UserError) as error:
            return self.answer(form, str(error))
        fields = {name: form[name] for name in FIELDS if name in form}
        return RedirectResponse(f"/compare?{urlencode(fields, doseq=True)}", 303)

    def answer(self, form: Form, error: str = "") -> Response:
        """Return the page of the comparison that a form requests; `error` is a message to show on it."""
        status = 422 if error else 200
        comparison = compare.Comparison()
        try:
            with self.runs.lock:
                try:
                    comparison = compare.read_comparison(self.runs, form)
                except OptionError as problem:
                    error = str(problem)
                runs = self.runs.list_all()
            return answer_page(self.page(comparison, runs, error), status)
        except (OSError, UserError) as problem:
            return answer_text(str(problem), 422 if error else 500)

    def fill_cells(self, comparison: compare.Comparison) -> list[list[compare.ShownClip]]:
        """Return the clips of a comparison: one list for each prompt, with a cell for each file."""
        return compare.fill_cells(comparison, self.notes, compare.find_queued_clips(self.queue))

    def page(self, comparison: compare.Comparison, runs: Sequence[RunSummary], error: str) -> str:
        """Return the HTML of a comparison. `runs` are all runs that can be selected.

        Raises:
            UserError: If the queue cannot be read.
            OSError: If a file is removed while the page is built.
        """
        cells = self.fill_cells(comparison)
        compared = {source.run.id for source in comparison.sources}
        models = {source.run.model for source in comparison.sources}
        other_runs = [run for run in runs if run.id not in compared and (not models or run.model in models)]
        values: dict[str, Any] = {
            "comparison": comparison,
            "cells": cells,
            "chosen": {file.key for file in comparison.columns},
            "titles": [file.step_title for file in comparison.columns],
            "others": other_runs,
            "bare": compare.find_without_files(other_runs),  # ids of runs that have no LoRA file
            "missing": count_missing(cells),
            "plays": any(cell.href.endswith(PLAYED) for cells_of_row in cells for cell in cells_of_row),
            "commands": [
                format_command(job.argv, comparison.sources[0].working_folder)
                for job in compare.plan_jobs(comparison, cells)
            ],
            "is_of_here": all(source.run.is_trusted for source in comparison.sources),
            "can_write": not self.queue.read_only,
            "message": error,
        }
        return render_page(HERE / "compare.html", say("Compare"), values, POLICY)


def count_missing(cells: Sequence[Sequence[compare.ShownClip]]) -> int:
    """Return the number of LoRA clips that exist neither as files nor as queued jobs."""
    count = 0
    for _, *column_cells in cells:
        count += sum(not cell.href and not cell.is_asked for cell in column_cells)
    return count


def compare_routes(runs: Runs, notes: FileNotes, queue: JobQueue) -> list[Route]:
    """Return the routes of the page Compare."""
    pages = ComparePages(runs, notes, queue)
    return [
        Route("/compare", pages.show),
        Route("/compare", answer_form(pages.make), methods=["POST"]),
    ]
