"""Determine the state of a run from its run.toml, its job, its check and its histories.

A run.toml is the draft of a run. Even before the run begins, its id is derived from the path of the history
that it will write, so that its page has one URL from the draft to the finished LoRA.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil  # comes with accelerate

from browser.core.short_names import short_digest
from browser.core.state_names import name_state
from browser.folders.described_folder import (
    DATASET_FILE,
    TRAINING_TABLE,
    DescribedFolder,
    read_described,
    reject_share,
)
from browser.jobs.background_jobs import BackgroundJobs, name_background_job
from browser.jobs.jobs import QUEUE, WAITING, Job, JobQueue, as_line
from browser.jobs.printed_lines import translate_line, translate_reason
from browser.runs.runs import DIED, FINISHED, RUNNING, STOPPED, Runs, RunSummary, is_process_alive
from modules.atomic_write import SPARE_BYTES, explain_errors, free_bytes
from modules.control_codes import shorten_lines
from modules.error_output import ERROR_LINE, extract_error_message
from modules.errors import OptionError, UserError
from modules.extension_words import split_extensions
from modules.file_locks import only_one
from modules.output_files import check_output_name
from modules.pages.language import join, refusal, say
from modules.paths import expand_path
from modules.text_files import parse_toml, read_content, real_path
from project.known_folders import recall_folder, remember_folder
from project.options import MODELS, RUN_FILE
from protocols.families import with_scripts
from training.config_options import PROJECT_TABLE
from training.reports.history import BEFORE_TRAINING, history_path
from training.saving.files import state_pattern

DESCRIBE = "describe"  # kinds of background jobs
CHECK = "check"
DRAFT, CHECKING, FAILED_CHECK, STARTING = "draft", "checking", "faults", "starting"
DOWNLOADING, CACHING, LOADING = "downloading", "caching", "loading"
TRAINING, SAMPLING, VALIDATING, SAVING = "training", "sampling", "validating", "saving"
STATES_BEFORE_TRAINING = (DRAFT, CHECKING, FAILED_CHECK, WAITING, STARTING, DOWNLOADING, CACHING, LOADING)
TRAINING_STATES = (TRAINING, SAMPLING, VALIDATING, SAVING)
STATES = (*STATES_BEFORE_TRAINING, *TRAINING_STATES, STOPPED, FINISHED, DIED)
ACTIVE_STATES = (CHECKING, STARTING, DOWNLOADING, CACHING, LOADING, *TRAINING_STATES)  # a process is working
# activity in the history of `run` -> state of the run, and its description
PREPARATION_STEPS = {
    "downloading the model": (DOWNLOADING, ""),
    "checking the files": (CHECKING, say("the files")),
    "checking the clips": (CHECKING, say("the files")),  # text in older versions
    "checking the captions": (CHECKING, say("the captions")),
    "caching latents": (CACHING, say("latents")),
    "caching captions": (CACHING, say("captions")),
    "training": (LOADING, say("the model")),
}
SAMPLE_PATTERN = re.compile(r"sample (\d+) of (\d+)(.*)", re.DOTALL)
BYTES_PATTERN = re.compile(r"([\d.,]+) (\w+) of ([\d.,]+) \2")  # `11.2 GB of 34.8 GB`
KILLED_EXIT_CODES = (9, -9, 137)  # exit codes after SIGKILL
DISK_FULL_EXIT_CODES = (1, 120)  # exit codes of Python after an error, 120 if flushing its output failed
SHOWN_LINES = 12  # number of lines of a log that a page shows
READ_LINES = 60  # lines of a log that are searched for the reason of a failure
MAX_REASON_LENGTH = 600  # characters
START_TIME_TOLERANCE = 1.0  # start times of processes are rounded


@dataclass(frozen=True)
class RunState:
    """State of a run, with the reason, details and job that pages show for it."""

    name: str  # one of STATES
    details: str = ""  # text after the name of the state: `40 of 120`
    reason: str = ""  # why it ended, or cannot begin
    job: Job | None = None  # job of the queue that is or was this run
    background_job: Job | None = None  # a check of its folder
    is_stop_requested: bool = False  # a stop was requested
    is_paused: bool = False  # it waits in a paused queue

    @property
    def text(self) -> str:
        """The state as text, such as `caching 40 of 120, latents`."""
        separator = ", " if self.name in (WAITING, DRAFT, STARTING) else " "
        return join(separator, filter(None, (name_state(self.name), self.details)))

    @property
    def kind(self) -> str:
        """One of the few states that lists distinguish by color and symbol."""
        if self.name in ACTIVE_STATES:
            return RUNNING
        return {DRAFT: WAITING, FAILED_CHECK: DIED}.get(self.name, self.name)

    @property
    def is_active(self) -> bool:
        """Whether a process is working on the run, or the run waits for one."""
        return self.name in ACTIVE_STATES or self.name == WAITING

    @property
    def last_lines(self) -> str:
        """Last lines that the run's command has printed; "" if its log is unknown."""
        source = self.background_job if self.background_job is not None else self.job
        return "" if source is None else source.last_lines(SHOWN_LINES)


