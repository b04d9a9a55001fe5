"""The page Compare: samples and clips of selected files, and jobs that generate the missing clips."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from browser.core.responses import Form, answer_form, answer_page, answer_text, read_query
from browser.core.server_state import Site
from browser.core.templates import show_page
from browser.jobs.command_lines import format_command
from browser.jobs.jobs import JobQueue
from browser.pages.compare import compare
from browser.runs.run_views import PLAYED, FileNotes
from browser.runs.runs import Runs, RunSummary
from modules.atomic_write import write_text
from modules.errors import OptionError, UserError
from modules.pages.language import refusal, say

FIELDS = ("run", "file", "prompt", "more")  # fields of the form


class ComparePages:
    """Shows comparisons, and queues the jobs that generate their clips."""

    def __init__(self, runs: Runs, notes: FileNotes, queue: JobQueue) -> None:
        self.runs = runs
        self.notes = notes
        self.queue = queue

    def show(self, request: Request) -> Response:
        """Return the page of the comparison that the URL's query names."""
        return self.answer(read_query(request))

    def make(self, _: Request, form: Form) -> Response:
        """Queue jobs that generate the comparison's missing clips, and show its page again."""
        try:
            with self.runs.lock:
                comparison = compare.read_comparison(self.runs, form)
            if not comparison.rows:
                raise refusal("Tick a prompt, or type one, to see what each file generates from it.")
            for job in compare.plan_jobs(comparison, self.find_row_clips(comparison)):
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

    def find_row_clips(self, comparison: compare.Comparison) -> list[compare.RowClips]:
        """Return the clips of a comparison for each prompt."""
        return compare.find_row_clips(comparison, self.notes, compare.find_queued_clips(self.queue))

    def page(self, comparison: compare.Comparison, runs: Sequence[RunSummary], error: str) -> str:
        """Return the HTML page that compares saved LoRA files. `runs` are all runs that the user can select.

        Raises:
            UserError: If the queue cannot be read.
            OSError: If a file is removed while the page is rendered.
        """
        row_clips = self.find_row_clips(comparison)
        compared_ids = {source.run.id for source in comparison.sources}
        models = {source.run.model for source in comparison.sources}
        runs_to_add = [
            run for run in runs if run.id not in compared_ids and (not models or run.model in models)
        ]
        shown_clips = [clip for clips in row_clips for clip in (clips.without_lora, *clips.with_lora)]
        values: dict[str, Any] = {
            "comparison": comparison,
            "row_clips": row_clips,
            "selected_files": {file.key for file in comparison.columns},
            "titles": [file.step_title for file in comparison.columns],
            "other_runs": runs_to_add,
            "ids_without_files": compare.find_runs_without_files(runs_to_add),
            "missing": sum(clip.is_missing for clips in row_clips for clip in clips.with_lora),
            "plays": any(clip.href.endswith(PLAYED) for clip in shown_clips),
            "commands": [
                format_command(job.argv, comparison.sources[0].working_folder)
                for job in compare.plan_jobs(comparison, row_clips)
            ],
            "is_of_here": all(source.run.is_trusted for source in comparison.sources),
            "can_write": not self.queue.read_only,
            "message": error,
        }
        return show_page("compare/compare.html", say("Compare"), values)


def compare_routes(site: Site) -> list[Route]:
    """Return the routes of the Compare page."""
    pages = ComparePages(site.runs, site.notes, site.queue)
    return [
        Route("/compare", pages.show),
        Route("/compare", answer_form(pages.make), methods=["POST"]),
    ]
