"""The page Settings: folders, the server, the queue's worker, and the bin."""

from pathlib import Path
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from browser.core.qr_code import draw_svg
from browser.core.responses import Form, answer_form, answer_move, answer_template, answer_unknown
from browser.core.server_command import find_worker, make_phone_argv, make_server_argv
from browser.core.server_state import Site, open_bin
from browser.jobs.command_lines import format_command
from browser.jobs.jobs import QUEUE
from downloads.listing import gigabytes
from modules.errors import UserError
from modules.pages.language import join, say, say_count

MAX_ENTRIES = 200  # maximum number of listed entries of the bin
WORKERS = {
    "here": say("this page's server runs its jobs"),
    "elsewhere": say("another server runs its jobs"),
    "": say("paused: jobs wait until it is started"),
}


class ShownSetting(NamedTuple):
    """A setting of the server as a row of the Settings page."""

    name: str
    value: str
    how: str  # option that changes the setting


class SettingsPages:
    """Shows the Settings page, and handles its buttons."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def show(self, request: Request) -> Response:
        """Return the Settings page; with `ask=empty` in the query, it asks whether to empty the bin."""
        return self.answer(asks_to_empty=request.query_params.get("ask") == "empty")

    def answer(self, error: str = "", asks_to_empty: bool = False) -> Response:
        """Return the Settings page with an error; with `asks_to_empty`, it asks whether to empty the bin."""
        site = self.site
        worker = find_worker(self.site)
        settings = site.settings
        can_be_reached = not settings.is_local or settings.public_origin is not None  # by other machines
        qr_code = ""
        if settings.address and can_be_reached:
            qr_code = draw_svg(settings.address, say("QR code of this page's address"))
        values: dict[str, Any] = {
            "rows": self.list_settings(),
            "worker": worker,
            "worker_words": WORKERS.get(worker, worker),
            "command": format_command(make_server_argv(self.site), Path.cwd()),
            "phone_command": format_command(make_phone_argv(self.site), Path.cwd()),
            **self._collect_bin_values(asks_to_empty),
            "gigabytes": gigabytes,
            "code": qr_code,
            "is_local": not can_be_reached,
            "can_write": not site.read_only,
            "message": error,
        }
        return answer_template(
            "settings/settings_page.html", say("Settings"), values, is_rejected=error != ""
        )

    def _collect_bin_values(self, asks_to_empty: bool) -> dict[str, Any]:
        """Return the template values of the section about the bin."""
        bin_folder = open_bin(self.site)
        entries = bin_folder.list_entries()
        size = gigabytes(sum(entry.size_bytes for entry in entries))
        count = say_count(len(entries), "%(n)s removal", "%(n)s removals")
        return {
            "entries": entries[:MAX_ENTRIES],
            "num_more": max(0, len(entries) - MAX_ENTRIES),
            "bin_words": join(", ", (count, size)) if entries else say("empty"),
            "bin": bin_folder.folders[0],
            "mark": bin_folder.compute_checksum(),
            "is_asked": asks_to_empty and bool(entries),
        }

    def list_settings(self) -> list[ShownSetting]:
        """Return the rows of the settings table: name, current value, and the option that sets it."""
        site = self.site
        settings = site.settings
        roots = [ShownSetting(say("folder with runs"), str(root), "FOLDER") for root in site.runs.roots]
        port = say("not known") if settings.port is None else str(settings.port)
        return [
            *roots,
            ShownSetting(say("folder of models"), str(site.models.absolute()), "--models DIR"),
            ShownSetting(
                say("relative paths begin in"), str(Path.cwd()), say("the folder where the command is typed")
            ),
            ShownSetting(say("queue"), str(site.queue.folder / QUEUE), say("in the first folder")),
            ShownSetting(say("host"), settings.host, "--host ADDRESS"),
            ShownSetting(say("port"), port, "--port N"),
            ShownSetting(
                say("address from outside"), settings.public_origin or say("none"), "--public_url URL"
            ),
            ShownSetting(say("token"), self._describe_token(), "--token FILE, or --no_token"),
            ShownSetting(say("may write"), say("no") if site.read_only else say("yes"), "--read_only"),
        ]

    def _describe_token(self) -> str:
        """Return the row of the settings table about the token: where it is stored, or that there is none."""
        token = self.site.settings.token
        if token.path is not None:
            return say("the word in %(absolute)s", absolute=token.path.absolute())
        if token.secret is not None:
            return say("a generated word, until the server ends")
        return say("none: every account of this machine can open the page")

    def change(self, request: Request, form: Form) -> Response:
        """Start or pause the queue, or empty the bin; then show the page again."""
        action = request.path_params["what"]
        try:
            if action == "work":
                self.site.queue.begin_work()
            elif action == "pause":
                self.site.queue.end_work(pauses=True)
            elif action == "empty":
                open_bin(self.site).empty("".join(form.get("mark", ())))
            else:
                return answer_unknown()
        except UserError as error:
            return self.answer(str(error), asks_to_empty=action == "empty")
        return answer_move("/settings")


def settings_routes(site: Site) -> list[Route]:
    """Return the routes of the Settings page."""
    pages = SettingsPages(site)
    return [
        Route("/settings", pages.show),
        Route("/settings/{what}", answer_form(pages.change), methods=["POST"]),
    ]
