"""Share a run with a friend: a link to its page, samples and saved files, but to nothing else.

Anyone with the link may view these, without the page's token. A link expires after some days, when it is
withdrawn, or when another run with the same name begins in the folder. Links are stored for this user alone,
next to the page's own token.
"""

import contextlib
import hmac
import json
import math
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from browser.core.responses import (
    Form,
    answer_form,
    answer_not_found,
    answer_page,
    answer_text,
)
from browser.core.server_state import Site
from browser.core.state_names import name_state
from browser.core.templates import show_page
from browser.folders.new_form import parse_integer
from browser.jobs.printed_lines import translate_memory
from browser.pages.runs.shared_files import answer_shared_file
from browser.runs.run_views import COMPARED, LiveRunState, drop_private, find_run_file
from browser.runs.runs import RUNNING, RunSummary
from modules.errors import UserError
from modules.file_locks import only_one
from modules.pages.language import say
from modules.pages.page import FILE_POLICY, link, mark_folders, render_page
from modules.text_files import parse_json, real_path
from modules.user_files import read_user_file, user_folder, write_user_file
from training.reports.history import RunHistory, read_session
from training.reports.page import TEMPLATE, Standing, page_values
from training.reports.sections import SAMPLES

ADDRESS = "/shared/"  # prefix of all addresses that need no token
FILE = "page_shares.json"  # name of a file in the user's settings
DAY = 60 * 60 * 24  # seconds
DEFAULT_DAYS, MAX_DAYS = 7, 365
MAX_SHARES = 200
MAX_KEPT = 300  # links in the file, also expired ones, each about 150 of 64 KiB
RELOAD_SECONDS = "60"  # interval at which a shared page of a running training reloads
ENDED = say("This link has expired: ask for a new one.")
MAX_SHOWN = (100, 30)  # columns and rows of the grid of samples
# without the script that loads samples: a shared page loads them by plain links
TAGS = {
    ".mp4": Markup('<video src="{}" aria-label="{}" controls muted loop playsinline></video>'),
    ".wav": Markup('<audio src="{}" aria-label="{}" controls preload="none"></audio>'),
    ".png": Markup('<img src="{}" alt="{}" loading="lazy">'),
}
# the page's own script, and samples of this server
SHARED_POLICY = FILE_POLICY.replace("-src data:", "-src 'self' data:")


@dataclass(frozen=True)
class ShareLink:
    """A link that shows others the page of one run until it expires."""

    word: str
    run: str  # id of the run, which depends only on its path
    end: float  # seconds since 1970
    session: int | None  # session of the run at that path; None if unknown

    @property
    def path(self) -> str:
        """Path of the shared page."""
        return f"{ADDRESS}{self.word}/"

    @property
    def last_day(self) -> str:
        """Local date and time at which the link expires."""
        return f"{datetime.fromtimestamp(self.end):%Y-%m-%d %H:%M}"


