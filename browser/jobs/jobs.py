"""Store a queue of command lines in a folder, and run them one after another."""

import contextlib
import json
import logging
import os
import re
import shlex
import subprocess
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from browser.core.short_names import short_digest
from browser.jobs import launch
from browser.jobs.earlier_jobs import EarlierJob
from browser.jobs.known_queues import KnownQueue, recall_queue, remember_queue
from browser.jobs.printed_lines import translate_log_line
from browser.runs.runs import (
    DIED,
    FINISHED,
    REMOTE_RUN_TIMEOUT_SECONDS,
    RUNNING,
    STOPPED,
    Runs,
    is_process_alive,
)
from modules.atomic_write import append_text, explain_errors, write_text
from modules.control_codes import escape_control_codes, shorten_lines
from modules.errors import OptionError, OutputError, UserError
from modules.file_locks import only_one
from modules.pages.language import join, refusal, say, say_count
from modules.run_limits import QUEUE_FOLDER, limit_variables
from modules.text_files import parse_json, read_text, real_path
from training.reports.history import describe_process

logger = logging.getLogger(__name__)

FOLDER = QUEUE_FOLDER
QUEUE = "queue.txt"
STATE = "jobs.json"
LOGS = "logs"
RENDER_FOLDER = "making"  # folder of the Generate page
WAITING = "waiting"
ENDED = (FINISHED, STOPPED, DIED)
MAX_EXIT_CODE_BYTES = 100  # maximum bytes read from the exit code file
LAST_LINES = 20
EVERY_SECONDS = 0.5
# a line of the text file, with its continuation lines
ENTRY = re.compile(r"[^\n]*\n?" if os.name == "nt" else r"(?:(?!\s*#)[^\n]*\\\n)*[^\n]*\n?")
MAX_TAIL_BYTES = 64 << 10  # bytes at the end of a log that are searched for its last lines
MAX_JOBS = 10**9
MAX_BORN = 1e11  # seconds since 1970
MAX_LINES = 1000  # lines of the text file
MAX_JOB_LENGTH = 100_000  # characters of a job
STORED_TYPES: dict[str, Any] = {
    "line": str,
    "folder": str,
    "process": dict | None,
    "worker": dict | None,
    "stops": int,
    "within": str,
    "typed": str,
}
STORED_FIELDS = ("id", "line", "folder", "process", "stops", "within", "typed")  # fields stored in STATE


class UnknownJobsError(OutputError):
    """Raised if a queue contains waiting jobs that this user has neither typed nor started."""


