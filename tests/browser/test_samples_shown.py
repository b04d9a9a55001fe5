"""Samples of a run: few in a row, one as large as the window, two laid over each other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modules.media.writing import write_png, write_video
from tests.browser.serving import Served, serve_runs
from tests.chromium import open_page, wait_until
from training.reports.history import History, describe_process, history_path

STEPS = (0, 100, 200, 300, 400, 500)
BEST = 300
PROMPTS = {"0": "a cat", "1": "a dog"}
SHOWN = "[...document.querySelectorAll('.grid thead th')].filter(one => one.checkVisibility())"
TITLES = f"{SHOWN}.map(one => one.firstChild.data.trim())"


def write_samples(folder: Path) -> None:
    """A run that has stopped, with a picture and a clip at each of six steps, each of its own gray."""
    history = History(history_path(folder, "x"), 1)
    (folder / "sample").mkdir(parents=True)
    told = {"model": "wan", "total_steps": 600, "changed": [], "unchanged": [], "listens": True}
    history.add(0, started={**told, "process": describe_process()})
    for number, step in enumerate(STEPS):
        frame = np.full((48, 64, 3), 40 * number, np.uint8)
        write_png(folder / "sample" / f"{step}.png", frame)
        write_video(folder / "sample" / f"{step}.mp4", iter([frame] * 5), 8.0)
        history.add(
            step, samples=f"{step:06d}", files={"0": f"{step}.png", "1": f"{step}.mp4"}, prompts=PROMPTS
        )
        history.add(step, validation={"validation/loss": 1 + abs(step - BEST)})
    history.add(500, ended="stopped", kind="")
    history.flush()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("samples")
    write_samples(folder)
    with serve_runs(folder) as served:
        yield served


@pytest.fixture(scope="module")
def page(served: Served) -> Iterator[Any]:
    with open_page(f"{served.url}{served.of('x')}", 1440) as page:
        yield page


def test_a_row_has_before_best_last_and_one_more_in_a_third_of_the_window(page: Any) -> None:
    assert page.evaluate(TITLES) == ["before training", "step 100", "step 300", "step 500"]
    rows = "[...document.querySelectorAll('.grid tbody')].map(one => one.getBoundingClientRect().height)"
    assert max(page.evaluate(rows)) <= 300
    page.get_by_label("all 6 steps").check()
    assert len(page.evaluate(TITLES)) == 6
    page.reload()
    assert len(page.evaluate(TITLES)) == 6, "what was chosen is remembered"
    page.get_by_label("all 6 steps").uncheck()


def test_the_size_is_remembered_also_on_other_pages(served: Served, page: Any) -> None:
    width = "document.querySelector('.grid td').getBoundingClientRect().width"
    before = page.evaluate(width)
    page.get_by_label("Size").fill("1.5")
    assert page.evaluate(width) == pytest.approx(1.5 * before, rel=0.02)
    page.reload()
    assert page.evaluate(width) == pytest.approx(1.5 * before, rel=0.02)
    page.goto(f"{served.url}/generate")
    assert page.locator("#results .size input").input_value() == "1.5"
    page.goto(f"{served.url}{served.of('x')}")
    page.get_by_label("Size").fill("1")


def test_keys_alone_enlarge_a_sample_and_go_through_steps_and_prompts(page: Any) -> None:
    page.locator(".grid td a").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("#beside[open] .b img")
    assert page.locator("#shown").inner_text() == "step 100"
    assert page.locator(".pair").bounding_box()["height"] > 0.75 * 900
    for key, shown in (("ArrowRight", "step 200"), ("ArrowRight", "step 300"), ("ArrowLeft", "step 200")):
        page.keyboard.press(key)
        assert page.locator("#shown").inner_text() == shown
    assert page.evaluate("document.querySelector('.pair .b').style.clipPath") == "inset(0px 0px 0px 0%)"
    page.keyboard.press("ArrowDown")
    wait_until(page, "document.querySelector('.pair .b video')?.currentTime > 0")
    assert (page.locator("#shown").inner_text(), page.locator("#shown_prompt").inner_text()) == (
        "step 200",
        "1 a dog",
    )
    assert page.locator(".pair .a > *").count() == 0
    page.locator("#later").focus()
    for _ in range(6):  # beyond the last step
        page.keyboard.press("Enter")
    focused = page.evaluate("[document.activeElement.id, document.activeElement.ariaDisabled]")
    assert focused == ["later", "true"]
    page.keyboard.press("Escape")
    page.wait_for_selector("#beside", state="hidden")
    assert page.evaluate("document.activeElement.closest('.grid td') !== null")


def test_two_lie_over_each_other_and_a_pointer_draws_the_line(page: Any) -> None:
    page.locator(".grid td a:visible").nth(3).click()
    page.get_by_label("lay another one over it").check()
    assert page.evaluate("['left', 'right'].map((id) => $(id).selectedOptions[0].text)") == [
        "before training",
        "step 500",
    ]
    box = page.locator(".pair").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.3, box["y"] + box["height"] / 2)
    clip = page.evaluate("document.querySelector('.pair .b').style.clipPath")
    assert 28 <= float(clip.split()[-1].rstrip("%)")) <= 32
    page.get_by_role("button", name="Back").click()
    assert page.locator("#shown").inner_text() == "step 400"
    assert page.locator(".pair .a img").count() == 1
    page.get_by_label("lay another one over it").uncheck()
    page.get_by_role("button", name="Close").click()
    assert page.problems == []


def test_places_of_samples_are_kept_before_they_are_loaded_and_without_scripts(served: Served) -> None:
    with open_page(f"{served.url}{served.of('x')}", 1440, java_script_enabled=False) as page:
        cell = page.locator(".grid td a").first.bounding_box()
        assert cell["height"] == pytest.approx(cell["width"] * 48 / 64, abs=1)
        shown = page.locator(".grid td:visible")
        assert shown.count() == 2 * 4
        page.get_by_label("all 6 steps").check()
        assert shown.count() == 2 * 6
        assert page.locator(".size").is_hidden()
        image = page.locator(".grid td img:visible").first
        wait_until(page, "document.querySelector('.grid td img').naturalWidth > 0")
        box = image.bounding_box()
        assert (box["width"], box["height"]) == pytest.approx((cell["width"], cell["height"]), abs=1)