class Shares:
    """The valid links of this user."""

    def list_all(self) -> list[ShareLink]:
        """Return the links that have not expired. A damaged file counts as empty."""
        now = time.time()
        return [share for share in self._read() if now < share.end <= now + (MAX_DAYS + 1) * DAY]

    def find(self, word: str) -> ShareLink | None:
        """Return the link whose URL contains this secret; None if there is none."""
        shares = [share for share in self.list_all() if _is_same(share.word, word)]
        return shares[0] if shares else None

    def list_run_links(self, run_id: str, session: int | None = None) -> list[ShareLink]:
        """Return the links to a run. `session` is the session id in its history."""
        return [share for share in self.list_all() if (share.run, share.session) == (run_id, session)]

    def add(self, run_id: str, days: int, session: int | None = None) -> ShareLink:
        """Create a link to a run that is valid for `days`. `session` is the session id in the run's history.

        Raises UserError if there are too many links, OSError if the link cannot be stored.
        """
        share = ShareLink(secrets.token_urlsafe(24), run_id, time.time() + days * DAY, session)
        with self._change() as shares:
            if len(self.list_all()) >= MAX_SHARES:
                raise UserError(say("There are already %(n)s links: withdraw some", n=MAX_SHARES))
            shares.append(share)
        return share

    def withdraw(self, run_id: str) -> None:
        """Remove all links to a run and to earlier runs at its path. Raises OSError if that fails."""
        with self._change() as shares:
            shares[:] = [share for share in shares if share.run != run_id]

    @contextlib.contextmanager
    def _change(self) -> Iterator[list[ShareLink]]:
        """Yield the list of all links to be changed, then write it, locked against this user's other servers.

        Expired links are kept while there is room, in case the clock was set wrong.
        """
        folder = user_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with only_one(folder / f"{FILE}.lock"):
            shares = self._read()
            yield shares
            shares.sort(key=lambda share: share.end)
            write_user_file(FILE, json.dumps([asdict(share) for share in shares[-MAX_KEPT:]]))

    def _read(self) -> list[ShareLink]:
        """Return the links stored in the file; [] if one of its lines is not a link."""
        try:
            shares = [
                ShareLink(str(row["word"]), str(row["run"]), float(row["end"]), _read_number(row["session"]))
                for row in parse_json(read_user_file(FILE) or "[]")
                if "session" in row  # links of earlier versions have no session
            ]
        except (ValueError, TypeError, KeyError, OverflowError):
            return []
        return shares if all(math.isfinite(share.end) for share in shares) else []


def _read_number(value: Any) -> int | None:
    """Return the session id stored with a link. Raises ValueError if it is not a number or null."""
    if value is not None and type(value) is not int:
        raise ValueError("a session is a whole number")
    return value


def _is_same(word: str, typed: str) -> bool:
    return hmac.compare_digest(word.encode(), typed.encode("utf-8", "replace"))


def shared_clip(name: str, prompt: str, step: int) -> Markup:
    """Return the HTML element that shows a sample image, clip or sound by its link."""
    label = mark_folders(say("%(prompt)s, step %(step)s", prompt=prompt, step=step))
    return TAGS.get(Path(name).suffix, TAGS[".png"]).format(link(SAMPLES, name), label)


def _is_run_file(path: Path, run: RunSummary) -> bool:
    """Return whether a path names one of the run's files directly in the run's folder, without a link."""
    folder = run.history.parent
    return path.name.startswith(run.name) and real_path(path) == real_path(folder) / path.relative_to(folder)


def remove_private_texts(live_state: LiveRunState) -> Standing:
    """Return the displayed state of a run without text that may name a folder, a file or another run.

    It removes error messages, and all option values except numbers and switches.
    """
    start = live_state.displayed.start
    shared_start = replace(
        start, changed=_select_numbers(start.changed), unchanged=_select_numbers(start.unchanged)
    )
    return replace(live_state.displayed, start=shared_start, text=name_state(live_state.state))


