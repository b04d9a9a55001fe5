"""Keep the render jobs of the Generate page in files, one for each result, shared by all servers of a folder.

A render job records how to generate a result, and its progress. The files are the only state: the page,
the server and the machine may restart, and two servers may serve one folder.
"""

import contextlib
import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from browser.jobs.jobs import WAITING, reject_link
from browser.runs.runs import DIED, FINISHED, RUNNING, STOPPED, is_process_alive
from modules.atomic_write import explain_errors, write_text
from modules.errors import OptionError, OutputError
from modules.file_locks import only_one
from modules.pages.language import refusal, say
from modules.text_files import parse_json, read_text

NAME = re.compile(r"(\d{1,9})\.json")
CANCEL_FILE = "{}.cancel"  # name of the file that asks the server working on a render job to stop
MAX_RENDER_JOB_BYTES = 2 << 20  # bytes of a job's file, which contains the prompt three times
MAX_WAITING = 200
MAX_ENDED = 300  # older ended jobs are removed; their results stay
LOADING = say("loading the model")
MAKING = say("making it")
# activities of a running job: those set here, and those that a generation reports (generation/making.py)
PHASES = (
    *(LOADING, MAKING),
    *(
        say("reading the prompt"),
        say("reading the images"),
        say("loading the transformer"),
        say("decoding"),
    ),
)
CANCELLING = say(
    "canceling; press again to end the process; the model is then loaded again for the next result"
)
ENDED_MEANWHILE = say("the page's server was ended in the meantime")


@dataclass
class RenderJob:
    """A request to generate one result, with its state and progress."""

    id: int  # 0: not stored yet
    title: str  # title of the model
    session: list[str]  # command of the process that loads the model and then reads requests
    command: list[str]  # command that generates the same result without such a process
    request: dict[str, Any]  # request as `generation/json_requests.py` reads it
    folder: str  # working folder of the commands
    save_path: str
    created: float
    form: dict[str, list[str]] = field(default_factory=dict)  # fields of the page that requested it
    state: str = WAITING
    reason: str = ""  # why it failed
    file: str = ""  # result
    process: dict[str, Any] | None = None  # process of the server that works on it
    doing: str = ""  # current activity
    done: int = 0  # finished steps
    steps: int = 0
    last_lines: str = ""  # last lines of a process that died
    warnings: str = ""  # warnings that the script printed, one per line

    @property
    def line(self) -> str:
        """Prompt in one line."""
        return " ".join(str(self.request.get("prompt", "")).split())

    @property
    def shown_title(self) -> str:
        """Title of the model, as translatable text."""
        return say(self.title)

    @property
    def shown_doing(self) -> str:
        """`doing` for a page: this program's messages are translated, text from files is not."""
        return next((words for words in (*PHASES, CANCELLING) if words == self.doing), self.doing)

    @property
    def seed(self) -> str:
        """Seed as text; "" if the request has none."""
        options = self.request.get("options")
        return str(options.get("seed", "")) if isinstance(options, dict) else ""


FIELD_TYPES: dict[str, Any] = {
    "id": int,
    "title": str,
    "session": list,
    "command": list,
    "request": dict,
    "folder": str,
    "save_path": str,
    "created": int | float,
    "form": dict,
    "state": str,
    "reason": str,
    "file": str,
    "process": dict | None,
    "doing": str,
    "done": int,
    "steps": int,
    "last_lines": str,
    "warnings": str,
}
NEW_FIELD_DEFAULTS: dict[str, Any] = {"warnings": ""}  # fields that files of earlier versions lack
STATES = (WAITING, RUNNING, FINISHED, STOPPED, DIED)


