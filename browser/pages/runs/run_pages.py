"""The list of runs, and each run's page, updates and files."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from browser.core.responses import (
    Form,
    answer_file,
    answer_form,
    answer_json,
    answer_not_found,
    answer_not_found_page,
    answer_page,
    answer_text,
)
from browser.core.server_state import Site
from browser.core.templates import show_page
from browser.pages.runs.live_run import collect_news, run_page
from browser.pages.runs.run_buttons import RunButtons, has_lora, run_button_routes
from browser.pages.runs.run_list import list_page, mark_list
from browser.pages.runs.shares import SharePages, share_routes
from browser.runs.comparable_runs import trains_lora
from browser.runs.run_views import find_run_file
from browser.runs.runs import DIED, RUNNING, RunSummary
from modules.errors import UserError
from modules.pages.language import say

# requests to a run, see training/training_run.py, and the answer to each
TRAINING_REQUESTS = {
    "sample": say("Requested: samples are generated after this step."),
    "save": say("Requested: it saves after this step."),
    "stop": say("Requested: it saves and ends after this step."),
}


class RunPages:
    """Shows the list of runs, and each run's page, updates and files; forwards requests to training runs."""

    def __init__(self, site: Site, buttons: RunButtons, shares: SharePages) -> None:
        self.runs = site.runs
        self.notes = site.notes
        self.queue = site.queue
        self.tracked_runs = site.tracked_runs
        self.buttons = buttons
        self.shares = shares

    def find(self, request: Request) -> RunSummary | None:
        """Return the run that a request's URL names; None if it does not exist."""
        return self.runs.find(request.path_params["id"])

    def find_file(self, request: Request) -> Path | None:
        """Return the file of a run that a URL names; None if the run's page does not link to it."""
        run = self.find(request)
        return None if run is None else find_run_file(self.runs, run, request.path_params["name"])

    def show_list(self, request: Request) -> Response:
        """Respond with the list of runs; 304 if the browser has it and nothing has changed."""
        tracked_runs = self.tracked_runs.list_all()
        query = request.query_params
        etag = f'"{mark_list(tracked_runs, query)}"'
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers={"etag": etag})
        page = list_page(tracked_runs, self.runs.roots, query, can_write=not self.queue.read_only)
        return answer_page(page, headers={"etag": etag})

    def show_run(self, request: Request) -> Response:
        """Respond with the page of a run or, if the run has not begun, with a page of its buttons."""
        tracked_run = self.tracked_runs.find(request.path_params["id"])
        if tracked_run is None:
            return answer_not_found_page(request)
        run = tracked_run.summary
        if not run.history.exists():
            return answer_page(self.buttons.show_page(tracked_run))
        run_config = self.tracked_runs.find_run_config(run)
        # this history is about the downloads and caching before a training run: show the run's page
        if run_config is not None and run_config.id != run.id:
            return RedirectResponse(f"/run/{run_config.id}/", 303)
        is_paused = False
        with contextlib.suppress(UserError):  # the queue's page reports it
            is_paused = self.queue.worker == ""
        lower_buttons = self.buttons.render(tracked_run, "runs/more_actions.html")
        if not self.queue.read_only:
            lower_buttons += self.shares.render(run.id, self.shares.find_origin(request))
        lower_buttons += show_page(
            "runs/run_parts.html",
            run.name,
            {
                "id": run.id,
                "options": dict(run.start.changed) if run.start else {},
                "has_lora": trains_lora(self.runs, run) and has_lora(run),
            },
        )
        page = run_page(
            self.runs,
            run,
            can_write=not self.queue.read_only,
            is_paused=is_paused,
            actions=self.buttons.render(tracked_run),
            lower_buttons=lower_buttons,
            kill_message=tracked_run.kill_message,
        )
        return answer_page(page)

    def show_news(self, request: Request) -> Response:
        """Respond with the values that a run's page polls, as JSON; 400 if `from` or `to` is not a number."""
        run = self.find(request)
        if run is None:
            return answer_not_found()
        try:
            tracked_run = self.tracked_runs.find(run.id) if run.state == DIED else None
            kill_message = "" if tracked_run is None else tracked_run.kill_message
            return answer_json(collect_news(self.runs, run, request.query_params, kill_message))
        except ValueError:
            return answer_text("from and to are numbers of steps.", 400)

    def show_about(self, request: Request) -> Response:
        """Respond with the HTML about a weight file: hash and metadata."""
        with self.runs.lock:
            path = self.find_file(request)
        return answer_not_found() if path is None else answer_page(self.notes.describe(path))  # takes a while

    def show_file(self, request: Request) -> Response:
        """Respond with a file of a run."""
        path = self.find_file(request)
        return answer_not_found() if path is None else answer_file(path)

    def ask(self, request: Request, form: Form) -> Response:
        """Ask a running training process to save, sample or stop, by a file next to its history."""
        with self.runs.lock:
            run = self.find(request)
        kind = "".join(form.get("what", ()))
        if run is None or kind not in TRAINING_REQUESTS:
            return answer_not_found()
        if run.state != RUNNING or run.start is None or not run.start.listens:
            return answer_text(say("Only a running training can do this."), 409)
        (run.history.parent / f"{run.name}.{kind}").touch()
        return answer_text(TRAINING_REQUESTS[kind])

    def lock(self, show: Callable[[Request], Response]) -> Callable[[Request], Response]:
        """Return a handler that calls `show` under the runs' lock."""

        def answer(request: Request) -> Response:
            with self.runs.lock:
                return show(request)

        return answer


def run_routes(site: Site) -> list[Route]:
    """Return the routes of the list of runs, and of each run."""
    buttons = RunButtons(site)
    shares = SharePages(site)
    pages = RunPages(site, buttons, shares)
    return [
        Route("/", pages.lock(pages.show_list)),
        Route("/run/{id}/", pages.lock(pages.show_run)),
        Route("/run/{id}/news", pages.lock(pages.show_news)),
        Route("/run/{id}/ask", answer_form(pages.ask), methods=["POST"]),
        Route("/run/{id}/about/{name:path}", pages.show_about),
        *run_button_routes(buttons),
        *share_routes(shares),
        # last: it matches every path
        Route("/run/{id}/{name:path}", pages.lock(pages.show_file)),
    ]
