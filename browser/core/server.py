"""Serve the routes, and check the host, the origin and the token of each request."""

import hmac
import ipaddress
import logging
import os
import re
import socket
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import escape
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from browser.core.page import list_body_limits, list_pages, list_public_addresses
from browser.core.page_access import (
    COOKIE,
    COOKIE_SECONDS,
    OLD_COOKIE,
    PageAccess,
    find_account,
    find_connection,
    find_page_access,
    list_values,
)
from browser.core.page_language import choose_language, language_headers, language_routes
from browser.core.page_root import add_root_to_header, serving_below
from browser.core.responses import (
    NO_WRITING,
    answer_not_found,
    answer_not_found_page,
    answer_text,
)
from browser.core.server_state import ServerSettings, Site
from browser.core.static_files import STATIC
from browser.core.templates import POLICY
from browser.core.tokens import PrintedWord, Ticket
from browser.jobs.background_jobs import BackgroundJobs
from browser.jobs.jobs import JobQueue, open_queue
from browser.jobs.render_worker import RenderWorker
from browser.runs.run_views import FileNotes
from browser.runs.runs import Runs
from modules.errors import UserError
from modules.extensions import PAGES, load_extensions
from modules.installation import EXTENSIONS
from modules.pages.language import say, show, speaking
from project.options import MODELS

logger = logging.getLogger(__name__)

