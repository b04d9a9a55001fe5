"""Generate the results that the Generate page requests, one after another, with a model that stays loaded.

A process of a generation script with --interactive does the work (`generation/json_requests.py`). It ends
when another model is requested, after some idle time, and when a queued job waits for the GPU. If several
servers show one folder, only one of them at a time works on the render jobs (`browser/jobs/render_queue.py`).
"""

import atexit
import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from browser.jobs import launch
from browser.jobs.jobs import WAITING, Job, JobQueue, QueueState, reject_link
from browser.jobs.render_queue import CANCELLING, LOADING, MAKING, RenderJob, RenderQueue
from browser.jobs.sessions import find_session, limit_session
from browser.runs.runs import DIED, FINISHED, RUNNING, STOPPED, is_process_alive
from modules.atomic_write import explain_errors, write_text
from modules.control_codes import escape_control_codes, shorten_lines
from modules.error_output import extract_error_message
from modules.errors import OptionError, OutputError, UserError
from modules.file_locks import only_one
from modules.installation import DRIVEN, FROM_QUEUE, program_environment
from modules.pages.language import refusal, say
from modules.text_files import parse_json, read_text
from training.reports.history import describe_process

logger = logging.getLogger(__name__)

FOLDER = "making"  # subfolder of the queue's folder
LOG = "making.log"
PREVIEWS = "preview"  # folder of the previews
PREVIEW_NAMES = ("latent_preview.mp4", "latent_preview.png")
SESSION = "session.json"  # names the process with the model
IDLE_SECONDS = 600.0  # a model idle for this long is freed
ANSWER_POLL_SECONDS = 0.2  # seconds between checks for answers
QUEUE_POLL_SECONDS = 1.0
PROGRESS_WRITE_SECONDS = 1.0  # interval of storing a job's progress for other servers
RETRY_SECONDS = 2.0  # retry interval after an error or while another server works
SHUTDOWN_SECONDS = 20.0  # seconds for a process to end by itself
SERVER_SHUTDOWN_SECONDS = 5.0  # the same, when the server ends
MAX_SESSION_BYTES = 1000  # bytes
TAIL = 64 << 10  # bytes at the end of the log that are searched for an error
LAST_LINES = 12
MAX_LINE_LENGTH = 500
MAX_WARNINGS_LENGTH = 4000  # characters that are kept of a render job
FindProgram = Callable[[Sequence[str], Path], tuple[object, list[str]]]
FINAL_FIELDS = ("state", "reason", "file", "process", "doing", "done", "steps", "last_lines", "warnings")
GENERATE = say("the page Generate")
NO_WRITING = say("the browser was started with --read_only")
KILLED = say(
    "the process was killed. Often the machine had too little memory: try a smaller "
    "size, or options that take less"
)


@dataclass
class ModelSession:
    """A running process that holds a loaded model, and the answers that it has sent."""

    argv: list[str]
    title: str
    process: "subprocess.Popen[str]"
    answers: "queue.Queue[dict[str, Any]]" = field(default_factory=queue.Queue)
    used: float = field(default_factory=time.monotonic)  # end of its last result
    is_ready: bool = False

    @property
    def is_alive(self) -> bool:
        """Whether the process is still running."""
        return self.process.poll() is None

    def start_reading(self) -> None:
        """Start the thread that reads the answers of the process."""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            for line in self.process.stdout:
                with contextlib.suppress(ValueError):  # a line printed by other code
                    answer = parse_json(line)
                    if isinstance(answer, dict):
                        self.answers.put(answer)

    def next_answer(self, seconds: float) -> dict[str, Any] | None:
        """Return the next answer of the model's process; None if none arrives within `seconds`."""
        with contextlib.suppress(queue.Empty):
            return self.answers.get(timeout=seconds)
        return None


