"""Make what the page Generate asks for, one result after the other, with a model that stays loaded.

Each wish is a file, so that a page, the server and a machine may be started again: what waited still waits,
and what was being made is said to have died. One process of a generation script with --interactive makes
the results (`generation/driven.py`). It ends when another model is asked for, when it has been idle for a
while, and when a job of the queue waits for the card.
"""

import atexit
import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from browser import launch
from browser.jobs import WAITING, JobQueue, refuse_link
from browser.runs import DIED, FINISHED, RUNNING, STOPPED
from browser.sessions import find_session, limit_session
from modules.atomic_write import explain_errors, write_text
from modules.errors import OptionError, OutputError
from modules.installation import DRIVEN, FROM_QUEUE, program_environment
from modules.text_files import parse_json, read_text

logger = logging.getLogger(__name__)

FOLDER = "making"  # in that of the queue
LOG = "making.log"
NAME = re.compile(r"\d{1,9}\.json")
IDLE_SECONDS = 600.0  # after which a model is freed
EVERY_SECONDS = 0.2
MOST_WAITING = 200
MOST_OF_WISH = 1 << 18  # bytes of a file
PATIENCE = 20.0  # seconds for a process to end by itself
LOADING = "loading the model"


@dataclass
class Making:
    """A wish for one result: how it is made, and what has become of it."""

    id: int
    title: str  # of the model
    session: list[str]  # command that loads the model
    command: list[str]  # command line that makes the same result
    request: dict[str, Any]  # of `generation/driven.py`
    folder: str  # in which the commands are typed
    save_path: str
    created: float
    state: str = WAITING
    reason: str = ""  # why it died
    file: str = ""  # result
    doing: str = ""  # while it is made
    done: int = 0  # steps
    steps: int = 0

    @property
    def line(self) -> str:
        return " ".join(self.request["prompt"].split())


STORED = ("id", "title", "session", "command", "request", "folder", "save_path", "created")
STORED_LATER = ("state", "reason", "file")


@dataclass
class Session:
    """A running process with a loaded model."""

    words: list[str]
    process: "subprocess.Popen[str]"
    used: float = field(default_factory=time.monotonic)  # when it made something last

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None


