"""The line of the machine: what runs, the cards of the driver, and free disk, without asking too often."""

import html
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from browser.core.graphics_cards import CardReader, GraphicsCard, read_cards
from browser.jobs.jobs import STATE, JobQueue
from browser.jobs.model_files import name_download
from modules.atomic_write import free_bytes
from tests.browser.serving import serve_runs, write_run
from tests.chromium import open_page, wait_until
from training.reports.history import History, describe_process, history_path

MINUTE = 60_000  # milliseconds by which a page's clock goes on, in place of waiting for its next question
LISTED = """NVIDIA GeForce RTX 4090, 12288, 24564, 61
Tesla, K80, 0, 11441, [N/A]
not a card
NVIDIA GB10, [N/A], [N/A], 40
"""


def write_driver(folder: Path, body: str) -> str:
    """Write a program in place of nvidia-smi that counts its calls."""
    program = folder / "nvidia-smi"
    program.write_text(f'#!/bin/sh\necho x >> "{folder / "calls"}"\n{body}\n', encoding="utf-8")
    program.chmod(0o755)
    return str(program)


def count_calls(folder: Path) -> int:
    return len((folder / "calls").read_text(encoding="utf-8").split())


def test_cards_are_read_from_the_list_of_the_driver() -> None:
    first, second, shared = read_cards(LISTED)

    assert first == GraphicsCard("NVIDIA GeForce RTX 4090", 12.0, 24564 / 1024, 61)
    assert first.summary == "NVIDIA GeForce RTX 4090, 12.0 of 24.0 GiB, 61 °C"
    assert (second.name, second.summary) == ("Tesla, K80", "Tesla, K80, 0.0 of 11.2 GiB")
    assert shared.summary == "NVIDIA GB10, 40 °C"


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_driver_is_asked_once_in_a_while_and_a_slow_or_broken_one_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "list").write_text(LISTED, encoding="utf-8")
    reader = CardReader(write_driver(tmp_path, f'cat "{tmp_path / "list"}"'))
    assert [len(reader.read()) for _ in range(5)] == [3] * 5
    assert count_calls(tmp_path) == 1

    for name, body in {"broken": "exit 9", "slow": "exec sleep 30"}.items():
        folder = tmp_path / name
        folder.mkdir()
        reader = CardReader(write_driver(folder, body))
        assert [reader.read() for _ in range(3)] == [[]] * 3
        assert count_calls(folder) == 1

    assert CardReader(None).read() == []


def test_free_disk_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    free = free_bytes(tmp_path / "not" / "yet" / "there")

    assert abs(free - shutil.disk_usage(tmp_path).free) < 1 << 30


def test_the_line_names_what_runs_and_links_to_it(tmp_path: Path) -> None:
    with serve_runs(tmp_path) as served:
        line = served.ask("/machine").text
    assert "nothing runs" in line
    assert re.search(r"\d+(\.\d)? [GM]B free", line)

    write_run(tmp_path, "y", 4, None)
    write_run(tmp_path, "over", 10)
    with serve_runs(tmp_path) as served:
        line = served.ask("/machine").text
        assert f'<a href="{served.of("y")}">y, step 4 of 10' in line
    assert ">over" not in line
    assert '"over: finished"' in html.unescape(line)

    history = History(history_path(tmp_path, "z.run"), 1)
    told = {"model": "wan", "total_steps": 10, "changed": [], "unchanged": [], "listens": True}
    history.add(0, started={**told, "process": describe_process()})
    history.add(0, doing="training")  # `run` begins it: the model is loaded
    history.flush()
    with serve_runs(tmp_path) as served:
        line = served.ask("/machine").text
        assert f'<a href="{served.of("z.run")}">z, loading the model' in line
    assert "nothing runs" not in line