class RenderQueue:
    """Reads and writes the render jobs stored in a folder. A lock on the folder protects each change."""

    def __init__(self, folder: Path) -> None:
        """Use the files in `folder`, which is created when the first render job is added."""
        self.folder = folder
        self._lock = threading.RLock()
        # job number -> modification mark of the file, and its content
        self._cached_jobs: dict[int, tuple[tuple[int, int, int], RenderJob]] = {}

    def list_all(self) -> list[RenderJob]:
        """Return all render jobs, the oldest first. A job counts as failed if its server has ended."""
        with self._lock:
            jobs = {}
            with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
                for entry in entries:
                    match = NAME.fullmatch(entry.name)
                    number = 0 if match is None else int(match[1])
                    job = None if match is None else self._read_job(number, Path(entry.path))
                    if job is not None:
                        jobs[number] = job
            for removed_number in self._cached_jobs.keys() - jobs.keys():
                del self._cached_jobs[removed_number]
            return [_fail_if_server_has_ended(jobs[number]) for number in sorted(jobs)]

    def find(self, number: int) -> RenderJob | None:
        """Return a render job by its number; None if it does not exist."""
        with self._lock:
            job = self._read_job(number, self._path(number))
        return None if job is None else _fail_if_server_has_ended(job)

    def add(self, new_jobs: Sequence[RenderJob]) -> list[int]:
        """Store new jobs of the Generate page, and return their numbers.

        Raises OptionError if too many are waiting, OutputError if they cannot be written.
        """
        with self._change():
            jobs = self.list_all()
            num_waiting = sum(job.state == WAITING for job in jobs)
            if num_waiting + len(new_jobs) > MAX_WAITING:
                raise refusal(
                    "%(waiting)s are waiting: at most %(most_waiting)s are accepted",
                    waiting=num_waiting,
                    most_waiting=MAX_WAITING,
                )
            first_number = max((job.id for job in jobs), default=0) + 1
            numbers: list[int] = []
            try:
                for number, new_job in enumerate(new_jobs, first_number):
                    self._write(replace(new_job, id=number))
                    numbers.append(number)
            except (OptionError, OutputError):  # store all jobs or none
                for number in numbers:
                    self._path(number).unlink(missing_ok=True)
                raise
            ended = [job.id for job in jobs if job.state not in (WAITING, RUNNING)]
            for old_number in ended[:-MAX_ENDED]:
                self._path(old_number).unlink(missing_ok=True)
        return numbers

    def change(self, number: int, states: Sequence[str], **values: Any) -> RenderJob:
        """Set values of a render job that is in one of the given states, and return it.

        Raises OptionError if it is in another state or does not exist, OutputError if it cannot be written.
        """
        with self._change():
            job = self.find(number)
            if job is None or job.state not in states:
                raise OptionError(f"there is no result {number} that is {' or '.join(states)}")
            for name, value in values.items():
                setattr(job, name, value)
            self._write(job)
            return job

    def remove(self, number: int) -> None:
        """Remove a render job from the list; its result stays. Raises OptionError if it has not ended."""
        with self._change():
            job = self.find(number)
            if job is None or job.state in (WAITING, RUNNING):
                raise refusal("there is no finished result %(number)s", number=number)
            self._path(number).unlink(missing_ok=True)

    def ask_to_cancel(self, number: int) -> None:
        """Ask the server that works on a render job, which may be another server, to stop it."""
        with explain_errors(self._cancel_path(number)):
            self._cancel_path(number).touch()

    def pop_cancel_request(self, number: int) -> bool:
        """Return whether a stop of a render job was requested, and clear the request."""
        try:
            self._cancel_path(number).unlink()
        except OSError:
            return False
        return True

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        with self._lock, explain_errors(self.folder / "1.json"):
            for folder in (self.folder.parent, self.folder):
                reject_link(folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            with only_one(self.folder / ".lock"):
                yield

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.json"

    def _cancel_path(self, number: int) -> Path:
        return self.folder / CANCEL_FILE.format(number)

    def _write(self, job: RenderJob) -> None:
        text = json.dumps({name: getattr(job, name) for name in FIELD_TYPES})
        if len(text) > MAX_RENDER_JOB_BYTES:  # `_read_entry` would reject it
            raise OptionError(f"a request of {len(text):,} bytes: {MAX_RENDER_JOB_BYTES:,} are the most")
        write_text(self._path(job.id), text)

    def _read_job(self, number: int, path: Path) -> RenderJob | None:
        """Return the render job in a file; None if the file is damaged or missing."""
        # Each call returns a new object, so that the caller's changes do not affect the cache.
        try:
            status = path.stat()
            version = (status.st_mtime_ns, status.st_size, status.st_ino)
            cached_version, cached_job = self._cached_jobs.get(number, (None, None))
            if cached_job is not None and cached_version == version:
                return replace(cached_job)
            row = {**NEW_FIELD_DEFAULTS, **parse_json(read_text(path, MAX_RENDER_JOB_BYTES))}
            for name, field_type in FIELD_TYPES.items():
                if not isinstance(row[name], field_type):
                    raise TypeError(f"{name} is {row[name]!r}")
            job = RenderJob(**{name: row[name] for name in FIELD_TYPES})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        if job.id != number or job.state not in STATES:
            return None
        self._cached_jobs[number] = (version, job)
        return replace(job)


def _fail_if_server_has_ended(job: RenderJob) -> RenderJob:
    """Return a render job, marked as failed if the server that worked on it has ended."""
    is_lost = not job.process or is_process_alive(job.process) is False
    if job.state == RUNNING and is_lost:
        job.state = DIED
        job.reason = ENDED_MEANWHILE
    return job
