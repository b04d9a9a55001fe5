"""Read the tables of languages, select one for a request, and keep the reader's choice in a cookie.

A table is a file in `languages`: sections of English strings and their translations. The section `scripts`
is sent to the browser, for the strings of JavaScript. A second file has one more section: the first sentences
of the help of all training options.
"""

import functools
import json
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from browser.page_root import add_root, find_port
from browser.responses import answer_not_found
from modules.pages.language import Language, language

TABLES = Path(__file__).resolve().parent / "languages"
# HTML code -> the language's own name; the untranslated strings are in the first language
NAMES = (("en", "English"), ("zh", "中文"), ("ja", "日本語"))
CODES = tuple(code for code, _ in NAMES)
COOKIE = "reelsmith_language"  # the port is appended, because all ports of a host share cookies
HEADER = "Reelsmith-Language"  # sent by a page's scripts: the language of the page
COOKIE_SECONDS = 60 * 60 * 24 * 365
SCRIPTS = "scripts"  # section of a language file
HELPS = "helps"  # section in a separate file


@functools.cache
def read_table(code: str) -> Mapping[str, Mapping[str, str]]:
    """Return the sections of a language's translation table; empty for English."""
    if code == CODES[0]:
        return {}
    sections = json.loads((TABLES / f"{code}.json").read_text(encoding="utf-8"))
    helps = json.loads((TABLES / f"{HELPS}_{code}.json").read_text(encoding="utf-8"))
    return {**sections, HELPS: helps}


@functools.cache
def read_texts(code: str) -> Mapping[str, str]:
    """Return all translations into a language, by their English strings."""
    return {key: text for section in read_table(code).values() for key, text in section.items() if text}


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
    text = _write_script(code)
    return Response(text, media_type="text/javascript")


@functools.cache
def _write_script(code: str) -> str:
    texts = json.dumps(read_table(code).get(SCRIPTS, {}), ensure_ascii=True, separators=(",", ":"))
    return f'"use strict";\nconst LANGUAGE = "{code}", TEXTS = {texts};\n{FUNCTIONS}'


FUNCTIONS = """
// Returns an English text in the language of the page, with %(name)s replaced by values.
function translate(text, values = {}) {
  return (TEXTS[text] ?? text).replace(/%\\((\\w+)\\)s/g, (place, name) => values[name] ?? place);
}

// Returns one of two texts by a number; the plural is the one that the table has.
function translateCount(number, singular, plural, values = {}) {
  const text = number === 1 && TEXTS[plural] === undefined ? singular : plural;
  return translate(text, { n: number.toLocaleString("en"), ...values });
}

// What scripts ask for is in the language of the page, also when another tab has changed it since.
{
  const send = globalThis.fetch;
  globalThis.fetch = (address, options = {}) => {
    const headers = new Headers(options.headers);
    headers.set("HEADER", LANGUAGE);
    return send(address, { ...options, headers });
  };
}
""".replace("HEADER", HEADER)


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
