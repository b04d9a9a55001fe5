"""Tags on the pages: a tagger is tried, writes into the queue, and tags are renamed in all captions."""

import html
import itertools
import os
import re
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlencode

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from browser.folders.datasets import MODELS
from browser.pages.tags.tag_editor import TagEditor, rename_tag
from browser.pages.tags.tag_pages import FORM
from browser.runs.runs import Runs
from data_tools.tags.run import TaggingOptions
from modules.errors import OptionError
from modules.script_options import parse_options
from tests.browser.described_folders import describe
from tests.browser.serving import Answer, Served, plain_text, python_of, serve_runs
from tests.browser.test_safe_clicks import save_image
from tests.chromium import open_page, wait_until
from tests.commands import MAX_SECONDS
from tests.data_tools.tags.making import first_pixel_weights, write_tagger
from tests.waiting import PATIENCE


def press(served: Served, what: str, folder: str = "pictures", **fields: str) -> Answer:
    """Press a button of the part about tags."""
    body = urlencode({"folder": folder, **fields})
    return served.ask(f"/new/tags/{what}", "POST", body, Origin=served.url)


def wait_for(served: Served, words: str) -> str:
    """Return the part of the page that shows progress, once it has these words."""
    end = time.monotonic() + MAX_SECONDS
    text = ""
    while time.monotonic() < end:
        text = served.ask("/new/tags?folder=pictures&part=progress").text
        if words in text:
            return text
        time.sleep(0.1)
    raise AssertionError(text)


def texts_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt*"))}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder below a root with two captions of tags and one sentence."""
    folder = tmp_path / "root" / "pictures"
    for number, text in enumerate(("cat, red_hat, catgirl", "red_hat", "A cat sits.")):
        save_image(folder / f"{number}.png", 60 * number + 60)
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.slow
def test_a_tagger_is_tried_and_then_writes_what_is_missing(pictures: Path, tmp_path: Path) -> None:
    before = texts_of(pictures)
    (pictures / "1.txt").unlink()
    write_tagger(tmp_path / "models" / "wd_tagger", first_pixel_weights(blue_eyes=(1, 1, 1)))
    with serve_runs(tmp_path / "root", models=tmp_path / "models") as served:
        shown = served.ask("/new/tags?folder=pictures").text
        assert "WD SwinV2 Tagger v3 · 0.5 GB" in shown
        assert "Apache-2.0" in shown
        assert "Download it on the page Models" not in shown

        assert press(served, "try").status == 200
        tried = wait_for(served, "tried; nothing has been written yet")
        assert "1.txt" not in texts_of(pictures)
        assert press(served, "write").status == 200
        written = wait_for(served, '<span class="state">finished</span>')
        again = press(served, "go_on")

    assert (tried.count("<li>"), "1.png" in tried) == (3, True)
    assert "job 1 of the queue" in written
    assert texts_of(pictures) == {**before, "1.txt": "blue_eyes"}
    assert (again.status, "There is nothing to continue." in again.text) == (422, True)


@pytest.mark.parametrize(
    ("text", "old", "new", "expected"),
    [
        ("cat, catgirl,red", "cat", "dog", "dog, catgirl, red"),
        ("a, cat , dog", "cat", "dog", "a, dog"),
        ("cat", "cat", "", ""),
        ("red,  hat", "cat", "dog", "red,  hat"),
        ("cat, a\nb\ncat", "cat", "", "a\nb\n"),
        # behind ||| tags are shuffled: the sign stays where it is
        ("cat ||| red, blue", "red", "green", "cat ||| green, blue"),
        ("cat|||red|||end", "end", "tail", "cat ||| red ||| tail"),
        ("cat ||| red", "cat", "", "||| red"),
        ("cat ||| red", "red", "", "cat |||"),
        ("cat ||| red, cat", "red", "cat", "cat |||"),
        ("cat ||| red", "cat ||| red", "", "cat ||| red"),
    ],
)
def test_a_tag_is_a_whole_word_between_commas(text: str, old: str, new: str, expected: str) -> None:
    assert rename_tag(text, old, new) == expected


def test_a_tag_is_renamed_in_all_captions_and_each_change_is_undone(pictures: Path) -> None:
    before = texts_of(pictures)
    with serve_runs(pictures.parent) as served:
        shown = served.ask("/new/tags?folder=pictures").text
        assert ">red_hat</button> <small>2</small>" in shown
        assert ">cat</button> <small>1</small>" in shown
        renamed = press(served, "rename", tag="red_hat", name="hat")
        removed = press(served, "remove", tag="hat")
        after = texts_of(pictures)
        (pictures / "0.txt").write_text("mine", encoding="utf-8")
        undone = press(served, "undo")
        press(served, "undo")
        refused = press(served, "undo")

    assert renamed.text.count("red_hat became hat in 2 captions") == 1
    assert "hat was removed from 1 caption. 1 has no other tag and stays unchanged." in removed.text
    assert after == {
        "0.txt": "cat, catgirl",
        "0.txt.2.bak": "cat, hat, catgirl",
        "0.txt.bak": "cat, red_hat, catgirl",
        "1.txt": "hat",
        "1.txt.bak": "red_hat",
        "2.txt": "A cat sits.",
    }
    assert (
        "0 captions were restored. 1 was changed by another program in the meantime and stays." in undone.text
    )
    assert {**texts_of(pictures), "0.txt": before["0.txt"]}.items() >= before.items()
    assert texts_of(pictures)["0.txt"] == "mine"
    assert refused.status == 422


