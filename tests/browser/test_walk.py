"""Two tabs are walked through by clicks that are drawn: commands, links, messages, focus and states hold.

A walk that fails prints its seed and its clicks. REELSMITH_WALK_SEED=7 takes another seed, and
REELSMITH_WALK=FILE walks the clicks of a file that a failed walk has written.
"""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

import numpy as np

from browser.jobs import launch
from browser.jobs.jobs import open_queue
from browser.jobs.render_worker import RenderWorker
from browser.runs.runs import RUNNING, Runs
from modules.media.writing import write_png
from pocket.measure import POCKET
from tests.browser import stand_in_jobs
from tests.browser.described_folders import describe
from tests.browser.serving import serve_runs, write_run
from tests.browser.test_render_worker import start_fake
from tests.browser.test_safe_clicks import describe as describe_pocket
from tests.browser.walking import SCRIPT, Walk, World, read_clicks
from tests.chromium import open_page, open_tabs, wait_until
from tests.commands import QUIET

SEED = 20261127
TOKEN = "walks-with-a-token-of-its-own"
SEED_VARIABLE, CLICKS_VARIABLE = "REELSMITH_WALK_SEED", "REELSMITH_WALK"
CLICKS, MANY_CLICKS = 20, 500
MODEL_FILES = tuple(f"{name}={POCKET / name}.safetensors" for name in ("dit", "vae", "t5"))


def save_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(4):
        write_png(folder / f"Bild ö {number}.png", np.full((64, 64, 3), 60 * number, np.uint8))
        (folder / f"Bild ö {number}.txt").write_text("a color\n", encoding="utf-8")


def fill_root(root: Path) -> None:
    """Write a described folder, one that is not, one that came from elsewhere, runs and results."""
    save_images(root / "my clips")
    save_images(root / "it's a dog 🐕")
    describe_pocket(root / "my clips", model_files=MODEL_FILES, max_train_steps=20)
    describe(root / "from elsewhere")
    write_png(root / "from elsewhere" / "cat.png", np.full((64, 64, 3), 200, np.uint8))
    write_run(root / "runs", "ended", 10)
    write_run(root / "runs", "stopped", 4, "")
    (root / "generated").mkdir()
    for number in range(2):
        write_png(
            root / "generated" / f"20261126-10101{number}_7.png", np.full((64, 64, 3), 90 * number, np.uint8)
        )


@contextlib.contextmanager
def serve_world(root: Path, is_real: bool) -> Iterator[World]:
    """Serve a filled root; what still runs at the end is killed."""
    fill_root(root)
    queue = open_queue(Runs([root]), read_only=False)
    worker = RenderWorker(queue) if is_real else RenderWorker(queue, start_fake)
    folders = [str(root / name) for name in ("my clips", "it's a dog 🐕", "from elsewhere", "none")]
    lines = [shlex.join(["reelsmith", "run", folder]) for folder in folders]
    upload = root.parent / "Foto ü.png"
    write_png(upload, np.full((48, 64, 3), 30, np.uint8))
    texts = [*folders, *lines, str(root / "my clips" / "Bild ö 1.png"), "convert_lora.py --help"]
    try:
        with serve_runs(
            root, queue=queue, render_worker=worker, models=root / "models", token=TOKEN
        ) as served:
            world = World(served, root, queue, worker, texts=texts, upload=upload, token=TOKEN)
            with world.watch_log():
                yield world
    finally:
        worker.close()
        queue.end_work()
        while running := [job for job in queue.jobs() if job.state == RUNNING]:
            queue.stop(running[0].id)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of pages start programs that stand in for trainings; they take seconds."""
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    send = launch.send_job

    def send_stand_in(waiting: Any, program: list[str], folder: str, code: Path) -> None:
        send(waiting, [sys.executable, str(stand_in_jobs.__file__), *program[1:]], folder, code)

    monkeypatch.setattr(launch, "send_job", send_stand_in)


def walk_pages(root: Path, count: int, seed: int, is_real: bool = False) -> None:
    """Walk so many clicks, or those of a file; fail at the first that leaves something wrong."""
    seed = int(os.environ.get(SEED_VARIABLE, seed))
    saved = os.environ.get(CLICKS_VARIABLE)
    clicks = read_clicks(Path(saved)) if saved else []
    with (
        serve_world(root, is_real) as world,
        open_tabs(f"{world.served.url}/?token={TOKEN}", 2, SCRIPT) as pages,
    ):
        for page in pages:
            page.wait_for_url("**/~*/**")  # the browser is let in, and knows the way
        walk = Walk(world, pages, seed)
        for number in range(len(clicks) or count):
            if clicks:
                walk.do(clicks[number])
            else:
                walk.step()
            if walk.faults:
                path = root.parent / "clicks.json"
                walk.save(path)
                pytest.fail(f"seed {seed}, clicks in {path}\n{walk.report()}", pytrace=False)


@pytest.mark.usefixtures("stand_ins")
def test_a_walk_meets_nothing_wrong(tmp_path: Path) -> None:
    walk_pages(tmp_path / "über uns", CLICKS, SEED)


@pytest.mark.slow
@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("seed", range(3))
def test_a_long_walk_meets_nothing_wrong(tmp_path: Path, seed: int) -> None:
    walk_pages(tmp_path / "über uns", MANY_CLICKS, seed)


@pytest.mark.usefixtures("stand_ins")
def test_the_focus_stays_near_when_a_check_begins_and_ends(tmp_path: Path) -> None:
    """Enter twice does not end what it has begun; who has the focus on a button that goes away keeps it."""
    folder = quote(str(tmp_path / "root" / "from elsewhere"))
    focused = "document.activeElement.id"
    with (
        serve_world(tmp_path / "root", is_real=False) as world,
        open_page(f"{world.served.url}/?token={TOKEN}") as page,
    ):
        page.wait_for_url("**/~*/**")  # the browser is let in, and knows the way
        page.goto(f"{world.served.url}/new?folder={folder}")
        page.get_by_role("button", name="Check", exact=True).press("Enter")
        page.get_by_role("button", name="Checking …").wait_for()
        page.keyboard.press("Enter")
        page.get_by_text("It goes on by itself").wait_for()
        assert page.evaluate(focused) == "step"
        page.get_by_text("no fault").or_(page.get_by_text("faults: a run would stop")).first.wait_for()
        assert page.evaluate(focused) == "step"

        page.get_by_text("the steps apart").click()
        page.get_by_role("button", name="Only look for faults").press("Enter")
        page.get_by_role("button", name="End it").focus()
        page.get_by_role("button", name="End it").wait_for(state="detached")
        wait_until(page, "document.activeElement.closest('#progress') !== null")
