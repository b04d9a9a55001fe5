"""A full disk, as a person at the page meets it: what is said, that nothing is lost, and how it goes on."""

import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest

from browser.core.short_names import short_digest
from browser.folders.captions import compute_checksum
from browser.jobs.launch import write_code
from tests.browser.drafts import PROMPTS, RUN, write_draft
from tests.browser.serving import Answer, Served, serve_runs

FULL = "the disk has 0.0 MB free"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve_runs(tmp_path) as served:
        yield served


@pytest.fixture
def fill(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Make the disk full; `monkeypatch.undo` frees it."""

    def fill() -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, (1 << 40) - 4096, 4096))

    yield fill
    monkeypatch.undo()


def post(served: Served, address: str, **fields: str) -> Answer:
    return served.ask(address, "POST", urlencode(fields), Origin=served.url)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_what_a_page_writes_is_refused_and_written_once_there_is_room(
    served: Served, fill: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = write_draft(tmp_path)
    before = contents(folder)
    have = compute_checksum(b"fluff")
    caption = f"/new/rows/{str(folder).encode().hex()}/caption/{short_digest('p0.png')}"
    text = f'{{"what": "save", "have": "{have}", "text": "a cat"}}'
    steps = {"folder": str(folder), "family": "wan", "task": "t2v-1.3B", "trigger": "fluff", "name": "fluff"}
    steps |= {f"file_{name}": f"{name}.safetensors" for name in ("dit", "vae", "t5")}
    fill()

    saved = served.ask(caption, "POST", text, Origin=served.url)
    described = post(served, "/new/describe", **steps, steps="30")
    checked = post(served, "/new/check", folder=str(folder))

    assert FULL in saved.json()["error"]
    for answer in (described, checked):
        assert answer.status == 422
        assert FULL in answer.text
        assert "Free some space" in answer.text
    assert contents(folder) == before
    assert not list(tmp_path.rglob("*.tmp"))

    monkeypatch.undo()
    assert served.ask(caption, "POST", text, Origin=served.url).status == 200
    assert post(served, "/new/describe", **steps, steps="30").status == 200
    assert (folder / "p0.txt").read_text(encoding="utf-8") == "a cat"
    assert "max_train_steps = 30" in (folder / "run.toml").read_text(encoding="utf-8")
    assert (folder / "prompts.txt").read_text(encoding="utf-8") == PROMPTS


def test_dropped_files_are_refused_by_their_names(
    served: Served, fill: Callable[[], None], tmp_path: Path
) -> None:
    fill()
    into_folder = served.ask("/new/upload?into=cats&name=x.png", "POST", "abc", Origin=served.url)
    as_input = served.ask("/generate/file?name=my+cat.png", "POST", "abc", Origin=served.url)

    assert into_folder.json()["error"].startswith(f"x.png: the disk of {tmp_path / 'cats'} has 4.1 kB free")
    assert f"{tmp_path / 'generated/inputs/my cat.png'}: {FULL}" in as_input.json()["said"]
    assert not (tmp_path / "cats").exists()
    assert not list((tmp_path / "generated/inputs").iterdir())


def test_an_earlier_check_stays_if_no_other_can_be_started(
    served: Served, fill: Callable[[], None], tmp_path: Path
) -> None:
    folder = write_draft(tmp_path)
    logs = tmp_path / "reelsmith-queue/logs"
    logs.mkdir(parents=True)
    name = f"check-{short_digest(folder)}"
    (logs / f"{name}.log").write_text("no fault\n", encoding="utf-8")
    (logs / f"{name}.code").write_text("0", encoding="utf-8")
    fill()

    answer = post(served, "/new/check", folder=str(folder))

    assert answer.status == 422
    assert FULL in answer.text
    assert (logs / f"{name}.log").read_text(encoding="utf-8") == "no fault\n"
    assert (logs / f"{name}.code").exists()


def test_a_page_does_not_ask_again_and_again_what_cannot_be_found_out(
    served: Served, fill: Callable[[], None], tmp_path: Path
) -> None:
    folder = write_draft(tmp_path)
    asks = 'hx-post="/new/settings/chosen"'
    assert asks in served.ask(f"/new/settings?folder={quote(str(folder))}").text
    fill()

    answer = post(served, "/new/settings/chosen", folder=str(folder))

    assert answer.status == 422
    assert "What <code>new</code> chose is not known: " in answer.text
    assert FULL in answer.text
    assert asks not in answer.text
    assert (folder / "run.toml").read_text(encoding="utf-8") == RUN


def test_the_exit_code_of_a_job_is_written_with_the_last_bytes(
    fill: Callable[[], None], tmp_path: Path
) -> None:
    fill()
    write_code(tmp_path / "1.code", 2)
    assert (tmp_path / "1.code").read_text(encoding="utf-8") == "2"
