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


@contextlib.contextmanager
def open_page(place: Path | str, width: int = 1280, height: int = 900, **look: str) -> Iterator[Any]:
    """Yield Playwright's page with this file or address open. `page.problems` lists errors, dialogs and
    requests, without those of the address' own server. look: of the page, as `color_scheme="dark"`.

    What the page stores is its own. Skips the test if no browser is installed.
    """
    page = _start().new_page(viewport={"width": width, "height": height}, **look)
    url = place if isinstance(place, str) else place.resolve().as_uri()
    _prepare(page, url)
    page.on("dialog", lambda dialog: (page.problems.append("dialog"), dialog.dismiss()))
    try:
        page.goto(url)
        page.wait_for_load_state("load")
        yield page
    finally:
        page.close()


@contextlib.contextmanager
def open_tabs(url: str, count: int, script: Path) -> Iterator[list[Any]]:
    """Yield as many tabs of one browser, each with this address open and `problems` as of `open_page`.

    Each is in a window of its own: one behind another would be drawn once a second, and clicks wait for that.
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
    """Let the page wait as long as tests do, for all that it is asked, and note its problems."""
    page.set_default_timeout(PATIENCE * MILLISECONDS)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(f"error: {error}"))
    page.on("console", lambda message: page.problems.append(f"console: {message.text}"))
    page.on("request", lambda request: _note_request(page, request.url, url))


STARTED: list[Any] = []  # Playwright and its browser, which files share that follow each other


@cache
def _start() -> Any:
    """Return the browser, which runs until `end_browser`."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser_path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if browser_path is None:
        pytest.skip("no browser: apt-get install --no-install-recommends chromium-headless-shell")
    STARTED.append(sync_api.sync_playwright().start())
    STARTED.append(STARTED[0].chromium.launch(executable_path=browser_path, args=FLAGS))
    return STARTED[1]


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


def end_browser() -> None:
    """End the browser if one was started: while Playwright runs, this thread has a loop of asyncio."""
    if STARTED:
        playwright, *browsers = STARTED
        for browser in browsers:
            browser.close()
        playwright.stop()
        STARTED.clear()
    _start.cache_clear()


def _note_request(page: Any, url: str, own: str) -> None:
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
