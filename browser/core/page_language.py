"""Select a language for a request, and keep the reader's choice in a cookie."""

from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from browser.core.language_tables import CODES, HEADER, NAMES, read_texts, write_script
from browser.core.page_root import add_root, find_port
from browser.core.responses import answer_not_found
from modules.pages.language import Language, language

COOKIE = "reelsmith_language"  # the port is appended, because all ports of a host share cookies
COOKIE_SECONDS = 60 * 60 * 24 * 365


def choose_language(request: Request) -> Language:
    """Return the language of a request: its page's, the cookie's, or the first supported one of the browser.

    Parts that a page requests later keep its language, even if another tab has changed the cookie.
    """
    page_language = request.headers.get(HEADER, "")
    code = page_language if page_language in CODES else _read_cookie(request)
    code = code or find_accepted(request.headers.get("accept-language", ""))
    address = request.url.path
    if request.url.query:
        address = f"{address}?{request.url.query}"
    return Language(code, read_texts(code), address, NAMES)


def _read_cookie(request: Request) -> str | None:
    try:
        cookie = SimpleCookie(request.headers.get("cookie", "")).get(_name_cookie(request))
    except CookieError:
        return None
    return cookie.value if cookie is not None and cookie.value in CODES else None


def _name_cookie(request: Request) -> str:
    """Return the name of this server's cookie."""
    # It contains the port, so that no other server overwrites it.
    return f"{COOKIE}_{find_port(request.scope)}"


def find_accepted(header: str) -> str:
    """Return the code of the supported language that a browser prefers. `header` is its Accept-Language."""
    languages = []
    for part in header.split(","):
        name, _, parameter = part.partition(";")
        weight = _read_weight(parameter)
        code = name.strip().lower().partition("-")[0]
        if code in CODES and weight > 0:
            languages.append((weight, code))
    # the first one among equal weights
    return max(languages, key=lambda one: one[0])[1] if languages else CODES[0]


def _read_weight(parameter: str) -> float:
    """Return the weight of `q=0.8`; 1 without a weight, 0 if it is not a number."""
    name, _, number = parameter.strip().partition("=")
    if name.strip().lower() != "q":
        return 1.0
    try:
        weight = float(number)
    except ValueError:
        return 0.0
    return weight if 0 <= weight <= 1 else 0.0


def change_language(request: Request) -> Response:
    """Store another language in a cookie, and redirect to the page that contained the link."""
    code = request.path_params["code"]
    if code not in CODES:
        return answer_not_found()
    answer = RedirectResponse(find_return_address(request.query_params.get("to", "")), 303)
    answer.set_cookie(
        _name_cookie(request),
        code,
        max_age=COOKIE_SECONDS,
        httponly=True,
        samesite="strict",
        path=add_root("/"),
    )
    return answer


def find_return_address(address: str) -> str:
    """Return `address` if it is a URL of this server's pages; otherwise the URL of the list of runs."""
    is_ours = address.startswith("/") and not address.startswith(("//", "/\\", "/language/"))
    is_plain = address.isprintable() and "\\" not in address
    try:
        parts = urlsplit(address)
    except ValueError:
        return "/"
    return address if is_ours and is_plain and not parts.netloc else "/"


def show_scripts(request: Request) -> Response:
    """Respond with a script: the translated strings of all scripts, and functions to look them up."""
    code = request.path_params["code"]
    if code not in CODES:
        return answer_not_found()
    return Response(write_script(code), media_type="text/javascript")


def language_routes() -> list[Route]:
    """Return the routes that change the language and deliver the translated strings of JavaScript files."""
    return [
        Route("/language/{code}.js", show_scripts),
        Route("/language/{code}", change_language),
    ]


def language_headers() -> list[tuple[bytes, bytes]]:
    """Return the language headers of a response to the current request."""
    return [
        (b"content-language", language().code.encode()),
        (b"vary", f"Accept-Language, Cookie, {HEADER}".encode()),
    ]
