"""Put the pages of a server below a path that only admitted browsers know.

A browser sends a cookie to all ports of a host, and so to other users' servers, but not to another path.
So the cookie that admits a browser belongs to a path that cannot be guessed, and all pages are below it.
Routes and templates do not know that path: it is removed from requests, and added to this server's URLs in
responses.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

MARK = "/~"  # prefix of that path; no page's own path starts with it
_ROOT: ContextVar[str] = ContextVar("root of pages", default="")
# attributes in our templates that contain addresses; all values are escaped, so none contains a quote
_ATTRIBUTES = (
    *("href", "src", "action", "hx-get", "hx-post"),
    *(f"data-{name}" for name in ("address", "piece", "refresh", "rows", "send", "show", "src", "upload")),
)
_ADDRESS = re.compile(rf'(?<=\s)(?:{"|".join(_ATTRIBUTES)})="(?=/(?![/~]))')
_MOVES = (b"location", b"hx-redirect")  # headers that lead to another page


@contextlib.contextmanager
def serving_below(root: str) -> Iterator[None]:
    """Let `add_root` and `add_root_to_page` prefix this server's URLs with a path; "" adds none."""
    token = _ROOT.set(root)
    try:
        yield
    finally:
        _ROOT.reset(token)


def find_port(scope: Mapping[str, Any]) -> int:
    """Return the port on which this server received a request, ignoring its headers; 0 if unknown."""
    _, port = scope.get("server") or ("", None)
    return port or 0


def add_root(address: str) -> str:
    """Prefix the URL path of a page with the server's root path; return any other URL unchanged."""
    is_ours = address.startswith("/") and not address.startswith(("//", MARK))
    return f"{_ROOT.get()}{address}" if is_ours else address


def add_root_to_page(page: str) -> str:
    """Insert the server's root path into all attributes of an HTML page that are URLs of this server."""
    root = _ROOT.get()
    return _ADDRESS.sub(lambda match: match[0] + root, page) if root else page


def add_root_to_header(name: bytes, value: bytes) -> bytes:
    """Insert the server's root path into a response header whose value is the URL of a page."""
    return add_root(value.decode("latin-1")).encode("latin-1") if name in _MOVES else value