def test_a_tag_is_renamed_and_given_back_by_clicks(pictures: Path) -> None:
    before = texts_of(pictures)
    with (
        serve_runs(pictures.parent) as served,
        open_page(f"{served.url}/new?{urlencode({'folder': str(pictures)})}") as page,
    ):
        page.get_by_role("button", name="Tags", exact=True).click()
        wait_until(page, "document.querySelector('#tag-rename') !== null")
        page.get_by_label("Old tag").fill("red_hat")
        page.get_by_label("becomes").fill("Hut ü")
        page.get_by_role("button", name="Rename everywhere").click()
        wait_until(page, "document.querySelector('#tag-editor .good').textContent.includes('2 captions')")
        assert texts_of(pictures)["0.txt"] == "cat, Hut ü, catgirl"
        assert "Hut ü" in page.locator(".tag-counts").inner_text()
        page.locator("#tag-editor").get_by_role("button", name="Undo").click()
        wait_until(page, "document.querySelector('#tag-editor .good').textContent.includes('restored')")
        assert page.problems == []
        page.get_by_label("Old tag").fill("nowhere")
        page.get_by_label("becomes").fill("x")
        page.get_by_role("button", name="Rename everywhere").click()
        wait_until(page, "document.querySelector('#tag-editor .bad').textContent.includes('nowhere')")
    assert texts_of(pictures).items() >= before.items()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, []),
        ({"thresh": "0.35", "num_frames": "8"}, []),
        ({"thresh": " 0.5 ", "join_frames": "mean"}, ["--thresh", "0.5", "--join_frames", "mean"]),
        ({"which": "append_tags", "remove_underscore": "yes"}, ["--append_tags", "--remove_underscore"]),
        ({"always_first_tags": "--overwrite_all"}, ["--always_first_tags=--overwrite_all"]),
        ({"undesired_tags": "a,\n b"}, ["--undesired_tags", "a, b"]),
    ],
)
def test_fields_become_the_words_of_the_command(fields: dict[str, str], words: list[str]) -> None:
    typed = FORM.make_argv(".", fields)

    assert typed == ["python", "tools/tag.py", ".", *words]
    (options,) = parse_options("", typed[2:], TaggingOptions)
    assert not options.overwrite_all


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"thresh": "2"}, "Least probability 2: use a number from 0 to 1."),
        ({"thresh": "nan"}, "use a number"),
        ({"num_frames": "many"}, "Frames of a clip many: use a whole number from 1 to 1024."),
        ({"num_frames": "2.5"}, "use a whole number"),
        ({"which": "overwrite_all"}, "Captions overwrite_all: choose from the list."),
    ],
)
def test_a_field_that_the_tool_would_refuse_is_named_at_once(fields: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        FORM.make_argv(".", fields)


@pytest.mark.parametrize("what", ["rename", "remove"])
def test_a_tag_that_was_not_typed_is_asked_for(what: str, pictures: Path) -> None:
    with serve_runs(pictures.parent) as served:
        answer = press(served, what, tag=" ", name="x")
    assert answer.status == 422
    assert "Type the tag in the field Old tag" in answer.text


def test_what_a_press_cannot_do_is_said(pictures: Path) -> None:
    with serve_runs(pictures.parent) as served:
        for what, fields, message in (
            ("write", {}, "load the model first"),
            ("try", {"model": str(pictures), "thresh": "x"}, "use a number from 0 to 1"),
            ("rename", {"tag": "cat"}, "Type the new name"),
            ("rename", {"tag": "cat", "name": "a, b"}, "without a comma"),
            ("rename", {"tag": "horse", "name": "cow"}, "no caption has the tag horse"),
        ):
            answer = press(served, what, **fields)
            assert (answer.status, message in answer.text) == (422, True), answer.text
        assert press(served, "other").status == 404
        assert press(served, "write", folder="nowhere").status == 404
    assert not list(pictures.glob("*.bak"))


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_captions_behind_links_that_lead_outside_are_neither_read_nor_written(
    pictures: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("cat, secret", encoding="utf-8")
    (pictures / "1.txt").unlink()
    (pictures / "1.txt").symlink_to(outside)
    editor = TagEditor(Runs((pictures.parent,)))

    assert editor.count(pictures)["secret"] == 0
    editor.rename(pictures, "cat", "dog")

    assert outside.read_text(encoding="utf-8") == "cat, secret"
    assert (pictures / "0.txt").read_text(encoding="utf-8") == "dog, red_hat, catgirl"


def test_both_pages_have_the_part_and_a_described_folder_is_one(pictures: Path) -> None:
    described = pictures.parent / "described"
    save_image(described / "0.png")
    (described / "0.txt").write_text("cat", encoding="utf-8")
    describe(described)
    lines = [
        f"[[datasets]]\nimage_directory = '{pictures}'",
        f"[[datasets]]\nimage_directory = '{described}'",
    ]
    (pictures.parent / "both.toml").write_text("\n".join(lines), encoding="utf-8")

    with serve_runs(pictures.parent) as served:
        new = served.ask("/new?folder=described").text
        line = served.ask("/new/tags?folder=described").text
        counts = served.ask("/new/tags?folder=described&part=editor").text
        addresses = [part.split('"')[0] for part in served.ask("/datasets").text.split('<a href="')[1:]]
        pages = [served.ask(address).text for address in addresses if address.startswith("/dataset/")]

    assert 'id="tags-fold"' in new
    assert f"{python_of('tools/tag.py')} dataset.toml --model_dir" in plain_text(line)
    assert ">cat</button> <small>1</small>" in counts
    lists = [page.count("<option value=") - len(MODELS) for page in pages if 'id="tool-folder"' in page]
    assert sorted(lists) == [5, 7]  # besides the models that the dataset is measured for


def test_tags_that_are_kept_in_front_are_counted_and_never_lost(pictures: Path) -> None:
    (pictures / "0.txt").write_text("cat ||| red_hat, big", encoding="utf-8")
    (pictures / "1.txt").write_text("||| red_hat", encoding="utf-8")
    with serve_runs(pictures.parent) as served:
        shown = served.ask("/new/tags?folder=pictures").text
        assert ">red_hat</button> <small>2</small>" in shown
        assert "|||" not in shown
        removed = press(served, "remove", tag="red_hat")
        refused = press(served, "rename", tag="cat", name="a ||| b")
    assert "red_hat was removed from 1 caption. 1 has no other tag and stays unchanged." in removed.text
    assert (refused.status, "a tag cannot contain |||" in refused.text) == (422, True)
    assert texts_of(pictures)["0.txt"] == "cat ||| big"
    assert texts_of(pictures)["1.txt"] == "||| red_hat"


def test_a_tag_of_the_list_is_taken_by_a_click(pictures: Path) -> None:
    with serve_runs(pictures.parent) as served:
        shown = served.ask("/new/tags?folder=pictures&part=editor").text
        (address,) = re.findall(r'hx-get="([^"]+)"[^>]*>red_hat</button>', shown)
        chosen = served.ask(html.unescape(address)).text
    assert '<input name="tag" value="red_hat"' in chosen
    assert 'id="tag-editor"' in chosen


def test_captions_that_are_json_objects_have_no_tags(pictures: Path) -> None:
    caption = '{"short_description": "cat, red_hat", "style": "cat, red_hat"}'
    (pictures / "0.txt").write_text(caption, encoding="utf-8")
    (pictures / "2.txt").write_text("{red_hat|cap}, cat", encoding="utf-8")  # a choice of words is none
    with serve_runs(pictures.parent) as served:
        shown = served.ask("/new/tags?folder=pictures").text
        assert ">red_hat</button> <small>1</small>" in shown
        assert ">cat</button> <small>1</small>" in shown
        assert "short_description" not in shown
        press(served, "rename", tag="cat", name="dog")
    assert texts_of(pictures)["0.txt"] == caption
    assert texts_of(pictures)["2.txt"] == "{red_hat|cap}, dog"


def test_many_captions_are_flushed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk takes some 10 ms for each flush: 400 captions and their backups took 12 s."""
    folder = tmp_path / "root" / "pictures"
    folder.mkdir(parents=True)
    for number in range(60):
        (folder / f"{number}.png").touch()
        (folder / f"{number}.txt").write_text(f"cat, tag {number}", encoding="utf-8")
    (folder / "7.txt").chmod(0o600)
    counter = itertools.count(1)
    flushed: list[int] = []
    together = threading.Barrier(5)

    def flush(_: int) -> None:
        number = next(counter)
        flushed.append(number)
        if number <= 5:
            together.wait(PATIENCE)  # for the others: a flush after a flush would wait in vain

    monkeypatch.setattr(os, "fsync", flush)
    editor = TagEditor(Runs([tmp_path / "root"]))
    editor.rename(folder, "cat", "dog")
    assert len(flushed) == 122  # two of the folder
    assert (folder / "7.txt").read_text(encoding="utf-8") == "dog, tag 7"
    assert (folder / "7.txt.bak").read_text(encoding="utf-8") == "cat, tag 7"
    if os.name != "nt":
        assert (folder / "7.txt").stat().st_mode & 0o777 == 0o600
    (folder / "3.txt").write_text("mine", encoding="utf-8")
    assert "59 captions were restored. 1 was changed by another program" in editor.undo(folder)
    assert (folder / "59.txt").read_text(encoding="utf-8") == "cat, tag 59"
    assert (folder / "3.txt").read_text(encoding="utf-8") == "mine"
    assert not list(folder.glob(".*"))