class RenderWorker:
    """Accepts render jobs from a server's Generate page, and works on them in a thread."""

    def __init__(self, queue: JobQueue, find_program: FindProgram = find_session) -> None:
        """Open the render jobs stored next to `queue`, whose training jobs use the same GPU.

        `find_program` is called with the command line that loads a model, and its folder. It returns the
        project's command and the program to start, as `find_session` does.
        """
        self.queue = queue
        self.find_program = find_program
        self.idle_seconds = IDLE_SECONDS
        self.folder = queue.folder / FOLDER
        self.read_only = queue.read_only
        self.store = RenderQueue(self.folder)
        self.session: ModelSession | None = None
        self.problem = ""  # error that keeps render jobs waiting
        self.waits_for = ""  # ordinary reason why they wait, such as a training run that uses the GPU
        self._current: RenderJob | None = None
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._process_end_lock = threading.Lock()  # taken before `_lock`, never after it
        self._thread: threading.Thread | None = None
        self._is_ended = False
        self._num_cancel_requests = 0  # stops that were requested for the current job: the second one kills
        # ended jobs whose end is not stored yet, because the disk was full
        self._unsaved: dict[int, RenderJob] = {}
        if not self.read_only:
            self._end_orphan()
            queue.before_start = self.free_gpu
            atexit.register(self.close)
            if self._has_waiting():
                self._begin()

    def list_all(self) -> list[RenderJob]:
        """Return all render jobs, the oldest first."""
        current = self._current
        newer = dict(self._unsaved)
        if current is not None and current.state == RUNNING:  # otherwise its file or `_unsaved` is newer
            newer[current.id] = current
        return [newer.get(render_job.id, render_job) for render_job in self.store.list_all()]

    def find(self, number: int) -> RenderJob | None:
        """Return a render job by its number; None if it does not exist."""
        return next((render_job for render_job in self.list_all() if render_job.id == number), None)

    @property
    def current(self) -> RenderJob | None:
        """The running render job; None if there is none."""
        return next((render_job for render_job in self.list_all() if render_job.state == RUNNING), None)

    @property
    def loaded(self) -> str:
        """Title of the loaded model; "" if no model is loaded."""
        session = self.session
        return session.title if session is not None and session.is_alive and session.is_ready else ""

    @property
    def preview(self) -> Path | None:
        """Newest preview of the result that is being generated; None if there is none."""
        if self.current is None:
            return None
        return next((path for path in self._preview_paths() if path.is_file()), None)

    def _preview_paths(self) -> list[Path]:
        return [self.folder / PREVIEWS / name for name in PREVIEW_NAMES]

    def add(self, new_jobs: Sequence[RenderJob]) -> list[int]:
        """Store new render jobs, and return their numbers. Raises OptionError if too many are waiting."""
        if self.read_only:
            raise OutputError(NO_WRITING)
        numbers = self.store.add(new_jobs)
        self._begin()
        return numbers

    def cancel(self, number: int) -> None:
        """Cancel a waiting job, or stop the running one; a second call ends the running job's process.

        Raises OptionError if the job is neither waiting nor running.
        """
        with self._lock:
            current = self._current
            is_running_here = current is not None and current.id == number and current.state == RUNNING
            if current is not None and is_running_here:
                self._cancel_current(current)
                return
            render_job = self.store.find(number)
            if render_job is not None and render_job.state == RUNNING:  # it runs on another server
                self.store.ask_to_cancel(number)
            else:
                self.store.change(number, [WAITING], state=STOPPED)

    def _cancel_current(self, current: RenderJob) -> None:
        """Interrupt the process of the running job; a second call kills it."""
        self._num_cancel_requests += 1
        session = self.session
        if session is None:  # no process yet: `_open_session` sees the count and ends the job
            return
        current.doing = CANCELLING
        can_be_interrupted = session.is_ready and os.name != "nt"  # while it loads, it ignores SIGINT
        if self._num_cancel_requests > 1 or not can_be_interrupted:
            launch.kill_processes(session.process.pid)
        else:
            session.process.send_signal(signal.SIGINT)

    def again(self, number: int) -> None:
        """Queue a stopped or failed render job again. Raises OptionError for a job in another state."""
        changes: dict[str, Any] = {
            "reason": "",
            "last_lines": "",
            "warnings": "",
            "file": "",
            "done": 0,
            "steps": 0,
        }
        self.store.change(number, [STOPPED, DIED], state=WAITING, process=None, **changes)
        self._begin()

    def remove(self, number: int) -> None:
        """Remove an ended render job from the list; its result stays."""
        self.store.remove(number)

    def free(self) -> None:
        """End the process with the model. Raises OptionError if it is generating a result."""
        with self._changed:
            # after a result is finished, its cleanup takes another moment
            self._changed.wait_for(
                lambda: self._current is None or self._current.state == RUNNING, SHUTDOWN_SECONDS
            )
            if self._current is not None:
                raise refusal("result %(id)s is being generated: cancel it first", id=self._current.id)
            session = self._detach_session()
        self._end_process(session)

    def free_gpu(self) -> str:
        """Unload the model to free the GPU for a queued job.

        Returns the reason why the GPU is still in use; "" if it is free.
        """
        with self._lock:
            if self._current is not None:
                return say(
                    "%(generate)s is generating result %(id)s: the job begins after it, or cancel it there",
                    generate=GENERATE,
                    id=self._current.id,
                )
            session = self._detach_session()
        self._end_process(session)
        with self._lock:
            if self.session is None:  # no model was loaded meanwhile
                self._end_orphan()
        if any(render_job.state == RUNNING for render_job in self.list_all()):
            return say(
                "%(generate)s of another server is generating a result: the job begins after it",
                generate=GENERATE,
            )
        # that server frees the GPU once it sees the waiting job
        owner = self._read_session()
        if owner and all(is_process_alive(owner[name]) is True for name in ("server", "process")):
            return say(
                "%(generate)s of another server still has its model loaded: the job begins when "
                "that has ended",
                generate=GENERATE,
            )
        return ""

    def close(self) -> None:
        """End the thread and the process; waiting jobs stay on disk."""
        with self._changed:
            self._is_ended = True
            self._changed.notify_all()
            if self._current is not None and self.session is not None and os.name != "nt":
                with contextlib.suppress(OSError):
                    self.session.process.send_signal(signal.SIGINT)
            session = self._detach_session()
        self._end_process(session, SERVER_SHUTDOWN_SECONDS)
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(SERVER_SHUTDOWN_SECONDS)

    # --- the thread

    def _begin(self) -> None:
        with self._changed:
            if not self._is_ended and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _work(self) -> None:
        """Run the waiting render jobs one after another, until none is left and no model is loaded."""
        # Only the server that holds a lock file in the folder runs jobs. After an error, or while another
        # server holds the lock, this thread tries again after some seconds.
        with contextlib.ExitStack() as lock_of_server:
            has_lock = False
            while not self._is_ended:
                wait_seconds = QUEUE_POLL_SECONDS
                try:
                    if not has_lock:
                        lock_of_server.enter_context(only_one(self.folder / ".maker.lock", waits=False))
                        has_lock = True
                        self._end_orphan()  # a generating process of a killed server
                    has_generated = self._generate_next()
                    self.problem = ""
                    if has_generated:
                        continue
                    if self._end_thread_if_idle():
                        return
                except BlockingIOError:  # another server has the lock
                    self.problem = say("another server of these folders generates the results")
                    wait_seconds = RETRY_SECONDS
                    if self._end_thread_if_idle():
                        return
                except (UserError, OSError, ValueError) as error:
                    if str(error) != self.problem:
                        logger.warning("cannot generate a result: %s", error)
                    self.problem = str(error)
                    wait_seconds = RETRY_SECONDS
                with self._changed:
                    if not self._is_ended:
                        self._changed.wait(wait_seconds)

    def _end_thread_if_idle(self) -> bool:
        """Return whether the worker thread has to end because nothing is left to do."""
        # In that case, `_thread` is cleared, so that the next render job starts a new thread.
        with self._changed:
            if self.session is not None or self._unsaved or self._has_waiting():
                return False
            self._thread = None
            return True

    def _has_waiting(self) -> bool:
        return any(render_job.state == WAITING for render_job in self.store.list_all())

    def _generate_next(self) -> bool:
        """Run the next render job, and return whether there was one. Free a model that is not needed."""
        self._save_finished()
        is_blocked = self._is_blocked_by_queue()
        self._free_if_unneeded(is_blocked)
        render_job = None if is_blocked else self._claim_next()
        if render_job is None:
            return False
        self.problem = ""
        try:
            self._generate(render_job)
        except (UserError, OSError, ValueError) as error:
            logger.debug("%s", render_job.command, exc_info=error)
            self._end_render_job(render_job, DIED, str(error))
            # late answers of this process would be mistaken for answers to the next render job
            self._end_process(self._detach_session())
        finally:
            self._remove_previews()
            with self._changed:
                self._current = None
                self._changed.notify_all()
        return True

    def _is_blocked_by_queue(self) -> bool:
        """Return whether a queued job uses the GPU or is next to use it, and name that job in `waits_for`."""
        try:
            queue_state = self.queue.now()
        except OutputError:  # the queue's page reports it
            return False
        job = _find_blocking_job(queue_state)
        if job is None:
            self.waits_for = ""
            return False
        if job.state == RUNNING:
            self.waits_for = say("job %(id)s of the queue runs", id=job.id)
        else:
            self.waits_for = say("job %(id)s of the queue is next", id=job.id)
        return True

    def _free_if_unneeded(self, is_blocked: bool) -> None:
        """End the process that holds the model if it was idle for too long, or blocks a job of the queue."""
        with self._lock:
            session = self.session
            if session is None:
                return
            is_idle = time.monotonic() - session.used > self.idle_seconds
            if not (is_blocked or is_idle or not session.is_alive):
                return
            session = self._detach_session()
        self._end_process(session)

    def _claim_next(self) -> RenderJob | None:
        """Mark the oldest waiting job of the Generate page as running, and return it; None without one."""
        with self._lock:
            for render_job in self.store.list_all():
                if render_job.state != WAITING:
                    continue
                with contextlib.suppress(OptionError):  # it was canceled meanwhile
                    self.store.pop_cancel_request(render_job.id)
                    self._num_cancel_requests = 0
                    self._current = self.store.change(
                        render_job.id,
                        [WAITING],
                        state=RUNNING,
                        process=describe_process(),
                        doing=LOADING,
                        done=0,
                    )
                    return self._current
        return None

    def _generate(self, render_job: RenderJob) -> None:
        """Run a render job in a process that has loaded its model, and record how the job ends."""
        session = self._open_session(render_job)
        if session is None:  # it could not be started, or the job was canceled: already recorded
            return
        self._send(session, render_job)
        is_complete = self._record_events(session, render_job)
        if not is_complete:
            self._record_process_end(session, render_job)
            return
        session.used = time.monotonic()
        if render_job.state == RUNNING and render_job.file:
            self._end_render_job(render_job, FINISHED)
        elif render_job.state == RUNNING:  # the process is ready again, but named no file: it failed
            self._end_render_job(render_job, DIED, self.read_last_error())

    def _record_events(self, session: ModelSession, render_job: RenderJob) -> bool:
        """Record the messages of the model's process in a render job until it is ready for the next job."""
        # The progress is stored about once a second. Returns False if the process ends before it is ready.
        last_write = time.monotonic()
        while True:
            answer = self._wait_for_answer(session, render_job)
            if answer is None:
                return False
            if answer.get("event") == "ready":
                return True
            self._record_event(render_job, answer)
            if time.monotonic() - last_write > PROGRESS_WRITE_SECONDS and render_job.state == RUNNING:
                last_write = time.monotonic()
                progress = {"doing": render_job.doing, "done": render_job.done, "steps": render_job.steps}
                with contextlib.suppress(UserError):  # only its final state matters
                    self.store.change(render_job.id, [RUNNING], **progress)

    def _record_event(self, render_job: RenderJob, answer: dict[str, Any]) -> None:
        """Record a JSON message of the generation process (generation/json_requests.py) in a render job."""
        is_canceled = self._num_cancel_requests > 0
        match answer.get("event"):
            case "begun":
                render_job.steps = int(answer["steps"])
            case "phase" if not is_canceled:
                render_job.doing = str(answer["what"])
            case "warned" if len(render_job.warnings) < MAX_WARNINGS_LENGTH:
                render_job.warnings = f"{render_job.warnings}\n{answer['text']}".strip()
            case "step":
                render_job.done = int(answer["done"])
                render_job.steps = int(answer.get("steps", render_job.steps))
                if not is_canceled:
                    render_job.doing = MAKING
            case "made":
                render_job.file = str(answer["file"])
            case "failed":
                self._end_render_job(render_job, DIED, str(answer["reason"]))
            case "cancelled":
                # it may have been written before the stop arrived
                self._end_render_job(render_job, FINISHED if render_job.file else STOPPED)

    def _wait_for_answer(self, session: ModelSession, render_job: RenderJob) -> dict[str, Any] | None:
        """Return the next JSON answer of the model's process; None if the process has ended."""
        while True:
            if self.store.pop_cancel_request(render_job.id):  # first, as fast steps leave no idle time
                self.cancel(render_job.id)
            answer = session.next_answer(ANSWER_POLL_SECONDS)
            if answer is not None:
                return answer
            if not session.is_alive:
                return session.next_answer(ANSWER_POLL_SECONDS)  # it may have answered before it ended

    def _record_process_end(self, session: ModelSession, render_job: RenderJob) -> None:
        """Record that the model's process has ended unexpectedly during a render job."""
        session.process.wait()
        if self._num_cancel_requests:
            self._end_render_job(render_job, STOPPED)
        elif self._is_ended:
            self._end_render_job(render_job, STOPPED, say("the page's server was ended"))
        else:
            is_killed = session.process.returncode == -getattr(signal, "SIGKILL", 9)
            self._end_render_job(render_job, DIED, KILLED if is_killed else self.read_last_error())
        self._end_process(self._detach_session())

    def _end_render_job(self, render_job: RenderJob, state: str, reason: str = "") -> None:
        """Set the final state of a render job and save it; if the disk is full, saving is retried later."""
        with self._lock:
            if render_job.state != RUNNING:
                return
            render_job.state = state
            render_job.reason = reason
            render_job.doing = ""
            render_job.process = None
            render_job.last_lines = self._read_last_lines() if state == DIED else ""
            self._unsaved[render_job.id] = render_job
        with contextlib.suppress(OutputError):  # the next turn tries again and reports the reason
            self._save_finished()

    def _save_finished(self) -> None:
        """Write the final states of render jobs. Raises OutputError if that fails; the caller tries again."""
        with self._lock:
            for number, render_job in list(self._unsaved.items()):
                values = {name: getattr(render_job, name) for name in FINAL_FIELDS}
                with contextlib.suppress(OptionError):  # the file may have been removed
                    self.store.change(number, [RUNNING], **values)
                del self._unsaved[number]

    def _open_session(self, render_job: RenderJob) -> ModelSession | None:
        """Return a ready process with a render job's model, loading the model if necessary."""
        # Returns None if loading fails or the job was canceled; the render job then records this.
        with self._lock:
            session = self.session
            has_same_model = session is not None and session.argv == render_job.session
            if session is not None and has_same_model and session.is_alive and session.is_ready:
                return session
            session = self._detach_session()
        self._end_process(session)  # it holds another model: unload that before the next one is loaded
        with self._lock:
            if self._num_cancel_requests or self._is_ended:
                self._end_render_job(render_job, STOPPED)
                return None
            session = self.session = self._start_session(render_job)
        answer = self._wait_for_answer(session, render_job)
        if answer is None or answer.get("event") != "ready":
            self._record_process_end(session, render_job)
            return None
        session.is_ready = True
        if self._num_cancel_requests:  # the job ends, but the loaded model stays for the next one
            self._end_render_job(render_job, STOPPED)
            return None
        return session

    def _start_session(self, render_job: RenderJob) -> ModelSession:
        """Start a generation process that loads a render job's model and then reads jobs from its stdin."""
        folder = Path(render_job.folder)
        if not folder.is_dir():
            raise OptionError(f"{folder}: the folder of this command is gone")
        _, program = self.find_program(render_job.session, folder)
        # the command may come from somebody else: it may write only below these folders
        limits = limit_session(Path(render_job.save_path), self.folder, self.queue.folder.parent)
        reject_link(self.folder)
        (self.folder / LOG).unlink(missing_ok=True)  # it may be a link
        previews = str(self.folder.absolute() / PREVIEWS)
        # FROM_QUEUE: a queue has started it; DRIVEN: it exchanges JSON, and writes previews to this folder
        environment = program_environment(**{FROM_QUEUE: "1", DRIVEN: previews, "PYTHONUTF8": "1"}, **limits)
        with explain_errors(self.folder / LOG), (self.folder / LOG).open("wb") as log:
            process = subprocess.Popen(
                program,
                cwd=folder,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        session = ModelSession(render_job.session, render_job.title, process)
        session.start_reading()
        owner = {"server": describe_process(), "process": describe_process(process.pid)}
        with contextlib.suppress(OutputError):  # without the file, an orphaned process ends only by itself
            write_text(self.folder / SESSION, json.dumps(owner))
        return session

    def _send(self, session: ModelSession, render_job: RenderJob) -> None:
        assert session.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended, which the reader notices
            session.process.stdin.write(json.dumps(render_job.request) + "\n")
            session.process.stdin.flush()

    def _detach_session(self) -> ModelSession | None:
        """Detach and return the model's process so that the caller can end it; None if no model is loaded."""
        with self._lock:
            session = self.session
            self.session = None
            return session

    def _end_process(self, session: ModelSession | None, patience: float = SHUTDOWN_SECONDS) -> None:
        """End a model's process by closing its input; kill it if it is alive after `patience` seconds."""
        # It also waits for processes that other threads are ending, because two models may not fit on the
        # GPU. If `session` is None, it only waits. Call it without holding the lock, which these threads
        # need.
        with self._process_end_lock:
            if session is None:
                return
            with contextlib.suppress(OSError):
                assert session.process.stdin is not None
                session.process.stdin.close()
            try:
                session.process.wait(patience)
            except subprocess.TimeoutExpired:
                launch.kill_processes(session.process.pid)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    session.process.wait(patience)
            with contextlib.suppress(OSError):
                (self.folder / SESSION).unlink()

    def _end_orphan(self) -> None:
        """End a process that a killed server has left behind and that still occupies GPU memory."""
        owner = self._read_session()
        if not owner:
            return
        if is_process_alive(owner["process"]) is True and is_process_alive(owner["server"]) is False:
            launch.kill_processes(owner["process"]["number"])
        if is_process_alive(owner["server"]) is not True:
            with contextlib.suppress(OSError):
                (self.folder / SESSION).unlink()
            self._remove_previews()

    def _read_session(self) -> dict[str, dict[str, Any]]:
        """Return the records of the process that holds a model and of its server; {} if there are none."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            row = parse_json(read_text(self.folder / SESSION, MAX_SESSION_BYTES))
            return {"server": dict(row["server"]), "process": dict(row["process"])}
        return {}

    def _remove_previews(self) -> None:
        for path in self._preview_paths():
            with contextlib.suppress(OSError):
                path.unlink()

    def _read_log(self) -> str:
        with contextlib.suppress(OSError), (self.folder / LOG).open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL))
            text = file.read().decode("utf-8", "replace")
            return "\n".join(line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n"))
        return ""

    def _read_last_lines(self) -> str:
        """Return the last lines that the process has logged."""
        lines = [line for line in self._read_log().split("\n") if line.strip()]
        return shorten_lines(escape_control_codes("\n".join(lines[-LAST_LINES:])), MAX_LINE_LENGTH)

    def read_last_error(self) -> str:
        """Return the error message that the model's process has logged, or a text that says there is none."""
        return extract_error_message(self._read_log()) or say(
            "the process has ended without an error message"
        )


def _find_blocking_job(queue_state: QueueState) -> Job | None:
    """Return the queued job that uses the GPU or is next to use it; None if there is none."""
    # waiting jobs of a paused queue do not block
    blocking_states = (RUNNING, WAITING) if queue_state.worker else (RUNNING,)
    for state in blocking_states:
        for job in queue_state.jobs:
            if job.state == state:
                return job
    return None
