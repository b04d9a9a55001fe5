"""From a described folder to results by clicks alone, with real programs; the server ends and comes back."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `browser` is not installed")

from tests.browser.test_new_page import FEW, PARTS
from tests.browser.test_safe_clicks import describe
from tests.browser.test_walk import save_images
from tests.chromium import open_page, wait_until
from tests.commands import QUIET, ROOT

SECONDS = 1000  # milliseconds
REJECTED = "ERR_CONNECTION_REFUSED"


class RestartedServer:
    """The server of the page as its command starts it, each time on the same port."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                ROOT / "tools" / "run_browser.py",
                self.root,
                "--port",
                str(self.port),
                "--no_token",
            ],
            cwd=self.root,
            env={**os.environ, **QUIET},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        assert str(self.port) in self.process.stdout.readline()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RestartedServer]:
    root = tmp_path / "über uns"
    save_images(root / "my clips")
    describe(
        root / "my clips",
        model_files=tuple(f"{name}={path}" for name, path in PARTS.items()),
        max_train_steps=12,
    )
    (root / "my clips" / "prompts.txt").write_text(FEW, encoding="utf-8")
    server = RestartedServer(root)
    yield server
    server.end()


def wait_for_text(page: Any, selector: str, text: str, seconds: int = 240) -> None:
    page.locator(selector, has_text=text).first.wait_for(timeout=seconds * SECONDS)


def restart(page: Any, server: RestartedServer) -> None:
    """End the server and start it again; the open page says so, and goes on by itself."""
    server.end()
    wait_for_text(page, "#machine", "does not answer")
    server.start()
    wait_for_text(page, "#machine", " free")
    assert {error for error in page.problems if "error: " in error and "fetch" not in error} == set()
    page.problems.clear()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a killed server there ends the jobs of its console")
def test_a_run_generate_and_the_queue_outlast_their_server(server: RestartedServer) -> None:
    output = server.root / "my clips" / "output"
    with open_page(server.url) as page:
        page.locator("#runs").get_by_text("my_clips").first.click()
        page.get_by_role("button", name="Start", exact=True).click()
        wait_for_text(page, "main .status", "caching")
        restart(page, server)
        wait_for_text(page, "main .status", "finished")
        run = page.url
        assert (output / "my_clips.safetensors").exists()

        page.get_by_role("button", name="Generate with it").click()
        page.get_by_label("Prompt", exact=True).fill("a red square")
        page.get_by_text("show the command").click()
        wait_for_text(page, "#command", "--prompt 'a red square'")
        assert "--lora_weight output/my_clips.safetensors" in page.locator("#command").inner_text()
        page.get_by_role("button", name="Make", exact=True).click()
        page.locator("#shelf .plate").first.wait_for(timeout=240 * SECONDS)
        page.locator("#shelf .more summary").first.click()
        page.get_by_role("button", name="start from this").click()
        wait_for_text(page, "#shelf .answer", "stands in the form: Redraw.")
        assert page.evaluate("document.activeElement.name") == "redraw"
        page.get_by_role("button", name="Make", exact=True).click()  # a changed one
        wait_until(page, "document.querySelectorAll('#shelf .plate').length === 2")
        assert page.problems == []

        for _ in range(2):
            page.goto(run)
            page.get_by_role("button", name="Put it into the queue").first.click()
            page.get_by_role("link", name="It is in the queue").wait_for()
        page.goto(f"{server.url}/queue")
        page.locator("li.job.running, li.job.waiting").first.wait_for()
        restart(page, server)
        wait_until_over(page, 3)
        assert page.locator("li.job.finished").count() == 3


def wait_until_over(page: Any, count: int) -> None:
    for _ in range(4):  # of a minute or so each
        with contextlib.suppress(AssertionError):
            wait_until(
                page, f"document.querySelectorAll('li.job:not(.waiting, .running)').length === {count}"
            )
            return
    raise AssertionError(page.locator("#jobs").inner_text())