@dataclass
class Job:
    """A command line in the queue, and the state of its process when it was last read."""

    id: int
    line: str  # as in the text file
    folder: str  # working folder
    log: Path
    process: dict[str, Any] | None = None  # process of the job; None: not started
    stops: int = 0  # number of stop requests
    within: str = ""  # the only folder to which the job may write; "": no limits
    typed: str = ""  # typed options that may send data despite limits
    entry_index: int = -1  # index among the entries of the text file; -1: its line has been removed
    code: int | None = field(init=False)
    state: str = field(init=False)  # WAITING, or as the state of a run

    def __post_init__(self) -> None:
        self.code = self._read_code()
        if self.process is None:
            self.state = WAITING
        elif self.code is None and self._is_running(self.process):
            self.state = RUNNING
        else:
            self.code = self._read_code()  # it may have ended since the first check
            self.state = self._name_ending()

    def _is_running(self, process: dict[str, Any]) -> bool:
        """Return whether the job's process runs; on another machine, whether its log is still growing."""
        is_alive = is_process_alive(process)
        if is_alive is not None:
            return is_alive
        # the process belongs to another machine, or was started before the last boot
        with contextlib.suppress(OSError):
            return time.time() - self.log.stat().st_mtime < REMOTE_RUN_TIMEOUT_SECONDS
        return False

    def _name_ending(self) -> str:
        if self.stops:
            return STOPPED
        return FINISHED if self.code == 0 else DIED

    def _read_code(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int(read_text(self.code_path, MAX_EXIT_CODE_BYTES))
        return None

    def as_row(self) -> dict[str, Any]:
        """Return the job's values as they are stored in the JSON state file."""
        row = {name: getattr(self, name) for name in STORED_FIELDS}
        for name in ("within", "typed"):
            if not row[name]:
                del row[name]
        return row

    @property
    def code_path(self) -> Path:
        """File that receives the exit code of the job."""
        return self.log.with_suffix(".code")

    @property
    def argv(self) -> list[str]:
        """Arguments of the command line. Raises OptionError if it cannot be parsed."""
        return launch.split_arguments(launch.command_part(self.line))

    @property
    def problem(self) -> str:
        """Reason why the queue would reject the command line; "" if it is accepted."""
        folder = Path(self.folder)
        try:
            launch.find_job_program(self.argv, folder)
            is_there = folder.is_dir()
        except OptionError as error:
            return str(error)
        except (OSError, ValueError):  # an impossible folder name
            is_there = False
        return "" if is_there else say("%(folder)s: there is no such folder", folder=self.folder)

    @property
    def seconds(self) -> float:
        """Seconds for which the job has been running, or for which it ran."""
        end = time.time()
        if self.state != RUNNING:
            with contextlib.suppress(OSError):
                end = (self.log if self.code is None else self.code_path).stat().st_mtime
        return max(0.0, end - (self.born or end))

    @property
    def born(self) -> float:
        """Start of the job in seconds since 1970; 0 if it has not started, or its file is damaged."""
        born = (self.process or {}).get("born")
        return float(born) if isinstance(born, (int, float)) and abs(born) < MAX_BORN else 0.0

    def last_lines(self, count: int = LAST_LINES) -> str:
        """Return the last lines of the job's log, with only the last state of each progress bar."""
        if self.log.is_symlink():  # a link may lead to another user's file
            return ""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - MAX_TAIL_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.rstrip().split("\n")]
        return shorten_lines(escape_control_codes("\n".join(lines[-count:])), 1000)

    def show_lines(self, count: int = LAST_LINES) -> str:
        """Return the last lines of the job's log, with the known ones in the page's language."""
        return join("\n", map(translate_log_line, self.last_lines(count).split("\n")))


@dataclass
class _QueueContent:
    """Content of a queue's two files: command lines in a text file, and the stored state of their jobs."""

    entries: list[str]  # entries of the text file: commands and other lines
    jobs: list[Job]
    last: int  # last number given to a job
    worker: dict[str, Any] | None  # process that runs the jobs

    def as_text(self) -> str:
        rows = [job.as_row() for job in self.jobs]
        info = {"last": self.last, "worker": self.worker, "jobs": rows}
        return json.dumps(info, indent=1)

    def count_waiting(self) -> "Counter[str]":
        """Count the waiting jobs by the digest of their command line."""
        return Counter(
            short_digest(json.dumps([job.line, job.folder, job.within, job.typed]), 16)
            for job in self.jobs
            if job.process is None
        )

    def find(self, number: int, *states: str) -> Job:
        """Return the job of the queue with this number.

        Raises OptionError if it does not exist, or is not in one of the `states`.
        """
        for job in self.jobs:
            if job.id == number and job.state in states:
                return job
        raise refusal(
            "there is no job %(number)s that is %(names)s", number=number, names=join(" or ", states)
        )

    def wait_again(self, job: Job, line: str) -> None:
        """Queue an ended or waiting job again, with this command line."""
        if job.entry_index < 0:
            self.entries.append("")  # entry -1
        self.entries[job.entry_index] = f"{line}\n"
        job.line = line
        job.process = None
        job.stops = 0
        job.code_path.unlink(missing_ok=True)

    def find_next(self) -> Job | None:
        """Return the first waiting job; None if a job is running or if none is waiting."""
        if any(job.state == RUNNING for job in self.jobs):
            return None
        return next((job for job in self.jobs if job.state == WAITING), None)


