"""The results in a browser: tiles, keys, the dialogs of their buttons, and thousands of them."""

import io
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modules.media.reading import frame_size, read_image, read_tags
from modules.media.writing import write_png, write_video
from tests.browser.serving import Served, python_of, serve_runs
from tests.browser.test_accessible import assert_fits, axe, list_errors  # noqa: F401  # a fixture
from tests.browser.test_results import MADE, MODEL, TAGS, describe, frames_of, wait_for_files, write_maker
from tests.browser.test_results import write_result as write_file
from tests.chromium import open_page, wait_until
from tests.commands import run_script
from tests.tiny.post_upscaling import write_rrdb

DAY = 86_400
NAMES = "[...document.querySelectorAll('#shelf .plate')].map((one) => one.dataset.name)"
# what the fields of the form hold that take a picture
IMAGES = "['start', 'references', 'redraw']"
IMAGES += ".map((name) => document.querySelector(`#make [name=${name}]`)?.value)"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three pictures of two days, a clip, and a picture of another program."""
    root = tmp_path / "roots"
    write_maker(root / "set" / "output")
    made = root / "generated"
    for name, seed, age in (("a", "7", 3 * DAY), ("b", "8", 20), ("c", "9", 30)):
        write_file(made / f"{name}.png", {**TAGS, "bt_seeds": seed}, age=age)
    frames = [np.full((64, 64, 3), level, np.uint8) for level in (20, 120, 220)]
    write_video(made / "clip.mp4", iter(frames), 16)
    write_file(made / "foreign.png", {}, age=40)
    return root


@pytest.fixture
def served(root: Path) -> Iterator[Served]:
    with serve_runs(root, models=root / "models") as served:
        yield served


@pytest.fixture
def page(served: Served) -> Iterator[Any]:
    with open_page(f"{served.url}/generate") as page:
        wait_for_plates(page, 5)
        yield page


def wait_for_plates(page: Any, count: int) -> None:
    """Wait until so many tiles are in view."""
    page.evaluate("document.getElementById('results').scrollIntoView()")
    wait_until(page, f"document.querySelectorAll('#shelf .plate').length === {count}")


def tile(page: Any, name: str) -> Any:
    return page.locator(f'#shelf .plate[data-name="{name}"]')


def press(page: Any, name: str, button: str) -> None:
    press_in(tile(page, name), button)


def press_in(plate: Any, button: str) -> None:
    """Press a button of a plate, below *More* if it is not in view."""
    wanted = plate.locator("button", has_text=re.compile(f"^{button}$"))
    if not wanted.is_visible():
        plate.get_by_text("More", exact=True).click()
    wanted.click()


def focused(page: Any) -> list[str]:
    """The file of the plate with the focus, and the text of what has it."""
    return page.evaluate(
        "[document.activeElement.closest('.plate')?.dataset.name ?? '', document.activeElement.innerText]"
    )


def test_plates_stand_by_day_with_their_settings(page: Any, root: Path) -> None:
    assert page.locator("#shelf .day").count() == 2
    assert page.locator("#shelf .day").first.inner_text() == "Today"
    names = page.evaluate(NAMES)
    assert names == ["clip.mp4", "b.png", "c.png", "foreign.png", "a.png"]
    text = tile(page, "b.png").inner_text()
    for word in ('a "red" square', "96 x 64", "seed 8", "own-step00000002 0.75"):
        assert word in text
    assert "does not contain its settings" in tile(page, "foreign.png").inner_text()
    assert tile(page, "foreign.png").get_by_role("button", name="again").count() == 0
    assert page.problems == []


def test_four_buttons_are_in_view_and_the_others_behind_more(page: Any, root: Path) -> None:
    in_view = tile(page, "b.png").locator("button:visible")
    four = ["again", "other seed", "larger", "compare"]
    assert in_view.all_inner_texts() == four
    tile(page, "b.png").get_by_role("button", name="compare").focus()
    page.keyboard.press("Tab")
    assert focused(page) == ["b.png", "More"]
    page.keyboard.press("Enter")
    others = ["start from this", "use as sample prompt", "settings", "download", "remove"]
    assert in_view.all_inner_texts() == four + others
    write_file(root / "generated" / "b.png", {**TAGS, "bt_seeds": "77"}, age=20)
    wait_until(page, "document.querySelector('[data-name=\"b.png\"]').innerText.includes('seed 77')")
    assert focused(page) == ["b.png", "More"]
    assert in_view.all_inner_texts() == four + others
    assert page.problems == []


def test_search_and_filters_keep_what_fits(page: Any) -> None:
    page.get_by_label("Find results").fill("foreign")
    wait_for_plates(page, 1)
    page.get_by_label("Find results").fill("moving")
    wait_for_plates(page, 3)
    page.get_by_label("Find results").fill("")
    page.get_by_label("Kind of results").select_option("clip")
    wait_for_plates(page, 1)
    page.get_by_label("Kind of results").select_option("")
    page.get_by_label("Made with").select_option(index=1)
    wait_for_plates(page, 3)
    page.get_by_label("Made with").select_option("")
    page.get_by_label("Run of results").select_option("own")
    wait_for_plates(page, 3)
    page.get_by_label("Find results").fill("nothing at all")
    wait_until(page, "document.getElementById('shelf').innerText.startsWith('None of them')")
    assert page.problems == []


def test_keys_move_open_and_close_and_the_focus_stays(page: Any, root: Path) -> None:
    page.set_viewport_size({"width": 1000, "height": 900})  # three in a row, below the form
    tile(page, "clip.mp4").locator("a.shown").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert focused(page)[0] == "c.png"
    page.keyboard.press("ArrowLeft")
    assert focused(page)[0] == "b.png"
    page.keyboard.press("Enter")
    page.wait_for_selector("#sheet[open]")
    text = page.locator("#sheet").inner_text()
    assert "--seed 8" in text
    assert "own-step00000002.safetensors, strength 0.75" in text
    page.keyboard.press("Escape")
    assert focused(page)[0] == "b.png"
    tile(page, "b.png").get_by_role("button", name="compare").focus()
    write_file(root / "generated" / "new.png", age=0)
    wait_for_plates(page, 6)
    assert focused(page) == ["b.png", "compare"]
    page.keyboard.press("ArrowDown")
    assert focused(page)[0] == "a.png"
    assert page.problems == []


def test_a_button_shows_the_command_that_it_stands_for(page: Any) -> None:
    tile(page, "b.png").get_by_role("button", name="again").focus()
    page.wait_for_selector("#types:not([hidden])")
    typed = page.locator("#types").inner_text()
    assert f" && {python_of('wan_generate_video.py')} --task t2v-1.3B" in typed
    assert "--seed 8" in typed
    page.locator("#sift input[type=search]").focus()
    assert page.locator("#types").is_hidden()


def test_chosen_ones_are_laid_over_each_other(page: Any) -> None:
    press(page, "b.png", "compare")
    assert page.locator("#beside").is_hidden()
    assert "press compare at another one" in page.locator("#compared").inner_text()
    press(page, "c.png", "compare")
    page.wait_for_selector("#beside[open]")
    files = page.evaluate(
        "['left', 'right'].map((id) => document.getElementById(id).selectedOptions[0].text)"
    )
    assert [file.partition(",")[0] for file in files] == ["b.png", "c.png"]
    page.get_by_label("Line between the two").fill("20")
    assert "20%" in page.evaluate("document.querySelector('.pair .b').style.clipPath")
    page.locator("#close").click()
    press(page, "clip.mp4", "compare")
    page.wait_for_selector("#beside[open]")
    assert page.locator("#left option").count() == 3
    page.locator("#close").click()
    page.get_by_role("button", name="choose none").click()
    assert page.locator("#compared").is_hidden()
    assert page.problems == []


def test_what_is_chosen_and_goes_is_not_chosen_any_more(page: Any, root: Path) -> None:
    press(page, "b.png", "compare")
    page.get_by_label("Find results").fill("dog")
    wait_until(page, "!document.querySelector('[data-name=\"b.png\"]')")
    assert page.locator("#compared").is_visible()
    page.get_by_role("button", name="choose none").click()
    wait_until(page, "document.activeElement.name === 'find'")  # its plate is not there

    page.get_by_label("Find results").fill("")
    press(page, "b.png", "compare")
    page.get_by_role("button", name="choose none").focus()
    (root / "generated" / "b.png").unlink()
    page.locator("#compared").wait_for(state="hidden")
    assert page.evaluate("document.activeElement.name") == "find"


def test_start_from_this_fills_the_form(page: Any, root: Path) -> None:
    press(page, "b.png", "start from this")
    path = str(root / "generated" / "b.png")
    wait_until(page, f"{IMAGES}.includes({path!r})")
    press(page, "clip.mp4", "start from this")
    path = str(root / "generated" / "clip_last.png")
    wait_until(page, f"{IMAGES}.includes({path!r})")
    assert int(read_image(Path(path)).mean()) > 210
    assert "stands in the form" in tile(page, "clip.mp4").locator(".answer").inner_text()


def test_an_address_fills_the_form_too(page: Any, served: Served, root: Path) -> None:
    id = tile(page, "c.png").get_attribute("data-id")
    page.goto(f"{served.url}/generate?from={id}")
    path = str(root / "generated" / "c.png")
    wait_until(page, f"{IMAGES}.includes({path!r})")


def test_the_dialog_of_a_sample_prompt(page: Any, root: Path) -> None:
    press(page, "b.png", "use as sample prompt")
    page.wait_for_selector("#sheet[open]")
    assert "No prepared folder here trains this family" in page.locator("#sheet").inner_text()
    page.locator("#sheet [data-close]").click()
    describe(root / "mine")
    press(page, "b.png", "use as sample prompt")
    page.wait_for_selector("#sheet input[type=radio]")
    with (root / "mine" / "prompts.txt").open("a") as file:
        file.write("written meanwhile\n")
    page.get_by_role("button", name="Add the line").click()
    wait_until(page, "document.getElementById('sheet').innerText.includes('changed in the meantime')")
    assert "written meanwhile" in page.locator("#sheet").inner_text()
    page.get_by_role("button", name="Add the line").click()
    wait_until(page, "document.getElementById('sheet').innerText.includes('now the last line')")
    lines = (root / "mine" / "prompts.txt").read_text().splitlines()
    assert lines[:3] == ["# mine", "a dog --d 1", "written meanwhile"]
    assert lines[3].startswith('a "red" square moving <b>left</b> --w 96 --h 64')


def test_a_file_is_downloaded_under_its_name(page: Any, root: Path) -> None:
    with page.expect_download() as download:
        press(page, "b.png", "download")
    assert download.value.suggested_filename == "b.png"
    assert Path(download.value.path()).read_bytes() == (root / "generated" / "b.png").read_bytes()


def test_remove_asks_back(page: Any, root: Path) -> None:
    press(page, "c.png", "remove")
    page.wait_for_selector("#sheet[open]")
    assert str(root / "generated" / "c.png") in page.locator("#sheet").inner_text()
    page.keyboard.press("Escape")
    assert (root / "generated" / "c.png").exists()
    press(page, "c.png", "remove")
    page.get_by_role("button", name="Put it into the bin").click()
    wait_for_plates(page, 4)
    assert not (root / "generated" / "c.png").exists()
    assert page.problems == []


def test_a_file_that_goes_meanwhile_is_told(page: Any, root: Path) -> None:
    page.evaluate("window.hold = Date.now()")
    (root / "generated" / "b.png").unlink()
    press(page, "b.png", "again")
    wait_until(
        page,
        "!document.querySelector('[data-name=\"b.png\"]') || "
        "document.querySelector('[data-name=\"b.png\"] .answer').innerText.includes('no longer exists')",
    )


def test_two_thousand_results_are_there_while_they_are_in_view(tmp_path: Path) -> None:
    content = write_file(tmp_path / "generated" / "0000.png").read_bytes()
    for number in range(1, 2000):
        path = tmp_path / "generated" / f"{number:04d}.png"
        path.write_bytes(content)
        os.utime(path, (time.time() - number - 10,) * 2)
    with serve_runs(tmp_path) as served, open_page(f"{served.url}/generate") as page:
        wait_until(page, "document.getElementById('counted').innerText === '2,000'")
        assert page.evaluate("document.querySelectorAll('#shelf .part').length") >= 84
        assert page.evaluate("document.querySelectorAll('#shelf .plate').length") < 200
        for _ in range(20):
            page.mouse.wheel(0, 4000)
            page.wait_for_timeout(40)
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        for _ in range(100):
            page.wait_for_timeout(100)
            page.evaluate("scrollTo(0, document.body.scrollHeight)")
            if page.locator('#shelf .plate[data-name="1999.png"]').count():
                break
        assert page.locator('#shelf .plate[data-name="1999.png"]').count() == 1
        assert page.evaluate("document.querySelectorAll('#shelf .plate').length") < 200
        assert page.evaluate("document.querySelectorAll('#shelf img').length") < 150
        assert page.problems == []


def test_prompts_and_names_run_nothing(tmp_path: Path) -> None:
    text = "</p><img src=x onerror=alert(1)><script>alert(2)</script>"
    tags = {**TAGS, "bt_prompt": text, "bt_lora_0": f"{text}.safetensors: 1", "bt_task": text}
    write_file(tmp_path / "generated" / "<img src=x onerror=alert(3)>.png", tags)
    with serve_runs(tmp_path) as served, open_page(f"{served.url}/generate") as page:
        wait_for_plates(page, 1)
        page.locator("#shelf .plate a.shown").click()
        page.wait_for_selector("#sheet[open]")
        assert text in page.locator("#sheet").inner_text()
        page.keyboard.press("Escape")
        for button in ("again", "compare", "larger", "remove"):
            press_in(page.locator("#shelf .plate"), button)
            page.wait_for_timeout(200)
            page.evaluate("for (const one of document.querySelectorAll('dialog[open]')) one.close()")
        errors = [error for error in page.problems if "422" not in error]
        assert errors == []


def test_read_only_shows_and_changes_nothing(root: Path) -> None:
    with serve_runs(root, read_only=True) as served, open_page(f"{served.url}/generate") as page:
        wait_for_plates(page, 5)
        buttons = {*page.locator("#shelf button").all_text_contents()}
        assert buttons == {"compare", "settings", "download"}


def test_the_results_fit_each_screen(page: Any) -> None:
    assert_fits(page)


@pytest.mark.slow
def test_the_results_have_no_serious_fault(axe: str, page: Any) -> None:  # noqa: F811
    page.evaluate(axe)
    errors = [error for error in list_errors(page) if "shelf" in str(error) or "sift" in str(error)]
    assert errors == []
    press(page, "b.png", "settings")
    page.wait_for_selector("#sheet[open]")
    assert [error for error in list_errors(page) if "sheet" in str(error)] == []


@pytest.mark.slow
def test_again_and_larger_by_clicks(tmp_path: Path) -> None:
    root = tmp_path / "roots"
    write_maker(root / "set" / "output")
    made = root / "generated"
    run_script("wan_generate_video.py", *MODEL, *MADE, "--save_path", made)
    [original] = made.glob("*.mp4")
    upscaler = root / "models" / "upscalers" / "RealESRGAN_x2plus.pth"
    upscaler.parent.mkdir(parents=True)
    write_rrdb(upscaler, unshuffle=2)
    with (
        serve_runs(root, models=root / "models") as served,
        open_page(f"{served.url}/generate") as page,
    ):
        wait_for_plates(page, 1)
        press(page, original.name, "again")
        [again] = [path for path in wait_for_files(made, 2) if path != original]
        assert frames_of(again).tobytes() == frames_of(original).tobytes()
        press(page, original.name, "larger")
        page.get_by_text("It will have 128 x 128 pixels, from 64 x 64.").wait_for()
        page.wait_for_selector("#sheet input[type=radio]")
        assert "upscaler.py --input" in page.locator("#sheet pre").inner_text()
        page.get_by_role("button", name="Make it larger").click()
        larger = made / f"{original.stem}_larger.mp4"
        for _ in range(900):
            if larger.exists():
                break
            page.wait_for_timeout(100)
        assert frame_size(larger) == (128, 128)
        assert read_tags(larger)["bt_prompt"] == "a red square"
        assert read_tags(larger)["post_1"].startswith("upscaler")
        page.locator("#sheet [data-close]").click()
        wait_for_plates(page, 3)
        names = page.evaluate(NAMES)
        assert abs(names.index(larger.name) - names.index(original.name)) == 1
        assert "afterwards: upscaler" in tile(page, larger.name).inner_text()
        assert page.problems == []


def test_a_click_hides_a_layer_of_a_picture_and_shows_what_is_behind(served: Served, root: Path) -> None:
    """The whole picture is blue, layer 1 red, layer 2 green on its left half, transparent on its right."""
    made = root / "generated"
    colors = {"layer0": (0, 0, 255), "layer1": (255, 0, 0), "layer2": (0, 255, 0), "composite": (9, 9, 9)}
    for name, color in colors.items():
        image = np.full((64, 64, 4), (*color, 255), np.uint8)
        if name == "layer2":
            image[:, 32:] = (0, 0, 255, 0)
        write_png(made / f"cat_{name}.png", image, TAGS)

    with open_page(f"{served.url}/generate") as page:
        page.evaluate("document.getElementById('results').scrollIntoView()")
        tile(page, "cat_composite.png").wait_for()
        press(page, "cat_composite.png", "layers")
        page.locator(".stack img:visible").first.wait_for()
        wait_until(page, "[...document.querySelectorAll('.stack img')].slice(1).every((one) => one.complete)")

        def see() -> list[str]:
            """The colors in the middle of the left and the right half of the stack."""
            box = (
                page.locator(".stack img:visible").last.bounding_box()
                or page.locator(".stack").bounding_box()
            )
            shot = read_png(page.screenshot(clip=box))
            height, width = shot.shape[:2]
            found = [tuple(map(int, shot[height // 2, x, :3])) for x in (width // 4, 3 * width // 4)]
            return [next((name for name, color in colors.items() if color == one), "behind") for one in found]

        assert see() == ["layer2", "layer1"]
        page.get_by_label("layer 2").click()
        assert see() == ["layer1", "layer1"]
        page.get_by_label("layer 1").click()
        assert page.locator(".stack img:visible").count() == 0
        page.get_by_label("layer 2").click()
        assert see() == ["layer2", "behind"]
        page.get_by_label("the whole image").click()
        assert see() == ["layer2", "layer0"]  # what is at the back stays there
        assert page.problems == []


def read_png(content: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
