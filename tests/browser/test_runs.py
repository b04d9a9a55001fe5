"""What a list tells of runs: found anywhere below the folders, alive or not, and quickly."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from browser.core.options import BrowserOptions
from browser.core.serving import run_browser
from browser.pages.runs.run_list import select_runs
from browser.runs.run_views import LiveRunState, label_runs, share_page
from browser.runs.runs import (
    DIED,
    FINISHED,
    REMOTE_RUN_TIMEOUT_SECONDS,
    RUNNING,
    STOPPED,
    Runs,
    read_run_summary,
)
from modules.errors import OptionError
from modules.script_options import parse_options
from tests.browser.serving import serve_runs, write_run
from tests.chromium import open_page
from tests.run_pages import find_run_page, read_run_page
from tests.training.toy import Killed, killed_at, train_toy, write_caches
from training.reports.history import History, describe_process, history_path

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux has this device")


def look(*folders: Path) -> dict[str, Any]:
    return {run.name: run for run in Runs(folders).list_all()}


def test_a_run_is_found_at_any_depth_with_what_it_tells(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "b", "deep", 4, None)
    write_run(tmp_path, "flat")

    found = look(tmp_path)

    assert set(found) == {"deep", "flat"}
    run = found["deep"]
    assert (run.state, run.model, run.step, run.total_steps) == (RUNNING, "wan", 4, 10)
    assert [round(loss, 3) for loss in run.losses] == [1.0, 0.5, 0.333, 0.25]
    assert (run.left, run.sample) == ("12 s", "deep_1.png")


def test_the_time_left_has_pauses_and_a_pause_says_what_is_made(tmp_path: Path) -> None:
    path = write_run(tmp_path, "x", 4, None)
    history = History(path if path.suffix == ".jsonl" else history_path(tmp_path, "x"), 1, 4)
    history.add(5, loss=0.2, average=0.2, seconds=2.0, left=3600.0)
    history.flush()
    runs = Runs((tmp_path,))
    (run,) = runs.list_all()
    assert run.left == "1 h"
    assert LiveRunState.of(run, runs.open(run).run_history).time_left == "· 1 h left"

    history.add(5, doing="sample 1 of 2, step 140 of 300")
    history.flush()
    (run,) = runs.list_all()
    assert LiveRunState.of(run, runs.open(run).run_history).time_left == "· sampling 1 of 2, step 140 of 300"


def ended_process() -> dict[str, Any]:
    code = "from training.reports.history import describe_process as d; import json; print(json.dumps(d()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("kind", "process", "state"),
    [
        ("good", describe_process, FINISHED),
        ("", describe_process, STOPPED),
        ("bad", describe_process, DIED),
        (None, describe_process, RUNNING),
        (None, ended_process, DIED),
        (None, lambda: {**describe_process(), "born": 5.0}, DIED),  # the number was given to another one
        (None, lambda: {**describe_process(), "number": "x"}, DIED),
    ],
)
def test_a_run_has_a_state(
    tmp_path: Path, kind: str | None, process: Callable[[], dict[str, Any]], state: str
) -> None:
    write_run(tmp_path, kind=kind, process=process())

    assert look(tmp_path)["x"].state == state


def test_a_run_of_another_machine_has_died_when_it_writes_no_more(tmp_path: Path) -> None:
    path = write_run(tmp_path, kind=None, process={**describe_process(), "machine": 0})
    assert look(tmp_path)["x"].state == RUNNING
    then = path.stat().st_mtime - REMOTE_RUN_TIMEOUT_SECONDS - 1
    os.utime(path, (then, then))

    assert look(tmp_path)["x"].state == DIED


@pytest.mark.parametrize("left", ["1" * 300, "9e999", "-1", '"x"', "NaN"])
def test_a_time_left_that_no_training_writes_breaks_no_page(left: str, tmp_path: Path) -> None:
    path = write_run(tmp_path, kind=None)
    with path.open("a", encoding="utf-8") as file:
        file.write(f'{{"step": 7, "loss": 1.0, "seconds": 1.0, "left": {left}, "doing": "x"}}\n')
    with serve_runs(tmp_path) as served:
        assert [served.ask(address).status for address in ("/", served.of("x"))] == [200, 200]


@pytest.mark.parametrize("typed", [".", "../output", "link"])
def test_a_run_is_of_here_however_its_folder_was_typed(typed: str, tmp_path: Path) -> None:
    told = {"written_in": str(tmp_path / "output")} if typed == "link" else {}
    write_run(tmp_path / "output", changed=[["output_dir", typed]], **told)
    assert look(tmp_path)["x"].is_trusted


@pytest.mark.skipif(sys.platform == "win32", reason="files have no owner's number there")
def test_a_history_of_another_account_is_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "output", changed=[["output_dir", "output"]])
    assert look(tmp_path)["x"].is_trusted
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_000)
    assert not look(tmp_path)["x"].is_trusted


def test_a_resumed_run_is_running_again(tmp_path: Path) -> None:
    path = write_run(tmp_path, kind="")
    started = path.read_text(encoding="utf-8").splitlines()[1]
    with path.open("a", encoding="utf-8") as file:
        file.write(started.replace('"step": 0', '"step": 6') + "\n")

    assert look(tmp_path)["x"].state == RUNNING


def test_a_history_that_was_emptied_since_it_was_looked_at_is_read_as_it_is(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * (40 << 10))
    status = path.stat()
    path.write_bytes(b"")

    assert read_run_summary(path, status).step == 0


def test_a_page_is_made_anew_if_something_came_between_it_and_its_first_question(tmp_path: Path) -> None:
    path = write_run(tmp_path, kind=None)
    with serve_runs(tmp_path) as served:
        (mark,) = re.findall(r'data-mark="(\w+)"', served.ask(served.of("x")).text)
        assert served.ask(served.of("x", "news")).json()["page"] == mark

        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": 6, "level": "info", "message": "new"}) + "\n")

        assert served.ask(served.of("x", "news")).json()["page"] != mark


def test_list_and_page_tell_the_seconds_of_the_last_50_steps_as_the_bar_does(tmp_path: Path) -> None:
    path = write_run(tmp_path, steps=0, kind=None, total_steps=100)
    rows = [{"step": step, "loss": 1.0, "seconds": 9.0 if step <= 10 else 1.0} for step in range(1, 61)]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)

    assert look(tmp_path)["x"].left == "40 s"
    with serve_runs(tmp_path) as served:
        page = served.ask(served.of("x")).text
    assert "<b>1</b><span>mean of the last 50 steps, without pauses; 2 min in all" in page
    assert "· 40 s left" in page


def test_what_trainings_write_is_told(tmp_path: Path) -> None:
    """Finished, and killed in the middle; and a copy elsewhere tells the same."""
    write_caches(tmp_path)
    train_toy(tmp_path, has_page=True)
    with pytest.raises(Killed):
        train_toy(tmp_path, "--output_name", "killed", family=killed_at(4), has_page=True)
    history = tmp_path / "output" / "killed-history.jsonl"
    text = history.read_text(encoding="utf-8")
    history.write_text(text.replace(f'"number": {os.getpid()}', '"number": 0'), encoding="utf-8")
    shutil.copytree(tmp_path / "output", tmp_path / "copy")

    for folder in (tmp_path / "output", tmp_path / "copy"):
        found = look(folder)
        assert {name: run.state for name, run in found.items()} == {"x": FINISHED, "killed": DIED}
        assert (found["x"].model, found["x"].step, found["x"].total_steps) == ("toy", 8, 8)


def test_a_run_of_an_older_version_is_told_by_its_page(tmp_path: Path) -> None:
    write_caches(tmp_path)
    train_toy(tmp_path, has_page=True)
    find_run_page(tmp_path / "output")
    history = tmp_path / "output" / "x-history.jsonl"
    rows = [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()]
    old = [{"step": 0, "started": True} if "started" in row else row for row in rows]
    new = ("ended", "memory", "commands", "message")
    old = [row for row in old if not any(key in row for key in new)]
    history.write_text("".join(f"{json.dumps(row)}\n" for row in old), encoding="utf-8")

    run = look(tmp_path)["x"]

    assert (run.state, run.model, run.step, run.total_steps) == (FINISHED, "toy", 8, 8)


def test_of_a_long_run_a_few_places_tell_the_same_as_the_whole_file(tmp_path: Path) -> None:
    path = write_run(tmp_path, steps=5000, total_steps=5000)

    run = look(tmp_path)["x"]

    assert path.stat().st_size > 300_000
    assert (run.step, run.state, run.sample, len(run.losses) >= 40) == (5000, FINISHED, "x_1.png", True)
    assert all(abs(loss - 1 / step) < 1e-6 for loss in run.losses for step in [round(1 / loss)])
    assert [*run.losses] == sorted(run.losses, reverse=True)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, ["dog", "a cat", "b cat"]),
        ({"sort": "name", "text": "CAT"}, ["a cat", "b cat"]),
        ({"family": "wan", "sort": "progress"}, ["dog", "b cat"]),
        ({"state": "running"}, []),
    ],
)
def test_a_list_is_sorted_and_chosen_by_words_family_and_state(
    tmp_path: Path, asked: dict[str, str], expected: list[str]
) -> None:
    for number, (name, model) in enumerate((("b cat", "wan"), ("a cat", "flux"), ("dog", "wan"))):
        path = write_run(tmp_path / model, name, 3 + number, model=model)
        os.utime(path, (1000 + number, 1000 + number))

    assert [run.name for run in select_runs(Runs([tmp_path]).list_all(), asked)] == expected


def test_a_list_reads_only_what_has_changed(tmp_path: Path) -> None:
    runs = Runs([tmp_path])
    paths = [write_run(tmp_path / f"{number}", f"run{number}") for number in range(3)]
    before = {run.name: run for run in runs.list_all()}
    with paths[1].open("ab") as file:
        file.write(b'{"step": 7, "loss": 0.25, "seconds": 1.0}\n')

    after = {run.name: run for run in runs.list_all()}

    assert [name for name in before if before[name] is not after[name]] == ["run1"]
    assert after["run1"].step == 7


def test_an_exported_page_shows_what_the_run_s_own_page_shows_but_no_folder(tmp_path: Path) -> None:
    write_caches(tmp_path)
    train_toy(tmp_path, "--save_every_n_steps", 4, has_page=True)
    history, target = tmp_path / "output" / "x-history.jsonl", tmp_path / "shared.html"

    run_browser(BrowserOptions(folders=(history,), export=target))

    share_page(find_run_page(tmp_path / "output"), tmp_path / "own.html")
    texts = [path.read_text(encoding="utf-8") for path in (target, tmp_path / "own.html")]
    assert str(tmp_path) not in texts[0]
    shared, own = (text.partition("written ")[0] + text.partition("<progress")[2] for text in texts)
    assert shared == own


def test_of_a_folder_with_a_training_and_its_preparations_the_training_is_exported(tmp_path: Path) -> None:
    write_run(tmp_path / "output", "mine", 2)
    write_run(tmp_path / "output", "mine.run", 1)  # what `run` did before it
    target = tmp_path / "shared.html"

    run_browser(BrowserOptions(folders=(tmp_path,), export=target))

    assert "<title>mine: training</title>" in target.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--host 0.0.0.0", "--token FILE"),
        ("--host example.org", "--token FILE"),
        ("nothing", "no such folder"),
        ("--export x.txt", "ends in .html"),
        ("--export x.html . .", "pass its folder"),
        ("--export x.html --port 80", "exclude each other"),
        ("--token short.txt", "at least 16"),
        ("--token long.txt", "larger than 1,024 bytes"),
        pytest.param("--token /dev/zero", "it is a device", marks=ON_LINUX),
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Path, words: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("secret\n", encoding="utf-8")
    (tmp_path / "long.txt").write_text("x" * 2000, encoding="utf-8")
    with pytest.raises(OptionError, match=message):
        parse_options("", words.split(), BrowserOptions)[0].read_token()


@pytest.mark.slow
def test_many_runs_are_a_table_that_keeps_its_filter_and_equal_names_tell_their_folders(
    tmp_path: Path,
) -> None:
    for number in range(70):
        write_run(tmp_path / f"day{number}", "same" if number < 2 else f"run{number}", 2)
    with serve_runs(tmp_path) as served:
        assert served.ask("/").text.count('<tr id="r') == 70
        cards = served.ask("/?text=same&view=cards").text
        assert (cards.count('<li id="r'), "same in day0" in cards, "same in day1" in cards) == (2, True, True)
        assert "<!--/private-->day" not in cards  # their labels have the folder, no card a path
        assert f"{datetime.now():%Y-%m-%d}" in cards
    with serve_runs(tmp_path) as served, open_page(f"{served.url}/") as page:
        page.fill("[name=text]", "run42")
        page.wait_for_url("**/*text=run42*")
        page.click("text=run42")
        page.wait_for_url("**/run/**")
        page.go_back()
        page.wait_for_selector("text=1 of 70 runs")
        assert page.input_value("[name=text]") == "run42"


def test_list_page_and_bar_show_one_average(tmp_path: Path) -> None:
    write_caches(tmp_path)
    train_toy(tmp_path, has_page=True)
    rows = [json.loads(line) for line in (tmp_path / "output" / "x-history.jsonl").read_text().splitlines()]
    average = [row["average"] for row in rows if "average" in row][-1]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert round(average, 6) in [round(sum(losses[-count:]) / count, 6) for count in range(2, 9)]
    assert look(tmp_path)["x"].loss == pytest.approx(average)
    assert f"<b>{average:.4g}</b>" in read_run_page(tmp_path / "output")


def test_only_samples_that_play_have_a_player(tmp_path: Path) -> None:
    for name in ("pictures", "clips"):
        path = write_run(tmp_path / name, name)
        if name == "clips":
            with path.open("a", encoding="utf-8") as file:
                row = {
                    "step": 6,
                    "samples": "000006",
                    "files": {"0": "clips_1.mp4"},
                    "prompts": {"0": "a cat"},
                }
                file.write(json.dumps(row) + "\n")
    with serve_runs(tmp_path) as served:
        found = {name: served.ask(served.of(name)).text.count('id="play"') for name in ("pictures", "clips")}
    assert found == {"pictures": 0, "clips": 1}


def test_runs_of_one_name_are_told_apart_by_their_folders_and_cards_show_no_paths(tmp_path: Path) -> None:
    write_run(tmp_path / "cats" / "output", "own")
    write_run(tmp_path / "dogs" / "output", "own")
    write_run(tmp_path / "hens" / "output", "own.run", kind=None)
    labels = {label for _, label in label_runs(Runs([tmp_path]).list_all())}
    assert labels == {"own in cats", "own in dogs", "own in hens"}
    with serve_runs(tmp_path) as served:
        for address in ("/", "/?view=table"):
            assert str(tmp_path / "cats") not in served.ask(address).text
        (cats,) = [run for run in served.runs.list_all() if run.history.parent.parent.name == "cats"]
        assert str(tmp_path / "cats") in served.ask(f"/run/{cats.id}/").text