@dataclass(frozen=True)
class RunConfig:
    """The training run that a folder's run.toml defines: its model, history and number of steps."""

    folder: Path
    history: Path  # history that its training writes
    changed: float  # modification time of run.toml
    model: str = ""
    steps: int = 0
    prompts: Path | None = None  # prompt file of the samples
    problem: str = ""  # why run.toml cannot be read

    @property
    def id(self) -> str:
        """Id of the run."""
        return self.summary.id

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.summary.name

    @property
    def output(self) -> Path:
        """Folder into which the training run saves its files."""
        return self.history.parent

    @property
    def preparation_history(self) -> Path:
        """History file of what `run` does before training: downloads and caching."""
        return history_path(self.output, f"{self.name}{BEFORE_TRAINING}")

    @property
    def summary(self) -> RunSummary:
        """Summary of the run for the list of runs, while the run has no history."""
        return RunSummary(
            history=self.history,
            changed=self.changed,
            start=None,
            ending=None,
            step=0,
            losses=(),
            step_seconds=None,
            sample="",
            memory={},
            model=self.model,
            total_steps=self.steps,
        )


def parse_run_config(path: Path, content: bytes, changed: float) -> RunConfig | None:
    """Parse the bytes of a run.toml. Returns None if the file is not one of this project's.

    `changed` is its modification time.
    """
    folder = real_path(path.parent)
    try:
        tables = parse_toml(content.decode())
    except ValueError as error:
        if not (folder / DATASET_FILE).is_file():  # `new` writes run.toml next to a dataset.toml
            return None
        return RunConfig(folder, _find_default_history(folder), changed, problem=f"{path}: {error}")
    if PROJECT_TABLE not in tables:
        return None
    try:
        values = tables[TRAINING_TABLE]
        name = str(values["output_name"])
        check_output_name("output_name", name, is_new=False)
        commands = tables[PROJECT_TABLE]["commands"]
        commands = [[str(word) for word in argv] for argv in commands]
        # `new` writes the download of the model as the first command
        family = _find_command_family(commands) or _find_value(commands[0], "--family")
        prompts = values.get("sample_prompts")
        for text in (str(values["output_dir"]), str(prompts or "")):
            reject_share(text, folder)
        return RunConfig(
            folder=folder,
            history=history_path(real_path(expand_path(str(values["output_dir"]), folder)), name),
            changed=changed,
            model=family,
            # epochs take precedence over steps
            steps=0 if "max_train_epochs" in values else int(values.get("max_train_steps", 0)),
            prompts=None if prompts is None else expand_path(str(prompts), folder),
        )
    except (OptionError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        problem = f"{path} is not in the form that `new` writes ({reason})"
        return RunConfig(folder, _find_default_history(folder), changed, problem=problem)


def _find_default_history(folder: Path) -> Path:
    return history_path(folder / "output", folder.name)


def _find_value(argv: Sequence[str], option: str) -> str:
    """Return the word after the last use of an option in a command; "" if it is not used."""
    following_words = dict(zip(argv, argv[1:], strict=False))
    return following_words.get(option, "")


def _find_command_family(commands: Sequence[Sequence[str]]) -> str:
    """Return the model family of a run's commands, as lists of runs show it; "" if there is none."""
    # The catalogue's families are divided differently (`wan22`, `stable_diffusion`). For a ControlNet, an
    # embedding or a full model, the family is taken from the caching commands, which are the same for all
    # kinds of runs.
    family_by_script = {f"{entry.cache}_latents.py": name for name, entry in with_scripts().items()}
    family_by_script |= {f"{entry.training_script}.py": name for name, entry in with_scripts().items()}
    for argv in reversed(commands):
        for word in argv:
            if word in family_by_script:
                return family_by_script[word]
    return ""


@dataclass(frozen=True)
class TrackedRun:
    """A run, its state, and the run.toml that defines it, if there is one."""

    summary: RunSummary
    state: RunState
    run_config: RunConfig | None = None  # run.toml from which it can be started, if its folder has one

    @property
    def kill_message(self) -> str:
        """Reason to show for a run that the page has killed; "" for all other runs."""
        return self.state.reason if self.state.name == STOPPED and self.summary.state == DIED else ""


@dataclass(frozen=True)
class WaitingJobs:
    """Numbers of the waiting jobs in queue order, read once to describe a whole list of runs."""

    numbers: Sequence[int]
    is_paused: bool  # the queue is paused


class TrackedRuns:
    """Finds folders with a run.toml, and determines the state of their runs and of all other runs."""

    def __init__(self, runs: Runs, queue: JobQueue, background_jobs: BackgroundJobs) -> None:
        self.runs = runs
        self.queue = queue
        self.background_jobs = background_jobs
        self._cached_configs: dict[Path, tuple[tuple[int, int, int], RunConfig | None]] = {}

    # ---- which runs exist

    def list_run_configs(self) -> list[RunConfig]:
        """Return the run.toml files below the roots. Call it after the runs were listed."""
        with self.runs.lock:
            configs_by_history = {}
            known: dict[Path, tuple[tuple[int, int, int], RunConfig | None]] = {}
            for path in self.runs.configs():
                if path.name == RUN_FILE and path not in known:
                    with contextlib.suppress(OSError):
                        known[path] = self._read_cached_run_config(path)
            self._cached_configs = known
            for _, run_config in known.values():
                if run_config is not None:
                    configs_by_history[run_config.history] = run_config
            return list(configs_by_history.values())

    def _read_cached_run_config(self, path: Path) -> tuple[tuple[int, int, int], RunConfig | None]:
        """Return the version (time, size, inode) of a run.toml, and its content, cached by version."""
        status = path.lstat()
        version = status.st_mtime_ns, status.st_size, status.st_ino
        cached = self._cached_configs.get(path)
        if cached is not None:
            cached_version, _ = cached
            if cached_version == version:
                return cached
        return version, parse_run_config(path, read_content(path), status.st_mtime)

    def find_run_config(self, run: RunSummary) -> RunConfig | None:
        """Return the run.toml whose training run writes this history; None if there is none."""
        for run_config in self.list_run_configs():
            if run.history in (run_config.history, run_config.preparation_history):
                return run_config
        return None

    def list_all(self) -> list[TrackedRun]:
        """Return all training runs, and each run.toml that was not run yet, with states, the newest first."""
        with self.runs.lock:
            runs_by_history = {run.history: run for run in self.runs.list_all()}
            run_configs = self.list_run_configs()
        jobs = self._list_jobs()
        by_folder = group_jobs(jobs)
        waiting = self._list_waiting(jobs)
        tracked_runs = []
        for run_config in run_configs:
            run = runs_by_history.pop(run_config.history, None)
            preparation = runs_by_history.pop(run_config.preparation_history, None)
            tracked_runs.append(
                self._make_tracked_run(
                    run_config, run, preparation, by_folder.get(run_config.folder, ()), waiting
                )
            )
        # only runs without a run.toml are left
        tracked_runs += [TrackedRun(run, read_run_state(run)) for run in runs_by_history.values()]
        return sorted(tracked_runs, key=lambda tracked_run: -tracked_run.summary.changed)

    def find(self, id: str) -> TrackedRun | None:
        """Return the training run with this id, or a run.toml that was not run yet; None without one."""
        with self.runs.lock:
            listed_runs = self.runs.list_all()
            run = next((listed for listed in listed_runs if listed.id == id), None)
            if run is None:  # its history may be new, or no longer listed
                run = self.runs.find(id)
            # a run.toml has the id of the run that it defines, even before the run has begun
            run_config = next((config for config in self.list_run_configs() if config.id == id), None)
        if run_config is None:
            return None if run is None else TrackedRun(run, read_run_state(run))
        # the downloads and caching before the training run have their own history
        preparation = next(
            (listed for listed in listed_runs if listed.history == run_config.preparation_history), None
        )
        jobs = self._list_jobs()
        folder_jobs = [job for job in jobs if is_folder_run(job, run_config.folder)]
        return self._make_tracked_run(run_config, run, preparation, folder_jobs, self._list_waiting(jobs))

    def find_job_states(self, jobs: Sequence[Job]) -> dict[int, TrackedRun]:
        """Return, by job number, the training run to which each waiting or running job belongs."""
        runs_by_job = {}
        for tracked_run in self.list_all():
            job = tracked_run.state.job
            if job is not None and job.state in (WAITING, RUNNING):
                runs_by_job[job.id] = tracked_run
        job_ids = {job.id for job in jobs}
        return {job_id: tracked_run for job_id, tracked_run in runs_by_job.items() if job_id in job_ids}

    def _list_jobs(self) -> list[Job]:
        try:
            return self.queue.jobs()
        except UserError:
            return []  # the queue's page reports the reason

    # ---- the state of a run

    def _list_waiting(self, jobs: Sequence[Job]) -> WaitingJobs:
        numbers = [job.id for job in jobs if job.state == WAITING]
        return WaitingJobs(numbers, is_paused=bool(numbers) and self._is_paused())

    def _make_tracked_run(
        self,
        run_config: RunConfig,
        run: RunSummary | None,
        preparation: RunSummary | None,
        folder_jobs: Sequence[Job],
        waiting: WaitingJobs,
    ) -> TrackedRun:
        """Return the training run of a folder's run.toml, with its state."""
        job = _select_job(folder_jobs, run)
        state = self._find_state(run_config, run, preparation, job)
        if state.name == WAITING and job is not None:
            position = waiting.numbers.index(job.id) + 1
            text = say("position %(place)s in the queue", place=position)
            if waiting.is_paused:
                text = say("%(place)s, which is paused", place=text)
            reason = "" if waiting.is_paused else self.queue.problem
            state = replace(state, details=text, reason=reason, is_paused=waiting.is_paused)
        # the list sorts runs by the time of their last change
        change_times = [entry.changed for entry in (run_config, run, preparation) if entry is not None]
        if job is not None and (job.state == RUNNING or state.job is job):  # the job determines the state
            change_times.append(job.born)
        if state.name == WAITING:
            with contextlib.suppress(OSError):
                change_times.append((self.queue.folder / QUEUE).stat().st_mtime)
        summary = run_config.summary if run is None else run
        return TrackedRun(replace(summary, changed=max(change_times)), state, run_config)

    def _is_paused(self) -> bool:
        try:
            return self.queue.worker == ""
        except UserError:
            return False

    def _find_state(
        self, run_config: RunConfig, run: RunSummary | None, preparation: RunSummary | None, job: Job | None
    ) -> RunState:
        """Return the state of a folder's run: what its process does now, or else how it last ended."""
        # `preparation` is the history of the downloads and caching before the training run.
        active_state = _find_active_state(run, preparation, job)
        if active_state is not None:
            return active_state
        # a check of the folder may be running in the background (`run --check`)
        check = self.background_jobs.find(name_background_job(CHECK, run_config.folder))
        if check is not None and check.state == RUNNING:
            return RunState(CHECKING, background_job=check)
        return _find_latest_ended_state(run_config, run, preparation, job=job, check=check)

    # ---- starting

    def is_trusted(self, run_config: RunConfig) -> bool:
        """Return whether the user has created or reviewed a run.toml on this machine.

        Otherwise it may come from somebody else. Files below the roots, such as histories and the queue,
        prove nothing, because they may have been copied.
        """
        return recall_folder(run_config.folder) is not None

    def start(self, folder: Path, argv: Sequence[str], is_reviewed: bool = False) -> None:
        """Add the run of a folder's run.toml to the queue, and start the queue unless other jobs wait.

        Args:
            is_reviewed: Whether the user has just read the run.toml; this is remembered.

        Raises:
            OptionError: If the run is active, or its run.toml comes from elsewhere and was not read.
            OutputError: If the queue cannot be written.
        """
        with self._start_lock():
            self._check_and_queue(real_path(folder), argv, is_reviewed)

    def reject_while_it_runs(self, folder: Path) -> None:
        """Raise OptionError if a training run of the folder is running, because its files must not change."""
        for tracked_run in self.list_all():
            run_config, state = tracked_run.run_config, tracked_run.state
            is_for_folder = run_config is not None and run_config.folder == folder
            # a check only reads the files, and ends soon
            is_running = state.name in ACTIVE_STATES and state.name != CHECKING
            if is_for_folder and is_running:
                raise refusal(
                    "%(name)s is %(text)s. It has already read its files, and would continue "
                    "with different ones: stop it first, or wait until it has ended.",
                    name=tracked_run.summary.name,
                    text=state.text,
                )

    def add_jobs(self, jobs: Sequence[tuple[Sequence[str], Path]]) -> None:
        """Add commands, each with its working folder, to the queue.

        Raises OptionError if one of them is already queued or running, OutputError if writing fails.
        """
        with self._start_lock():
            present = [(job.line, job.folder) for job in self._list_jobs() if job.state in (WAITING, RUNNING)]
            if any((as_line(words), str(real_path(folder))) in present for words, folder in jobs):
                raise refusal("It is already in the queue.")
            for words, folder in jobs:
                self.queue.add(words, folder)

    @contextlib.contextmanager
    def _start_lock(self) -> Iterator[None]:
        """Let one request at a time, on any server, check the queue and add to it."""
        with explain_errors(self.queue.folder):
            self.queue.folder.mkdir(parents=True, exist_ok=True)
            with only_one(self.queue.folder / ".start.lock"):
                yield

    def _check_and_queue(self, folder: Path, argv: Sequence[str], is_reviewed: bool) -> None:
        """Add the run of a folder to the queue, unless it needs a review, or is already waiting or running.

        The caller holds the lock that keeps two requests from starting runs at the same time.
        """
        jobs = [job for job in self._list_jobs() if is_folder_run(job, folder)]
        if any(job.state == WAITING for job in jobs):
            raise refusal("It is already in the queue.")
        with self.runs.lock:
            self.runs.list_all()  # finds new folders, which `list_run_configs` then reads
            run_configs = self.list_run_configs()
        for run_config in run_configs:
            if run_config.folder == folder:
                if not is_reviewed and not self.is_trusted(run_config):
                    raise refusal(
                        "%(folder)s comes from elsewhere. Review what it may do on the page of "
                        "%(name)s, and start it there.",
                        folder=run_config.folder / RUN_FILE,
                        name=run_config.name,
                    )
                tracked_run = self.find(run_config.id)  # a job whose training has ended is about to end
                state = None if tracked_run is None else tracked_run.state
                # a background job is a check
                if state is not None and state.is_active and state.background_job is None:
                    raise refusal("It is already running: it is %(text)s.", text=state.text)
        if is_reviewed and recall_folder(folder) is None:  # the user has read run.toml: do not ask again
            remember_folder(folder)
        self.queue.add_and_begin(argv, Path.cwd())


def make_run_argv(described: DescribedFolder, models: Path) -> list[str]:
    """Return the command that downloads missing files and starts the folder's training run."""
    argv = ["reelsmith", "run", str(described.folder)]
    paths = [described.folder / path for path in described.model_files.values()]
    if not all(path.exists() for path in paths):
        argv.append("--download")
        known = recall_folder(described.folder)
        target = None if known is None else known.models  # use no path from run.toml
        if target is not None and target != real_path(models):
            argv += ["--models", str(target)]
        elif models != MODELS:
            argv += ["--models", str(models)]
    return argv


def make_check_argv(folder: Path) -> list[str]:
    """Return the command that checks a folder's run.toml and dataset before a training run."""
    return ["reelsmith", "run", str(folder), "--check"]


def find_start_argv(run_config: RunConfig, models: Path) -> list[str]:
    """Return the command that starts the training run of a run.toml, even if `new` did not write the file."""
    try:
        return make_run_argv(read_described(run_config.folder), models)
    except (OSError, ValueError):
        return ["reelsmith", "run", str(run_config.folder)]


def find_run_folder(job: Job) -> Path | None:
    """Return the real path of FOLDER in a job's `reelsmith run FOLDER`.

    Returns None for other jobs, and for commands that only check or print.
    """
    try:
        _, argv = split_extensions(job.argv)
    except OptionError:
        return None
    # `reelsmith run FOLDER` or `python reelsmith.py run FOLDER`
    if "run" not in argv[:3] or "--check" in argv or "--dry_run" in argv:
        return None
    index = argv.index("run") + 1
    if len(argv) <= index:
        return None
    try:
        path = real_path(Path(job.folder, argv[index]))
    except ValueError:  # not a valid file name
        return None
    return path.parent if path.name == RUN_FILE else path


def group_jobs(jobs: Sequence[Job]) -> dict[Path, list[Job]]:
    """Group the jobs that run `reelsmith run FOLDER` by the folder's real path."""
    by_folder: dict[Path, list[Job]] = {}
    for job in jobs:
        folder = find_run_folder(job)
        if folder is not None:
            by_folder.setdefault(folder, []).append(job)
    return by_folder


def is_folder_run(job: Job, folder: Path) -> bool:
    """Return whether a job runs `reelsmith run FOLDER` to train, and not only to check the folder."""
    return find_run_folder(job) == folder


def _find_active_state(
    run: RunSummary | None, preparation: RunSummary | None, job: Job | None
) -> RunState | None:
    """Return what the process of a run does now, or that its job waits; None if neither is active."""
    # `preparation` is the history of the downloads and caching before the training run.
    # a stop through the queue; `read_run_state` finds the other stops
    is_stop_requested = job is not None and job.state == RUNNING and job.stops > 0
    if run is not None and run.state == RUNNING:
        state = read_run_state(run)
        return replace(state, job=job, is_stop_requested=state.is_stop_requested or is_stop_requested)
    if preparation is not None and preparation.state == RUNNING:
        return replace(read_preparation_state(preparation), job=job, is_stop_requested=is_stop_requested)
    if job is None:
        return None
    if job.state == RUNNING:
        return _find_running_job_state(job, run, preparation)
    return RunState(WAITING, job=job) if job.state == WAITING else None


def newest_job(jobs: Sequence[Job]) -> Job | None:
    """Return the running job, otherwise a waiting job, otherwise the job started last; None without jobs."""
    for state in (RUNNING, WAITING):
        for job in jobs:
            if job.state == state:
                return job
    return max(jobs, key=lambda job: (job.born, job.id), default=None)


def _select_job(folder_jobs: Sequence[Job], run: RunSummary | None) -> Job | None:
    """Return the job to show for a folder: the newest one, or a waiting one if the newest has just ended."""
    # `run` is the folder's training run; None if it has no history.
    job = newest_job(folder_jobs)
    if job is None or job.state != RUNNING or run is None or run.state == RUNNING:
        return job
    waiting_jobs = [folder_job for folder_job in folder_jobs if folder_job.state == WAITING]
    # the training run ended after the job began, so the job is about to end
    is_about_to_end = run.changed > job.born + START_TIME_TOLERANCE
    return waiting_jobs[0] if waiting_jobs and is_about_to_end else job


def read_run_state(run: RunSummary) -> RunState:
    """Return the state of a training run according to its history.

    A name that ends with BEFORE_TRAINING belongs to the history of the downloads and caching before training.
    """
    is_preparation = run.name.endswith(BEFORE_TRAINING)
    if run.state == RUNNING:
        state = read_preparation_state(run) if is_preparation else _read_training_state(run.doing)
        return replace(state, is_stop_requested=(run.history.parent / f"{run.name}.stop").exists())
    if run.state != DIED:
        return RunState(run.state)
    if run.ending is None:
        reason: str = say(
            "It ended after step %(step)s without a message: it was killed, or the machine was turned off.",
            step=f"{run.step:,}",
        )
    else:
        text, _ = run.ending
        reason = translate_line(text)
    # errors that the check before the training run has found are not a crash
    has_failed_check = is_preparation and "while checking" in reason
    return RunState(FAILED_CHECK if has_failed_check else DIED, reason=reason)


def _read_training_state(doing: str) -> RunState:
    """Return the state of an active training run; `doing` names its current work, such as sampling."""
    sample = SAMPLE_PATTERN.fullmatch(doing)
    if sample is not None:
        progress = say("%(step)s of %(total_steps)s", step=sample[1], total_steps=sample[2])
        return RunState(SAMPLING, details=join("", (progress, sample[3])))
    if doing in TRAINING_STATES:
        return RunState(doing)
    return RunState(TRAINING, details=doing)


def read_preparation_state(preparation: RunSummary) -> RunState:
    """Return the state of a run that still downloads files or caches latents and texts before training."""
    step, _, progress = preparation.doing.partition(": ")
    if step not in PREPARATION_STEPS:
        return RunState(STARTING, details=preparation.doing)
    name, about = PREPARATION_STEPS[step]
    size = BYTES_PATTERN.fullmatch(progress)
    if size is not None:
        progress = say("%(done)s of %(total)s %(unit)s", done=size[1], total=size[3], unit=size[2])
        if name == CACHING:  # count only files, not the bytes of a model that is loaded
            return RunState(
                name, details=say("%(about)s, loading %(progress)s", about=about, progress=progress)
            )
    return RunState(name, details=join(", ", filter(None, (progress, about))))


def _find_latest_ended_state(
    run_config: RunConfig,
    run: RunSummary | None,
    preparation: RunSummary | None,
    job: Job | None,
    check: Job | None,
) -> RunState:
    """Return the state of an inactive run from its job, histories or check, whichever ended last."""
    # `preparation` is the history of the downloads and caching before the training run.
    # pairs (time of its end, state); time 0 makes "draft" the state if nothing has ended
    candidates: list[tuple[float, RunState]] = [(0.0, RunState(DRAFT, reason=run_config.problem))]
    histories = [history for history in (run, preparation) if history is not None]
    for history in histories:
        candidates.append((history.changed, _read_ended_run_state(history, job)))
    if job is not None and _ended_without_history(job, run_config, histories):
        candidates.append((job.born + job.seconds, _read_job_state(job)))
    # a check of an earlier run.toml says nothing about this one
    if check is not None and check.born + START_TIME_TOLERANCE >= run_config.changed:
        candidates.append((check.born + check.seconds, _read_check_state(check)))
    _, latest = max(candidates, key=lambda candidate: candidate[0])
    # a passed check does not change the state of a run that has begun
    if latest.name == DRAFT and run is not None:
        return read_run_state(run)
    return latest


def _find_running_job_state(job: Job, *histories: RunSummary | None) -> RunState:
    """Return the state of a run whose job is running but not writing a history: starting, or just ended."""
    for history in histories:
        if history is not None and history.changed > job.born + START_TIME_TOLERANCE:
            return _read_ended_run_state(history, job)  # the process is about to end
    return RunState(STARTING, details=job.last_lines(1), job=job, is_stop_requested=job.stops > 0)


def _read_ended_run_state(run: RunSummary, job: Job | None) -> RunState:
    """Return the state of an ended run with a history. `job` is the newest job of its folder, if any."""
    state = read_run_state(run)
    is_later_job = job is not None and job.born > run.changed + START_TIME_TOLERANCE
    if job is None or is_later_job:
        return state
    if state.name == DIED and run.ending is None and job.stops > 1:  # the second Stop kills the process
        return RunState(STOPPED, reason=explain_kill(run), job=job)
    if state.name == DIED and (run.ending is None or run.name.endswith(BEFORE_TRAINING)):
        state = replace(state, reason=_explain_failure(job, state.reason))
    return replace(state, job=job)


def explain_kill(run: RunSummary) -> str:
    """Describe where a run that was killed by a second Stop will continue."""
    if run.name.endswith(BEFORE_TRAINING):
        return say("Ended immediately from the page, before its training began. Continue resumes it.")
    states = state_pattern(run.name)
    state_folders = []
    with contextlib.suppress(OSError):
        folders = [entry for entry in run.history.parent.iterdir() if states.fullmatch(entry.name)]
        state_folders = sorted(folders, key=lambda folder: (folder.stat().st_mtime, folder.name))
    text = say("Ended immediately from the page after step %(step)s", step=f"{run.step:,}")
    if not state_folders:
        return say("%(text)s. No state was saved: it starts again from the beginning.", text=text)
    newest = state_folders[-1].name
    step = re.search(r"-step(\d+)-state$", newest)
    if step is not None:
        continuation = say("step %(step)s", step=f"{int(step[1]):,}")
    else:
        continuation = say("its last state, %(name)s", name=newest)
    return say("%(text)s; continues from %(place)s.", text=text, place=continuation)


def _ended_without_history(job: Job, run_config: RunConfig, histories: Sequence[RunSummary]) -> bool:
    """Return whether no history is as new as a job, so that only its exit code tells how the run ended."""
    # run.toml may have had another name when an older job ran
    if not histories and job.born + START_TIME_TOLERANCE < run_config.changed:
        return False
    return all(history.changed + START_TIME_TOLERANCE < job.born for history in histories)


def _read_check_state(check: Job) -> RunState:
    if check.code == 0:
        return RunState(DRAFT, details=say("checked, no fault"), background_job=check)
    if check.state == STOPPED:
        return RunState(DRAFT, details=say("its check was stopped"), background_job=check)
    return RunState(
        FAILED_CHECK, reason=_explain_failure(check, say("The check found faults.")), background_job=check
    )


def _read_job_state(job: Job) -> RunState:
    """Return the state of a run whose job has ended before its training began."""
    if job.state != DIED:
        return RunState(job.state, job=job)
    return RunState(DIED, reason=_explain_failure(job, say("It ended without a message.")), job=job)


def _explain_failure(job: Job, otherwise: str) -> str:
    """Return why a command has failed: its last error, or how it was killed; otherwise `otherwise`."""
    lines = job.last_lines(READ_LINES)
    if job.code in KILLED_EXIT_CODES:
        return say("It was killed: memory ran out, or somebody ended it.")
    if ERROR_LINE.search(lines):
        return translate_reason(shorten_lines(extract_error_message(lines), MAX_REASON_LENGTH))
    if job.state == RUNNING:  # it is about to end
        return otherwise
    # None: not even the exit code was written
    may_be_full_disk = job.code in (None, *DISK_FULL_EXIT_CODES)
    if may_be_full_disk and _is_disk_full(job.log.parent):
        return say(
            "The disk of %(parent)s is full: it could not write why it ended. Free some "
            "space, and start it again; what it has saved is used.",
            parent=job.log.parent,
        )
    if job.code is None:
        return say("Its process has ended without a message: it was killed, or the machine was turned off.")
    return otherwise


def _is_disk_full(folder: Path) -> bool:
    """Return whether the disk of a folder is full."""
    with contextlib.suppress(OSError):
        return free_bytes(folder) < SPARE_BYTES
    return False


def mark_state(tracked_run: TrackedRun) -> str:
    """Return a key that changes with everything that a page shows about a run's state."""
    state = tracked_run.state
    lines = state.last_lines if state.name in STATES_BEFORE_TRAINING else ""
    changed = 0.0 if tracked_run.run_config is None else tracked_run.run_config.changed
    info = (state.text, state.reason, state.is_stop_requested, state.is_paused, lines, changed)
    return short_digest(repr(info))


def is_started_by(run: RunSummary, job: Job) -> bool:
    """Return whether a job's process is a parent of the process of this training run."""
    if (
        run.state != RUNNING
        or run.start is None
        or not job.process
        or not is_process_alive(run.start.process)
    ):
        return False
    with contextlib.suppress(psutil.Error, KeyError):  # it has just ended
        parents = psutil.Process(run.start.process["number"]).parents()
        return job.process["number"] in {parent.pid for parent in parents}
    return False
