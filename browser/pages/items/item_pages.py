"""Answer requests about the items of a run: their list, their pictures, and the buttons of each."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from browser.core.responses import Form, answer_form, answer_not_found, answer_template, answer_unknown
from browser.core.server_state import Site
from browser.folders.datasets import Datasets
from browser.folders.thumbnails import Thumbnails, answer_cacheable_jpeg, answer_placeholder
from browser.pages.items.requests import add_request, make_line
from browser.pages.items.run_items import (
    RunItem,
    changes_turns,
    describe_shown,
    find_shown,
    list_items,
    obeys_requests,
)
from browser.runs.runs import RUNNING, RunSummary
from modules.errors import MediaError, UserError
from modules.pages.language import refusal, say
from training.reports.item_turns import ASIDE, BACK, CAPTION, asked_path

MAX_SHOWN = 200


class ItemPages:
    """Shows the items of a run as a part of its page, and handles their buttons."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.runs = site.runs
        self.datasets = Datasets(site.runs)
        self.thumbnails = Thumbnails()

    def find(self, request: Request) -> tuple[RunSummary, list[RunItem]] | None:
        """Return the run that a URL names, with its items; None if it does not change turns of items."""
        with self.runs.lock:
            run = self.runs.find(request.path_params["id"])
            if run is None or not changes_turns(run):
                return None
            return run, list_items(self.datasets, run)

    def show(self, request: Request) -> Response:
        """Respond with the list of a run's items."""
        found = self.find(request)
        if found is None:
            return answer_not_found()
        return self.answer(*found, words=request.query_params.get("find", ""))

    def answer(
        self, run: RunSummary, items: list[RunItem], words: str = "", failed_id: str = "", error: str = ""
    ) -> Response:
        """Return the list of a run's items.

        Args:
            run: The run.
            items: All its items.
            words: Words that shown items contain.
            failed_id: Id of the item whose button had no effect.
            error: The reason.
        """
        chosen = find_shown(items, words)
        shown = chosen[:MAX_SHOWN]
        is_running = run.state == RUNNING
        values: dict[str, Any] = {
            "id": run.id,
            "items": shown,
            "summary": describe_shown(chosen, len(shown)),
            "words": words,
            "is_running": is_running,
            "obeys": obeys_requests(run),
            "can_ask": is_running and obeys_requests(run) and not self.site.read_only,
            "failed_id": failed_id,
            "error": error,
            "address_of": _make_picture_address,
        }
        return answer_template("items/items.html", run.name, values, is_rejected=error != "")

    def show_picture(self, request: Request) -> Response:
        """Respond with a small image of an item's media file."""
        found = self.find(request)
        items = [] if found is None else found[1]
        path = next((item.path for item in items if item.id == request.path_params["item"]), None)
        if path is None:
            return answer_not_found()
        try:
            return answer_cacheable_jpeg(self.thumbnails.make({"path": str(path)}, path.stat().st_mtime_ns))
        except (MediaError, OSError):
            return answer_placeholder()

    def ask(self, request: Request, form: Form) -> Response:
        """Ask a running training to set an item aside, to take it back, or to use another caption."""
        found = self.find(request)
        word = request.path_params["what"]
        if found is None:
            return answer_not_found()
        if word not in (ASIDE, BACK, CAPTION):
            return answer_unknown()
        run, items = found
        item = next((item for item in items if item.id == "".join(form.get("item", ()))), None)
        words = "".join(form.get("find", ()))
        if item is None:
            return self.answer(run, items, words, error=say("This item is not in the run any more."))
        caption = "".join(form.get("caption", ()))
        try:
            if run.state != RUNNING or not obeys_requests(run):
                raise refusal("Only a running training with --watch_items can do this.")
            add_request(asked_path(run.history.parent, run.name), make_line(word, item, caption))
        except (UserError, OSError) as error:
            item.caption = caption or item.caption  # what was typed stays
            return self.answer(run, items, words, failed_id=item.id, error=str(error))
        item.asked = word
        if word == CAPTION:
            item.caption = caption.strip()
        return self.answer(run, items, words)


def _make_picture_address(run_id: str, item: RunItem) -> str:
    """Return the address of an item's picture, which changes with its file; "" without a file."""
    if item.path is None:
        return ""
    try:
        changed = item.path.stat().st_mtime_ns
    except OSError:
        return ""
    return f"/turns/{run_id}/{item.id}/picture?{changed}"


def item_routes(site: Site) -> list[Route]:
    """Return the routes of the items of runs."""
    pages = ItemPages(site)
    return [
        Route("/turns/{id}", pages.show),
        Route("/turns/{id}/{item}/picture", pages.show_picture),
        Route("/turns/{id}/{what}", answer_form(pages.ask), methods=["POST"]),
    ]
