"""The pages with forms are accessible too: by axe, on all screens, by keyboard, and by labels that differ."""

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from tests.browser.serving import Served, serve_runs, write_run
from tests.browser.test_accessible import assert_fits, axe, list_errors
from tests.browser.test_safe_clicks import describe, list_routes, save_image
from tests.chromium import open_page

__all__ = ["axe"]  # a fixture
# texts of which none may hold another one of its page: a person and a test find things by them
LABELS = """[...document.querySelectorAll('label, legend, [aria-label]')]
  .filter(one => one.checkVisibility())
  .map(one => one.ariaLabel || [...one.childNodes]
    .filter(part => part.nodeType === 3 || ['B', 'SPAN'].includes(part.tagName))
    .map(part => part.textContent).join(' '))
  .map(text => text.trim().replace(/\\s+/g, ' ').toLowerCase()).filter(text => text)"""
# takes the mark of the element with the focus away; true if nothing has it
LEAVE_MARK = """(() => {
    const one = document.activeElement;
    if (!one || one === document.body) return true;
    delete one.dataset.missed;
    return false;
  })()"""
QUERIES = ("", "?folder=described")
MAX_TABS = 400


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A root with runs, a described folder, one that is not, and results."""
    root = tmp_path_factory.mktemp("root")
    write_run(root / "runs", "own", 10)
    write_run(root / "runs", "other", 4, None)
    for place in ("pictures", "described"):
        for number in range(3):
            save_image(root / place / f"{number}.png", 80 * number)
            (root / place / f"{number}.txt").write_text(f"picture {number}", encoding="utf-8")
    describe(root / "described")
    for number in range(3):
        save_image(root / "generated" / f"20261126-10101{number}_{number}.png", 70 * number)
    with serve_runs(root) as served:
        yield served


def list_pages(served: Served) -> list[str]:
    """The addresses of all whole pages."""
    addresses = [route.path for route in list_routes(served, "GET") if "{" not in route.path]
    addresses.append(served.of("own"))
    pages = []
    for address in addresses:
        for query in QUERIES:
            answer = served.ask(address + query)
            if answer.status == 200 and "<nav>" in answer.text:
                pages.append(address + query)
    return pages


def open_all(page: Any, address: str) -> None:
    page.goto(address)
    page.wait_for_timeout(1000)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    page.wait_for_timeout(300)


def find_contained(labels: list[str]) -> list[tuple[str, str]]:
    """Return pairs of labels of which the first is in the second."""
    different = sorted(set(labels))
    return [(label, other) for label in different for other in different if label != other and label in other]


@pytest.mark.slow
def test_no_label_of_a_page_holds_another_one(served: Served) -> None:
    errors = {}
    with open_page(served.url) as page:
        for address in list_pages(served):
            open_all(page, served.url + address)
            errors[address] = find_contained(page.evaluate(LABELS))
    assert {address: pairs for address, pairs in errors.items() if pairs} == {}


def test_a_label_in_another_one_is_found() -> None:
    assert find_contained(["seed", "keep the seed", "steps", "seed"]) == [("seed", "keep the seed")]


@pytest.mark.slow
def test_pages_with_forms_fit_all_screens_and_all_is_named(served: Served) -> None:
    with open_page(served.url) as page:
        for address in list_pages(served):
            open_all(page, served.url + address)
            assert_fits(page)


@pytest.mark.slow
def test_pages_with_forms_have_no_serious_fault(axe: str, served: Served) -> None:
    errors = {}
    with open_page(served.url) as page:
        for address in list_pages(served):
            open_all(page, served.url + address)
            page.evaluate(axe)
            errors[address] = list_errors(page)
    assert {address: found for address, found in errors.items() if found} == {}


@pytest.mark.slow
def test_each_control_is_reached_by_the_keyboard(served: Served) -> None:
    """Tab reaches all fields and buttons of a page, and what has the focus is seen."""
    controls = (
        "document.querySelectorAll('main button, main input, main select, main textarea, main summary')"
    )
    visible = (
        f"[...{controls}].filter(one => one.checkVisibility() && !one.disabled && one.type !== 'hidden')"
    )
    with open_page(served.url) as page:
        for address in list_pages(served):
            page.goto(served.url + address)
            page.wait_for_timeout(500)
            page.evaluate(f"{visible}.forEach(one => {{ one.dataset.missed = 'yes'; }})")
            for _ in range(MAX_TABS):
                page.keyboard.press("Tab")
                if page.evaluate(LEAVE_MARK):
                    break
            missed = page.evaluate(
                "[...document.querySelectorAll('[data-missed]')].map(one => one.outerHTML)"
            )
            # of a group of radio buttons Tab reaches the chosen one
            assert [text for text in missed if 'type="radio"' not in text] == [], address
