"""Two servers of one folder, and two pages of one server: nothing is lost, and nothing is done twice."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from browser.folders import captions
from browser.folders.captions import CaptionConflictError, CaptionFiles, compute_checksum
from browser.folders.described_folder import ChangedMeanwhileError, change_keys
from browser.jobs.background_jobs import name_background_job
from browser.jobs.jobs import FOLDER as QUEUE_FOLDER
from browser.jobs.jobs import JobQueue
from tests.browser.serving import Served, serve_runs
from tests.browser.test_run_buttons import address_of, write_resumable
from tests.browser.test_safe_clicks import describe, list_children, save_image, wait_for_children
from tests.chromium import open_page, wait_until
from tests.waiting import PATIENCE

PRESSES = 12  # of each page


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(2):
        save_image(tmp_path / "described" / f"{number}.png", 80 * number)
        (tmp_path / "described" / f"{number}.txt").write_text("an image", encoding="utf-8")
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
        thread.join(PATIENCE)


def test_jobs_that_two_servers_add_at_once_are_all_there(root: Path, servers: tuple[Served, Served]) -> None:
    statuses: list[int] = []

    def add(served: Served, name: str) -> None:
        for number in range(PRESSES):
            line = f"convert_lora.py --help {name}{number}"
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
    name = name_background_job("check", root / "described")
    assert len(list((root / QUEUE_FOLDER / "logs").glob(f"{name}.json"))) == 1
    for served in servers:
        assert "checking" in served.ask("/new?folder=described").text
    for child in list_children():
        child.kill()
    wait_for_children()


def count_starts(root: Path, servers: tuple[Served, Served], address: str, **fields: str) -> list[int]:
    """Press a button that starts a run four times at once on both servers; return the answers' statuses."""
    statuses: list[int] = []
    pages = [*servers, *servers]
    run_together(*(lambda s=served: statuses.append(press(s, address, **fields)) for served in pages))
    for served in servers:
        press(served, "/queue/pause")
    for child in list_children():
        child.kill()
    wait_for_children()
    return sorted(statuses)


def test_a_start_that_is_pressed_twice_starts_once(root: Path, servers: tuple[Served, Served]) -> None:
    assert count_starts(root, servers, "/new/start", folder="described", accept="yes") == [200, 422, 422, 422]
    assert len(JobQueue(root / QUEUE_FOLDER).jobs()) == 1


def test_a_run_of_a_terminal_that_is_continued_twice_goes_on_once(
    root: Path, servers: tuple[Served, Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("browser.jobs.typed_jobs.check_options", lambda words, folder, earlier, seconds: None)
    write_resumable(root / "other", "typed")
    address = f"{address_of(servers[0], 'typed')}do/start"

    assert count_starts(root, servers, address) == [200, 422, 422, 422]
    assert len(JobQueue(root / QUEUE_FOLDER).jobs()) == 1


def test_of_two_servers_that_save_a_caption_at_once_the_second_sees_the_first(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first one has compared, and not yet written."""
    path = root / "described" / "0.txt"
    of_servers = CaptionFiles(), CaptionFiles()
    _, have, _ = of_servers[0].read(path)
    outcomes: list[str] = []
    write = captions._write

    def write_slowly(file: Path, content: bytes) -> None:
        time.sleep(0.3)
        write(file, content)

    def save(server: CaptionFiles, text: str) -> None:
        try:
            server.save(path, text, have)
            outcomes.append(text)
        except CaptionConflictError:
            outcomes.append("refused")

    monkeypatch.setattr(captions, "_write", write_slowly)
    run_together(*(lambda s=s, t=t: save(s, t) for s, t in zip(of_servers, ("one", "two"), strict=True)))

    saved = path.read_text(encoding="utf-8")
    assert saved in ("one", "two")
    assert sorted(outcomes) == sorted([saved, "refused"])
    assert not (path.parent / captions.LOCK).exists()


def test_an_undo_sees_what_another_server_saves_meanwhile(root: Path) -> None:
    path = root / "described" / "0.txt"
    first, second = CaptionFiles(), CaptionFiles()
    first.save(path, "one", first.read(path)[1])
    have = first.read(path)[1]
    second.save(path, "two", have)

    with pytest.raises(CaptionConflictError):
        first.undo(path, have)

    assert path.read_text(encoding="utf-8") == "two"


def test_of_two_changes_of_one_text_the_second_is_refused(root: Path) -> None:
    path = root / "described" / "run.toml"
    have = compute_checksum(path.read_bytes())
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


def test_another_page_of_the_queue_no_longer_calls_it_empty(root: Path) -> None:
    with serve_runs(root) as served, open_page(f"{served.url}/queue") as page:
        assert "The queue is empty." in page.locator("#jobs").inner_text()
        press(served, "/queue/add", line="convert_lora.py --help")
        wait_until(page, "document.querySelector('.job') !== null")
        assert "The queue is empty." not in page.locator("main").inner_text()
