"""Get into a page that has a secret word, as a browser does: by the printed address."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import SimpleCookie

from tests.browser.serving import Answer, Served


@dataclass(frozen=True)
class Entered:
    """What a browser keeps that was let in: the root of the pages, and its cookie."""

    served: Served
    root: str
    cookie: str

    def ask(self, address: str, method: str = "GET", body: str = "", **headers: str) -> Answer:
        return self.served.ask(self.root + address, method, body, Cookie=self.cookie, **headers)


def enter(served: Served, word: str, **headers: str) -> Entered:
    answer = served.ask(f"/?token={word}", **headers)
    assert answer.status == 200, answer.text
    (root,) = re.findall('content="0;url=(.+)/"', answer.text)
    return Entered(served, root, cookie_of(answer.headers)[0])


def cookie_of(headers: Mapping[str, str]) -> tuple[str, str]:
    """Return the cookie of an answer as a browser sends it, and the path that it is sent to."""
    ((name, morsel),) = SimpleCookie(headers["set-cookie"]).items()
    return f"{name}={morsel.value}", morsel["path"]
