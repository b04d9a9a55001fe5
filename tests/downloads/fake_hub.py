"""A local server with the addresses of the Hugging Face hub and of ModelScope; it breaks on demand."""

import contextlib
import hashlib
import json
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.servers import run_handler

COMMIT = "c" * 40


@dataclass
class FakeHub:
    """What the server has and what it does; `requests` notes method, path and headers of each request."""

    files: dict[str, bytes] = field(default_factory=dict)  # "owner/name/path" -> data
    cuts: list[int] = field(default_factory=list)  # bytes after which the next answers end
    ignores_ranges: bool = False
    states_range: str | None = None  # of the next answers, whatever they hold; with the status for a part
    redirects_to: str = ""  # another address of this server that sends the data, as the hub's does
    sends_instead: dict[str, bytes] = field(default_factory=dict)  # damaged data
    small: set[str] = field(default_factory=set)  # files with a git SHA-1 instead of a SHA-256
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    address: str = ""

    def add(self, repository: str, path: str, data: bytes) -> None:
        self.files[f"{repository}/{path}"] = data

    def sent_ranges(self) -> list[str | None]:
        """The Range header of each GET, in order."""
        return [headers.get("range") for method, _, headers in self.requests if method == "GET"]

    def etag(self, name: str) -> str:
        data = self.files[name]
        if name in self.small:
            return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def serve() -> Iterator[FakeHub]:
    """Run a server on a free port of this machine for the block."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_data=False)

        def do_GET(self) -> None:
            self._answer(with_data=True)

        def _answer(self, with_data: bool) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            hub.requests.append((self.command, self.path, headers))
            parts = urllib.parse.urlsplit(self.path)
            path = urllib.parse.unquote(parts.path)
            if path.startswith("/api/v1/models/"):
                self._modelscope(path, dict(urllib.parse.parse_qsl(parts.query)))
                return
            if "/releases/download/" in path:  # as on GitHub: repository/releases/download/tag/file
                repository, _, rest = path.strip("/").partition("/releases/download/")
            else:
                repository, _, rest = path.strip("/").partition("/resolve/")
            self._send(f"{repository}/{rest.partition('/')[2]}", with_data)

        def _modelscope(self, path: str, query: dict[str, str]) -> None:
            repository = path.removeprefix("/api/v1/models/").partition("/repo")[0]
            if path.endswith("/repo/files"):
                files = [
                    {"Path": name.removeprefix(f"{repository}/"), "Size": len(data), "Sha256": hub.etag(name)}
                    for name, data in hub.files.items()
                    if name.startswith(f"{repository}/")
                ]
                status = 200 if files else 404
                self._reply(status, json.dumps({"Code": status, "Data": {"Files": files}}).encode())
                return
            self._send(f"{repository}/{query['FilePath']}", with_data=True)

        def _send(self, name: str, with_data: bool) -> None:
            if name not in hub.files:
                self._reply(404, b"no")
                return
            if hub.redirects_to and self.headers["Host"] != urllib.parse.urlsplit(hub.redirects_to).netloc:
                self.send_response(302)
                self.send_header("Location", f"{hub.redirects_to}{self.path}")
                self._describe(name)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data, start = hub.sends_instead.get(name, hub.files[name]), 0
            asked = self.headers.get("Range")
            if asked and with_data and not hub.ignores_ranges:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                if start >= len(data):
                    self._reply(416, b"")
                    return
            # before the headers, after which the client may ask again, in another thread
            end = start + hub.cuts.pop(0) if with_data and hub.cuts else len(data)
            declared = hub.states_range if with_data else None
            self.send_response(206 if start or declared is not None else 200)
            if start or declared is not None:
                declared = f"bytes {start}-{len(data) - 1}/{len(data)}" if declared is None else declared
                self.send_header("Content-Range", declared)
            self.send_header("Content-Length", str(len(data) - start))
            self._describe(name)
            self.end_headers()
            if not with_data:
                return
            self.wfile.write(data[start:end])
            if end < len(data):
                self.close_connection = True

        def _describe(self, name: str) -> None:
            self.send_header("ETag", f'"{hub.etag(name)}"')
            self.send_header("X-Linked-Etag", f'"{hub.etag(name)}"')
            self.send_header("X-Linked-Size", str(len(hub.files[name])))
            self.send_header("X-Repo-Commit", COMMIT)

        def _reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    with run_handler(Handler) as hub.address:
        yield hub
