"""The word of the page: of its own making, for one user, and in no log, list of processes or other place."""

import os
import re
import secrets
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from browser.options import BrowserOptions
from browser.page_access import COOKIE
from browser.serving import make_address, show_address
from browser.tokens import (
    CLOSED_CONNECTION,
    Connection,
    PageToken,
    Ticket,
    find_owner,
    is_own_connection,
    select_token,
)
from modules.user_files import user_folder
from tests.browser.entering import enter
from tests.browser.serving import serve_runs, write_run
from tests.chromium import open_page

ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="lists connections as Linux does")
ON_POSIX = pytest.mark.skipif(os.name == "nt", reason="of modes of POSIX")
AS_ROOT = pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="needs another user")
TOKEN = "a-secret-word-of-letters"
NOBODY = 65534
ASK = """
import http.client, sys
link = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=300)
link.request("GET", sys.argv[2], headers={"Cookie": sys.argv[3]})
print(link.getresponse().status)
"""


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "user"))


def test_the_word_is_made_once_and_stays() -> None:
    first = select_token(BrowserOptions())
    assert re.fullmatch(r"[\w-]{43}", first.secret or "")
    assert select_token(BrowserOptions()) == first
    assert first.path == user_folder() / "page_token"
    assert select_token(BrowserOptions(no_token=True)) == PageToken(None)


@ON_POSIX
@pytest.mark.parametrize("fault", ["open", "short", "old", "link", "of bytes", "a folder"])
def test_a_word_that_others_may_know_is_replaced(fault: str, tmp_path: Path) -> None:
    first = select_token(BrowserOptions())
    path = first.path
    assert path is not None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    if fault == "open":
        path.chmod(0o604)
    elif fault == "short":
        path.write_text("short", encoding="utf-8")
    elif fault == "old":  # older versions sent it to all ports of this machine, in a cookie
        path.write_text(secrets.token_urlsafe(32), encoding="utf-8")
    elif fault == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif fault == "of bytes":
        path.write_bytes(b"\xff" * 40)
    else:
        path.unlink()
        path.mkdir()

    again = select_token(BrowserOptions())

    assert re.fullmatch(r"[\w-]{43}", again.secret or "")
    assert again.secret != first.secret


@ON_POSIX
def test_a_token_file_that_others_can_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "token.txt"
    path.write_text(TOKEN, encoding="utf-8")
    path.chmod(0o644)
    assert select_token(BrowserOptions(token=path)).secret == TOKEN
    assert f"chmod 600 {path}" in caplog.text
    caplog.clear()
    path.chmod(0o600)
    select_token(BrowserOptions(token=path))
    assert caplog.text == ""


def test_a_job_prints_no_word(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    token = select_token(BrowserOptions())
    show_address(BrowserOptions(), 8765, token)
    assert capsys.readouterr().out == make_address(BrowserOptions(), 8765, token.secret) + "\n"
    monkeypatch.setenv("REELSMITH_FROM_QUEUE", "1")
    show_address(BrowserOptions(), 8765, token)
    printed = capsys.readouterr().out
    assert str(token.secret) not in printed
    assert str(token.path) in printed


def test_a_ticket_lets_one_browser_in(tmp_path: Path) -> None:
    ticket = Ticket()
    with serve_runs(tmp_path, token=TOKEN, ticket=ticket) as served:
        assert served.ask(f"/new?token={ticket.secret}").status == 401
        assert served.ask(f"/?token={ticket.secret[:-1]}").status == 401
        opened = served.ask(f"/?token={ticket.secret}")
        assert opened.headers["set-cookie"].startswith(f"{COOKIE}=")
        assert served.ask(f"/?token={ticket.secret}").status == 401
    late = Ticket(end=0.0)
    with serve_runs(tmp_path, token=TOKEN, ticket=late) as served:
        assert served.ask(f"/?token={late.secret}").status == 401


@ON_LINUX
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_connections_of_this_user_are_told_apart(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with listener, socket.create_connection(listener.getsockname()[:2]) as client:
        here, there = client.getsockname()[:2], client.getpeername()[:2]
        connection = Connection(here[0], here[1], there[0], there[1])
        assert is_own_connection(connection)
        # the same port of ours leads elsewhere: another account may have the connection that is asked for
        assert find_owner(replace(connection, server_port=there[1] ^ 1)) is None
        client.shutdown(socket.SHUT_WR)
        assert find_owner(connection) == CLOSED_CONNECTION
    assert not is_own_connection(Connection(host, 1, host, 2))


def ask_as_nobody(port: int, address: str, cookie: str = "") -> str:
    done = subprocess.run(
        ["/usr/bin/env", "python3", "-I", "-c", ASK, str(port), address, cookie],
        user=NOBODY,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"another user cannot start Python: {done.stderr[-200:]}")
    return done.stdout


@ON_LINUX
@AS_ROOT
def test_another_user_gets_in_neither_with_nor_without_a_ticket(tmp_path: Path) -> None:
    ticket = Ticket()
    with serve_runs(tmp_path, token=TOKEN, ticket=ticket) as served:
        for address in ("/", f"/?token={ticket.secret}"):
            assert ask_as_nobody(served.port, address) == "401\n"
        # nor with all that a browser of this user sends
        browser = enter(served, TOKEN)
        assert ask_as_nobody(served.port, f"{browser.root}/", browser.cookie) == "401\n"
        assert browser.ask("/").status == 200


def test_a_browser_that_was_let_in_sees_all_pages(tmp_path: Path) -> None:
    write_run(tmp_path / "output", "x")
    ticket = Ticket()
    with (
        serve_runs(tmp_path, token=TOKEN, ticket=ticket) as served,
        open_page(f"{served.url}/?token={ticket.secret}") as page,
    ):
        page.get_by_role("heading", name="x").wait_for()
        assert re.fullmatch(rf"{served.url}/~[\w-]+/", page.url)
        root = page.url.removesuffix("/")
        for address in ("/new", "/generate", "/queue", "/models", "/settings"):
            page.goto(f"{root}{address}")
            page.get_by_role("link", name="Generate").first.wait_for()
            assert TOKEN not in page.content()
        assert page.evaluate("document.cookie") == ""
        assert page.problems == []
        page.goto(f"{served.url}/queue?from=bookmark")  # typed without the root, which the browser knows
        page.get_by_role("link", name="Generate").first.wait_for()
        assert page.url == f"{root}/queue?from=bookmark"
