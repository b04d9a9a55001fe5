"""Page New: the row of pictures of a folder, the tabs below it, and what dropped files are asked."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from tests.browser.serving import Served, serve_runs
from tests.chromium import open_page, wait_until
from tests.data_tools.report.making import save_image

WINDOWS = ((1440, 900), (390, 844))
MAX_TABS = 60  # on the way to one field
RING = 4  # pixels around a button that has the focus


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "über uns").mkdir()
    return tmp_path / "über uns"


@pytest.fixture
def served(root: Path) -> Iterator[Served]:
    with serve_runs(root) as served:
        yield served


def write_images(folder: Path, count: int, uncaptioned: tuple[int, ...] = ()) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [
        save_image(
            folder / f"p{index:02}.png", index, (32, 24), None if index in uncaptioned else f"<b>{index}</b>"
        )
        for index in range(count)
    ]


def address_of(folder: Path) -> str:
    return f"/new?{urlencode({'folder': str(folder)})}"


def list_tiles(text: str) -> list[str]:
    strip = text[text.index('<ul class="strip"') :]
    return re.findall(r"<li.*?</li>", strip[: strip.index("</ul>")], re.DOTALL)


def test_the_first_twelve_files_stand_with_their_captions_and_the_others_are_counted(
    served: Served, root: Path
) -> None:
    write_images(root / "set", 14, uncaptioned=(3, 13))

    tiles = list_tiles(served.ask(address_of(root / "set")).text)

    assert [f'title="p{index:02}.png"' in tiles[index] for index in range(12)] == [True] * 12
    assert [index for index, tile in enumerate(tiles) if 'class="bare"' in tile and "no caption" in tile] == [
        3
    ]
    assert "&lt;b&gt;5&lt;/b&gt;" in tiles[5]
    assert len(tiles) == 13
    assert "all 14" in tiles[12]


def test_twelve_files_are_all(served: Served, root: Path) -> None:
    write_images(root / "set", 12)

    assert len(list_tiles(served.ask(address_of(root / "set")).text)) == 12
    assert 'class="strip"' not in served.ask("/new").text


@pytest.mark.parametrize("window", WINDOWS)
def test_the_trigger_word_is_in_view_below_the_pictures(
    window: tuple[int, int], served: Served, root: Path
) -> None:
    write_images(root / "set", 14)
    with open_page(served.url + address_of(root / "set"), *window) as page:
        field = page.get_by_label("Trigger word").bounding_box()
        bar = page.locator("#next").bounding_box()
        strip = page.locator(".strip").bounding_box()
        assert strip["y"] + strip["height"] < field["y"]
        assert field["y"] + field["height"] < bar["y"]
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.problems == []


def test_tabs_open_one_part_and_a_tile_leads_to_its_file(served: Served, root: Path) -> None:
    write_images(root / "set", 14)
    with open_page(served.url + address_of(root / "set")) as page:
        page.get_by_role("button", name="Tags", exact=True).click()
        page.get_by_label("Old tag").wait_for()
        page.get_by_role("button", name="Masks", exact=True).click()
        page.locator("#mask-find").wait_for()
        assert list_open(page) == ["masks-fold"]

        page.locator(".strip a").nth(2).click()
        page.get_by_label("Caption of p02.png").wait_for()
        wait_until(page, "document.querySelectorAll('#items .file').length === 1")
        assert list_open(page) == ["captions"]
        page.get_by_role("button", name="Files", exact=True).click()
        wait_until(page, "document.querySelector('#captions').open === false")
        assert page.problems == []


def list_open(page: Any) -> list[str]:
    """Return the ids of the open parts, after making sure that the tabs say the same."""
    wait_until(
        page,
        "[...document.querySelectorAll('.tabs button')].every((tab) => "
        "(tab.ariaExpanded === 'true') === document.getElementById(tab.getAttribute('aria-controls')).open)",
    )
    return page.evaluate("[...document.querySelectorAll('details[name=part][open]')].map((part) => part.id)")


def test_a_typed_folder_shows_its_pictures_at_once(served: Served, root: Path) -> None:
    write_images(root / "set", 3, uncaptioned=(0,))
    with open_page(f"{served.url}/new") as page:
        page.get_by_label("Folder").fill(str(root / "set"))
        page.keyboard.press("Tab")
        page.locator(".strip li").nth(2).wait_for()
        page.locator("#source > summary").get_by_text("3 images, 1 without caption").wait_for()
        page.get_by_label("Folder").fill(str(root / "no"))
        page.keyboard.press("Tab")
        page.locator("#folder_fault").get_by_text("no such folder").wait_for()
        assert page.locator(".strip").count() == 0
        assert page.problems == []


def test_dropped_files_are_asked_what_they_are_and_the_word_names_all(
    served: Served, root: Path, tmp_path: Path
) -> None:
    images = write_images(tmp_path / "camera", 2, uncaptioned=(0, 1))
    with open_page(f"{served.url}/new") as page:
        page.get_by_label("Choose files").set_input_files(images)
        page.get_by_text("2 files: what are they?").wait_for()
        assert page.evaluate("document.activeElement.id") == "into"
        page.keyboard.type("Mrs. Fluff ä")
        page.keyboard.press("Enter")
        page.wait_for_url("**folder=**")
        assert sorted(path.name for path in (root / "Mrs. Fluff ä").iterdir()) == ["p00.png", "p01.png"]
        assert page.get_by_label("Trigger word").input_value() == "mrsfluffä"
        assert page.locator("#source").get_attribute("open") is None
        assert page.problems == []


def test_dropped_files_without_a_word_go_into_a_folder_of_the_day(
    served: Served, root: Path, tmp_path: Path
) -> None:
    images = write_images(tmp_path / "camera", 1)
    with open_page(f"{served.url}/new") as page:
        page.get_by_label("Choose files").set_input_files(images)
        page.get_by_role("button", name="Put them there").click()
        page.wait_for_url("**folder=**")
        assert page.get_by_label("Trigger word").input_value() == ""
    (folder,) = [path for path in root.iterdir() if (path / "p00.png").exists()]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", folder.name)


def test_a_card_chooses_a_model_with_its_version(served: Served, root: Path) -> None:
    write_images(root / "set", 3)
    with open_page(served.url + address_of(root / "set")) as page:
        cards = page.locator(".model-cards button")
        assert cards.count() == 3
        family, task = cards.nth(1).get_attribute("data-family"), cards.nth(1).get_attribute("data-task")
        cards.nth(1).click()
        wait_until(page, f"document.querySelector('#task').value === {task!r}")
        assert page.get_by_label("Model", exact=True).input_value() == family
        wait_until(
            page,
            "JSON.stringify([...document.querySelectorAll('.model-cards button')]"
            ".map((card) => card.ariaPressed)) === JSON.stringify(['false', 'true', 'false'])",
        )
        wait_until(page, "!document.querySelector('#leads').textContent.includes('Still missing')")

        page.locator("#table > summary").click()
        page.get_by_label("Narrow this list").fill("krea")
        shown = page.locator("#model-rows tr:visible")
        assert shown.count() >= 1
        assert all("Krea" in text for text in shown.all_inner_texts())
        assert page.problems == []


def tab_to(page: Any, condition: str) -> None:
    """Press Tab until the element with the focus meets a condition, as somebody without a mouse does."""
    for _ in range(MAX_TABS):
        page.keyboard.press("Tab")
        if page.evaluate(f"(one => {condition})(document.activeElement)"):
            return
    raise AssertionError(f"Tab never reaches: {condition}")


def test_the_keyboard_alone_leads_from_an_empty_page_to_a_ready_button(served: Served, root: Path) -> None:
    write_images(root / "set", 3)
    with open_page(f"{served.url}/new") as page:
        tab_to(page, "one.textContent.trim() === 'set'")
        page.keyboard.press("Enter")
        page.wait_for_url("**folder=**")
        tab_to(page, "one.id === 'trigger'")
        page.keyboard.type("ohwx")
        tab_to(page, "one.matches('.model-cards button')")
        page.keyboard.press("Enter")
        wait_until(page, "!document.querySelector('#leads').textContent.includes('Still missing')")
        tab_to(page, "one.id === 'step'")
        assert page.evaluate("document.activeElement.textContent") == "Prepare"
        ring, bar = (page.locator(place).bounding_box() for place in ("#step", "#next"))
        assert ring["x"] - bar["x"] >= RING  # the bar cuts what is outside of it
        assert page.problems == []


def test_pictures_captions_and_the_checklist_are_read_without_scripts(served: Served, root: Path) -> None:
    write_images(root / "set", 3, uncaptioned=(2,))
    with open_page(served.url + address_of(root / "set"), java_script_enabled=False) as page:
        assert page.locator(".strip li").count() == 3
        assert "<b>1</b>" in page.locator(".strip").inner_text()
        assert page.locator(".strip .bare").inner_text() == "no caption"
        rows = page.locator(".checklist")
        assert rows.get_by_text("3 images").is_visible()
        assert rows.get_by_text("1 file has no caption").is_visible()
        assert page.locator(".model-cards b").count() >= 3
