"""Open an HTML page in a real browser: a headless Chromium, driven by Playwright.

On Debian and Ubuntu: apt-get install --no-install-recommends chromium-headless-shell
"""

import contextlib
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from tests.waiting import MILLISECONDS, PATIENCE

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--autoplay-policy=no-user-gesture-required"),
]
ONE_PROCESS = "--process-per-site"  # for all pages of the tests' servers


@contextlib.contextmanager
def open_page(place: Path | str, width: int = 1280, height: int = 900, **look: str) -> Iterator[Any]:
    """Yield Playwright's page with this file or address open. `page.problems` lists errors, dialogs and
    requests, without those of the address' own server. look: of the page, as `color_scheme="dark"`.

    What the page stores is its own. Skips the test if no browser is installed.
    """
    shared = _context(**look)
    is_first = shared not in USED
    if is_first:
        USED.append(shared)
        _close_pages(shared)  # a window may have opened late
    page = shared.new_page() if is_first else _start(ONE_PROCESS).new_page(**look)
    page.set_viewport_size({"width": width, "height": height})
    url = place if isinstance(place, str) else place.resolve().as_uri()
    _prepare(page, url)
    page.on("dialog", lambda dialog: (page.problems.append("dialog"), dialog.dismiss()))
    try:
        page.goto(url)
        page.wait_for_load_state("load")
        yield page
    finally:
        if is_first:
            USED.remove(shared)
            _close_pages(shared)
            _remove_stored(shared, page.origins)
        else:
            page.close()


@cache
def _context(**look: str) -> Any:
    """Return the context that pages of one look share which follow each other.

    Its first page keeps a process that each page of a new context would start, a processor second of work.
    It is blank, and at the address of the tests' servers: pages of one site share a process, whatever
    the port.
    """
    context = _start(ONE_PROCESS).new_context(**look)
    first = context.new_page()
    first.route("**", lambda route: route.fulfill(body="", content_type="text/html"))
    first.goto("http://127.0.0.1/")
    return context


USED: list[Any] = []  # contexts of which a page is open


def _close_pages(context: Any) -> None:
    """Close all pages of a context but its first one."""
    for page in context.pages[1:]:
        page.close()


def _remove_stored(context: Any, origins: set[str]) -> None:
    """Remove all that pages have stored, cookies too. origins: of the pages."""
    session = context.new_cdp_session(context.pages[0])
    for origin in origins:
        session.send("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "all"})
    session.detach()


@contextlib.contextmanager
def open_tabs(url: str, count: int, script: Path) -> Iterator[list[Any]]:
    """Yield as many tabs of one browser, each with this address open and `problems` as of `open_page`.

    Each is in a window of its own: one behind another would be drawn once a second, and clicks wait for that.
    Each has a process of its own, so that a busy one does not make the other one late.
    script: runs in each page before its own scripts. Dialogs are left to the caller.
    """
    context = _start().new_context(viewport={"width": 1280, "height": 900})
    context.add_init_script(path=script)
    try:
        tabs = [context.new_page()]
        for _ in range(count - 1):
            with tabs[0].expect_popup() as popup:
                tabs[0].evaluate("void open('about:blank', '', 'popup,noopener,width=1280,height=900')")
            tabs.append(popup.value)
        for page in tabs:
            _prepare(page, url)
            page.goto(url)
        yield tabs
    finally:
        context.close()


def _prepare(page: Any, url: str) -> None:
    """Let the page wait as long as tests do, for all that it is asked, and note its problems and origins."""
    page.set_default_timeout(PATIENCE * MILLISECONDS)
    page.problems = []
    page.origins = set()
    page.on("pageerror", lambda error: page.problems.append(f"error: {error}"))
    page.on("console", lambda message: _note(page.problems, message.text))
    page.on("request", lambda request: _note_request(page, request.url, url))


def _note(problems: list[str], text: str) -> None:
    """Note what the console says, but not that the page had the data of its address cleared."""
    if not text.startswith("Clear-Site-Data header on"):
        problems.append(f"console: {text}")


STARTED: list[Any] = []  # Playwright and its browsers, which files share that follow each other


@cache
def _start(*flags: str) -> Any:
    """Return the browser with these flags, which runs until `end_browser`."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if browser_path is None:
        pytest.skip("no browser: apt-get install --no-install-recommends chromium-headless-shell")
    if not STARTED:
        STARTED.append(sync_api.sync_playwright().start())
    STARTED.append(STARTED[0].chromium.launch(executable_path=browser_path, args=[*FLAGS, *flags]))
    return STARTED[-1]


def is_used_by(test_file: ModuleType | None) -> bool:
    """Return whether a file of tests names what opens pages; None: there is no such file."""
    return test_file is not None and any(
        value is open_page or value is open_tabs for value in vars(test_file).values()
    )


def is_of_browser(process: psutil.Process) -> bool:
    """Return whether a process is Playwright's, or one that it has started."""
    with contextlib.suppress(psutil.Error):  # it has just ended
        return any("playwright" in Path(one.exe()).parts for one in (process, *process.parents()))
    return False


def read_seconds() -> float:
    """Return the processor seconds of the browsers that run, and of what has ended in them."""
    if not STARTED:
        return 0.0
    seconds = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if is_of_browser(process):
                seconds += sum(process.cpu_times()[:4])  # its own and its children's
    return seconds


def end_browser() -> None:
    """End the browser if one was started: while Playwright runs, this thread has a loop of asyncio."""
    if STARTED:
        playwright, *browsers = STARTED
        for browser in browsers:
            browser.close()
        playwright.stop()
        STARTED.clear()
    _start.cache_clear()
    _context.cache_clear()


def _note_request(page: Any, url: str, own: str) -> None:
    if not url.startswith("data:"):
        page.origins.add("/".join(url.split("/")[:3]))
    if not url.startswith(("data:", "file:", "/".join(own.split("/")[:3]))):
        page.problems.append(f"request: {url}")


def read_page(page: Any, read: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a page answers; None while another one takes its place, or is not drawn yet."""
    from playwright.sync_api import Error

    try:
        return read(*arguments)
    except Error as error:
        is_new = "context was destroyed" in str(error) or "navigat" in str(error)
        if not is_new and "properties of null" not in str(error):
            raise
        page.wait_for_load_state("load")
        return None


def wait_until(page: Any, expression: str) -> None:
    """Wait until an expression is true; Playwright's own waiting needs pages that may evaluate texts."""
    end = time.monotonic() + PATIENCE
    for looked in itertools.count():
        if read_page(page, page.evaluate, expression):
            return
        assert time.monotonic() < end, f"never true: {expression}"
        page.wait_for_timeout(50 if looked < 40 else 150)  # milliseconds; each look costs several of work
