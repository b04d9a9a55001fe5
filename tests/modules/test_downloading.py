"""Files from sites that send them slowly."""

import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

import modules.downloading as downloading
from modules.downloading import RetryableError, ask_http, receive
from tests.servers import run_handler
from tests.waiting import PATIENCE


class Trickle(BaseHTTPRequestHandler):
    """Sends a byte every twentieth of a second."""

    ended = threading.Event()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        try:
            while not self.ended.wait(0.05):
                self.wfile.write(b"x")
        except OSError:  # the other side has given up
            return

    def log_message(self, *arguments: object) -> None: ...


def test_bytes_are_handed_on_as_they_arrive() -> None:
    Trickle.ended.clear()
    with run_handler(Trickle) as address:
        started = time.monotonic()
        with ask_http(f"{address}/a.png", 0, None) as answer:
            first = next(iter(answer.pieces))
            Trickle.ended.set()

    assert set(first) == {ord("x")}
    assert time.monotonic() - started < PATIENCE  # a whole piece would take an hour


def test_a_site_that_sends_too_slowly_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "SLOW_SECONDS", 0.3)  # a minute in earnest
    Trickle.ended.clear()
    with run_handler(Trickle) as address:
        with pytest.raises(RetryableError, match="less than 64 KiB arrived in"):
            receive(
                lambda have, version: ask_http(f"{address}/a.png", have, version),
                tmp_path / "a.png",
                tries=1,
                wait=lambda seconds: None,
                first_wait=0.0,
                max_bytes=2000,
            )
        Trickle.ended.set()
