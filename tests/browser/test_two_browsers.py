"""Two servers of one folder, and two pages of one server: nothing is lost, and nothing is done twice."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from browser.captions import mark_bytes
from browser.described import ChangedMeanwhileError, change_keys
from browser.errands import errand_name
from browser.jobs import FOLDER as QUEUE_FOLDER
from browser.jobs import JobQueue
from tests.browser.serving import Served, serve_runs
from tests.browser.test_safe_clicks import describe, list_children, save_picture, wait_for_children

PRESSES = 12  # of each page


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(2):
        save_picture(tmp_path / "described" / f"{number}.png", 80 * number)
        (tmp_path / "described" / f"{number}.txt").write_text("a picture", encoding="utf-8")
    describe(tmp_path / "described")
    return tmp_path


@pytest.fixture
def servers(root: Path) -> Iterator[tuple[Served, Served]]:
    with serve_runs(root) as first, serve_runs(root) as second:
        yield first, second


def press(served: Served, address: str, **fields: str) -> int:
    return served.ask(address, "POST", urlencode(fields), Origin=served.url).status


def run_together(*calls: Callable[[], object]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


def test_jobs_that_two_servers_add_at_once_are_all_there(root: Path, servers: tuple[Served, Served]) -> None:
    statuses: list[int] = []

    def add(served: Served, name: str) -> None:
        for number in range(PRESSES):
            line = f"convert_lora.py --input {name}{number}"
            statuses.append(press(served, "/queue/add", line=line))

    run_together(*(lambda s=served, n=name: add(s, n) for served, name in zip(servers, "ab", strict=True)))

    assert statuses == 2 * PRESSES * [303]
    jobs = JobQueue(root / QUEUE_FOLDER).jobs()
    assert sorted(job.id for job in jobs) == list(range(1, 2 * PRESSES + 1))
    assert {job.line[-2:].strip() for job in jobs} >= {"a0", "b0", "a9", "b9"}


def test_of_two_servers_one_runs_the_jobs(servers: tuple[Served, Served]) -> None:
    press(servers[0], "/queue/add", line="convert_lora.py --help")

    statuses = [press(served, "/queue/work") for served in servers]

    assert sorted(statuses) == [303, 422]
    for served in servers:
        press(served, "/queue/pause")
    wait_for_children()


def test_a_check_that_is_pressed_on_two_pages_runs_once(root: Path, servers: tuple[Served, Served]) -> None:
    statuses: list[int] = []
    pages = [*servers, *servers]

    run_together(
        *(lambda s=served: statuses.append(press(s, "/new/check", folder="described")) for served in pages)
    )

    assert sorted(statuses) == [200, 422, 422, 422]
    name = errand_name("check", root / "described")
    assert len(list((root / QUEUE_FOLDER / "logs").glob(f"{name}.json"))) == 1
    for served in servers:
        assert "checking" in served.ask("/new?folder=described").text
    for child in list_children():
        child.kill()
    wait_for_children()


def test_of_two_changes_of_one_text_the_second_is_refused(root: Path) -> None:
    path = root / "described" / "run.toml"
    have = mark_bytes(path.read_bytes())
    outcomes: list[str] = []

    def change(steps: int) -> None:
        try:
            change_keys(path, {"max_train_steps": steps}, have)
            outcomes.append("written")
        except ChangedMeanwhileError:
            outcomes.append("refused")

    change(7)
    change(8)

    assert outcomes == ["written", "refused"]
    assert "max_train_steps = 7" in path.read_text(encoding="utf-8")
