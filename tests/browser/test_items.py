"""Items on the page of a run: their states, pictures and losses, and the requests that its buttons write."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from browser.core.short_names import short_digest
from browser.pages.items.requests import add_request
from modules.errors import OptionError
from tests.browser.serving import Answer, Served, plain_text, serve_runs, write_run
from tests.browser.test_accessible import assert_fits
from tests.browser.test_safe_clicks import save_image
from tests.chromium import open_page, wait_until
from tests.training.toy import Killed, killed_at, train_toy, write_caches
from training.reports.item_turns import MAX_REQUEST_BYTES, read_changes, read_items
from training.reports.sections import items_path, turns_path

KEYS = [f"bild ä{number}_0064x0064_wan" for number in range(3)]
DATASET = """
[general]
caption_extension = ".txt"
[[datasets]]
image_directory = "bilder"
"""


def write_items_run(folder: Path, kind: str | None = None, **changed: str) -> Path:
    """Write a run that watches its items, with three images, a turn by loss and one by request."""
    options = {"watch_items": "True", "dataset_config": "dataset.toml", **changed}
    write_run(folder / "out", "x", kind=kind, changed=[list(pair) for pair in options.items()])
    (folder / "dataset.toml").write_text(DATASET, encoding="utf-8")
    for number in range(3):
        save_image(folder / "bilder" / f"bild ä{number}.png", 80 * number)
        (folder / "bilder" / f"bild ä{number}.txt").write_text(f"caption {number}", encoding="utf-8")
    rows: list[dict[str, Any]] = [{"session": 7, "version": 1}]
    for step in (1, 2, 3):
        for batch, key in enumerate(KEYS[:2]):
            loss = 0.3 / step if batch else 0.1
            rows.append({"step": step, "batch": 2 * step + batch, "key": key, "level": 0.5, "loss": loss})
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    items_path(folder / "out", "x").write_text(text, encoding="utf-8")
    changes = [[4, KEYS[0], "rests", "its loss stays at 60% of that at the start"]]
    changes.append([5, KEYS[2], "aside", "requested"])
    turns = {"session": 7, "items": {key: key.partition("_")[0] for key in KEYS}, "changes": changes}
    turns_path(folder / "out", "x").write_text(json.dumps(turns), encoding="utf-8")
    return folder / "out" / "x.items"


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """The file of requests of the run."""
    return write_items_run(tmp_path / "clips")


@pytest.fixture
def served(asked: Path) -> Iterator[Served]:
    with serve_runs(asked.parent.parent) as served:
        yield served


def items_of(served: Served, rest: str = "") -> str:
    """The address of the items of the run."""
    return f"/turns/{served.of('x').split('/')[2]}{rest}"


def list_items(served: Served, **query: str) -> str:
    answer = served.ask(f"{items_of(served)}?{urlencode(query)}")
    assert answer.status == 200
    return plain_text(answer.text)


def ask(served: Served, word: str, key: str, **fields: str) -> Answer:
    body = urlencode({"item": short_digest(key), **fields})
    return served.ask(items_of(served, f"/{word}"), "POST", body, Origin=served.url)


def test_a_run_lists_its_items_with_picture_state_and_losses(served: Served) -> None:
    assert f'hx-get="{items_of(served)}"' in served.ask(served.of("x")).text
    page = list_items(served)

    assert read_items(turns_path(served.runs.root_folders[0] / "out", "x")).keys() == set(KEYS)
    assert "1 drawn, 1 drawn seldom, 1 set aside" in page
    assert "drawn seldom since step 4: its loss stays at 60% of that at the start" in page
    assert "set aside since step 5: by request" in page
    assert page.count("<polyline") == 2
    assert "loss 1.29 times that of others, learned 3 times" in page
    assert page.index("bild ä0.png") < page.index("bild ä2.png") < page.index("bild ä1.png")
    assert all(f"caption {number}</textarea>" in page for number in range(3))
    assert "bild ä1.png" not in list_items(served, find="caption 2")
    addresses = re.findall(r'<img src="([^"]+)"', served.ask(items_of(served)).text)
    picture = served.ask(addresses[0])
    assert len(addresses) == 3
    assert picture.body.startswith(b"\xff\xd8")
    assert served.ask(items_of(served, "/x/picture")).status == 404


def test_buttons_write_what_the_run_obeys(served: Served, asked: Path) -> None:
    assert "asked to be set aside" in ask(served, "aside", KEYS[1]).text
    asked.with_name("x.items.asking").write_text("", encoding="utf-8")  # of a server that was killed
    assert "asked to be taken back" in ask(served, "back", KEYS[2]).text
    assert "a red ball" in ask(served, "caption", KEYS[0], caption=" a red ball ").text

    lines = asked.read_text(encoding="utf-8").splitlines()
    assert lines == [f"aside {KEYS[1]}", f"back {KEYS[2]}", f"caption {KEYS[0]}: a red ball"]
    assert "asked for another caption" in list_items(served)


@pytest.mark.parametrize(
    ("word", "key", "caption", "reason"),
    [
        ("caption", KEYS[0], "  ", "Type the new caption."),
        ("caption", KEYS[0], "a\nb", "remove the line break"),
        ("caption", KEYS[0], "a\0b", "a caption cannot contain"),
        ("aside", "gone", "", "This item is not in the run any more."),
    ],
)
def test_what_a_request_cannot_say_is_one_sentence_on_the_page(
    served: Served, asked: Path, word: str, key: str, caption: str, reason: str
) -> None:
    answer = ask(served, word, key, caption=caption)
    assert answer.status == 422
    assert reason in answer.text
    assert not asked.exists()


def test_only_a_running_training_that_listens_is_asked(tmp_path: Path) -> None:
    write_items_run(tmp_path / "ended", kind="good")
    with serve_runs(tmp_path / "ended") as served:
        assert "Only a running training can change them." in list_items(served)
        assert "<textarea" not in list_items(served)
        assert "Only a running training with --watch_items can do this." in ask(served, "aside", KEYS[0]).text


def test_without_the_feature_nothing_of_it_is_shown(tmp_path: Path) -> None:
    write_run(tmp_path, "x", kind=None)
    with serve_runs(tmp_path) as served:
        assert "run_items" not in served.ask(served.of("x")).text
        assert served.ask(items_of(served)).status == 404
        assert ask(served, "aside", KEYS[0]).status == 404


def test_too_many_requests_are_refused_and_the_earlier_ones_kept(tmp_path: Path) -> None:
    asked = tmp_path / "x.items"
    asked.write_text("a" * (MAX_REQUEST_BYTES - 5), encoding="utf-8")
    with pytest.raises(OptionError, match="Too many requests"):
        add_request(asked, "aside clip1")
    assert len(asked.read_text(encoding="utf-8")) == MAX_REQUEST_BYTES - 5


@pytest.mark.slow
def test_a_training_obeys_what_the_buttons_ask(tmp_path: Path) -> None:
    """The run stands still between two steps, as a killed one, while its page is used."""
    write_caches(tmp_path)
    words = ["--watch_items", "--item_losses", "--save_state", "--save_every_n_steps=4"]
    words.append("--max_train_steps=24")
    with pytest.raises(Killed):
        train_toy(tmp_path, *words, family=killed_at(6), has_page=True)
    toys = [f"clip{number}_0032x0032_toy" for number in range(3)]
    with serve_runs(tmp_path / "output") as served:
        assert "5 drawn, 0 drawn seldom, 0 set aside" in list_items(served)
        assert "asked to be set aside" in ask(served, "aside", toys[1]).text
        assert "asked to be set aside" in ask(served, "aside", toys[2]).text
        assert "a new caption" in ask(served, "caption", toys[0], caption="a new caption").text

        train_toy(tmp_path, *words, "--resume", tmp_path / "output" / "x-step00000004-state", has_page=True)

        page = list_items(served)
    assert not (tmp_path / "output" / "x.items").exists()
    changes = read_changes(turns_path(tmp_path / "output", "x"))
    assert [(one.key, one.change) for one in changes] == [
        (toys[1], "aside"),
        (toys[2], "aside"),
        (toys[0], "caption"),
    ]
    assert "3 drawn, 0 drawn seldom, 2 set aside" in page
    assert "set aside since step 5: by request" in page
    assert "with a new caption" in page


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_a_button_changes_its_row_alone(served: Served, width: int) -> None:
    with open_page(f"{served.url}{served.of('x')}", width=width) as page:
        wait_until(page, "document.querySelectorAll('#item_list li').length === 3")
        assert_fits(page)
        typed = page.locator("#item_list textarea").nth(1)
        typed.fill("not sent yet")
        page.locator("#item_list").get_by_role("button", name="Set aside").first.click()
        wait_until(page, "document.querySelector('#item_list').textContent.includes('asked to be set aside')")
        page.locator("#find_item").fill("caption 0")
        wait_until(page, "document.querySelectorAll('#item_list li').length === 1")
        page.locator("#find_item").fill("")
        wait_until(page, "document.querySelectorAll('#item_list img').length === 3")
        assert page.problems == []