def test_a_paused_queue_is_named_and_markup_in_a_job_stays_text(tmp_path: Path) -> None:
    queue = JobQueue(tmp_path / "queue")
    queue.add(["convert_lora.py", "--input", "<b>a", "x" * 100], tmp_path)
    with serve_runs(tmp_path, queue=queue) as served:
        assert '<a href="/queue">1 waits: the queue is paused</a>' in served.ask("/machine").text

    stored = json.loads((queue.folder / STATE).read_text(encoding="utf-8"))
    stored["jobs"][0]["process"] = describe_process()  # this one, which runs
    (queue.folder / STATE).write_text(json.dumps(stored), encoding="utf-8")
    with serve_runs(tmp_path, queue=queue) as served:
        line = served.ask("/machine").text
    assert '<a href="/queue#j1">job 1: convert_lora.py --input &#39;&lt;b&gt;a&#39; xxx' in line
    assert "x …</a>" in line


def test_a_download_is_named_with_what_has_arrived(tmp_path: Path) -> None:
    models, logs = tmp_path / "models", tmp_path / "reelsmith-queue" / "logs"
    logs.mkdir(parents=True)
    name = name_download(models, "wan", "t2v-1.3B")
    record = {"line": "x", "folder": str(tmp_path), "process": describe_process(), "stops": 0}
    (logs / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")
    (logs / f"{name}.progress").write_text('[1000000000, 4000000000, "B"]', encoding="utf-8")

    with serve_runs(tmp_path, models=models) as served:
        line = served.ask("/machine").text
        page = served.ask("/models").text

    assert '<a href="/models#loading">loading Wan2.1 t2v-1.3B, 1.0 of 4.0 GB</a>' in line
    assert '<progress value="0.25" max="1"' in page
    assert "<button>Stop</button>" in page


def test_a_damaged_queue_does_not_hide_the_rest(tmp_path: Path) -> None:
    (tmp_path / "reelsmith-queue").mkdir()
    (tmp_path / "reelsmith-queue" / STATE).write_text("{", encoding="utf-8")
    with serve_runs(tmp_path) as served:
        assert "free" in served.ask("/machine").text


@pytest.mark.parametrize("address", ["/new", "/datasets"])
def test_a_server_that_does_not_answer_any_more_is_said(tmp_path: Path, address: str) -> None:
    write_run(tmp_path, "y", 4, None)
    with serve_runs(tmp_path) as served, open_page(f"{served.url}{address}") as page:
        page.clock.install()
        page.reload()
        wait_until(page, "document.querySelector('#machine a') !== null")
        page.route("**/machine", lambda route: route.abort())
        page.clock.fast_forward(MINUTE)
        wait_until(page, "document.getElementById('machine').textContent.includes('does not answer')")
        command = page.locator("#machine code").text_content()
        assert command is not None
        assert str(tmp_path) in command
        shown = re.sub("<[^>]*>", "", served.ask("/settings").text)  # folders are marked in it
        assert command in html.unescape(shown)
        page.unroute("**/machine")
        page.clock.fast_forward(MINUTE)
        wait_until(page, "document.querySelector('#machine a')?.textContent.startsWith('y, step 4')")


@pytest.mark.parametrize("address", ["/", "/new", "/queue", "/datasets", "/models", "/settings", "run"])
def test_every_page_shows_the_line(tmp_path: Path, address: str) -> None:
    write_run(tmp_path, "y", 4, None)
    with (
        serve_runs(tmp_path) as served,
        open_page(served.url + (address if address.startswith("/") else served.of("y"))) as page,
    ):
        wait_until(page, "document.querySelector('#machine a')?.textContent.startsWith('y, step 4')")
        assert page.problems == []


def test_the_line_says_at_once_that_a_run_has_ended(tmp_path: Path) -> None:
    path = write_run(tmp_path, "x", 10, None)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 10, "doing": "saving"}) + "\n")
    with serve_runs(tmp_path) as served:
        assert "x, step 10 of 10, saving" in served.ask("/machine").text
        assert "保存" in served.ask("/machine", Accept_Language="zh").text
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": 10, "ended": "finished", "kind": "good"}) + "\n")
        assert "nothing runs" in served.ask("/machine").text
