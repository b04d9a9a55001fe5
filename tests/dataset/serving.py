"""A local web site for the tests: it counts what it is asked for, and fails as told."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.servers import run_handler

CUT = 100_000  # bytes that arrive before the connection breaks


@dataclass
class Site:
    """Files of a folder under `url`. fails: how often a name is answered with 503 first; cuts: how often its
    connection breaks in the middle; passes: where a name is passed on to.
    """

    folder: Path
    url: str = ""
    fails: Counter[str] = field(default_factory=Counter)
    cuts: Counter[str] = field(default_factory=Counter)
    passes: dict[str, str] = field(default_factory=dict)
    version: str = '"one"'  # of all files
    heeds_version: bool = True  # else the rest of another file is sent as if it were that of the first
    asked: list[str] = field(default_factory=list)  # names, with `@9` if from byte 9 on
    auth: list[str] = field(default_factory=list)

    def answer(self, handler: Any) -> None:
        name = unquote(urlsplit(handler.path).path).lstrip("/")
        start = handler.headers.get("range", "").removeprefix("bytes=").removesuffix("-")
        self.asked.append(f"{name}@{start}" if start else name)
        if self.heeds_version and handler.headers.get("if-range", self.version) != self.version:
            start = ""
        self.auth.append(handler.headers.get("authorization", ""))
        path = self.folder / name
        code = 503 if self.fails[name] else 302 if name in self.passes else 200 if path.is_file() else 404
        self.fails[name] -= code == 503
        content = path.read_bytes() if code == 200 else b""
        first = int(start or 0)
        handler.send_response(206 if start and code == 200 else code)
        if name in self.passes:
            handler.send_header("location", self.passes[name])
        if start:
            handler.send_header("content-range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        handler.send_header("content-length", str(len(content) - first))
        handler.send_header("etag", self.version)
        handler.end_headers()
        is_cut = self.cuts[name] > 0
        self.cuts[name] -= is_cut
        handler.wfile.write(content[first : first + CUT] if is_cut else content[first:])
        handler.close_connection = True


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Site]:
    site = Site(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.answer(self)

        def log_message(self, *args: Any) -> None: ...

    with run_handler(Handler) as site.url:
        yield site


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "site").mkdir()
    with serve(tmp_path / "site") as one:
        yield one
