"""A change keeps the place on the page; buttons of a job that end and remove it are apart."""

from pathlib import Path

import pytest

from tests.browser.serving import serve_runs, write_run
from tests.browser.test_model_pages import write_task
from tests.browser.test_walk import save_images
from tests.chromium import open_page, wait_until


def test_removing_parts_keeps_the_place_and_says_that_it_worked(tmp_path: Path) -> None:
    write_run(tmp_path / "root", "x")
    models = tmp_path / "models"
    models.mkdir()
    write_task(models, "wan", "t2v-1.3B")
    address = "/models?family=wan&task=t2v-1.3B&ask=remove"
    with (
        serve_runs(tmp_path / "root", models=models) as served,
        open_page(f"{served.url}{address}", 390, 500) as page,
    ):
        button = page.get_by_role("button", name="Move to the bin")
        button.scroll_into_view_if_needed()
        before = page.evaluate("scrollY")
        assert before > 200
        button.click()
        page.wait_for_url("**moved=**")
        said = page.locator("p.good[role=status]")
        said.get_by_text("It is now in").wait_for()
        wait_until(page, f"Math.abs(scrollY - {before}) < 5")
        page.reload()
        assert page.problems == []


def test_using_the_bar_of_the_next_step_scrolls_nothing(tmp_path: Path) -> None:
    """The bar covers what is below it; who moves to its buttons by keys has them in view already."""
    save_images(tmp_path / "my clips")
    with serve_runs(tmp_path) as served, open_page(f"{served.url}/new?folder=my+clips", 1280, 500) as page:
        assert page.evaluate("document.documentElement.scrollHeight") > 900
        for control in ("#step", "#shown_command summary", "#apart summary"):
            page.evaluate(f"document.querySelector('{control}').focus()")
            page.locator(control).click()
            assert page.evaluate("scrollY") == 0, control


@pytest.mark.parametrize("width", [390, 1440])
def test_what_ends_a_job_is_where_neither_retry_nor_remove_comes(tmp_path: Path, width: int) -> None:
    row = '<li class="job"><p class="number">1</p><div><code>x</code></div><p class="ask">{}</p></li>'
    running = row.format('<button id="stop1">Save and end</button>')
    ended = row.format('<button id="retry1">Run again</button><button id="remove1">Remove</button>')
    with serve_runs(tmp_path) as served, open_page(f"{served.url}/queue", width) as page:
        page.evaluate(f"document.querySelector('main').innerHTML = `<ol class='jobs'>{running}{ended}</ol>`")
        stop, retry, remove = (
            page.locator(f"#{name}1").bounding_box() for name in ("stop", "retry", "remove")
        )
        assert retry["x"] + retry["width"] <= stop["x"]
        assert stop["x"] + stop["width"] <= remove["x"]
