"""What lets a browser in: nothing of it goes to another port, and nobody else can use what does."""

import contextlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from browser.core.page_access import COOKIE, COOKIE_SECONDS, PageAccess, derive_access
from browser.core.page_root import add_root, add_root_to_page, serving_below
from tests.browser.entering import enter
from tests.browser.serving import Served, serve_runs, write_run
from tests.browser.test_safe_clicks import list_addresses, root
from tests.chromium import open_page

__all__ = ["root"]  # a fixture
TOKEN = "a-secret-word-of-letters"
OTHER_TOKEN = "another-word-of-letters"
# attributes that hold paths of files: values of fields, and texts to copy
NO_ADDRESSES = "(?:value|placeholder|title|content|data-text|data-for|data-folder)="
QUERIES = ("", "?folder=described", "?folder=pictures")


@contextlib.contextmanager
def listen_as_another(page: str = "") -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Serve a page at another port of this machine; yield its address, and the headers of all requests."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append({name.lower(): value for name, value in self.headers.items()})
            body = page.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Set-Cookie", f"{COOKIE}=9999999999.x; Path=/; Max-Age=1000")
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_server_at_another_port_gets_nothing_from_a_browser_that_was_let_in(tmp_path: Path) -> None:
    write_run(tmp_path, "x")
    with serve_runs(tmp_path, token=TOKEN) as served:
        forms = f'<img src="{served.url}/"><form method=post action="/"><button>x</button></form>'
        with listen_as_another(forms) as (other, seen), open_page(f"{served.url}/?token={TOKEN}") as page:
            page.get_by_role("heading", name="x").wait_for()
            home = page.url
            page.goto(f"{other}/new")
            page.get_by_role("button", name="x").click()
            page.wait_for_load_state("load")
            page.evaluate("fetch('/static/browser.js', {credentials: 'include'}).then(() => 1)")
            assert len(seen) >= 3
            for headers in seen:
                sent = "; ".join(f"{name}={value}" for name, value in headers.items())
                assert TOKEN not in sent
                assert home.split("/")[3] not in sent  # of the path
                for address in ("/", f"{served.of('x')}", "/new", "/static/browser.js"):
                    refused = served.ask(address, Cookie=headers.get("cookie", ""))
                    assert refused.status == 401, sent
            page.goto(home)  # what the other server has set for all paths keeps nobody out
            page.get_by_role("heading", name="x").wait_for()


def test_two_pages_stay_open_beside_each_other_and_after_a_restart(tmp_path: Path) -> None:
    write_run(tmp_path, "x")
    with (
        serve_runs(tmp_path, token=TOKEN) as first,
        serve_runs(tmp_path, token=OTHER_TOKEN) as second,
        open_page(f"{first.url}/?token={TOKEN}") as page,
    ):
        page.get_by_role("heading", name="x").wait_for()
        homes = [page.url]
        page.goto(f"{second.url}/?token={OTHER_TOKEN}")
        page.get_by_role("heading", name="x").wait_for()
        homes.append(page.url)
        for home in homes:
            page.goto(home)
            page.get_by_role("heading", name="x").wait_for()
        kept = page.context.cookies()
        assert len({cookie["path"] for cookie in kept if cookie["name"] == COOKIE}) == 2
    with pytest.raises(AssertionError), serve_runs(tmp_path, token=TOKEN) as elsewhere:  # of another port
        enter(elsewhere, OTHER_TOKEN)


def test_words_hold_for_one_server_one_account_and_thirty_days() -> None:
    now = 1_800_000_000.0
    access = PageAccess(derive_access(TOKEN, 8765).key, lambda: now)
    word = access.make_cookie_value(1000)
    assert access.has_valid_cookie(f"{COOKIE}=x; a=b; {COOKIE}={word}; {COOKIE}=", 1000)
    assert not access.has_valid_cookie(f"{COOKIE}={word}", 1001)
    assert not access.has_valid_cookie(f"{COOKIE}={word}", None)
    assert not access.has_valid_cookie(f"other={word}", 1000)
    end, _, signed = word.partition(".")
    assert not access.has_valid_cookie(f"{COOKIE}={int(end) + 1}.{signed}", 1000)
    for token, port in ((TOKEN, 8766), (OTHER_TOKEN, 8765)):
        other = PageAccess(derive_access(token, port).key, lambda: now)
        assert not other.has_valid_cookie(f"{COOKIE}={word}", 1000)
        assert other.root != access.root
    late = PageAccess(access.key, lambda: now + COOKIE_SECONDS)
    assert not late.has_valid_cookie(f"{COOKIE}={word}", 1000)
    again = PageAccess(derive_access(TOKEN, 8765).key, lambda: now + COOKIE_SECONDS - 1)  # after a restart
    assert again.has_valid_cookie(f"{COOKIE}={word}", 1000)
    assert TOKEN not in word + access.root


