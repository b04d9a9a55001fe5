"""Processes that run a script and start with its libraries loaded: loading takes most of a start."""

import atexit
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from modules.installation import PREFIX

SERVER = Path(__file__).resolve().parent / "warm_server.py"
# other systems cannot copy a process safely, or not at all; the server loads modules of a checkout
CAN_BE_WARM = sys.platform == "linux" and not PREFIX
PAUSE = 0.02  # seconds between two looks


class WarmServer:
    """The process that others are copied from; it ends with this one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
        )
        self.pid: int = self._process.pid
        self._lock = threading.Lock()  # a request and its answer belong together, whichever thread asks
        atexit.register(self._end)

    def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request, return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


SERVERS: list[WarmServer] = []  # that run, of all tests of this process


@cache
def _server(environment: tuple[tuple[str, str], ...]) -> WarmServer:
    server = WarmServer({**os.environ, **dict(environment)})
    SERVERS.append(server)
    return server


class WarmProcess:
    """A script that runs; used like subprocess.Popen."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path | None,
        environment: Mapping[str, str],
        out: Path,
        err: Path,
        place: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Start it. command: a script and its arguments. environment: added to this process's.

        place: added too; libraries are loaded without it.
        """
        self._asked = _server(tuple(sorted(environment.items()))).ask
        request = {
            "run": list(command),
            "folder": str(folder or Path.cwd()),
            "environment": {**os.environ, **environment, **place},
            "out": str(out),
            "err": str(err),
        }
        self.pid: int = self._asked(request)["pid"]
        self.returncode: int | None = None
        self._command, self._said = [sys.executable, *command], (out, err)

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        if self.returncode is None:
            self.returncode = self._asked({"poll": self.pid})["code"]
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code when it ends. Raises subprocess.TimeoutExpired if it does not in time."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            code = self.poll()
            if code is not None:
                return code
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            time.sleep(PAUSE)

    def done(self) -> subprocess.CompletedProcess[str]:
        """Return how it ended and what it said, once it has."""
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in self._said]
        return subprocess.CompletedProcess(self._command, self.returncode or 0, *texts)

    def send_signal(self, number: int) -> None:
        """Send a signal unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(9)
