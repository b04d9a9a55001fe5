"""A queue goes on by itself only with jobs that its user has typed or started here."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from browser.core.serving import reopen_queue
from browser.jobs.jobs import JobQueue, as_line
from modules.installation import ROOT
from modules.user_files import user_folder
from tests.browser.test_jobs import SHORT, wait_for, wait_for_states

OTHER = ["python", "tools/doctor.py"]


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[JobQueue]:
    """A queue that its user has started, whose server has ended, with one job that waits."""
    queue = JobQueue(tmp_path / "root" / "reelsmith-queue")
    queue.folder.mkdir(parents=True)
    queue.begin_work()
    queue.end_work()
    queue.add(SHORT, ROOT)
    yield queue
    queue.end_work()


def count_begun(queue: JobQueue) -> int:
    return sum(job.process is not None for job in queue.jobs())


def test_a_queue_that_came_with_a_folder_stays_paused(tmp_path: Path) -> None:
    folder = tmp_path / "root" / "reelsmith-queue"
    folder.mkdir(parents=True)
    (folder / "queue.txt").write_text(f"{as_line(SHORT)}\n", encoding="utf-8")
    book: dict[str, Any] = {"last": 0, "worker": None, "open": True, "jobs": []}
    (folder / "jobs.json").write_text(json.dumps(book), encoding="utf-8")

    assert not reopen_queue(JobQueue(folder))


def test_a_copy_of_a_started_queue_stays_paused(queue: JobQueue, tmp_path: Path) -> None:
    shutil.copytree(queue.folder.parent, tmp_path / "copy")
    assert not reopen_queue(JobQueue(tmp_path / "copy" / "reelsmith-queue"))


def test_a_line_that_came_while_no_page_was_open_waits_to_be_read(queue: JobQueue) -> None:
    with (queue.folder / "queue.txt").open("a", encoding="utf-8") as file:
        file.write(f"{as_line(OTHER)}\n")

    later = JobQueue(queue.folder)
    assert not reopen_queue(later)
    assert "1 line was added to" in later.problem
    assert count_begun(later) == 0

    later.begin_work()  # somebody has read it
    wait_for(lambda: count_begun(later) > 0)
    later.end_work()
    again = JobQueue(queue.folder)
    assert reopen_queue(again)
    wait_for_states(again, "finished", "finished")
    again.end_work()


def test_an_equal_second_line_is_another_job(queue: JobQueue) -> None:
    text = (queue.folder / "queue.txt").read_text(encoding="utf-8")
    (queue.folder / "queue.txt").write_text(text * 2, encoding="utf-8")
    assert not reopen_queue(JobQueue(queue.folder))


@pytest.mark.parametrize("change", ["limits", "folder", "state"])
def test_a_job_whose_record_was_changed_is_another_job(queue: JobQueue, change: str, tmp_path: Path) -> None:
    queue.add(OTHER, tmp_path, within=tmp_path)
    assert queue.jobs()[-1].within
    path = queue.folder / "jobs.json"
    book = json.loads(path.read_text(encoding="utf-8"))
    if change == "limits":
        del book["jobs"][-1]["within"]
    elif change == "folder":
        book["jobs"][-1]["folder"] = str(tmp_path / "root")
    else:
        book["jobs"] = []  # as if the file had been removed
    path.write_text(json.dumps(book), encoding="utf-8")
    assert not reopen_queue(JobQueue(queue.folder))


def test_lines_that_come_while_the_queue_works_are_known(queue: JobQueue) -> None:
    queue.begin_work()
    wait_for_states(queue, "finished")
    line = f"cd {ROOT} && {as_line(OTHER)}\n"
    with (queue.folder / "queue.txt").open("a", encoding="utf-8") as file:
        file.write(line)
    wait_for(lambda: len(queue.jobs()) == 2)
    wait_for_states(queue, "finished", "finished")
    queue.retry(2)  # with the button of a page
    queue.end_work()
    later = JobQueue(queue.folder)
    assert reopen_queue(later)
    later.end_work()


def test_who_pauses_or_only_works_once_starts_no_later_server(queue: JobQueue) -> None:
    queue.begin_work()
    queue.end_work(pauses=True)
    assert not reopen_queue(JobQueue(queue.folder))
    typed = JobQueue(queue.folder)
    typed.begin_work(stays_open=False)  # with --work
    typed.end_work()
    assert not reopen_queue(JobQueue(queue.folder))


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_in_the_place_of_a_limited_folder_starts_nothing(queue: JobQueue, tmp_path: Path) -> None:
    folder = tmp_path / "root" / "theirs"
    folder.mkdir()
    number = queue.add(OTHER, tmp_path, within=folder)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    queue.begin_work()
    wait_for_states(queue, "finished", "died")
    assert "is a link to another place by now" in queue.jobs()[-1].last_lines()
    assert queue.jobs()[-1].id == number


def test_without_a_place_to_remember_the_queue_stays_paused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for name in ("XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(tmp_path / "file"))
    assert user_folder().is_relative_to(tmp_path / "file")
    queue = JobQueue(tmp_path / "reelsmith-queue")
    queue.begin_work()
    queue.end_work()
    assert not reopen_queue(JobQueue(queue.folder))
