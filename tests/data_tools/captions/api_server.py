"""A server with an OpenAI-compatible interface, in a thread of the test."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.servers import run_handler

# the number of the request, from 0, and what it asks -> status and JSON text, a caption, or the raw answer
Reply = Callable[[int, dict[str, Any]], tuple[int, str] | str | bytes]


@dataclass
class FakeServer:
    """Remembers what it was asked."""

    address: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


def caption(text: Any, finish: str = "stop") -> tuple[int, str]:
    """The answer of a server with a caption."""
    message = {"role": "assistant", "content": text}
    return 200, json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": finish}]})


@contextmanager
def run_server(reply: Reply, retry_after: str | None = None) -> Iterator[FakeServer]:
    """Answer requests until the block ends. retry_after: a header of answers that are errors."""
    seen = FakeServer()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(seen.bodies)
                seen.bodies.append(body)
                seen.headers.append(dict(self.headers))
                seen.paths.append(self.path)
            answer = reply(number, body)
            with suppress(OSError):  # the program that asked may be gone
                if isinstance(answer, bytes):
                    self.wfile.write(answer)
                else:
                    self._send(*(caption(answer) if isinstance(answer, str) else answer))

        def _send(self, status: int, text: str) -> None:
            self.send_response(status)
            if status != 200 and retry_after is not None:
                self.send_header("Retry-After", retry_after)
            if 300 <= status < 400:
                self.send_header("Location", "/elsewhere")
            content = text.encode()
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with run_handler(Handler) as address:
        seen.address = f"{address}/v1"
        yield seen