class Maker:
    """Keep the wishes of a server's page Generate, and make them in a thread."""

    def __init__(self, queue: JobQueue) -> None:
        self.queue = queue
        self.folder = queue.folder / FOLDER
        self.read_only = queue.read_only
        self.session: Session | None = None
        self._makings: dict[int, Making] = {}
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._is_ended = False
        self._is_cancelled = False  # the one that is being made
        self._read_all()
        atexit.register(self.close)

    def list_all(self) -> list[Making]:
        """Return all wishes, the oldest first."""
        with self._lock:
            return [self._makings[number] for number in sorted(self._makings)]

    def find(self, number: int) -> Making | None:
        with self._lock:
            return self._makings.get(number)

    @property
    def current(self) -> Making | None:
        return next((making for making in self.list_all() if making.state == RUNNING), None)

    @property
    def loaded(self) -> str:
        """Return the title of the model that is loaded; empty if none is."""
        session = self.session
        if session is None or not session.is_alive:
            return ""
        titles = [making.title for making in self.list_all() if making.session == session.words]
        return titles[-1] if titles else "a model"

    def add(self, wishes: Sequence[Callable[[int], Making]]) -> list[int]:
        """Note wishes; return their numbers. Raises OptionError if too many wait, OutputError if it fails."""
        if self.read_only:
            raise OutputError("the browser was started with --read_only")
        with self._changed:
            waiting = sum(making.state == WAITING for making in self._makings.values())
            if waiting + len(wishes) > MOST_WAITING:
                raise OptionError(f"{waiting} are waiting: {MOST_WAITING} are the most")
            numbers = []
            for make in wishes:
                number = max(self._makings, default=0) + 1
                making = make(number)
                self._write(making)
                self._makings[number] = making
                numbers.append(number)
            self._begin()
            self._changed.notify_all()
        return numbers

    def cancel(self, number: int) -> None:
        """Take a waiting wish back, or stop the one that is being made. Raises OptionError for another."""
        with self._lock:
            making = self._makings.get(number)
            if making is None or making.state not in (WAITING, RUNNING):
                raise OptionError(f"{number} neither waits nor is made (any more)")
            if making.state == WAITING:
                making.state = STOPPED
                self._write(making)
            elif self.session is not None:
                self._is_cancelled = True
                if making.doing == LOADING or os.name == "nt":
                    self.session.process.kill()
                else:
                    self.session.process.send_signal(signal.SIGINT)

    def again(self, number: int) -> None:
        """Let a wish that was stopped or died wait again. Raises OptionError for another."""
        with self._changed:
            making = self._makings.get(number)
            if making is None or making.state not in (STOPPED, DIED):
                raise OptionError(f"{number} was neither stopped, nor has it died")
            making.state = WAITING
            making.reason = ""
            self._write(making)
            self._begin()
            self._changed.notify_all()

    def remove(self, number: int) -> None:
        """Forget a wish that has ended; its result stays."""
        with self._lock:
            making = self._makings.get(number)
            if making is None or making.state in (WAITING, RUNNING):
                raise OptionError(f"{number} has not ended")
            del self._makings[number]
            self._path(number).unlink(missing_ok=True)

    def free(self) -> None:
        """End the process with the model, unless it makes something."""
        with self._lock:
            if self.current is None and self.session is not None:
                self._end_session()

    def lets_queue_begin(self) -> bool:
        """Return whether a job of the queue may begin now: nothing is made, and no model is loaded."""
        with self._lock:
            if self.current is not None:
                return False
            if self.session is not None:
                self._end_session()
            return True

    def close(self) -> None:
        """End the thread and the process; what waits stays on disk."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()
            if self.session is not None:
                self._end_session()

    # --- the thread

    def _begin(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while not self._is_ended:
            making = self._next()
            if making is None:
                self._free_if_idle()
                with self._changed:
                    self._changed.wait(EVERY_SECONDS)
                continue
            try:
                self._make(making)
            except (OSError, OutputError, OptionError, ValueError) as error:
                logger.debug("%s", making.command, exc_info=error)
                self._note(making, DIED, reason=str(error))

    def _next(self) -> Making | None:
        """Return the wish to make now, marked as running; None while a job of the queue has the card."""
        with self._lock:
            waiting = [making for making in self.list_all() if making.state == WAITING]
            if not waiting or self._is_card_taken():
                return None
            making = waiting[0]
            making.state = RUNNING
            making.doing = LOADING
            making.done = 0
            making.steps = 0
            self._is_cancelled = False
            self._write(making)
            return making

    def _is_card_taken(self) -> bool:
        """Return whether a job of the queue runs."""
        try:
            return any(job.state == RUNNING for job in self.queue.jobs())
        except OutputError:
            return False

    def _free_if_idle(self) -> None:
        with self._lock:
            session = self.session
            is_idle = session is not None and time.monotonic() - session.used > IDLE_SECONDS
            if session is not None and (is_idle or not session.is_alive):
                self._end_session()

    def _make(self, making: Making) -> None:
        """Make one wish, and note how it ends."""
        session = self._open_session(making)
        self._send(session, making)
        while True:
            answer = self._read_answer(session)
            if answer is None:
                state = STOPPED if self._is_cancelled else DIED
                self._note(making, state, reason="" if self._is_cancelled else self.last_words())
                with self._lock:
                    self._end_session()
                return
            event = answer.get("event")
            if event == "begun":
                making.steps = int(answer["steps"])
                making.doing = "making"
            elif event == "step":
                making.done = int(answer["done"])
            elif event == "made":
                making.file = str(answer["file"])
            elif event == "failed":
                self._note(making, DIED, reason=str(answer["reason"]))
            elif event == "cancelled":
                self._note(making, STOPPED)
            elif event == "ready":
                break
        session.used = time.monotonic()
        if making.state == RUNNING:
            is_made = bool(making.file)
            self._note(making, FINISHED if is_made else DIED, reason="" if is_made else self.last_words())

    def _open_session(self, making: Making) -> Session:
        """Return a process with the model of a wish, that waits for a request; loads it if need be."""
        with self._lock:
            session = self.session
            if session is not None and session.is_alive and session.words == making.session:
                return session
            if session is not None:
                self._end_session()
            session = self.session = self._start_session(making)
        answer = self._read_answer(session)
        if answer is None or answer.get("event") != "ready":
            if self._is_cancelled:
                self._note(making, STOPPED)
            raise OptionError(self.last_words() or "the process has ended without a word")
        return session

    def _start_session(self, making: Making) -> Session:
        folder = Path(making.folder)
        _, program = find_session(making.session, folder)
        limits = limit_session(Path(making.save_path), self.folder, self.queue.folder.parent)
        self.folder.mkdir(parents=True, exist_ok=True)
        refuse_link(self.folder)
        (self.folder / LOG).unlink(missing_ok=True)  # it may be a link
        with (self.folder / LOG).open("wb") as log:
            process = subprocess.Popen(
                program,
                cwd=folder,
                env=program_environment(**{FROM_QUEUE: "1", DRIVEN: "1", "PYTHONUTF8": "1"}, **limits),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        return Session(making.session, process)

    def _send(self, session: Session, making: Making) -> None:
        assert session.process.stdin is not None
        session.process.stdin.write(json.dumps(making.request) + "\n")
        session.process.stdin.flush()

    def _read_answer(self, session: Session) -> dict[str, Any] | None:
        """Return the next answer of a process; None if it has ended."""
        assert session.process.stdout is not None
        for line in session.process.stdout:
            with contextlib.suppress(ValueError):  # somebody else's print
                answer = parse_json(line)
                if isinstance(answer, dict):
                    return answer
        return None

    def _end_session(self) -> None:
        """End the process: by the end of its input, else by force. To be called with the lock."""
        session = self.session
        self.session = None
        if session is None:
            return
        with contextlib.suppress(OSError):
            assert session.process.stdin is not None
            session.process.stdin.close()
        try:
            session.process.wait(PATIENCE if session.is_alive else 0)
        except subprocess.TimeoutExpired:
            launch.kill_processes(session.process.pid)

    def last_words(self) -> str:
        """Return the last line that the process has logged."""
        with contextlib.suppress(OSError, ValueError):
            lines = read_text(self.folder / LOG).replace("\r", "\n").strip().splitlines()
            return lines[-1] if lines else ""
        return ""

    # --- files

    def _note(self, making: Making, state: str, reason: str = "") -> None:
        with self._lock:
            if making.state != RUNNING:
                return
            making.state = state
            making.reason = reason
            making.doing = ""
            self._write(making)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.json"

    def _write(self, making: Making) -> None:
        with explain_errors(self._path(making.id)):
            for folder in (self.folder.parent, self.folder):
                refuse_link(folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            row = {name: getattr(making, name) for name in (*STORED, *STORED_LATER)}
            write_text(self._path(making.id), json.dumps(row, indent=1))

    def _read_all(self) -> None:
        """Read the wishes of earlier servers. One that was being made has died with its server."""
        with contextlib.suppress(OSError):
            for path in sorted(self.folder.iterdir()):
                if NAME.fullmatch(path.name):
                    self._read(path)
        if any(making.state == WAITING for making in self._makings.values()) and not self.read_only:
            self._begin()

    def _read(self, path: Path) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            row = parse_json(read_text(path, MOST_OF_WISH))
            making = Making(**{name: row[name] for name in (*STORED, *STORED_LATER)})
            if making.state == RUNNING:
                making.state = DIED
                making.reason = "the page's server was ended meanwhile"
            self._makings[making.id] = making
