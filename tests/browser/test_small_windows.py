"""On a phone the content comes first; answers stay until the state changes; the end of a run is told once."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.browser.described_folders import describe
from tests.browser.serving import Served, serve_runs, write_run
from tests.chromium import open_page, open_tabs, wait_until
from tests.waiting import MILLISECONDS, PATIENCE

# a notice of the browser is counted where all tabs see it
NOTICES = """
class Counted {
  constructor(text) { localStorage.setItem("notices", `${localStorage.getItem("notices") ?? ""}${text};`); }
  static permission = "granted";
}
window.Notification = Counted;
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A described folder whose training runs, with a command that the page Generate knows."""
    folder = describe(tmp_path / "clips")
    write_generating(folder / "output", None)
    return tmp_path


def write_generating(output: Path, kind: str | None) -> None:
    history = write_run(output, "own", kind=kind)
    line = "python wan_generate_video.py --lora_weight own.safetensors --prompt x"
    row = {"step": 6, "commands": [["Generate with it", line, line, "", ""]]}
    with history.open("a", encoding="utf-8") as file:
        file.write(f"{json.dumps(row)}\n")


def tops_of(page: Any, selector: str) -> set[int]:
    boxes = [one.bounding_box() for one in page.locator(selector).all()]
    return {round(box["y"] + box["height"] / 2) for box in boxes}


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    with serve_runs(folder) as served:
        yield served


@pytest.mark.parametrize("width", [360, 390])
def test_links_are_in_one_line_and_the_others_in_a_menu_without_scripts(served: Served, width: int) -> None:
    with open_page(f"{served.url}/models", width, java_script_enabled=False) as page:
        links = "nav > a, nav summary"
        assert page.locator(f"{links}").all_inner_texts() == ["New", "Runs", "Queue", "Generate", "Models"]
        assert len(tops_of(page, links)) == 1
        page.locator("nav summary").click()
        page.locator("nav .menu a", has_text="Settings").click()
        page.wait_for_url("**/settings")
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_filters_are_there_from_ten_runs_on_and_take_one_line_of_a_phone(
    served: Served, folder: Path
) -> None:
    with open_page(served.url, 390) as page:
        assert page.locator("#choose").is_hidden()
        for number in range(9):
            write_run(folder / f"r{number}", f"r{number}")
        page.goto(f"{served.url}/?text=r1")
        assert page.locator("#choose").bounding_box()["height"] < 60
        assert page.locator("#choose select:visible").count() == 0
        page.get_by_label("filters").check()
        assert page.locator("#choose select:visible").count() == 4
        assert page.locator(".plate").first.bounding_box()["y"] < 900
        page.set_viewport_size({"width": 1440, "height": 900})
        assert page.locator("#choose select:visible").count() == 4
        assert page.get_by_label("filters").is_hidden()


@pytest.mark.parametrize("width", [390, 1440])
def test_stop_is_apart_from_buttons_that_begin_and_remove_behind_a_line(
    served: Served, folder: Path, width: int
) -> None:
    with open_page(served.url + served.of("own"), width) as page:
        stop = page.locator("#stop").bounding_box()
        edit = page.locator("#edit_samples").bounding_box()
        assert page.locator("#remove").bounding_box()["y"] > edit["y"] + edit["height"]
        shutil.rmtree(folder / "clips" / "output")
        write_generating(folder / "clips" / "output", "")
        page.locator("#train_on").wait_for(timeout=PATIENCE * MILLISECONDS)
        for name in ("start", "train_on", "again", "generate_with", "remove"):
            assert page.locator(f"#{name}").bounding_box()["y"] >= stop["y"] + stop["height"]
        rule = page.evaluate("getComputedStyle(document.querySelector('.apart')).borderTopStyle")
        last = page.evaluate("[...document.querySelectorAll(':is(#deeds, #further) button')].at(-1).id")
        assert (rule, last) == ("solid", "remove")
        assert page.problems == []


def test_an_answer_is_green_and_stays_until_the_state_changes(served: Served, folder: Path) -> None:
    with open_page(served.url + served.of("own"), 390) as page:
        page.evaluate("window.confirm = () => true")
        page.locator("#stop").click()
        done = page.locator("#done")
        done.get_by_text("Requested: it saves").wait_for()
        good = "getComputedStyle(document.documentElement).getPropertyValue('--good').trim()"
        color = page.evaluate("getComputedStyle(document.querySelector('#done span')).color")
        assert color == page.evaluate(
            f"(() => {{ const one = document.createElement('i'); one.style.color = {good};"
            " document.body.append(one); return getComputedStyle(one).color; })()"
        )
        wait_until(page, "document.querySelector('#deeds .status').textContent.includes('asked to stop')")
        page.wait_for_timeout(5000)
        assert "Requested: it saves" in done.inner_text()
        shutil.rmtree(folder / "clips" / "output")
        write_generating(folder / "clips" / "output", "")
        page.locator("#train_on").wait_for(timeout=PATIENCE * MILLISECONDS)
        wait_until(page, "document.getElementById('done').textContent.trim() === ''")


def test_the_end_of_a_run_is_told_once_however_many_pages_are_open(served: Served, folder: Path) -> None:
    write_run(folder / "before", "before", kind="good")
    script = folder / "notices.js"
    script.write_text(NOTICES, encoding="utf-8")
    with open_tabs(served.url, 3, script) as tabs:
        for tab in tabs:
            wait_until(tab, "document.querySelector('#machine [data-ended]') !== null")
        tabs[0].get_by_label("tell me when a run ends").check()
        for tab in tabs[1:]:
            tab.goto(f"{served.url}/queue")
        shutil.rmtree(folder / "clips" / "output")
        write_generating(folder / "clips" / "output", "good")
        for tab in tabs:
            wait_until(tab, "document.querySelector('#machine [data-ended]')?.dataset.ended.includes('own')")
        tabs[0].wait_for_timeout(300)
        assert tabs[0].evaluate("localStorage.getItem('notices')") == "own: finished;"
        assert sum(tab.title() == "own: finished" for tab in tabs) == 1


def test_samples_come_before_the_second_row_of_buttons_and_numbers_take_one_line(
    served: Served, folder: Path
) -> None:
    shutil.rmtree(folder / "clips" / "output")
    write_generating(folder / "clips" / "output", "good")
    Image.new("RGB", (64, 64)).save(folder / "clips" / "output" / "sample" / "own_1.png")
    with open_page(served.url + served.of("own"), 360, 800) as page:
        assert len(tops_of(page, "#first .tile")) == 1
        order = ["h1", "#first progress", "#generate_with", "#samples", ".grid", "#train_on", "#remove"]
        tops = [page.locator(one).first.bounding_box()["y"] for one in order]
        assert tops == sorted(tops)
        assert page.locator("#shots .grid td").first.bounding_box()["y"] < 700
        assert len(tops_of(page, "#deeds button")) == 1
        page.get_by_label("up to").fill("1")
        page.get_by_role("button", name="Train on").click()
        page.locator("#done_further").get_by_text("enter a larger number").wait_for()
        page.get_by_role("button", name="Remove").click()
        question = page.get_by_role("button", name="Move it into the bin")
        question.wait_for()
        assert question.bounding_box()["y"] > page.locator("#train_on").bounding_box()["y"]
        assert [error for error in page.problems if "422" not in error] == []
