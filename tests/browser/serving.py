"""Runs as a training writes them, and the server of the page for all runs, on a free port."""

import asyncio
import contextlib
import html
import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from browser.core.server import make_app
from browser.core.serving import make_server_config, open_socket
from browser.jobs.jobs import open_queue
from browser.runs.runs import Runs
from modules.command import quote_for_shell
from modules.installation import FRONT_SCRIPT, PREFIX
from modules.script_words import console_words
from tests.commands import ROOT
from tests.waiting import PATIENCE
from training.reports.history import History, describe_process, history_path

PAUSE = 0.01  # seconds between two looks of a server whether it is to end
PNG = b"\x89PNG not really"


def python_of(script: str) -> str:
    """How the page begins the command of a script: by the path, which may have blanks, or in the package."""
    if not PREFIX:
        return quote_for_shell(["python", str(ROOT / script)])
    name = Path(script).stem
    return "reelsmith" if script == FRONT_SCRIPT else " ".join(console_words(name))


def plain_text(page: str) -> str:
    """The text of a page as a browser shows it, with its tags."""
    return html.unescape(re.sub("<!--.*?-->", "", page))


@dataclass(frozen=True)
class Answer:
    """What the server has answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Served:
    """A server of runs. Addresses go out as they are written here, without being tidied."""

    port: int
    runs: Runs

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, address: str, method: str = "GET", body: str = "", **headers: str) -> Answer:
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(link):
            link.putrequest(method, address, skip_host="Host" in headers, skip_accept_encoding=True)
            is_chunked = "Transfer_Encoding" in headers
            length = {"Content-Length": str(len(body))} if body and not is_chunked else {}
            for name, value in {**headers, **length}.items():
                link.putheader(name.replace("_", "-"), value)
            link.endheaders(body.encode() or None, encode_chunked=is_chunked)
            answer = link.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def send(self, address: str, body: bytes, **headers: str) -> Answer:
        """POST bytes, by default from our own origin. The server may refuse them before all have arrived."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(link):
            with contextlib.suppress(ConnectionError):
                link.request("POST", address, body, {"Origin": self.url, **headers})
            answer = link.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())

    def of(self, name: str, rest: str = "") -> str:
        """The address of a run by its name."""
        (run,) = [run for run in self.runs.list_all() if run.name == name]
        return f"/run/{run.id}/{rest}"


class QuickServer(uvicorn.Server):
    """A server that ends as soon as it is told to, where uvicorn looks ten times a second.

    What is answered just then is answered to its end.
    """

    async def main_loop(self) -> None:
        await self.on_tick(0)
        while not self.should_exit:
            await asyncio.sleep(PAUSE)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        while self.server_state.connections or self.server_state.tasks:
            await asyncio.sleep(PAUSE)


@contextlib.contextmanager
def serve_runs(*folders: Path, **options: Any) -> Iterator[Served]:
    """Serve the runs below folders. options: of `make_app`."""
    runs, listener = Runs(folders), open_socket("127.0.0.1", 0)
    queue = options.pop("queue", None) or open_queue(runs, bool(options.get("read_only")))
    app = make_app(runs, queue=queue, **options)
    server = QuickServer(make_server_config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield Served(listener.getsockname()[1], runs)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listener.close()
        queue.end_work()  # a page may have begun it, and the thread would go on beside later tests


def write_run(folder: Path, name: str = "x", steps: int = 6, kind: str | None = "good", **told: Any) -> Path:
    """Write a run of 10 steps that stands at `steps`, with a sample and a saved file.

    kind: of its end; None: it has not ended. told: what it says of itself beside the usual.
    """
    history = History(history_path(folder, name), 1)
    (folder / "sample").mkdir(parents=True, exist_ok=True)
    default = {
        "model": "wan",
        "total_steps": 10,
        "changed": [["seed", "1"]],
        "unchanged": [],
        "listens": True,
    }
    history.add(0, started={**default, "process": describe_process(), **told})
    for step in range(1, steps + 1):
        history.add(step, loss=1 / step, rates={"lr/unet": 1e-4}, seconds=2.0)
    history.add(steps, samples=f"{steps:06d}", files={"0": f"{name}_1.png"}, prompts={"0": "a <b>cat"})
    history.add(steps, saved=f"{name}.safetensors")
    history.add(steps, level="warning", message="the disk is nearly full")
    if kind is not None:
        history.add(steps, ended="finished" if kind == "good" else "stopped", kind=kind)
    history.flush()
    (folder / "sample" / f"{name}_1.png").write_bytes(PNG)
    (folder / f"{name}.safetensors").write_bytes(b"0123456789")
    return history.path
