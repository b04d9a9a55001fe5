"""The word of the page: of its own making, for one user, and in no log, list of processes or other place."""

import hashlib
import json
import os
import re
import secrets
import socket
import stat
import subprocess
import sys
from base64 import b64encode
from dataclasses import replace
from pathlib import Path

import pytest

from browser.core.options import BrowserOptions
from browser.core.page_access import COOKIE, derive_access
from browser.core.serving import ServerAddress, make_start_name, show_address
from browser.core.tokens import (
    CLOSED_CONNECTION,
    Connection,
    PageToken,
    PrintedWord,
    Ticket,
    choose_account_port,
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
import http.client, json, sys
link = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=300)
link.request("GET", sys.argv[2], headers=json.loads(sys.argv[3]))
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
    show_address(ServerAddress(BrowserOptions(), 8765), token)
    assert capsys.readouterr().out == ServerAddress(BrowserOptions(), 8765).format(token.secret) + "\n"
    monkeypatch.setenv("REELSMITH_FROM_QUEUE", "1")
    show_address(ServerAddress(BrowserOptions(), 8765), token)
    printed = capsys.readouterr().out
    assert str(token.secret) not in printed
    assert str(token.path) in printed


def test_the_printed_word_lets_one_browser_in_and_the_next_is_shown(tmp_path: Path) -> None:
    shown: list[str] = []
    word = PrintedWord(shown.append)
    first = word.secret
    with serve_runs(tmp_path, token=TOKEN, word=word, start_name="0123456789ab.localhost") as served:
        assert served.ask(f"/?token={first[:-1]}").status == 401
        opened = served.ask(f"/?token={first}", Host="0123456789ab.localhost")
        assert opened.headers["clear-site-data"] == '"storage"'
        assert opened.headers["set-cookie"].startswith(f"{COOKIE}=")
        assert served.ask(f"/?token={first}").status == 401
        assert shown == [word.secret]
        assert word.secret != first
        enter(served, word.secret)  # another browser
        earlier = served.ask("/", Host=f"ba9876543210.localhost:{served.port}")
        assert (earlier.status, "earlier start" in earlier.text) == (421, True)
    assert len(shown) == 2


def test_each_start_has_an_origin_of_its_own(tmp_path: Path) -> None:
    """What a browser keeps for the address of an earlier start reaches no later one."""
    names = {make_start_name() for _ in range(2)}
    assert len(names) == 2
    assert all(re.fullmatch(r"[0-9a-f]{12}\.localhost", name) for name in names)
    kept = [derive_access(TOKEN, 8765, name) for name in names]
    assert kept[0].root != kept[1].root
    assert not kept[1].has_valid_cookie(f"{COOKIE}={kept[0].make_cookie_value(1000)}", 1000)


def test_cookies_of_another_server_do_not_reach_the_name_of_a_start(tmp_path: Path) -> None:
    """A server answers no request with 700 kB of cookies, which each port of `localhost` may set."""
    word = PrintedWord(lambda word: None)
    name = "0123456789ab.localhost"
    with (
        serve_runs(tmp_path, token=TOKEN, word=word, start_name=name) as served,
        open_page(f"http://localhost:{served.port}/static/enter.js") as page,
    ):
        page.evaluate(
            """() => {
                for (let number = 0; number < 180; number += 1)
                    for (const domain of ["", "; domain=localhost"])
                        document.cookie = `c${number}=${"x".repeat(4000)}; path=/${domain}`;
            }"""
        )
        assert page.evaluate("document.cookie.length") > 500_000
        page.goto(f"http://{name}:{served.port}/?token={word.secret}")
        page.wait_for_url("**/~*/")
        assert page.title() == "Runs"
        assert page.evaluate("document.cookie") == ""


def test_a_script_of_another_server_at_this_address_does_not_run(tmp_path: Path) -> None:
    """Each script is named with its digest, so that a browser refuses another content."""
    with serve_runs(tmp_path) as served:
        for address in ("/", "/new", "/generate", "/models", "/queue", "/settings"):
            text = served.ask(address).text
            named = re.findall(r'<(?:script src|link rel="stylesheet" href)="([^"]+)"([^>]*)>', text)
            assert named, address
            for path, attributes in named:
                digest = hashlib.sha256(served.ask(path).body).digest()
                assert f'integrity="sha256-{b64encode(digest).decode()}"' in attributes, path


def test_accounts_have_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = set()
    for number in range(20):
        monkeypatch.setattr(Path, "home", lambda number=number: Path(f"/home/{number}"))
        ports.add(choose_account_port())
        assert choose_account_port() in ports
    assert len(ports) > 15
    assert all(20_000 <= port < 30_000 for port in ports)


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


def ask_as_nobody(port: int, address: str, **headers: str) -> str:
    done = subprocess.run(
        ["/usr/bin/env", "python3", "-I", "-c", ASK, str(port), address, json.dumps(headers)],
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
        assert ask_as_nobody(served.port, f"{browser.root}/", Cookie=browser.cookie) == "401\n"
        assert browser.ask("/").status == 200


@ON_LINUX
@AS_ROOT
@pytest.mark.parametrize("name", ["X-Forwarded-For", "X-Real-IP", "X-Client-IP", "Forwarded"])
def test_no_header_makes_another_user_pass_for_this_one(name: str, tmp_path: Path) -> None:
    with serve_runs(tmp_path, token=TOKEN) as served:
        browser = enter(served, TOKEN)
        # every account sees this user's open connections and their ports
        with socket.create_connection(("127.0.0.1", served.port)) as own:
            host, port = own.getsockname()
            address = f"for={host}:{port}" if name == "Forwarded" else f"{host}:{port}"
            headers = {"Cookie": browser.cookie, name: address, "X-Forwarded-Proto": "http"}
            assert ask_as_nobody(served.port, f"{browser.root}/", **headers) == "401\n"


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
