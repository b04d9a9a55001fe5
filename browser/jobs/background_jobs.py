"""Run this project's commands for a page, outside the queue: `new`, `run --check`, trial captions.

These commands need a GPU only briefly, so they do not wait for a training run. Each has a name such as
`check-0123456789abcdef`. Its record and output are files, so another server, or this one after a restart,
finds them.
"""

import contextlib
import json
import re
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from browser.core.short_names import short_digest
from browser.jobs import launch
from browser.jobs.jobs import LOGS, STORED_TYPES, Job, JobQueue, as_line, reject_link
from browser.runs.runs import RUNNING, is_process_alive
from modules.atomic_write import append_text, check_space, explain_errors, write_text
from modules.errors import OptionError, OutputError
from modules.file_locks import only_one
from modules.installation import PROGRESS, TELLS_KINDS
from modules.pages.language import refusal, say
from modules.run_limits import limit_variables
from modules.text_files import parse_json, read_text, real_path
from training.reports.history import describe_process

NAME = re.compile(r"[a-z]+-[0-9a-f]{16}")
STORED_FIELDS = ("line", "folder", "process", "stops")
LOOKED_EVERY = 0.1  # seconds
MAX_RECORD_BYTES = 1 << 17  # bytes


def name_background_job(kind: str, folder: Path) -> str:
    """Return the name of the background job of a kind in a folder.

    A folder has at most one job of each kind.
    """
    return f"{kind}-{short_digest(real_path(folder))}"


def has_changed_since(job: Job, folder: Path, names: Sequence[str]) -> bool:
    """Return whether any of the files `names` in a folder has changed since a background job was started."""
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
    """Starts commands outside the queue as background processes, and reads their state and output."""

    def __init__(self, queue: JobQueue) -> None:
        """Store the files of background jobs in the folder of `queue`, next to the logs of its jobs."""
        self.folder = queue.folder / LOGS
        self.read_only = queue.read_only
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self,
        name: str,
        argv: Sequence[str],
        folder: Path,
        *,
        within: Path | None = None,
        typed: Sequence[str] = (),
    ) -> None:
        """Start a command as the job `name`, which replaces the earlier job with this name.

        Args:
            name: Name of the job, as `name_background_job` returns it.
            within: Folder of the run.toml that the command uses. Its files may come from somebody else, so
                the command gets the limits that `run` sets. None if no argument comes from a folder's
                files.
            typed: Names of options that may send data despite the limits, because the user typed their
                values.

        Raises:
            OptionError: If the command is not one of this project's, or if the job is still running.
            OutputError: If the job's files cannot be written.
        """
        if self.read_only:
            raise OutputError(say("the browser was started with --read_only"))
        _, program = launch.find_program(argv, folder)
        with explain_errors(self.folder / name):
            reject_link(self.folder.parent)
            self.folder.mkdir(parents=True, exist_ok=True)
            reject_link(self.folder)
            with only_one(self.folder / ".lock"):
                earlier_job = self.find(name)
                if earlier_job is not None and earlier_job.state == RUNNING:
                    raise refusal("it is already running: wait until it has ended, or stop it")
                check_space(self._record(name), MAX_RECORD_BYTES)  # before the earlier files are removed
                # a process that waits for its command, and may write only below the folder `within`
                log = self._log(name)
                progress = log.with_suffix(".progress")  # progress of loops, which pages show
                for path in (log, log.with_suffix(".code"), progress):
                    path.unlink(missing_ok=True)
                # a limited process may not write the progress file, which is outside `within`
                variables = {PROGRESS: str(progress)} if within is None else limit_variables([within], typed)
                # TELLS_KINDS: `new` then marks each printed line with its kind, which the page reads
                process = launch.prepare_process(log, **variables, **{TELLS_KINDS: "1"})
                self._children[name] = process
                record = {
                    "line": as_line(argv),
                    "folder": str(real_path(folder)),
                    "process": describe_process(process.pid),
                    "stops": 0,
                }
                write_text(self._record(name), json.dumps(record))
        # only now that the process id is stored: if the server is killed earlier, the job does not start
        launch.send_job(process, program, str(folder), self._log(name).with_suffix(".code"))

    def find(self, name: str) -> Job | None:
        """Return a background job with its current state; None if it does not exist or is damaged."""
        child = self._children.get(name)
        if child is not None and child.poll() is not None:  # reap a process that has ended
            del self._children[name]
        try:
            record = parse_json(read_text(self._record(name), MAX_RECORD_BYTES))
            for key in STORED_FIELDS:
                if not isinstance(record[key], STORED_TYPES[key]):
                    return None
            # `start` writes every line in this format; another program wrote a line in another format
            is_canonical = as_line(shlex.split(record["line"])) == record["line"]
            if not is_canonical or record["process"] is None:
                return None
        except (OSError, ValueError, TypeError, KeyError, OptionError):
            return None
        return Job(id=0, log=self._log(name), **{key: record[key] for key in STORED_FIELDS})

    def wait(self, name: str, seconds: float) -> Job | None:
        """Wait until a background job has ended, for at most `seconds`, and return it."""
        end = time.monotonic() + seconds
        while True:
            job = self.find(name)
            if job is None or job.state != RUNNING or time.monotonic() > end:
                return job
            time.sleep(LOOKED_EVERY)

    def stop(self, name: str) -> None:
        """End a running background job immediately, with all processes that it has started.

        Nothing happens if no job with this name is running.

        Raises:
            OutputError: If the job runs on another machine.
        """
        job = self.find(name)
        if job is None or job.state != RUNNING or not job.process:
            return
        is_alive = is_process_alive(job.process)
        if is_alive is None:  # the number belongs to a process on another machine
            raise OutputError(say("it runs on another machine. Stop it from there"))
        if not is_alive:  # it has just ended
            return
        with explain_errors(self._record(name)):
            append_text(job.log, "It was stopped.\n")
            record = {key: getattr(job, key) for key in STORED_FIELDS} | {"stops": 1}
            write_text(self._record(name), json.dumps(record))
        launch.kill_processes(job.process["number"])

    def forget(self, name: str) -> None:
        """Remove the record and the output of a background job that has ended."""
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
