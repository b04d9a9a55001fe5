"""What an admitted browser keeps: the secret path of the pages, and the value of a cookie for that path only.

Neither reveals the secret token of the page. Both are derived from the token, the port and the host name of
this start: they do not work on other servers, and after a restart only if the server keeps its name
(--token). The cookie's value contains the day on which it expires and, where the system shows it, the
account that opened the page. So a server of another account that takes over the port learns nothing that
admits anybody else.
"""

import hashlib
import hmac
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from browser.core.page_root import MARK, find_port
from browser.core.tokens import Connection, find_owner

COOKIE = "reelsmith_page"
OLD_COOKIE = "reelsmith"  # older cookie with the token itself, sent to all ports; it is deleted
COOKIE_SECONDS = 60 * 60 * 24 * 30  # after that, the printed address has to be opened again


@dataclass(frozen=True)
class PageAccess:
    """The secret path and the cookie values of one server."""

    key: bytes
    now: Callable[[], float] = time.time

    @property
    def root(self) -> str:
        """Secret path that begins the URL path of every page."""
        return f"{MARK}{self._sign('path')}"

    def make_cookie_value(self, owner: int | None) -> str:
        """Return a cookie value. `owner` is the browser's user id; None if it is not known."""
        end = int(self.now()) + COOKIE_SECONDS
        return f"{end}.{self._sign(f'{end} {owner}')}"

    def has_valid_cookie(self, cookies: str, owner: int | None) -> bool:
        """Return whether a cookie's value is valid for the user id `owner` and has not expired."""
        return any(self._is_valid_value(value, owner) for value in list_values(cookies, COOKIE))

    def _is_valid_value(self, value: str, owner: int | None) -> bool:
        end, _, _ = value.partition(".")
        expected = f"{end}.{self._sign(f'{end} {owner}')}"
        if not hmac.compare_digest(value.encode("utf-8", "replace"), expected.encode("utf-8", "replace")):
            return False
        return self.now() < int(end)

    def _sign(self, text: str) -> str:
        digest = hmac.digest(self.key, text.encode("utf-8", "replace"), "sha256")
        return urlsafe_b64encode(digest[:24]).decode()  # a whole number of characters


@cache
def derive_access(token: str, port: int, name: str = "") -> PageAccess:
    """Derive the path and the cookie key of a server from its secret token.

    The derivation is slow on purpose: a token given by --token may be easy to guess, and a path could be used
    to test guesses. `name` is the host name that the server has for this start only; "" if it has none.
    """
    salt = f"pages of Reelsmith at {name}:{port}".encode()
    return PageAccess(hashlib.pbkdf2_hmac("sha256", token.encode(), salt, iterations=200_000))


def find_page_access(token: str, scope: Mapping[str, Any], name: str = "") -> PageAccess:
    """Return the secret path and cookie values of the server that received the request `scope` (ASGI).

    `name` is the server's host name for this start only; "" if it has none.
    """
    return derive_access(token, find_port(scope), name)


def list_values(cookies: str, wanted: str) -> list[str]:
    """Return the values of all cookies named `wanted`: another server on this host may have set one, too."""
    values = []
    for part in cookies.split(";"):
        name, _, value = part.strip().partition("=")
        if name == wanted:
            values.append(value)
    return values


def find_connection(scope: Mapping[str, Any]) -> Connection | None:
    """Return both ends of a request's connection; None if the server does not know them."""
    client, server = scope.get("client"), scope.get("server")
    if client is None or server is None or server[1] is None:
        return None
    return Connection(*client, *server)


def find_account(scope: Mapping[str, Any]) -> int | None:
    """Return the id of the local user who sent a request; None if the system does not show it."""
    connection = find_connection(scope)
    return None if connection is None else find_owner(connection)