PLAIN_PAGE = '<!doctype html><title>Reelsmith</title><link rel="icon" href="data:,">'
REDIRECT_TO_RUN_LIST = PLAIN_PAGE + '<meta http-equiv="refresh" content="0;url={root}/">'
# an admitted browser knows the root path of the pages; this script redirects it there
REDIRECT_TO_ROOT = PLAIN_PAGE + '<script src="{script}"></script><p>{text}'
ENTER_SCRIPT = "/static/enter.js"  # contains no secret
NO_TOKEN = say(
    "Open the address that the command has printed last in its terminal. It ends in ?token= and a secret "
    "word. This browser is then admitted without it."
)
EARLIER_START = say(
    "This address was that of an earlier start of the page. Open the address that the command has printed "
    "last in its terminal."
)
HEADERS = {
    "content-security-policy": f"{POLICY}; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
# a host name or IPv4 address, or an IPv6 address in brackets without a zone (network card)
HOST = re.compile(r"(?:(?P<name>[\w.-]+)|\[(?P<inside>[0-9a-f:.]+)\])(?::\d{1,5})?", re.ASCII | re.IGNORECASE)
START_NAME = re.compile(r"[0-9a-f]{12}\.localhost(?::\d{1,5})?", re.ASCII)  # of this start or an earlier one
REMOVED_COOKIE = f"{OLD_COOKIE}=; Max-Age=0; Path=/".encode()
TRANSLATED = (b"text/html", b"text/plain", b"application/json")  # content types with translatable text
MAX_BYTES = 512 << 10  # largest body of a request: a form with two long prompts


@dataclass
class _BoundedBody:
    """Counts a request body's bytes as they arrive, because a chunked body has no Content-Length."""

    receive: Receive
    max_bytes: int
    received_bytes: int = 0

    async def receive_part(self) -> Message:
        message = await self.receive()
        self.received_bytes += len(message.get("body", b""))
        if self.received_bytes > self.max_bytes:
            raise HTTPException(413, f"A request can have at most {self.max_bytes:,} bytes.")
        return message


@dataclass
class _SentResponse:
    """Adds the common headers to a response, and records whether its headers have been sent."""

    send: Send
    complete_headers: Callable[[Sequence[tuple[bytes, bytes]]], list[tuple[bytes, bytes]]]
    removes_old_cookie: bool
    has_begun: bool = False

    async def send_part(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            message["headers"] = self.complete_headers(message["headers"])
            if self.removes_old_cookie:
                message["headers"].append((b"set-cookie", REMOVED_COOKIE))
        await self.send(message)


@dataclass
class Gate:
    """Passes only requests that come from this server's pages, have the token, and are small.

    A page of another site can make a browser send requests to this server; the Origin header reveals that.
    Host names that are not this server's are rejected too (DNS rebinding), because pages under them would
    share its origin. With `read_only`, requests that could write are rejected, so routes need not check it.
    """

    app: ASGIApp
    names: frozenset[str]  # names of the server in requests; IP addresses are always accepted
    token: str | None  # opens the page; a browser stores values derived from it, see `PageAccess`
    read_only: bool
    ticket: Ticket | None = None  # opens the page once
    word: PrintedWord | None = None  # that of the printed address; None: the token is in it
    start_name: str = ""  # host name for this start only; "" if the server keeps its name
    public_origin: str | None = None  # origin of a reverse proxy in front of the server
    headers: dict[str, str] = field(default_factory=lambda: dict(HEADERS))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and pass it on or reject it.

        1. With a token, remove the secret root path from the request's URL path.
        2. Reject a request with a wrong host, origin or cookie; pass on all others.
        3. Limit the body while it is read, and add common headers to the response.

        If a route raises an error, answer with status 500, unless the response has already begun.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        access = None if self.token is None else find_page_access(self.token, scope, self.start_name)
        is_below_root, scope = _strip_root(scope, access)  # routes are matched without the root
        root = access.root if access is not None and is_below_root else ""
        request = Request(scope)
        body = _BoundedBody(receive, max_bytes=list_body_limits().get(request.url.path, MAX_BYTES))
        has_old_cookie = bool(list_values(request.headers.get("cookie", ""), OLD_COOKIE))
        response = _SentResponse(send, self._complete_headers, has_old_cookie)
        try:
            # text in the language of the request, and the secret root in all addresses of the response
            with speaking(choose_language(request)), serving_below(root):
                rejection = self._find_rejection(request, access, is_below_root)
                await (rejection or self.app)(scope, body.receive_part, response.send_part)
        except Exception as error:  # a damaged file may raise anything; only this request fails
            logger.debug("%s", request.url.path, exc_info=error)
            if not response.has_begun:
                await answer_text(say("This cannot be shown."), 500)(scope, receive, response.send_part)

    def _complete_headers(self, headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return the headers of a response, with default headers for those that it does not set."""
        default_headers = [(b"cache-control", b"no-cache")]
        default_headers += [(name.encode(), value.encode()) for name, value in self.headers.items()]
        if any(name == b"content-type" and value.startswith(TRANSLATED) for name, value in headers):
            default_headers += language_headers()
        names = {name for name, _ in headers}
        missing_headers = [(name, value) for name, value in default_headers if name not in names]
        return [(name, add_root_to_header(name, value)) for name, value in [*headers, *missing_headers]]

    def _find_rejection(
        self, request: Request, access: PageAccess | None, is_below_root: bool
    ) -> Response | None:
        """Return the response that rejects a request; None if the request may pass."""
        hosts = request.headers.getlist("host")
        # pages of other sites may reach this server under their own host names (DNS rebinding)
        if len(hosts) != 1 or not self._is_own_host(hosts[0]):
            is_earlier_start = len(hosts) == 1 and START_NAME.fullmatch(hosts[0]) is not None
            return answer_text(EARLIER_START if is_earlier_start else "Wrong host.", 421)
        is_read = request.method in ("GET", "HEAD")
        if not self._is_from_here(request, is_read):
            return answer_text("Wrong origin.", 403)
        if self.read_only and not is_read:
            return answer_text(NO_WRITING, 403)
        path = request.url.path
        is_public = is_read and path.startswith((ENTER_SCRIPT, *list_public_addresses()))
        if access is None or is_public:
            return None
        return self._check_browser(request, access, is_below_root)

    def _is_from_here(self, request: Request, is_read: bool) -> bool:
        """Return whether a request comes from a page of this server, or opens a page in the browser."""
        headers = request.headers
        origin = headers.get("origin")
        if origin is None and not is_read:
            return False
        # a proxy may send the server's internal name or the public one
        if origin not in (None, f"http://{headers.get('host', '')}", self.public_origin):
            return False
        is_opened = is_read and headers.get("sec-fetch-mode") == "navigate"
        return is_opened or headers.get("sec-fetch-site", "none") in ("none", "same-origin")

    def _check_browser(self, request: Request, access: PageAccess, is_below_root: bool) -> Response | None:
        """Return None if a request has the cookie or the token; otherwise the response that rejects it."""
        # Opening the URL with `?token=` sets the cookie, which admits the browser from then on.
        typed_token = request.query_params.get("token")
        opens_first_page = request.url.path == "/" and typed_token is not None
        if opens_first_page and self._is_token_or_ticket(request, typed_token or ""):
            return self._admit_browser(request, access)
        scheme, _, bearer_token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._is_token(bearer_token.strip()):  # sent by programs
            return None
        cookies = request.headers.get("cookie", "")
        if is_below_root and access.has_valid_cookie(cookies, find_account(request.scope)):
            return None
        if "text/html" not in request.headers.get("accept", ""):
            return answer_text(NO_TOKEN, 401)
        # an admitted browser that opened a URL without the root path is redirected by the page's script
        page = REDIRECT_TO_ROOT.format(script=ENTER_SCRIPT, text=escape(show(NO_TOKEN)))
        return HTMLResponse(page, 401)

    def _admit_browser(self, request: Request, access: PageAccess) -> Response:
        """Return the page that sets the cookie and then opens the list of runs."""
        # It does not redirect, because after a link from another site, browsers would not send the cookie.
        page = HTMLResponse(REDIRECT_TO_RUN_LIST.format(root=access.root))
        # what a server of another account at this address has left, such as a service worker
        page.headers["clear-site-data"] = '"storage"'
        origin = self.public_origin or ""
        is_encrypted = origin.removeprefix("https://") == request.headers.get("host", "").lower()
        page.set_cookie(
            COOKIE,
            access.make_cookie_value(find_account(request.scope)),
            max_age=COOKIE_SECONDS,
            httponly=True,
            samesite="strict",
            path=access.root,
            secure=is_encrypted,
        )
        return page

    def _is_token_or_ticket(self, request: Request, word: str) -> bool:
        """Return whether `word`, from the URL, admits the browser: printed word, token or valid ticket."""
        if self._is_token(word) or (self.word is not None and self.word.take(word)):
            return True
        return self.ticket is not None and self.ticket.take(word, find_connection(request.scope))

    def _is_token(self, word: str) -> bool:
        return hmac.compare_digest(word.encode(), (self.token or "").encode())

    def _is_own_host(self, host: str) -> bool:
        """Return whether a Host header is one of this server's names, or an IP address."""
        # Other names may be an attack by DNS rebinding.
        match = HOST.fullmatch(host)
        if match is None:
            return False
        if (match["name"] or "").lower() in self.names:
            return True
        is_in_brackets = match["inside"] is not None  # only IPv6 addresses are written in brackets
        try:
            if is_in_brackets:
                ipaddress.IPv6Address(match["inside"])
            else:
                ipaddress.IPv4Address(match["name"])
        except ValueError:
            return False
        return True


def _strip_root(scope: Scope, access: PageAccess | None) -> tuple[bool, Scope]:
    """Return whether a request's path is below the secret root path, and the scope without that root."""
    if access is None:
        return True, scope
    root, path = access.root, scope["path"]
    beginning, rest = path[: len(root)], path[len(root) :]
    has_root = hmac.compare_digest(beginning.encode("utf-8", "surrogatepass"), root.encode())
    if not has_root or rest[:1] not in ("", "/"):
        return False, scope
    raw_rest = scope.get("raw_path", b"")[len(root) :]
    return True, {**scope, "path": rest or "/", "raw_path": raw_rest or b"/"}


def explain_error(request: Request, error: Exception) -> Response:
    """Return the response, with advice, to a request that failed on a damaged or missing file."""
    if not isinstance(error, UserError):
        return answer_not_found()
    return answer_text(str(error), 500 if request.method == "GET" else 422)


def explain_address(request: Request, error: Exception) -> Response:
    """Return the 404 response to a URL that does not exist."""
    return answer_not_found_page(request)


def make_app(
    runs: Runs,
    host: str = "localhost",
    token: str | None = None,
    read_only: bool = False,
    queue: JobQueue | None = None,
    models: Path = MODELS,
    settings: ServerSettings | None = None,
    render_worker: RenderWorker | None = None,
    ticket: Ticket | None = None,
    word: PrintedWord | None = None,
    start_name: str = "",
) -> ASGIApp:
    """Return the ASGI application that serves all pages.

    Args:
        host: Name of the server in requests, in addition to IP addresses and this machine's name.
        token: Secret token; None to admit everybody.
        read_only: Whether to reject requests that could write.
        queue: The job queue; None to open it with `open_queue`.
        render_worker: Worker of the Generate page; None to create one for the queue.
        ticket: Secret that opens the page once.
        word: Word of the printed address; None if that has the token.
        start_name: Host name of the server for this start only; "" if it keeps its name.
    """
    queue = queue or open_queue(runs, read_only)
    site = Site(
        runs,
        queue,
        BackgroundJobs(queue),
        render_worker or RenderWorker(queue),
        models=models,
        notes=FileNotes(),
        settings=settings or ServerSettings(),
    )
    public_origin = None if settings is None else settings.public_origin
    host_names = _list_host_names(host, public_origin)
    if start_name:
        host_names |= {start_name}
    handlers = {UserError: explain_error, OSError: explain_error, 404: explain_address}
    app = Starlette(routes=_list_routes(site), exception_handlers=handlers)
    app.router.redirect_slashes = False  # it would redirect to an address built from the request's host
    return Gate(
        app,
        names=host_names,
        token=token,
        read_only=read_only,
        ticket=ticket,
        word=word,
        start_name=start_name,
        public_origin=public_origin,
    )


def _list_routes(site: Site) -> list[Route]:
    """Return the routes of all pages, and of the extensions if they are enabled."""
    routes = [Route("/static/{name}", show_static), *language_routes()]
    for page in list_pages():
        routes += page.make_routes(site)
    return [*routes, *_list_extension_routes(site)]


def show_static(request: Request) -> Response:
    """Respond with a script or style sheet of the pages."""
    path = STATIC.get(request.path_params["name"])
    return answer_not_found() if path is None else FileResponse(path)


def _list_extension_routes(site: Site) -> list[Route]:
    """Return the routes that extensions add; [] if extensions are not enabled."""
    if not os.environ.get(EXTENSIONS):
        return []

    routes: list[Route] = []
    for make_routes in load_extensions(PAGES).values():
        routes += make_routes(site)
    return routes


def _list_host_names(host: str, public_origin: str | None) -> frozenset[str]:
    """Return the values that a request's Host header may have, in addition to IP addresses."""
    machine = socket.gethostname().lower()
    names = {"localhost", host.lower(), machine, f"{machine}.local"}
    if public_origin is not None:
        names.add(urllib.parse.urlsplit(public_origin).hostname or "")
    return frozenset(names)
