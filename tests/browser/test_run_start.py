"""How a run stands from its first minute: as a draft, a job, a check, and in its histories."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from browser.core.short_names import free_name
from browser.jobs.background_jobs import name_background_job
from browser.jobs.jobs import JobQueue
from browser.pages.runs.permissions import read_permissions
from browser.runs.run_start import find_start_argv, read_preparation_state
from browser.runs.runs import read_run_summary
from modules.errors import OptionError
from project.options import MODELS
from tests.browser.described_folders import describe, find, look, state, trace
from tests.browser.serving import serve_runs, write_run
from training.reports.history import BEFORE_TRAINING, History, describe_process, history_path

TRAIN = ["python", "wan_train_network.py", "--config_file", "run.toml"]
LATENTS = ["python", "wan_cache_latents.py", "--dataset_config", "dataset.toml"]


def set_job(queue: JobQueue, code: int | None, printed: str = "", stops: int = 0) -> None:
    """Write for the first job that its process has begun just now; it has ended with the code, if any."""
    (job, *_) = queue.jobs()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.log.write_text(printed, encoding="utf-8")
    path = queue.folder / "jobs.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    process = describe_process()
    stored["jobs"][0]["process"] = {
        **process,
        "born": process["born"] if code is None else round(time.time()),
    }
    stored["jobs"][0]["stops"] = stops
    path.write_text(json.dumps(stored), encoding="utf-8")
    if code is not None:
        job.code_path.write_text(str(code), encoding="utf-8")


def set_back(folder: Path, seconds: float = 60) -> None:
    """Make the three files of a folder older."""
    then = time.time() - seconds
    for name in ("run.toml", "dataset.toml", "prompts.txt"):
        os.utime(folder / name, (then, then))


@pytest.mark.parametrize(
    "script",
    ["sdxl_train_network", "sdxl_train_control_net_lllite", "sdxl_train_textual_inversion", "sdxl_train"],
)
def test_a_draft_of_each_kind_has_the_family_of_its_run(script: str, tmp_path: Path) -> None:
    path = describe(tmp_path / "clips") / "run.toml"
    text = path.read_text(encoding="utf-8").replace("wan_train_network", script)
    text = text.replace("wan_cache_latents", "sdxl_cache_latents").replace('"wan"', '"stable_diffusion"')
    path.write_text(text, encoding="utf-8")
    assert find(look(tmp_path)).summary.model == "sdxl"


def test_a_draft_has_the_family_of_the_run_that_it_becomes(tmp_path: Path) -> None:
    """Which is that of its training script: the catalogue calls it stable_diffusion."""
    folder = describe(tmp_path / "my photos")
    path = folder / "run.toml"
    text = path.read_text(encoding="utf-8").replace("wan_train_network", "sdxl_train_network")
    path.write_text(text.replace('"wan"', '"stable_diffusion"'), encoding="utf-8")
    assert find(look(tmp_path)).summary.model == "sdxl"


def test_a_described_folder_is_a_draft_with_the_address_of_its_training(tmp_path: Path) -> None:
    folder = describe(tmp_path / "my clips", steps=2000)
    tracked_runs = look(tmp_path)
    shown = find(tracked_runs)
    assert (shown.state.text, shown.summary.model, shown.summary.total_steps) == ("draft", "wan", 2000)

    write_run(folder / "output", "own", kind="good")

    assert find(tracked_runs).summary.id == shown.summary.id
    assert state(tracked_runs) == "finished"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[training]\n", None),  # another program's
        ("[reelsmith]\ncommands = [[]]\n", "it has no 'training'"),
        ('[training]\noutput_dir = "o"\noutput_name = "../x"\n[reelsmith]\n', "it contains a folder"),
        ("[training\n", "Expected ']'"),
    ],
)
def test_a_run_toml_that_cannot_be_used_says_why(content: str, reason: str | None, tmp_path: Path) -> None:
    folder = describe(tmp_path / "clips")
    (folder / "run.toml").write_text(content, encoding="utf-8")
    shown = look(tmp_path).list_all()

    assert [one.state.name for one in shown] == ([] if reason is None else ["draft"])
    assert all(reason in one.state.reason for one in shown if reason is not None)


def test_a_job_waits_at_its_place_in_a_queue_that_is_paused(tmp_path: Path) -> None:
    folder = describe(tmp_path / "clips")
    tracked_runs = look(tmp_path)
    tracked_runs.queue.add(["python", "tools/download.py", "--list"], tmp_path)
    tracked_runs.queue.add(["reelsmith", "run", str(folder)], tmp_path)

    shown = find(tracked_runs)

    assert shown.state.text == "waiting, position 2 in the queue, which is paused"
    assert shown.state.is_paused
    assert [one.summary.name for one in tracked_runs.find_job_states(tracked_runs.queue.jobs()).values()] == [
        "own"
    ]


@pytest.mark.parametrize(
    ("doing", "text"),
    [
        ("downloading the model: 11.2 GB of 34.8 GB", "downloading 11.2 of 34.8 GB"),
        ("downloading the model: 900 MB of 34.8 GB", "downloading 900 MB of 34.8 GB"),
        ("checking the files", "checking the files"),
        ("caching latents: 40 of 120", "caching 40 of 120, latents"),
        ("caching captions", "caching captions"),
        ("caching captions: 5.1 GB of 11.4 GB", "caching captions, loading 5.1 of 11.4 GB"),
        ("training", "loading the model"),
        ("something else", "starting, something else"),
    ],
)
def test_what_run_does_before_its_training_is_a_state(doing: str, text: str, tmp_path: Path) -> None:
    folder = describe(tmp_path / "clips")
    begun = trace(folder)
    assert begun._history is not None
    begun._history.add(0, doing=doing)
    begun._history.flush()
    path = history_path(folder / "output", "own.run")

    assert read_preparation_state(read_run_summary(path, path.stat())).text == text
    assert state(look(tmp_path)) == text
    assert [shown.summary.name for shown in look(tmp_path).list_all()] == ["own"]


@pytest.mark.parametrize(
    ("doing", "text"),
    [
        ("sample 1 of 3, step 14 of 30", "sampling 1 of 3, step 14 of 30"),
        ("saving", "saving"),
        ("validating", "validating"),
        ("", "training"),
    ],
)
def test_what_a_training_does_between_two_steps_is_a_state(doing: str, text: str, tmp_path: Path) -> None:
    folder = describe(tmp_path / "clips")
    write_run(folder / "output", "own", kind=None)
    history = History(history_path(folder / "output", "own"), 1, 6)
    history.add(6, **({"doing": doing} if doing else {"loss": 1.0}))
    history.flush()

    assert state(look(tmp_path)) == text


def test_a_run_that_is_started_again_waits_before_it_is_what_it_was(tmp_path: Path) -> None:
    folder = describe(tmp_path / "clips")
    write_run(folder / "output", "own", kind="")
    tracked_runs = look(tmp_path)
    assert state(tracked_runs) == "stopped"
    tracked_runs.queue.add(["reelsmith", "run", str(folder)], tmp_path)
    assert state(tracked_runs).startswith("waiting, position 1")
    tracked_runs.queue.remove(1)
    assert state(tracked_runs) == "stopped"


def test_a_run_is_continued_while_the_job_of_its_stopped_training_is_about_to_end(tmp_path: Path) -> None:
    folder = describe(tmp_path / "clips")
    tracked_runs = look(tmp_path)
    tracked_runs.queue.begin_work = lambda: None  # type: ignore[method-assign]
    words = ["reelsmith", "run", str(folder)]
    tracked_runs.start(folder, words)
    set_job(tracked_runs.queue, None)
    with pytest.raises(OptionError, match="It is already running: it is starting"):
        tracked_runs.start(folder, words)
    history = write_run(folder / "output", "own", kind="")
    later = time.time() + 5
    os.utime(history, (later, later))
    assert state(tracked_runs) == "stopped"

    tracked_runs.start(folder, words)

    assert state(tracked_runs).startswith("waiting, position 1")
    with pytest.raises(OptionError, match="already in the queue"):
        tracked_runs.start(folder, words)


DIED = "OptionError: dit.safetensors is missing. Add --download"


@pytest.mark.parametrize(
    ("code", "printed", "name", "reason"),
    [
        (2, f"In the folder x:\n{DIED}\n", "died", "dit.safetensors is missing. Add --download"),
        (1, "OutputError: x: No space left on device\n", "died", "x: No space left on device"),
        (9, "Loading torch ...\n", "died", "It was killed: memory ran out, or somebody ended it."),
        (1, "what\n", "died", "It ended without a message."),
        (0, "", "finished", ""),
    ],
)
def test_a_job_that_ended_before_its_training_says_why(
    code: int, printed: str, name: str, reason: str, tmp_path: Path
) -> None:
    folder = describe(tmp_path / "clips")
    set_back(folder)
    tracked_runs = look(tmp_path)
    tracked_runs.queue.add(["reelsmith", "run", str(folder)], tmp_path)
    set_job(tracked_runs.queue, code, printed)

    shown = find(tracked_runs)

    assert (shown.state.name, shown.state.reason) == (name, reason)
    assert shown.state.last_lines == printed.strip()


def test_a_job_that_waits_says_why_it_cannot_begin(tmp_path: Path) -> None:
    folder = describe(tmp_path / "clips")
    tracked_runs = look(tmp_path)
    tracked_runs.queue.add(["reelsmith", "run", str(folder)], tmp_path)
    tracked_runs.queue.problem = "x/jobs.json: the disk has 0.0 MB free"
    assert find(tracked_runs).state.reason == ""  # it is paused: that is why
    tracked_runs.queue._worker_thread = threading.current_thread()
    assert find(tracked_runs).state.reason == "x/jobs.json: the disk has 0.0 MB free"


def test_a_full_disk_that_took_the_last_words_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = describe(tmp_path / "clips")
    set_back(folder)
    tracked_runs = look(tmp_path)
    tracked_runs.queue.add(["reelsmith", "run", str(folder)], tmp_path)
    set_job(tracked_runs.queue, 1, "In the folder x:\n")
    monkeypatch.setattr("browser.runs.run_start.free_bytes", lambda folder: 4096)
    logs = tracked_runs.queue.folder / "logs"
    assert find(tracked_runs).state.reason == (
        f"The disk of {logs} is full: it could not write why it ended. Free some space, and start it again; "
        "what it has saved is used."
    )


def test_a_killed_process_is_named_and_a_changed_run_toml_is_a_draft_again(tmp_path: Path) -> None:
    folder = describe(tmp_path / "clips")
    set_back(folder)
    tracked_runs = look(tmp_path)
    tracked_runs.queue.add(["reelsmith", "run", str(folder)], tmp_path)
    set_job(tracked_runs.queue, None)
    assert state(tracked_runs).startswith("starting")
    path = tracked_runs.queue.folder / "jobs.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["jobs"][0]["process"] = {**describe_process(), "born": round(time.time()), "number": 2**22 + 1}
    path.write_text(json.dumps(stored), encoding="utf-8")
    assert find(tracked_runs).state.reason.startswith("Its process has ended without a message")

    describe(folder, steps=20)
    later = time.time() + 5
    os.utime(folder / "run.toml", (later, later))

    assert state(tracked_runs) == "draft"


def test_faults_of_a_check_are_a_state_with_its_last_lines(tmp_path: Path) -> None:
    folder = describe(tmp_path / "clips")
    set_back(folder)
    tracked_runs = look(tmp_path)
    name = name_background_job("check", folder)
    log = tracked_runs.queue.folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True)
    process = {**describe_process(), "born": round(time.time())}
    record = {
        "line": f"reelsmith run {folder} --check",
        "folder": str(tmp_path),
        "process": process,
        "stops": 0,
    }
    log.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")
    log.write_text("3 captions are empty\n", encoding="utf-8")
    log.with_suffix(".code").write_text("1", encoding="utf-8")
    shown = find(tracked_runs)
    assert (shown.state.name, shown.state.last_lines) == ("faults", "3 captions are empty")

    log.with_suffix(".code").write_text("0", encoding="utf-8")

    assert state(tracked_runs) == "draft, checked, no fault"


def test_a_run_that_ended_at_a_check_has_faults_and_a_trace_alone_tells_it(tmp_path: Path) -> None:
    folder = describe(tmp_path / "clips")
    begun = trace(folder)
    begun.note([*LATENTS, "--check"])
    begun.end("exit code 1", "bad")

    shown = find(look(tmp_path))

    assert (shown.state.name, shown.state.reason) == ("faults", "ended while checking the files: exit code 1")


def test_a_download_that_failed_tells_why_also_while_its_process_is_about_to_end(tmp_path: Path) -> None:
    folder = describe(tmp_path / "clips")
    set_back(folder)
    tracked_runs = look(tmp_path)
    tracked_runs.queue.add(["reelsmith", "run", str(folder)], tmp_path)
    set_job(
        tracked_runs.queue, None, "DownloadError: https://hub/x cannot be reached (Connection refused).\n"
    )
    history = History(history_path(folder / "output", f"own{BEFORE_TRAINING}"), 1)
    started: dict[str, Any] = {
        "model": "",
        "total_steps": 10,
        "changed": [],
        "unchanged": [],
        "listens": False,
    }
    history.add(0, started={**started, "process": {**describe_process(), "number": 2**22 + 1}})
    history.add(0, ended="ended while downloading the model: exit code 1", kind="bad")
    later = time.time() + 5  # the process of this test began long ago
    history.flush()
    os.utime(history.path, (later, later))

    shown = find(tracked_runs)

    assert shown.state.job is not None
    assert shown.state.job.state == "running"
    assert (shown.state.name, shown.state.reason) == (
        "died",
        "https://hub/x cannot be reached (Connection refused).",
    )


def test_a_training_that_died_tells_its_own_reason(tmp_path: Path) -> None:
    folder = describe(tmp_path / "clips")
    history = History(history_path(folder / "output", "own"), 1)
    started: dict[str, Any] = {"model": "wan", "total_steps": 10, "changed": [], "unchanged": []}
    (folder / "output").mkdir()
    history.add(0, started={**started, "listens": True, "process": describe_process()})
    history.add(3, ended="ended by an error after step 3: out of memory", kind="bad")
    history.flush()
    assert find(look(tmp_path)).state.reason == "ended by an error after step 3: out of memory"


@pytest.mark.parametrize(
    ("taken", "name", "expected"),
    [
        ([], "own", "own-2"),
        (["own-2.html"], "own", "own-3"),
        (["own-2-history.jsonl"], "own-2", "own-3"),
        (["2026-11-27.safetensors"], "2026-11-27", "2026-11-27-2"),  # a date has no number of a run
    ],
)
def test_a_further_run_gets_a_name_that_no_run_has(
    taken: list[str], name: str, expected: str, tmp_path: Path
) -> None:
    for entry in taken:
        (tmp_path / entry).touch()
    assert free_name(tmp_path, name) == expected


def test_a_foreign_run_toml_is_not_started_before_it_was_read(tmp_path: Path) -> None:
    folder = describe(tmp_path / "clips", is_trusted=False)
    tracked_runs = look(tmp_path)
    words = ["reelsmith", "run", str(folder)]
    with pytest.raises(OptionError, match="comes from elsewhere"):
        tracked_runs.start(folder, words)
    assert tracked_runs.queue.jobs() == []
    tracked_runs.queue.begin_work = lambda: None  # type: ignore[method-assign]

    tracked_runs.start(folder, words, is_reviewed=True)

    assert [job.line for job in tracked_runs.queue.jobs()] == [f"reelsmith run {folder}"]
    with pytest.raises(OptionError, match="already in the queue"):
        tracked_runs.start(folder, words)


def test_start_starts_a_paused_queue_unless_others_wait_in_it(tmp_path: Path) -> None:
    folder = describe(tmp_path / "clips")
    begun = []
    tracked_runs = look(tmp_path)
    tracked_runs.queue.begin_work = lambda: begun.append(1)  # type: ignore[method-assign,func-returns-value]
    tracked_runs.start(folder, ["reelsmith", "run", str(folder)])
    assert begun == [1]
    tracked_runs.queue.remove(1)
    tracked_runs.queue.add(["python", "tools/download.py", "--list"], tmp_path)

    tracked_runs.start(folder, ["reelsmith", "run", str(folder)])

    assert begun == [1]


def test_the_list_the_page_and_the_queue_say_the_same(tmp_path: Path) -> None:
    folder = describe(tmp_path / "clips")
    begun = trace(folder)
    begun.note(LATENTS)
    with serve_runs(tmp_path) as served:
        (address,) = {
            part.split('"')[0] for part in served.ask("/").text.split('href="')[1:] if "/run/" in part
        }
        for place in ("/", address):
            assert "caching latents" in served.ask(place).text
        assert served.ask(f"{address}standing").json()["state"] == "caching latents"
        old = served.ask(served.of("own.run"))
        assert (old.status, old.headers["location"]) == (303, address)

        write_run(folder / "output", "own", kind=None)

        assert 'id="samples"' in served.ask(address).text
        assert served.ask(f"{address}standing").json()["is_begun"]


def test_what_was_removed_is_not_listed(tmp_path: Path) -> None:
    describe(tmp_path / "reelsmith-bin" / "2026" / "clips")
    write_run(tmp_path / "reelsmith-bin" / "2026" / "output", "own")
    assert look(tmp_path).list_all() == []


@pytest.mark.parametrize("place", ["absolute", "own", "/", "/usr/models", "~/models", "models"])
def test_a_foreign_run_toml_types_no_path_of_its_own(place: str, tmp_path: Path) -> None:
    """Wherever its --to leads: also into a folder that is here."""
    folder = describe(tmp_path / "clips", is_trusted=False)
    (folder / "cache" / "dit.safetensors").unlink()
    to = {"absolute": str(tmp_path / "elsewhere"), "own": str(folder / "m")}.get(place, place)
    text = (folder / "run.toml").read_text(encoding="utf-8")
    (folder / "run.toml").write_text(text.replace(str(tmp_path / "models"), to), encoding="utf-8")
    tracked_runs = look(tmp_path)
    tracked_runs.queue.begin_work = lambda: None  # type: ignore[method-assign]
    plan = find(tracked_runs).run_config
    assert plan is not None
    words = find_start_argv(plan, MODELS)
    assert words == ["reelsmith", "run", str(folder), "--download"]
    with pytest.raises(OptionError, match="comes from elsewhere"):
        tracked_runs.start(folder, words)

    tracked_runs.start(folder, words, is_reviewed=True)

    assert find_start_argv(plan, MODELS) == words
    assert tracked_runs.is_trusted(plan)


def test_what_a_folder_brings_along_makes_it_no_known_one(tmp_path: Path) -> None:
    """A queue with its run, the job that described it, and a history: they may all be from elsewhere."""
    folder = describe(tmp_path / "clips", is_trusted=False)
    tracked_runs = look(tmp_path)
    tracked_runs.queue.add(["reelsmith", "run", str(folder)], tmp_path)
    queue = tracked_runs.queue.folder
    (queue / "logs").mkdir(exist_ok=True)
    name = name_background_job("describe", folder)
    record = {"line": f"reelsmith new {folder}", "folder": str(tmp_path), "process": {}, "stops": 0}
    (queue / "logs" / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    (queue / "logs" / f"{name}.code").write_text("0", encoding="utf-8")
    history = History(history_path(folder / "output", "own"), 1)
    (folder / "output").mkdir()
    started = {"model": "wan", "total_steps": 10, "changed": [], "unchanged": [], "listens": True}
    started["written_in"] = str(folder / "output")
    history.add(0, started={**started, "process": describe_process()})
    history.add(3, ended="finished", kind="good")
    history.flush()
    plan = find(tracked_runs).run_config
    assert plan is not None

    assert not tracked_runs.is_trusted(plan)


def test_what_a_foreign_file_does_first_cannot_be_hidden_behind_what_is_usual(tmp_path: Path) -> None:
    folder = describe(
        tmp_path / "clips",
        is_trusted=False,
        network_module="evil.code",
        huggingface_repo_id="evil/repository",
    )
    tables = '[[datasets]]\nimage_directory = "."\ncache_directory = "cache"\n' * 150
    (folder / "dataset.toml").write_text(tables, encoding="utf-8")

    permissions = read_permissions(folder)

    assert [one.is_unusual for one in permissions[:3]] == [True, True, False]
    assert {one.text for one in permissions[:2]} == {
        "loads the code evil.code",
        "uploads the trained files to evil/repository",
    }
    assert len(permissions) == 101
    assert permissions[-1].text.startswith("and 56 more that are not listed, 0 of them unusual")


def test_more_unusual_things_than_fit_are_counted(tmp_path: Path) -> None:
    folder = describe(tmp_path / "clips", is_trusted=False)
    tables = '[[datasets]]\nimage_directory = "."\ncache_directory = "/evil"\n' * 150
    (folder / "dataset.toml").write_text(tables, encoding="utf-8")

    last = read_permissions(folder)[-1]

    assert last.is_unusual
    assert last.text.startswith("and 54 more that are not listed, 50 of them unusual")


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (("own-step00000004-state", "own-step00000005-state"), "continues from step 5."),
        (("own-000002-state",), "continues from its last state, own-000002-state."),
        ((), "No state was saved: it starts again from the beginning."),
    ],
)
def test_a_run_that_a_second_stop_has_ended_is_stopped(
    states: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    folder = describe(tmp_path / "clips")
    set_back(folder)
    dead = {**describe_process(), "number": 2**22 + 1}
    write_run(folder / "output", "own", steps=6, kind=None, process=dead)
    for name in states:
        (folder / "output" / name).mkdir()
    tracked_runs = look(tmp_path)
    assert find(tracked_runs).state.name == "died"
    tracked_runs.queue.add(["reelsmith", "run", str(folder)], tmp_path)
    set_job(tracked_runs.queue, -9, stops=2)

    shown = find(tracked_runs)

    assert shown.state.name == "stopped"
    assert shown.state.reason.startswith("Ended immediately from the page after step 6")
    assert shown.state.reason.endswith(message)
    with serve_runs(tmp_path) as served:
        page = served.ask(f"/run/{shown.summary.id}/").text
    assert "Ended immediately from the page after step 6" in page
    assert "without a message" not in page