def _select_numbers(options: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the options that have only numbers as values, or no value (switches)."""
    return [(name, text) for name, text in options if all(map(_is_number, text.split()))]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return word in ("True", "False")
    return True


def _render_shared_page(run: RunSummary, run_history: RunHistory, live_state: LiveRunState) -> str:
    """Return the HTML of a run's page without private data: folders, error messages, training images."""
    values: dict[str, Any] = page_values(
        run.history.parent,
        run_history,
        remove_private_texts(live_state),
        load=shared_clip,
        maximum=MAX_SHOWN,
        name=run.name,
        has_sections=False,  # do not name training images
    )
    values |= {"is_shared": True, "commands": (), "makes_samples": True}
    values["memory"] = translate_memory(run_history.memory)
    return drop_private(render_page(TEMPLATE, run.name, values, SHARED_POLICY))


class SharePages:
    """Shows the links to shared runs, and creates and withdraws them."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.shares = Shares()

    # ---- for a friend

    def find(self, request: Request) -> RunSummary | None:
        """Return the run of a share link; None if the link has expired or another run took its path."""
        share = self.shares.find(request.path_params["word"])
        if share is None:
            return None
        run = self.site.runs.find(share.run)
        return run if run is not None and read_session(run.history) == share.session else None

    def show_page(self, request: Request) -> Response:
        """Respond with the page of a shared run, without private data; 401 if the link has expired."""
        with self.site.runs.lock:
            run = self.find(request)
            if run is None or not run.history.exists():
                return answer_text(ENDED, 401)
            run_history = self.site.runs.open(run).run_history
            if self.find(request) is None:  # a new run began, and its history may have been read instead
                return answer_text(ENDED, 401)
        live_state = LiveRunState.of(run, run_history)
        headers = {
            # also as a header: in a meta element, frame-ancestors is ignored
            "content-security-policy": f"{SHARED_POLICY}; frame-ancestors 'none'",
            "x-robots-tag": "noindex",
        }
        if live_state.state == RUNNING:
            headers["refresh"] = RELOAD_SECONDS
        return answer_page(_render_shared_page(run, run_history, live_state), headers=headers)

    def show_file(self, request: Request) -> Response:
        """Respond with a file of a shared run, without its metadata; 401 if the link has expired."""
        with self.site.runs.lock:
            run = self.find(request)
            if run is None:
                return answer_text(ENDED, 401)
            name = request.path_params["name"]
            # a comparison may show another run's file
            path = None if COMPARED.fullmatch(name) else find_run_file(self.site.runs, run, name)
            if path is not None and not _is_run_file(path, run):
                path = None
        return answer_not_found() if path is None else answer_shared_file(path, request)

    # ---- for the user

    def render(self, run_id: str, origin: str, is_open: bool = False, error: str = "") -> str:
        """Return the HTML of the section of a run's page with its share links.

        Args:
            origin: Origin of the links, such as https://my-page.example.org.
            is_open: Whether to show the section unfolded.
        """
        settings = self.site.settings
        with self.site.runs.lock:
            run = self.site.runs.find(run_id)
        # a link belongs to one run: it expires when another run begins at the same path
        links = [] if run is None else self.shares.list_run_links(run_id, read_session(run.history))
        values: Mapping[str, Any] = {
            "id": run_id,
            "links": [(origin + share.path, share.last_day) for share in links],
            "days": DEFAULT_DAYS,
            # whether no other machine can reach this page
            "is_alone": settings.is_local and settings.public_origin is None,
            "is_open": is_open,
            "refused": error,
        }
        return show_page("runs/sharing.html", "", values)

    def find_origin(self, request: Request) -> str:
        """Return the origin, such as https://my-page.example.org, at which others reach this server."""
        public_origin = self.site.settings.public_origin
        return public_origin or f"http://{request.headers.get('host', '')}"

    def change(self, request: Request, form: Form) -> Response:
        """Create a link to a run, or withdraw all of its links."""
        run_id = request.path_params["id"]
        with self.site.runs.lock:
            run = self.site.runs.find(run_id)
        if run is None:
            return answer_not_found()
        withdraws_links = "back" in form  # name of the pressed button
        try:
            if withdraws_links:
                self.shares.withdraw(run_id)
            else:
                days = parse_integer("".join(form.get("days", ())).strip(), MAX_DAYS)
                if days is None:
                    raise UserError(say("A link is valid for 1 to %(maximum)s days", maximum=MAX_DAYS))
                self.shares.add(run_id, days, read_session(run.history))
        except (UserError, OSError) as error:
            section = self.render(run_id, self.find_origin(request), is_open=True, error=str(error))
            return answer_page(section, 422)
        return answer_page(self.render(run_id, self.find_origin(request), is_open=True))


def share_routes(pages: SharePages) -> list[Route]:
    """Return the routes of shared runs. They must come before the route of a run's files."""
    return [
        Route(f"{ADDRESS}{{word}}/", pages.show_page),
        Route(f"{ADDRESS}{{word}}/{{name:path}}", pages.show_file),
        Route("/run/{id}/share", answer_form(pages.change), methods=["POST"]),
    ]
