"""Build responses (pages, JSON, files, error messages), and read the bodies and forms of requests."""

import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response

from browser.core.page_root import add_root_to_page
from browser.core.static_files import add_digests
from browser.core.templates import POLICY, show_page
from modules.pages.language import say, show, show_all

Form = dict[str, list[str]]
NOT_FOUND = say("It does not exist.")
NO_WRITING = say("The server was started with --read_only.")
# types of files that trainings write; other people's histories may also list HTML, scripts and SVG
SHOWN = {".png": "image/png", ".mp4": "video/mp4", ".wav": "audio/wav"}


def answer_page(text: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    r"""Return an HTML page; undecodable bytes of file names are shown as escapes such as \udce9."""
    return HTMLResponse(
        add_root_to_page(add_digests(text)).encode("utf-8", "backslashreplace"), status, headers
    )


def answer_template(
    template: str, title: str, values: Mapping[str, Any], is_rejected: bool = False, policy: str = POLICY
) -> Response:
    """Return a page rendered from a template, as `show_page` names it.

    `is_rejected` marks the page as the explanation of a rejected request (status 422).
    """
    return answer_page(show_page(template, title, values, policy), 422 if is_rejected else 200)


def answer_message(text: str, is_rejected: bool = False) -> Response:
    """Return a response with a short message to show next to a button. `is_rejected` marks it as an error."""
    return answer_template("message.html", "", {"message": text, "is_bad": is_rejected}, is_rejected)


def answer_json(value: Any, status: int = 200) -> Response:
    """Return a JSON response for any value that `json.dumps` accepts."""
    text = json.dumps(show_all(value), ensure_ascii=True, separators=(",", ":"))
    return Response(text, status, media_type="application/json")


def answer_text(text: str, status: int = 200) -> Response:
    """Return a plain-text response, in the page's language if there is a translation."""
    return PlainTextResponse(show(text), status)


def answer_file(path: Path) -> Response:
    """Return a file of a run. Browsers show samples, and save all other files instead of opening them."""
    kind = SHOWN.get(path.suffix)
    if kind is not None:
        return FileResponse(path, media_type=kind)
    policy = {"content-security-policy": "sandbox; default-src 'none'"}
    return FileResponse(path, headers=policy, media_type="application/octet-stream", filename=path.name)


def answer_move(address: str) -> Response:
    """Return the response to an htmx form that makes the browser open another page of this server.

    htmx sends the forms, because a plain form without a referrer has the origin null, which is rejected.
    """
    return Response(headers={"hx-redirect": address})


def answer_not_found() -> Response:
    """Return the plain-text response for a missing file or page (status 404)."""
    return answer_text(NOT_FOUND, 404)


def answer_not_found_page(request: Request) -> Response:
    """Return a 404 page with links for a URL that does not exist; plain text for a part of a page."""
    if "hx-request" in request.headers:
        return answer_not_found()
    page = show_page("not_found.html", say("Not there"), {"message": NOT_FOUND})
    return answer_page(page, 404)


def answer_unknown() -> Response:
    """Return the response (status 404) to a form whose button the page does not know."""
    return answer_text(say("There is no such request."), 404)


def read_query(request: Request) -> Form:
    """Return the query parameters of a request's URL."""
    query = request.query_params
    return {name: query.getlist(name) for name in query}


def answer_body(answer: Callable[[Request, bytes], Response]) -> Callable[[Request], Awaitable[Response]]:
    """Return a handler that reads a body, limited by `server.Gate`, and calls `answer` in a thread."""

    async def ask(request: Request) -> Response:
        return await run_in_threadpool(answer, request, await request.body())

    return ask


def answer_form(answer: Callable[[Request, Form], Response]) -> Callable[[Request], Awaitable[Response]]:
    """Return a handler that reads a URL-encoded form and calls `answer` with it in a thread."""
    return answer_body(lambda request, body: answer(request, parse_qs(body.decode("utf-8", "replace"))))