@dataclass(frozen=True)
class QueueState:
    """The jobs of a queue, and which process runs them, as read at one moment."""

    jobs: Sequence[Job]  # in the order of the text file
    worker: str  # as `JobQueue.worker`


class JobQueue:
    """Manages the job queue in a folder, whose text file users may edit too, and runs the jobs on request.

    A line stays in the text file when its job begins. Otherwise, saving an older copy from an editor would
    start the job again. Lines are matched with jobs by text: to repeat a command, add a second line or retry.
    """

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        """Use the queue files in `folder`, which is created when the first job is added."""
        self.folder = folder
        self.read_only = read_only
        self.problem = ""  # reason why the last start of a job failed
        # frees the graphics card before a job starts; returns the reason if the job has to wait, or ""
        self.before_start: Callable[[], str] = lambda: ""
        self._continues_in_next_server = False  # the next server continues the running queue
        self._stop_requested = threading.Event()
        self._worker_thread: threading.Thread | None = None
        self._child_process: subprocess.Popen[bytes] | None = None

    def jobs(self) -> list[Job]:
        """Return all jobs in the order of the text file. Raises OutputError if a file cannot be read."""
        return self._read_content().jobs

    def now(self) -> QueueState:
        """Return all jobs and the worker, read at one moment. Raises OutputError if a file cannot be read."""
        content = self._read_content()
        return QueueState(content.jobs, self._find_worker(content))

    @property
    def worker(self) -> str:
        """Where jobs run: "here" in this process, "elsewhere" in another one, "" if no process runs them."""
        return "here" if self._worker_thread is not None else self._find_worker(self._read_content())

    def _find_worker(self, content: _QueueContent) -> str:
        if self._worker_thread is not None:
            return "here"
        return (
            "elsewhere"
            if content.worker is not None and is_process_alive(content.worker) is not False
            else ""
        )

    def add(
        self, argv: Sequence[str], folder: Path, *, within: Path | None = None, typed: Sequence[str] = ()
    ) -> int:
        """Append one of this project's commands, and return the number of its job.

        Args:
            within: The only folder to which the command may write; None if it may write anywhere.
            typed: Options that may send data despite the limits, because the user has typed them.

        Raises:
            OptionError: If `argv` is not one of this project's commands, or is one that never ends.
            OutputError: If the queue cannot be written.
        """
        launch.find_job_program(argv, folder)
        line = as_line(argv)
        with self._edit_files() as content:
            job = self._new_job(content, line, folder)
            job.within = "" if within is None else str(real_path(within))
            job.typed = " ".join(typed)
            content.jobs.append(job)
            content.entries.append(f"{line}\n")
        return job.id

    def add_and_begin(
        self, argv: Sequence[str], folder: Path, *, within: Path | None = None, typed: Sequence[str] = ()
    ) -> int:
        """Append a command, and start the queue unless other jobs are waiting.

        Returns the number of the job. `within` is the only folder to which it may write, `typed` are options
        that may send data anyway.
        """
        others_wait = any(job.state == WAITING for job in self.jobs())
        number = self.add(argv, folder, within=within, typed=typed)
        if self.worker == "" and not others_wait:
            self.begin_work()
        return number

    def move(self, number: int, by: int) -> None:
        """Swap a waiting job with the next (`by` 1) or the previous (`by` -1) job, if there is one."""
        with self._edit_files() as content:
            job = content.find(number, WAITING)
            waiting = [candidate for candidate in content.jobs if candidate.state == WAITING]
            index = waiting.index(job) + by
            if 0 <= index < len(waiting):
                neighbor = waiting[index]
                entry = content.entries[job.entry_index]
                content.entries[job.entry_index] = content.entries[neighbor.entry_index]
                content.entries[neighbor.entry_index] = entry

    def remove(self, number: int) -> None:
        """Delete a job that is not running, with its line and its log."""
        with self._edit_files() as content:
            job = content.find(number, WAITING, *ENDED)
            if job.entry_index >= 0:
                content.entries[job.entry_index] = ""
            content.jobs.remove(job)
            for path in (job.log, job.code_path):
                path.unlink(missing_ok=True)

    def stop(self, number: int) -> None:
        """Interrupt a running job as Ctrl-C does, so that it saves and ends; a second call kills it.

        Raises OutputError if it runs on another machine.
        """
        with self._edit_files() as content:
            job = content.find(number, RUNNING)
            if job.process is None or not is_process_alive(job.process):
                raise OutputError(
                    say("job %(number)s runs on another machine. Stop it from there", number=number)
                )
            job.stops += 1
            process_id = job.process["number"]
            if job.stops == 1:
                launch.interrupt_processes(process_id)
            else:
                launch.kill_processes(process_id)

    def retry(self, number: int) -> None:
        """Queue an ended job again; add `--resume latest` to a training run without --resume."""
        with self._edit_files() as content:
            job = content.find(number, *ENDED)
            argv = job.argv
            line = job.line
            command, _ = launch.find_program(argv, Path(job.folder))
            is_training = command.words[0] in ("train", "finetune")
            resumes = any(word.partition("=")[0] == "--resume" for word in argv)
            if is_training and not resumes:
                line = shlex.join([*argv, "--resume", "latest"])
            content.wait_again(job, line)

    def edit(self, number: int, line: str) -> None:
        """Replace the command line of a job that is not running, and queue it again.

        Raises OptionError if the line is not valid, or if the job is running.
        """
        with self._edit_files() as content:
            job = content.find(number, WAITING, *ENDED)
            command, folder = launch.split_folder(line, Path(job.folder))
            argv = launch.split_arguments(command)
            other_jobs = [other for other in content.jobs if other is not job]
            launch.check_options(argv, folder, list_earlier(other_jobs))
            content.wait_again(job, as_line(argv))
            job.folder = str(real_path(folder))
            job.within = ""  # a typed line has no limits
            job.typed = ""

    @property
    def is_open(self) -> bool:
        """Return whether this user has started the queue, with any server here, and not paused it since."""
        known = recall_queue(self.folder)
        return known is not None and known.is_open

    def begin_work(self, stays_open: bool = True, *, only_known: bool = False) -> None:
        """Start the thread that runs the waiting jobs one after another.

        Args:
            stays_open: Whether the next server of these folders continues the queue.
            only_known: Whether to refuse to start if the user does not know one of the waiting jobs.

        Raises:
            OutputError: If another process runs the jobs.
            UnknownJobsError: If `only_known` is set and the user does not know a waiting job.
        """
        if self._worker_thread is not None:
            return
        was_open = self.is_open  # the user has started the queue, and not paused it since
        worker_lock = contextlib.ExitStack()  # holds the lock file of the one server that runs the jobs
        with self._edit_files() as content:
            if only_known:
                known_queue = recall_queue(self.folder)
                # a line may wait several times: jobs beyond the number of its known ones are unknown
                unknown = content.count_waiting() - (Counter() if known_queue is None else known_queue.jobs)
                if unknown:
                    raise UnknownJobsError(
                        say_count(
                            unknown.total(),
                            "The queue is paused: %(n)s line was added to %(folder)s while no page was "
                            "open. Read the waiting jobs, then start the queue",
                            "The queue is paused: %(n)s lines were added to %(folder)s while no page was "
                            "open. Read the waiting jobs, then start the queue",
                            folder=self.folder / QUEUE,
                        )
                    )
            try:
                worker_lock.enter_context(only_one(self.folder / ".worker.lock", waits=False))
            except BlockingIOError:
                raise OutputError(
                    say("another browser runs the jobs of %(folder)s already", folder=self.folder)
                ) from None
            content.worker = describe_process()
            self._continues_in_next_server = stays_open or was_open
        self._stop_requested.clear()
        self._worker_thread = threading.Thread(target=self._work, args=(worker_lock,), daemon=True)
        self._worker_thread.start()

    def end_work(self, pauses: bool = False) -> None:
        """End the thread that starts the queue's jobs; a running job continues.

        With `pauses`, the queue also stays paused in the next server of these folders.
        """
        worker = self._worker_thread
        self._worker_thread = None
        if worker is None:
            return
        self._stop_requested.set()
        worker.join()
        self._continues_in_next_server = False
        with self._edit_files() as content:
            content.worker = None
            known_queue = recall_queue(self.folder)
            if pauses and known_queue is not None:
                remember_queue(self.folder, is_open=False, jobs=known_queue.jobs.elements())

    def _work(self, worker_lock: contextlib.ExitStack) -> None:
        """Run the waiting jobs one after another until the queue is closed, holding the queue's lock."""
        with worker_lock:
            while not self._stop_requested.wait(EVERY_SECONDS):
                try:
                    self.start_next()
                    self.problem = ""
                except (UserError, OSError) as error:
                    if str(error) != self.problem:
                        logger.warning("cannot start a job: %s", error)
                    self.problem = str(error)

    def start_next(self) -> None:
        """Start the first waiting job, unless a job is running. Raises OutputError if it cannot start now.

        1. Free the GPU, which a model loaded for generation may use.
        2. Under the lock of the queue, start a process that waits for its command, and store its id.
        3. Send it the command.
        """
        if self._child_process is not None and self._child_process.poll() is not None:
            self._child_process = None  # `poll` has reaped the process
        if self._read_content().find_next() is None:
            return
        reason = self.before_start()  # "" if the GPU is free
        if reason:
            raise OutputError(reason)
        with self._edit_files() as content:
            job = content.find_next()  # again, under the lock: another server may have started or removed it
            if job is None:
                return
            job.log.parent.mkdir(exist_ok=True)
            try:
                program = launch.find_job_program(job.argv, Path(job.folder))
                # a link may have replaced the only folder that the job may write to
                if job.within and str(real_path(Path(job.within))) != job.within:
                    raise OptionError(
                        f"{job.within} is a link to another place by now. Remove the link, then retry"
                    )
            except OptionError as error:
                append_text(job.log, f"{error}\n")
                write_text(job.code_path, str(error.exit_code))
                job.process = {}  # unlike None, this means that the job was started
                return
            # environment variables: a job from a folder's run.toml may write only below that folder
            limits = limit_variables([Path(job.within)], job.typed.split()) if job.within else {}
            self._child_process = launch.prepare_process(job.log, **limits)
            job.process = describe_process(self._child_process.pid)
        # the process waits for its command until now, when its id is stored: if the server is killed earlier,
        # the job does not start
        launch.send_job(self._child_process, program, job.folder, job.code_path)

    def _read_content(self) -> _QueueContent:
        content, stored_text = self._read_files()
        if content.as_text() != stored_text and not self.read_only:
            with self._edit_files() as content:  # stores the numbers of the new jobs
                pass
        return content

    @contextlib.contextmanager
    def _edit_files(self) -> Iterator[_QueueContent]:
        """Yield the jobs in the queue's text file and state file, then write the changes made to them."""
        if self.read_only:
            raise OutputError(say("the browser was started with --read_only"))
        with explain_errors(self.folder / QUEUE):
            for folder in (self.folder, self.folder / LOGS):
                reject_link(folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            with only_one(self.folder / ".lock"):
                content, stored_text = self._read_files()
                old_entries = [*content.entries]
                waiting_before = content.count_waiting()
                yield content
                # each file is written only if it changed: users edit the text file too
                if content.entries != old_entries:
                    write_text(self.folder / QUEUE, "".join(content.entries))
                if content.as_text() != stored_text:
                    write_text(self.folder / STATE, content.as_text())
                self._store_known_jobs(content.count_waiting(), waiting_before)

    def _store_known_jobs(self, waiting: "Counter[str]", waiting_before: "Counter[str]") -> None:
        """Store which waiting jobs the user knows about, outside the queue's own folder."""
        # The user knows about jobs that were added with a button, and about lines that were added to the text
        # file while the queue ran on the user's request. Other lines must be confirmed before the queue
        # starts.
        known_queue = recall_queue(self.folder) or KnownQueue(is_open=False, jobs=Counter())
        is_started_here = self._continues_in_next_server
        if is_started_here:  # then the user knows all waiting jobs
            known_jobs = waiting
        else:
            added = waiting - waiting_before  # jobs that a button has just added
            still_waiting = known_queue.jobs & waiting  # for each line, the smaller of the two counts
            known_jobs = still_waiting + added
        updated_queue = KnownQueue(is_open=known_queue.is_open or is_started_here, jobs=known_jobs)
        if updated_queue != known_queue:
            remember_queue(self.folder, updated_queue.is_open, updated_queue.jobs.elements())

    def _read_files(self) -> tuple[_QueueContent, str]:
        """Return the content of the command and state files, and the text of the state file."""
        stored_text = _read_or_empty(self.folder / STATE) or _QueueContent([], [], 0, None).as_text()
        try:
            stored = parse_json(stored_text)
            _check_stored(stored)
            jobs = [self._job(**row) for row in stored["jobs"]]
            content = _QueueContent([], [], stored["last"], stored["worker"])
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            path = self.folder / STATE
            raise OutputError(f"{path} is damaged ({error}). Remove it, and lines of finished jobs") from None
        content.entries = self._read_entries()
        content.jobs = self._match_jobs(content, jobs)
        return content, stored_text

    def _read_entries(self) -> list[str]:
        """Return the lines of the queue's text file. Raises OutputError if there are too many or too long."""
        entries = [entry for entry in ENTRY.findall(_read_or_empty(self.folder / QUEUE)) if entry]
        if len(entries) > MAX_LINES or any(len(entry) > MAX_JOB_LENGTH for entry in entries):
            raise OutputError(
                say(
                    "%(folder)s: at most %(most_lines)s lines of %(most_of_job)s characters are "
                    "read. Remove some",
                    folder=self.folder / QUEUE,
                    most_lines=f"{MAX_LINES:,}",
                    most_of_job=f"{MAX_JOB_LENGTH:,}",
                )
            )
        if entries and not entries[-1].endswith("\n"):  # an added entry must begin a new line
            entries[-1] += "\n"
        return entries

    def _match_jobs(self, content: _QueueContent, jobs: Sequence[Job]) -> list[Job]:
        """Match the jobs in the queue's state file with the lines in its text file."""
        # Return the sorted jobs.
        # 1. For each command line, match the newest jobs with its occurrences in the text file.
        # 2. Create a new job for each line without a job.
        # 3. Sort: running jobs without a line, ended jobs without a line, jobs in the order of their lines.
        #    Drop waiting jobs without a line, because the user has removed the line.
        lines = _list_lines(content.entries)
        num_lines = Counter(lines.values())
        ended_without_line: list[Job] = []
        unmatched: dict[str, list[Job]] = {}  # keyed by line
        for line, equal_jobs in _group_by_line(jobs).items():
            num_surplus = max(0, len(equal_jobs) - num_lines[line])
            surplus = [job for job in equal_jobs if job.state in ENDED][:num_surplus]  # the oldest
            ended_without_line += surplus
            unmatched[line] = [job for job in equal_jobs if job not in surplus]
        jobs_with_line: list[Job] = []
        for index, line in lines.items():
            candidates = unmatched.get(line)
            job = candidates.pop(0) if candidates else self._new_job(content, line, _find_line_folder(line))
            job.entry_index = index
            jobs_with_line.append(job)
        still_unmatched = [job for equal_jobs in unmatched.values() for job in equal_jobs]
        running_without_line = [job for job in still_unmatched if job.state == RUNNING]
        return [*running_without_line, *ended_without_line, *jobs_with_line]

    def _new_job(self, content: _QueueContent, line: str, folder: Path) -> Job:
        content.last += 1
        return self._job(content.last, line, str(real_path(folder)))

    def _job(self, id: int, line: str, folder: str, **stored: Any) -> Job:
        return Job(id, line, folder, self.folder / LOGS / f"{id}.log", **stored)


def _group_by_line(jobs: Iterable[Job]) -> dict[str, list[Job]]:
    """Group jobs by command line."""
    groups: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        groups[job.line].append(job)
    return groups


def _list_lines(entries: Sequence[str]) -> dict[int, str]:
    """Return the command lines among the text file's entries, by index, without comments and blank lines."""
    lines = {}
    for index, entry in enumerate(entries):
        line = entry.strip()
        if line and not line.startswith("#"):
            lines[index] = line
    return lines


def _check_stored(stored: Any) -> None:
    """Raise ValueError, TypeError or LookupError if the stored state is damaged."""
    numbers = [stored["last"], *(row["id"] for row in stored["jobs"])]
    for number in numbers:
        if type(number) is not int or not 0 <= number < MAX_JOBS:  # the number becomes a part of file names
            raise ValueError(f"{number!r} is not a number of a job")
    for row in (stored, *stored["jobs"]):
        for name, kind in STORED_TYPES.items():
            if name in row and not isinstance(row[name], kind):
                raise TypeError(f"{name} is {row[name]!r}")


def may_still_write(job: Job) -> bool:
    """Return whether a job may still write files, because it is waiting or running."""
    return job.state in (WAITING, RUNNING)


def list_earlier(jobs: Iterable[Job]) -> list[EarlierJob]:
    """Return the jobs that may still write files, to check a job that runs after them."""
    earlier = []
    for job in filter(may_still_write, jobs):
        with contextlib.suppress(OptionError):  # an invalid line will be rejected and writes nothing
            earlier.append(launch.find_earlier_job(job.argv, Path(job.folder)))
    return [*filter(None, earlier)]


def as_line(argv: Sequence[str]) -> str:
    """Return arguments as one line of the text file. Raises OptionError if they contain line breaks."""
    line = shlex.join(argv)
    if line.splitlines() != [line]:
        raise refusal("%(line)s: a job is one line", line=f"{line!r}")
    return line


def _find_line_folder(line: str) -> Path:
    """Return the folder in which a line's command runs: the folder of its `cd`, or the working folder."""
    match = launch.CD_PREFIX.fullmatch(line)
    if match is None:
        return Path.cwd()
    argv: list[str] = []
    with contextlib.suppress(OptionError):  # an open quote
        argv = launch.split_arguments(match[1])
    folder = argv[0] if len(argv) == 1 else match[1].strip()
    return Path.cwd() / folder  # the job reports a missing folder


def open_queue(runs: Runs, read_only: bool) -> JobQueue:
    """Return the queue of the first root. Raises OutputError if its folder is a link."""
    folder = runs.root_folders[0] / FOLDER
    for subfolder in (folder, folder / LOGS, folder / RENDER_FOLDER):
        reject_link(subfolder)
    return JobQueue(folder, read_only)


def reject_link(path: Path) -> None:
    """Raise OutputError if a file or folder of the queue is a link."""
    default = os.path.normcase(real_path(path.parent) / path.name)
    if os.path.normcase(real_path(path)) != default:
        raise OutputError(f"{path} is a link to another place. Remove the link")


def _read_or_empty(path: Path) -> str:
    reject_link(path)
    try:
        return read_text(path)
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read: {error}") from None
