"""Which captions are written, kept and edited."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from data_tools.captions.places import RECORD_NAME, OverwriteRules
from data_tools.captions.run import CaptionBackend, _make_captions, run_captioning
from dataset.config import load_dataset_config
from modules.errors import DatasetError, OptionError, UserError
from tests.commands import QUIET, ROOT
from tests.data_tools.captions.making import (
    FakeServer,
    everything_in,
    make_folder,
    make_list,
    options_of,
    read_captions,
    read_lines,
    run_server,
)
from tests.waiting import PATIENCE, wait_for

HAND = "written by a person\n"


@pytest.fixture(scope="module")
def server() -> Any:
    """A server that answers each request with its number."""
    with run_server(lambda number, body: f"caption {number}") as fake:
        yield fake


def run(config: Path, server: FakeServer | None, *words: object) -> None:
    given = () if server is None else ("--api_base", server.address, "--api_model", "m", "--api_workers", "1")
    run_captioning(load_dataset_config(config), options_of(config, *given, *words))


def test_only_what_is_missing_is_made_and_a_second_run_makes_nothing(
    tmp_path: Path, server: FakeServer
) -> None:
    config = make_folder(tmp_path, {"a": HAND})
    before = len(server.bodies)
    run(config, server)

    captions = read_captions(tmp_path)
    assert captions.pop("a") == HAND
    assert list(captions.values()) == [f"caption {before}", f"caption {before + 1}"]
    state = everything_in(tmp_path)
    run(config, server)
    assert everything_in(tmp_path) == state
    assert len(server.bodies) == before + 2


def test_a_dry_run_names_what_is_missing_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_folder(tmp_path, {"a": HAND}, extension=None)
    state = everything_in(tmp_path)
    run(config, None, "--dry_run")

    said = capsys.readouterr().out
    assert said.startswith("2 captions would be made, 1 are kept.")
    for name in ("b b", "ç"):
        image = tmp_path / "im ages" / f"{name}.png"
        assert f"{image} (missing): {image.with_suffix('.txt')}" in said
    assert "a.png" not in said
    assert 'caption_extension = ".txt"' in said
    assert everything_in(tmp_path) == state


@pytest.mark.parametrize(
    "words",
    [
        ("--overwrite", "--fill_empty", "--trigger_word", "zxc", "--replace", "person", "robot"),
        ("--overwrite_all",),
        ("--edit_only", "--replace", "person", "robot"),
    ],
)
@pytest.mark.parametrize("is_list", [False, True])
def test_what_a_person_wrote_is_never_lost(
    words: tuple[str, ...], is_list: bool, tmp_path: Path, server: FakeServer
) -> None:
    if is_list:
        bare, with_caption = '{"image_path": {}}', '{"image_path": {}, "caption": "written by a person"}'
        config = make_list(tmp_path, [bare, with_caption, bare])
    else:
        config = make_folder(tmp_path, {"b b": HAND})
    for _ in range(2):
        run(config, None if "--edit_only" in words else server, *words)

    is_replaced = "--overwrite_all" in words or "--edit_only" in words
    kept = [path for path, text in everything_in(tmp_path).items() if HAND.strip().encode() in text]
    if is_list:
        now = read_lines(tmp_path)[1]["caption"]
        assert any(path.name == "list.jsonl.bak" for path in kept) or not is_replaced
    else:
        now = read_captions(tmp_path)["b b"]
        assert [path.name for path in kept] == (["b b.txt.bak"] if is_replaced else ["b b.txt"])
    assert (str(now).strip() == HAND.strip()) is not is_replaced


def test_overwriting_makes_own_captions_anew_but_not_edited_ones(tmp_path: Path, server: FakeServer) -> None:
    config = make_folder(tmp_path)
    run(config, server)
    first = read_captions(tmp_path)
    edited = tmp_path / "im ages" / "a.txt"
    edited.write_text("caption of mine", encoding="utf-8")
    run(config, server, "--overwrite", "--caption_prefix", "New:")

    captions = read_captions(tmp_path)
    assert captions.pop("a") == "caption of mine"
    assert all(text.startswith("New: ") and text != f"New: {first[name]}" for name, text in captions.items())
    assert not list((tmp_path / "im ages").glob("*.bak"))


def test_an_interrupted_overwriting_goes_on_where_it_was(tmp_path: Path) -> None:
    config = make_folder(tmp_path)
    answers: list[Any] = ["one"] * 3 + ["two", (404, "stop")] + ["three"] * 9
    with run_server(lambda number, _: answers[number]) as server:
        run(config, server)
        with pytest.raises(UserError, match="404"):
            run(config, server, "--overwrite")
        assert sorted(read_captions(tmp_path).values()) == ["one", "one", "two"]
        run(config, server, "--overwrite")
        assert sorted(read_captions(tmp_path).values()) == ["three", "three", "two"]
        run(config, server, "--overwrite")
        assert set(read_captions(tmp_path).values()) == {"three"}

        # killed behind the last caption
        record = tmp_path / "im ages" / RECORD_NAME
        record.write_text(record.read_text().rpartition('{"end"')[0])
        run(config, server, "--overwrite")
        assert len(server.bodies) == 10
        run(config, server, "--overwrite")
        assert len(server.bodies) == 13


def test_after_files_that_failed_only_these_are_made_anew(tmp_path: Path, server: FakeServer) -> None:
    config = make_folder(tmp_path)
    run(config, server)
    image = tmp_path / "im ages" / "a.png"
    full = image.read_bytes()
    image.write_bytes(full[:60])
    with pytest.raises(DatasetError, match=r"1 of 3 got no caption; all others are done:\n.*a\.png"):
        run(config, server, "--overwrite")
    image.write_bytes(full)
    before = len(server.bodies)

    run(config, server, "--overwrite")  # as the error says

    assert len(server.bodies) == before + 1
    run(config, server, "--overwrite")
    assert len(server.bodies) == before + 4


def test_an_empty_caption_is_a_caption_unless_it_is_to_be_filled(tmp_path: Path, server: FakeServer) -> None:
    config = make_folder(tmp_path, {"a": " \n"})
    run(config, server)
    assert read_captions(tmp_path)["a"] == " \n"
    run(config, server, "--fill_empty")
    assert read_captions(tmp_path)["a"].startswith("caption")


def test_a_caption_that_somebody_writes_meanwhile_is_kept(tmp_path: Path) -> None:
    config = make_folder(tmp_path)

    def reply(number: int, body: Any) -> str:
        (tmp_path / "im ages" / "a.txt").write_text(HAND, encoding="utf-8")
        return "a cat"

    with run_server(reply) as server:
        run(config, server)

    assert read_captions(tmp_path) == {"a": HAND, "b b": "a cat", "ç": "a cat"}


def test_a_list_gets_the_captions_that_it_lacks(tmp_path: Path, server: FakeServer) -> None:
    edited = '{"image_path": {}, "control_path": "gone.png", "control_path_1": "too.png"}'
    lines = [edited, '{"caption": "x", "image_path": {}}', '{"caption":null,"image_path":{}}']
    config = make_list(tmp_path, lines, keys='trigger_word = "zxc"')
    run(config, server, "--caption_suffix", "in 4k.")

    first, second, third = read_lines(tmp_path)
    assert (first["control_path"], second["caption"]) == ("gone.png", "x")
    for text in (str(first["caption"]), str(third["caption"])):
        assert text.endswith("in 4k.")
        assert "zxc" not in text


def test_captions_that_several_tables_share_are_made_once(tmp_path: Path, server: FakeServer) -> None:
    config = make_folder(tmp_path)
    table = config.read_text(encoding="utf-8")
    control = f"control_directory = {str(tmp_path / 'not there')!r}\n"  # it is not asked for
    text = f"{table}resolution = 512\n{table}{control}cache_directory = 'other'\n"
    config.write_text(text, encoding="utf-8")
    before = len(server.bodies)
    run(config, server)

    assert len(server.bodies) == before + 3
    with config.open("a", encoding="utf-8") as file:
        file.write('caption_prefix = "A video of"\n')
    with pytest.raises(OptionError, match="it would be there twice"):
        run(config, None, "--dry_run", "--caption_prefix", "A video of")


def test_many_failures_without_a_caption_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.captions.run.MAX_INITIAL_FAILURES", 2)
    config = make_folder(tmp_path)
    with run_server(lambda *_: (400, "no")) as server, pytest.raises(UserError, match="None of the first 2"):
        run(config, server)


def test_what_ends_a_server_ends_the_run(tmp_path: Path) -> None:
    def reject(*_: object) -> Any:
        raise AssertionError("nothing is looked at or written")

    overwrite_rules = OverwriteRules(generated=False, all=False, empty=False)
    backend = CaptionBackend(
        "m", "", overwrite_rules, load_captioner=reject, read_frames=reject, postprocess=reject
    )

    with pytest.raises(SystemExit):
        _make_captions(lambda *_: (one for one in [(Any, SystemExit(3))]), {}, {}, backend)


def test_a_try_prints_the_captions_of_the_first_files_without_one_and_writes_none(
    tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_folder(tmp_path, {"a": HAND})
    before, state = len(server.bodies), everything_in(tmp_path)

    run(config, server, "--try_on", 2, "--trigger_word", "ohwx")

    assert everything_in(tmp_path) == state
    images = tmp_path / "im ages"
    lines = [images / "b b.png", f"  ohwx, caption {before}", images / "ç.png"]
    assert capsys.readouterr().out.splitlines() == [*map(str, lines), f"  ohwx, caption {before + 1}"]
    with pytest.raises(OptionError, match="--dry_run"):
        run(config, server, "--try_on", 2, "--dry_run")


def test_captions_are_edited_without_a_model(
    tmp_path: Path, server: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_folder(tmp_path, {"a": "a dog\n\nruns", "b b": "a cat"})
    run(config, server)
    replaced = ("--replace", "dog", "cat", "--replace", "caption", "")
    words = ("--edit_only", "--caption_prefix", "A photo:", *replaced)
    state = everything_in(tmp_path)
    run(config, None, *words, "--dry_run")
    assert everything_in(tmp_path) == state
    assert "'a dog /  / runs' -> 'A photo: a cat /  / runs'" in capsys.readouterr().out

    for _ in range(2):  # a second time changes nothing
        run(config, None, *words)
    made = read_captions(tmp_path)["ç"]
    assert read_captions(tmp_path) == {"a": "A photo: a cat\n\nruns", "b b": "A photo: a cat", "ç": made}
    backups = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "im ages").glob("*.bak")}
    assert backups.pop("ç.txt.bak").startswith("caption ")
    assert backups == {"a.txt.bak": "a dog\n\nruns", "b b.txt.bak": "a cat"}
    run(config, server, "--overwrite")  # what was the program's own still is
    assert read_captions(tmp_path)["ç"] != made
    assert read_captions(tmp_path)["b b"] == "A photo: a cat"


@pytest.mark.parametrize("is_list", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_between_two_captions(is_list: bool, tmp_path: Path) -> None:
    config = (make_list if is_list else make_folder)(tmp_path)
    reached, release = threading.Event(), threading.Event()

    def reply(number: int, body: Any) -> str:
        if number == 2:
            reached.set()
            release.wait(PATIENCE)
        return f"caption {number}"

    def written() -> list[str]:
        lines = [line.get("caption") for line in read_lines(tmp_path)] if is_list else []
        return sorted(str(text) for text in lines or read_captions(tmp_path).values() if text is not None)

    with run_server(reply) as server:
        words = ["--api_base", server.address, "--api_model", "m", "--api_workers", "1"]
        command = [str(ROOT / "tools/caption_dataset.py"), "--dataset_config", str(config), *words]
        process = subprocess.Popen([sys.executable, *command], env={**os.environ, **QUIET})
        try:
            assert reached.wait(PATIENCE)
            wait_for(lambda: len(written()) >= 2)
        finally:
            process.kill()
            process.wait()
        release.set()
        assert written() == ["caption 0", "caption 1"]
        run(config, server)
        assert len(server.bodies) == 4

    assert written() == ["caption 0", "caption 1", "caption 3"]
    assert [path.name for path in tmp_path.rglob(".*")] == [RECORD_NAME]


def test_a_run_goes_on_with_what_a_killed_earlier_version_left(tmp_path: Path, server: FakeServer) -> None:
    config = make_list(tmp_path, ['{"image_path": {}}'] * 2 + ['{"image_path": {}, "caption": "hand"}'])
    _, second, third = (line["image_path"] for line in read_lines(tmp_path))
    waiting = tmp_path / ".list.jsonl.captions"
    made = {second: "of before", third: "no"}
    records = [{"path": path, "old": None, "caption": text} for path, text in made.items()]
    waiting.write_bytes("\n".join(["", *map(json.dumps, records), '{"p']).encode() + b"\xc3")
    state = everything_in(tmp_path)
    run(config, None, "--model", tmp_path, "--dry_run")
    assert everything_in(tmp_path) == state
    before = len(server.bodies)

    run(config, server)

    assert len(server.bodies) == before + 1
    assert [line["caption"] for line in read_lines(tmp_path)][1:] == ["of before", "hand"]
    assert not waiting.exists()
