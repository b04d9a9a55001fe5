"""Regularization images on the pages: the button puts the command with the typed words into the queue."""

import time
from pathlib import Path
from urllib.parse import urlencode

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from tests.browser.described_folders import describe
from tests.browser.serving import Answer, Served, plain_text, python_of, serve_runs
from tests.browser.test_safe_clicks import save_image
from tests.commands import MAX_SECONDS


def press(served: Served, what: str, folder: str, **fields: str) -> Answer:
    body = urlencode({"folder": folder, **fields})
    return served.ask(f"/new/regularization/{what}", "POST", body, Origin=served.url)


def test_the_form_shows_its_command_and_says_what_is_missing(tmp_path: Path) -> None:
    describe(tmp_path / "cat")
    save_image(tmp_path / "plain" / "0.png")
    with serve_runs(tmp_path) as served:
        page = served.ask("/new?folder=cat").text
        typed = urlencode({"folder": "cat", "class_word": "tabby cat", "trigger_word": "zwolf"})
        form = served.ask(f"/new/regularization?{typed}").text
        plain = served.ask("/new/regularization?folder=plain").text
        no_word = press(served, "write", "cat", class_word=" ")
        not_described = press(served, "write", "plain", class_word="cat")
        unknown = press(served, "other", "cat", class_word="cat")

    assert 'id="regularization-fold"' in page
    words = "--class_word 'tabby cat' --trigger_word zwolf"
    assert f"{python_of('tools/regularize.py')} . {words}" in plain_text(form)
    assert "Make regularization images" in form
    assert "Make regularization images" not in plain
    assert (no_word.status, "Type the word for the class" in no_word.text) == (422, True)
    assert (not_described.status, "press Prepare first" in not_described.text) == (422, True)
    assert unknown.status == 404


@pytest.mark.slow
def test_the_button_runs_the_command_in_the_queue(tmp_path: Path) -> None:
    """The folder is one of a video model, whose refusal is shown."""
    describe(tmp_path / "cat")
    with serve_runs(tmp_path) as served:
        assert press(served, "write", "cat", class_word="cat").status == 200
        end = time.monotonic() + MAX_SECONDS
        text = ""
        while "died" not in text and time.monotonic() < end:
            text = served.ask("/new/regularization?folder=cat&part=progress").text
            time.sleep(0.1)
    assert "job 1 of the queue" in text
    assert "trains a video model, which has no regularization images" in text, text
    assert not (tmp_path / "cat" / "regularization_images").exists()
