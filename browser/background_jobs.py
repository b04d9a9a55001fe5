"""Run commands of ours for a page, next to the queue: describing and checking a folder, a try of captions.

They need no graphics card for long, so that they do not wait for a training. Each has a name, such as
`check-0123456789abcdef`, and is kept in files: another server, or this one started again, finds it.
"""

import contextlib
import json
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from browser import launch
from browser.jobs import KINDS, LOGS, Job, JobQueue, as_line, reject_link
from browser.names import short_digest
from browser.runs import RUNNING, is_living
from modules.atomic_write import append_text, check_space, explain_errors, write_text
from modules.errors import OptionError, OutputError
from modules.file_locks import only_one
from modules.installation import PROGRESS
from modules.pages.language import say
from modules.run_limits import limit_variables
from modules.text_files import parse_json, read_text, real_path
from training.reports.history import describe_process

NAME = re.compile(r"[a-z]+-[0-9a-f]{16}")
STORED = ("line", "folder", "process", "stops")
LOOKED_EVERY = 0.1  # seconds
MAX_OF_RECORD = 1 << 17  # bytes


def name_background_job(kind: str, folder: Path) -> str:
    """Return the name of the background job of a kind in a folder. There is one of each."""
    return f"{kind}-{short_digest(real_path(folder))}"


def has_changed_since(job: Job, folder: Path, names: Sequence[str]) -> bool:
    """Return whether one of some files of a folder has changed since a background job was started."""
    try:
        began = job.log.with_suffix(".json").stat().st_mtime_ns
    except OSError:
        return True
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            if (folder / name).stat().st_mtime_ns > began:
                return True
    return False


class BackgroundJobs:
    """Start commands in processes of their own, and read their state and what they have printed."""

    def __init__(self, queue: JobQueue) -> None:
        """queue: the files lie in its folder, next to the logs of its jobs."""
        self.folder = queue.folder / LOGS
        self.read_only = queue.read_only
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self,
        name: str,
        words: Sequence[str],
        folder: Path,
        *,
        within: Path | None = None,
        typed: Sequence[str] = (),
    ) -> None:
        """Start a command of ours, in place of what the background job of this name was before.

        folder: the working folder. within: a described folder, which may be somebody else's: the command has
        the limits of its `run`. None for commands that are made of no words of a folder's files. typed: names
        of options that may send something despite the limits, because somebody has typed their values.

        Raises OptionError if it is not a command of ours or the background job is still running, OutputError
        if its files cannot be written.
        """
        if self.read_only:
            raise OutputError(say("the browser was started with --read_only"))
        _, program = launch.find_program(words, folder)
        with explain_errors(self.folder / name):
            reject_link(self.folder.parent)
            self.folder.mkdir(parents=True, exist_ok=True)
            reject_link(self.folder)
            with only_one(self.folder / ".lock"):
                earlier = self.find(name)
                if earlier is not None and earlier.state == RUNNING:
                    raise OptionError(say("it is running already: wait until it has ended, or stop it"))
                check_space(self._record(name), MAX_OF_RECORD)  # before the earlier one is gone
                log = self._log(name)
                progress = log.with_suffix(".progress")  # of loops, for pages that show it
                for path in (log, log.with_suffix(".code"), progress):
                    path.unlink(missing_ok=True)
                variables = {PROGRESS: str(progress)} if within is None else limit_variables([within], typed)
                child = launch.prepare_process(log, **variables)
                self._children[name] = child
                record = {
                    "line": as_line(words),
                    "folder": str(real_path(folder)),
                    "process": describe_process(child.pid),
                    "stops": 0,
                }
                write_text(self._record(name), json.dumps(record))
        launch.send_job(child, program, str(folder), log.with_suffix(".code"))

    def find(self, name: str) -> Job | None:
        """Return a background job with its present state; None if there is none, or its record is damaged."""
        child = self._children.get(name)
        if child is not None and child.poll() is not None:
            del self._children[name]
        try:
            record = parse_json(read_text(self._record(name), MAX_OF_RECORD))
            for key in STORED:
                if not isinstance(record[key], KINDS[key]):
                    return None
            is_ours = as_line(shlex.split(record["line"])) == record["line"]
            if not is_ours or record["process"] is None:
                return None
        except (OSError, ValueError, TypeError, KeyError, OptionError):
            return None
        return Job(id=0, log=self._log(name), **{key: record[key] for key in STORED})

    def wait(self, name: str, seconds: float) -> Job | None:
        """Return a background job when it has ended, or after so many seconds."""
        end = time.monotonic() + seconds
        while True:
            job = self.find(name)
            if job is None or job.state != RUNNING or time.monotonic() > end:
                return job
            time.sleep(LOOKED_EVERY)

    def stop(self, name: str) -> None:
        """End a running background job at once, with all processes that it has started.

        Raises OutputError if it runs on another machine.
        """
        job = self.find(name)
        if job is None or job.state != RUNNING or not job.process:
            return
        is_alive = is_living(job.process)
        if is_alive is None:  # its number is that of another process here
            raise OutputError(say("it runs on another machine. Stop it from there"))
        if not is_alive:  # it has just ended
            return
        with explain_errors(self._record(name)):
            append_text(job.log, "It was stopped.\n")
            record = {key: getattr(job, key) for key in STORED} | {"stops": 1}
            write_text(self._record(name), json.dumps(record))
        launch.kill_processes(job.process["number"])

    def forget(self, name: str) -> None:
        """Remove what is known of a background job that has ended."""
        job = self.find(name)
        if job is not None and job.state != RUNNING and not self.read_only:
            with explain_errors(self._record(name)):
                self._record(name).unlink(missing_ok=True)

    def _log(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise OptionError(f"{name!r} names no background job")
        return self.folder / f"{name}.log"

    def _record(self, name: str) -> Path:
        return self._log(name).with_suffix(".json")
