"""The browser of the tests is started once for files that follow each other, and is gone for all others."""

from pathlib import Path

import tests.browser.test_light
from tests import chromium, test_tiers
from tests.browser.serving import serve_runs
from tests.chromium import open_page

STORED = "[localStorage.length, sessionStorage.length, document.cookie, innerWidth]"


def test_files_that_open_pages_are_known() -> None:
    assert chromium.is_used_by(tests.browser.test_light)
    assert not chromium.is_used_by(test_tiers)
    assert not chromium.is_used_by(None)


def test_a_page_finds_nothing_of_the_one_before(tmp_path: Path) -> None:
    """They have one server here, whose pages share what they store in a browser of a user."""
    with serve_runs(tmp_path) as served:
        with open_page(served.url, 500) as page:
            page.evaluate("localStorage.a = 1, sessionStorage.a = 1, document.cookie = 'a=1'")
            with page.expect_popup():
                page.evaluate("document.cookie = 'b=1; path=/queue', void open('/queue')")
            assert page.evaluate("[localStorage.a, sessionStorage.a, document.cookie]") == ["1", "1", "a=1"]
        with open_page(f"{served.url}/static/browser.js") as page:  # it stores nothing by itself
            assert page.evaluate(STORED) == [0, 0, "", 1280]
            assert page.context.cookies() == []
            assert len(page.context.pages) == 2  # the blank one, too


def test_two_open_pages_share_nothing(tmp_path: Path) -> None:
    with serve_runs(tmp_path) as served:
        address = f"{served.url}/static/browser.js"
        with open_page(address) as page, open_page(address) as other:
            page.evaluate("localStorage.a = 1, document.cookie = 'a=1'")
            assert other.evaluate(STORED) == [0, 0, "", 1280]