def test_the_cookie_of_older_versions_is_removed(tmp_path: Path) -> None:
    with serve_runs(tmp_path, token=TOKEN) as served:
        refused = served.ask("/", Cookie=f"a=b; reelsmith={TOKEN}")
        assert (refused.status, refused.headers["set-cookie"]) == (401, "reelsmith=; Max-Age=0; Path=/")
        assert "set-cookie" not in served.ask("/", Cookie="a=reelsmith=x").headers


@pytest.mark.parametrize("path", ["", "/", "!/", "//", "/../", "/%2e%2e/"])
def test_nothing_but_the_root_itself_leads_to_the_pages(path: str, tmp_path: Path) -> None:
    with serve_runs(tmp_path, token=TOKEN) as served:
        browser = enter(served, TOKEN)
        for start in (browser.root[:-1], browser.root.upper(), f"/{browser.root}", f"/x{browser.root}"):
            assert served.ask(f"{start}{path}", Cookie=browser.cookie).status in (400, 401)
        assert served.ask(f"{browser.root}x/", Cookie=browser.cookie).status == 401


def test_a_program_gets_in_by_a_header_with_the_word(tmp_path: Path) -> None:
    with serve_runs(tmp_path, token=TOKEN) as served:
        assert served.ask("/queue", Authorization=f"Bearer {TOKEN}").status == 200
        for header in (TOKEN, f"Bearer {TOKEN[:-1]}", "Bearer ", f"Basic {TOKEN}", f"Bearer {TOKEN}x"):
            assert served.ask("/queue", Authorization=header).status == 401
        refused = served.ask("/queue/pause", "POST", "x=1", Authorization=f"Bearer {TOKEN}")
        assert refused.status == 403  # of no origin


def all_pages(served: Served) -> list[str]:
    return [f"{address}{query}" for address in list_addresses(served, "GET") for query in QUERIES]


def test_every_address_in_every_page_is_below_the_root(root: Path) -> None:
    with serve_runs(root, token=TOKEN) as served:
        browser = enter(served, TOKEN)
        count = 0
        for address in all_pages(served):
            answer = browser.ask(address)
            for name in ("location", "hx-redirect"):
                assert answer.headers.get(name, browser.root).startswith(browser.root)
            if "html" in answer.headers.get("content-type", ""):
                found = re.findall(rf'\s(?!{NO_ADDRESSES})([\w-]+)="(/[^"]*)', answer.text)
                count += len(found)
                assert not [one for one in found if not one[1].startswith(f"{browser.root}/")], address
            elif "json" in answer.headers.get("content-type", ""):
                found = re.findall(r'"(address|picture|mask)":"(/[^"]*)', answer.text)
                assert not [one for one in found if not one[1].startswith(f"{browser.root}/")], address
        assert count > 100


def test_addresses_get_the_root_once_and_other_texts_never() -> None:
    page = '<a href="/new" class="x"><input value="/new"><p>&#34;/new&#34;</p><img src="//evil/x">'
    with serving_below("/~root"):
        shown = add_root_to_page(page)
        assert shown.startswith('<a href="/~root/new" class="x"><input value="/new">')
        assert 'src="//evil/x"' in shown
        assert add_root_to_page(shown) == shown
        assert add_root(add_root("/new?a=/b")) == "/~root/new?a=/b"
        assert [add_root(one) for one in ("new", "./x", "http://a/b", "//a/b", "")] == [
            *("new", "./x", "http://a/b", "//a/b", ""),
        ]
    assert add_root_to_page(page) == page
