"""The form of a caption's keys, which agrees with its text, in a real browser; and where it is shown."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from browser.core.language_tables import read_texts
from browser.folders.caption_keys import describe_formats, find_folder_caption_format
from fibo_2.captions import FORMAT, find_caption_errors
from modules.pages.language import Language, speaking
from protocols.families import FAMILIES
from tests.browser.serving import Served, serve_runs
from tests.chromium import open_page, wait_until
from tests.data_tools.report.making import save_image

# numbers, escapes and white space that a reader of JSON would write otherwise
TEXT = """{
  "short_description" : "a \\u0063at, {\\"wild\\"}",
  "lighting": { "conditions": "sun", "own": 1.50 },
  "own_key": [1e400, 1.0,  "\\/"],
  "objects": [ {"location":"left", "description":"a cat"}, {"description": "a }] dog"} ]
}"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "sét a"
    folder.mkdir()
    for name, text in {"a": TEXT, "b": "a plain one", "c": '{"short_description": broken'}.items():
        save_image(folder / f"{name}.png", 1, (64, 48), caption=None)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def served(folder: Path) -> Iterator[Served]:
    with serve_runs(folder.parent) as served:
        yield served


def card(page: Any, name: str) -> Any:
    return page.locator(".file", has=page.locator(f"h3:text-is('{name}.png')"))


def open_files(served: Served, folder: Path, **look: str) -> Any:
    return open_page(f"{served.url}/new?folder={quote(str(folder))}#captions", **look)


def test_a_field_changes_its_value_alone_and_the_text_the_fields(served: Served, folder: Path) -> None:
    with open_files(served, folder) as page:
        first = card(page, "a")
        first.get_by_text("By its keys").click()
        text = first.locator(".caption textarea")
        description, light = first.get_by_label("short description"), first.get_by_label("conditions")
        assert description.input_value() == 'a cat, {"wild"}'
        assert light.input_value() == "sun"
        assert first.get_by_text("own_key").count() == 1

        light.fill('night, "dark"')
        assert text.input_value() == TEXT.replace('"sun"', '"night, \\"dark\\""')
        first.get_by_label("shadows").fill("long")
        assert '"own": 1.50, "shadows": "long" }' in text.input_value()
        first.get_by_label("style medium").fill("photograph")  # it stands where the model was trained with it
        first.get_by_label("background setting").fill("a barn")
        assert '"background_setting": "a barn", "lighting": {' in text.input_value()
        assert text.input_value().rstrip("}\n").endswith('"style_medium": "photograph"')

        text.fill(text.input_value().replace("a barn", "a house"))
        assert first.get_by_label("background setting").input_value() == "a house"

        light.press("Control+Enter")
        first.get_by_text("saved", exact=True).wait_for()
        assert page.problems == []
    written = (folder / "a.txt").read_text(encoding="utf-8")
    for part in ('"own_key": [1e400, 1.0,  "\\/"],', "1.50", '"location":"left", "description":"a cat"'):
        assert part in written
    caption = json.loads(written)
    assert caption["lighting"] == {"conditions": 'night, "dark"', "own": 1.5, "shadows": "long"}
    assert find_caption_errors(written) == ["own_key is not a key of a caption"]


def test_entries_are_added_filled_and_removed(served: Served, folder: Path) -> None:
    with open_files(served, folder) as page:
        first = card(page, "a")
        first.get_by_text("By its keys").click()
        objects = first.locator("fieldset", has=page.locator("legend:text-is('objects')")).first
        objects.get_by_role("button", name="Add one").click()
        objects.get_by_label("description").nth(2).fill("a bird")
        objects.get_by_label("say more of it").nth(2).select_option("texture")
        objects.get_by_label("texture").fill("feathers")
        objects.get_by_role("button", name="Remove").nth(1).click()
        texts = first.locator("fieldset", has=page.locator("legend:text-is('text render')")).first
        texts.get_by_role("button", name="Add one").click()
        texts.get_by_label("text", exact=True).fill("SALE")
        text = first.locator(".caption textarea").input_value()
        assert page.problems == []
    caption = json.loads(text)
    assert caption["objects"] == [
        {"location": "left", "description": "a cat"},
        {"description": "a bird", "texture": "feathers"},
    ]
    assert caption["text_render"] == [{"text": "SALE"}]
    assert '{"location":"left", "description":"a cat"}' in text


def test_broken_json_and_sentences_say_so(served: Served, folder: Path) -> None:
    with open_files(served, folder) as page:
        wait_until(page, "document.querySelectorAll('.file').length === 3")
        assert not card(page, "b").get_by_text("By its keys").is_visible()  # no run of such a model is here
        assert not card(page, "c").get_by_text("By its keys").is_visible()
        page.evaluate("document.querySelector('#items').dataset.format = 'fibo_2'")
        for name in "bc":
            card(page, name).locator(".caption textarea").press("End")
            card(page, name).locator(".caption textarea").press("x")
            card(page, name).get_by_text("By its keys").click()
        card(page, "c").get_by_text("It is no JSON").wait_for()
        card(page, "b").get_by_role("button", name="Make it an object").click()
        assert card(page, "b").get_by_label("short description").input_value() == "a plain onex"
        text = card(page, "b").locator(".caption textarea").input_value()
    assert json.loads(text) == {"short_description": "a plain onex"}


def test_the_form_speaks_the_language_of_the_page(served: Served, folder: Path) -> None:
    with open_files(served, folder, locale="ja-JP") as page:
        first = card(page, "a")
        first.locator(".keys summary").click()
        assert first.get_by_label("短い説明").input_value() == 'a cat, {"wild"}'


@pytest.mark.parametrize("code", ["zh", "ja"])
def test_all_keys_have_names_in_each_language(code: str) -> None:
    names = [(key["name"], key["parts"]) for key in json.loads(describe_formats())["fibo_2"]["keys"]]
    assert names[0][0] == "short_description"
    assert [name for name, _ in names] == [key.name for key in FORMAT.keys]
    with speaking(Language(code, read_texts(code), "/", ())):
        keys = json.loads(describe_formats())["fibo_2"]["keys"]
    for key in keys:
        assert all(not part["label"].isascii() for part in (key, *key["parts"]))


@pytest.mark.parametrize("family", ["fibo_2", "krea2"])
def test_a_described_folder_of_such_a_model_has_the_form(family: str, tmp_path: Path) -> None:
    script = f"{FAMILIES[family].cache}_latents.py"
    commands = [["python", "tools/download.py", "--family", family, "--task", "t"], ["python", script]]
    commands.append(["python", f"{FAMILIES[family].training_script}.py"])
    run = {"training": 'output_name = "x"', "reelsmith": f"files = []\ncommands = {json.dumps(commands)}"}
    text = "\n".join(f"[{name}]\n{lines}" for name, lines in run.items())
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    (tmp_path / "dataset.toml").write_text("[[datasets]]\nimage_directory = '.'\n", encoding="utf-8")

    assert find_folder_caption_format(tmp_path) == ("fibo_2" if family == "fibo_2" else "")
    assert find_folder_caption_format(None) == ""
