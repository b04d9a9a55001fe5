"""Determine the state of a run from its draft, its job, its check and its histories.

A folder that `new` has described is the draft of a run. Its run has the address of the history that its
training will write, so that one address leads to it from the draft to the finished LoRA.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from browser.background_jobs import BackgroundJobs, name_background_job
from browser.described_folder import (
    DATASET_FILE,
    TRAINING_TABLE,
    DescribedFolder,
    read_described,
    reject_share,
)
from browser.jobs import QUEUE, WAITING, Job, JobQueue, as_line
from browser.printed_lines import translate_line, translate_reason
from browser.runs import DIED, FINISHED, RUNNING, STOPPED, Runs, RunSummary
from browser.short_names import short_digest
from browser.state_names import name_state
from modules.atomic_write import SPARE_BYTES, explain_errors, free_bytes
from modules.control_codes import shorten_lines
from modules.error_output import ERROR_LINE, extract_error_message
from modules.errors import OptionError, UserError
from modules.file_locks import only_one
from modules.output_files import check_output_name
from modules.pages.language import join, say
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
DRAFT, CHECKING, FAULTS, STARTING = "draft", "checking", "faults", "starting"
DOWNLOADING, CACHING, LOADING = "downloading", "caching", "loading"
TRAINING, SAMPLING, VALIDATING, SAVING = "training", "sampling", "validating", "saving"
BEFORE = (DRAFT, CHECKING, FAULTS, WAITING, STARTING, DOWNLOADING, CACHING, LOADING)
DURING = (TRAINING, SAMPLING, VALIDATING, SAVING)
STATES = (*BEFORE, *DURING, STOPPED, FINISHED, DIED)
BUSY = (CHECKING, STARTING, DOWNLOADING, CACHING, LOADING, *DURING)  # a process works
# activity in the history of `run` -> state of the run, and its description
STEPS = {
    "downloading the model": (DOWNLOADING, ""),
    "checking the files": (CHECKING, say("the files")),
    "checking the clips": (CHECKING, say("the files")),  # text in older versions
    "checking the captions": (CHECKING, say("the captions")),
    "caching latents": (CACHING, say("latents")),
    "caching captions": (CACHING, say("captions")),
    "training": (LOADING, say("the model")),
}
SAMPLE = re.compile(r"sample (\d+) of (\d+)(.*)", re.DOTALL)
BYTES = re.compile(r"([\d.,]+) (\w+) of ([\d.,]+) \2")  # `11.2 GB of 34.8 GB`
KILLED = (9, -9, 137)  # exit codes after SIGKILL
UNWRITTEN = (1, 120)  # exit codes of Python after an error, 120 if flushing its output failed
SHOWN_LINES = 12  # number of lines of a log that a page shows
READ_LINES = 60  # lines of a log that are searched for the reason of a failure
MAX_OF_REASON = 600  # characters
SECOND = 1.0  # start times of processes are rounded


@dataclass(frozen=True)
class RunState:
    """State of a run, with the reason, the texts and the job that pages show for it."""

    name: str  # one of STATES
    words: str = ""  # details of the state: `40 of 120`
    reason: str = ""  # why it ended, or cannot begin
    job: Job | None = None  # job of the queue that is or was this run
    background_job: Job | None = None  # a check of its folder
    is_asked: bool = False  # a stop was requested
    is_paused: bool = False  # it waits in a paused queue

    @property
    def text(self) -> str:
        """The state as a text such as `caching 40 of 120, latents`."""
        separator = ", " if self.name in (WAITING, DRAFT, STARTING) else " "
        return join(separator, filter(None, (name_state(self.name), self.words)))

    @property
    def kind(self) -> str:
        """The state that lists show: several states share a color and a symbol."""
        if self.name in BUSY:
            return RUNNING
        return {DRAFT: WAITING, FAULTS: DIED}.get(self.name, self.name)

    @property
    def is_active(self) -> bool:
        """Whether a process works on the run, or it waits for one."""
        return self.name in BUSY or self.name == WAITING

    @property
    def last_lines(self) -> str:
        """Last lines that the run's command has printed; "" if its log is unknown."""
        source = self.background_job if self.background_job is not None else self.job
        return "" if source is None else source.last_lines(SHOWN_LINES)


@dataclass(frozen=True)
class FolderPlan:
    """The run that the run.toml of a described folder defines: its model, history and number of steps."""

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
        """Folder that the training saves into."""
        return self.history.parent

    @property
    def preparation(self) -> Path:
        """History file of the steps that `run` takes before the training."""
        return history_path(self.output, f"{self.name}{BEFORE_TRAINING}")

    @property
    def summary(self) -> RunSummary:
        """Summary of a described folder's run for the list of runs, while it has no history."""
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


def read_plan(path: Path, changed: float) -> FolderPlan | None:
    """Read a run.toml. Returns None if it belongs to another program.

    `changed` is its modification time. Raises OSError if it cannot be read.
    """
    return make_plan(path, read_content(path), changed)


def make_plan(path: Path, content: bytes, changed: float) -> FolderPlan | None:
    """Parse the bytes of a run.toml. Returns None if it belongs to another program.

    `changed` is its modification time.
    """
    folder = real_path(path.parent)
    try:
        tables = parse_toml(content.decode())
    except ValueError as error:
        if not (folder / DATASET_FILE).is_file():  # a described folder has a dataset.toml too
            return None
        return FolderPlan(folder, _find_default_history(folder), changed, problem=f"{path}: {error}")
    if PROJECT_TABLE not in tables:
        return None
    try:
        return _parse_plan(folder, tables, changed)
    except (OptionError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        problem = f"{path} is not as `new` writes it ({reason})"
        return FolderPlan(folder, _find_default_history(folder), changed, problem=problem)


def _find_default_history(folder: Path) -> Path:
    return history_path(folder / "output", folder.name)


def _parse_plan(folder: Path, tables: Mapping[str, Any], changed: float) -> FolderPlan:
    """Parse the training that a described folder's run.toml defines; any invalid value raises an error."""
    values = tables[TRAINING_TABLE]
    name = str(values["output_name"])
    check_output_name("output_name", name, is_new=False)
    commands = tables[PROJECT_TABLE]["commands"]
    download = [str(word) for word in commands[0]]  # `new` writes the download of the model first
    next_words = dict(zip(download, download[1:], strict=False))  # word -> the word after it
    prompts = values.get("sample_prompts")
    for text in (str(values["output_dir"]), str(prompts or "")):
        reject_share(text, folder)
    return FolderPlan(
        folder=folder,
        history=history_path(real_path(expand_path(str(values["output_dir"]), folder)), name),
        changed=changed,
        model=_read_family([[str(word) for word in words] for words in commands])
        or next_words.get("--family", ""),
        # epochs take precedence over steps
        steps=0 if "max_train_epochs" in values else int(values.get("max_train_steps", 0)),
        prompts=None if prompts is None else expand_path(str(prompts), folder),
    )


def _read_family(commands: Sequence[Sequence[Any]]) -> str:
    """Return the family of a run's commands, as lists of runs name it; "" if they belong to none.

    The catalogue's families are divided differently (`wan22`, `stable_diffusion`). For a ControlNet, an
    embedding or a full model, the family is that of the caching commands, which are the same for all kinds of
    runs.
    """
    families = {f"{entry.cache}_latents.py": name for name, entry in with_scripts().items()}
    families |= {f"{entry.training_script}.py": name for name, entry in with_scripts().items()}
    words = [str(word) for command in reversed(commands) for word in command]
    return next((families[word] for word in words if word in families), "")


@dataclass(frozen=True)
class ShownRun:
    """A run, its state, and the described folder that defines it, if there is one."""

    summary: RunSummary
    state: RunState
    plan: FolderPlan | None = None  # plan of the described folder from which it can be started

    @property
    def ended_at_once(self) -> str:
        """Reason to show for a run that the page has killed; "" for all other runs."""
        return self.state.reason if self.state.name == STOPPED and self.summary.state == DIED else ""


@dataclass(frozen=True)
class WaitingJobs:
    """Numbers of the waiting jobs in their order, read once for all runs of a list."""

    numbers: Sequence[int]
    is_paused: bool  # the queue is paused


class TrackedRuns:
    """Finds described folders, and determines the state of their runs and of all other runs."""

    def __init__(self, runs: Runs, queue: JobQueue, background_jobs: BackgroundJobs) -> None:
        self.runs = runs
        self.queue = queue
        self.background_jobs = background_jobs
        self._plans: dict[Path, tuple[tuple[int, int, int], FolderPlan | None]] = {}

    # ---- what there is

    def list_plans(self) -> list[FolderPlan]:
        """Return the described folders below the roots. Call it after the runs were listed."""
        with self.runs.lock:
            plans = {}
            known: dict[Path, tuple[tuple[int, int, int], FolderPlan | None]] = {}
            for path in self.runs.configs():
                if path.name == RUN_FILE and path not in known:
                    with contextlib.suppress(OSError):
                        known[path] = self._read_plan(path)
            self._plans = known
            for _, plan in known.values():
                if plan is not None:
                    plans[plan.history] = plan
            return list(plans.values())

    def _read_plan(self, path: Path) -> tuple[tuple[int, int, int], FolderPlan | None]:
        """Return a run.toml's (time, size, inode) and plan; the file is read only if these have changed."""
        status = path.lstat()
        mark = status.st_mtime_ns, status.st_size, status.st_ino
        before = self._plans.get(path)
        if before is not None and before[0] == mark:
            return before
        return mark, read_plan(path, status.st_mtime)

    def find_plan(self, run: RunSummary) -> FolderPlan | None:
        """Return the described folder from which a run can be started again; None if there is none."""
        plans = self.list_plans()
        return next((plan for plan in plans if run.history in (plan.history, plan.preparation)), None)

    def list_all(self) -> list[ShownRun]:
        """Return all runs, and described folders that have not run yet, with states, the newest first."""
        with self.runs.lock:
            runs_by_history = {run.history: run for run in self.runs.list_all()}
            plans = self.list_plans()
        jobs = self._list_jobs()
        by_folder = group_jobs(jobs)
        waiting = self._list_waiting(jobs)
        shown_runs = []
        for plan in plans:
            run = runs_by_history.pop(plan.history, None)
            preparation = runs_by_history.pop(plan.preparation, None)
            shown_runs.append(self._show(plan, run, preparation, by_folder.get(plan.folder, ()), waiting))
        # what is left are runs without a described folder
        shown_runs += [ShownRun(run, read_run_state(run)) for run in runs_by_history.values()]
        return sorted(shown_runs, key=lambda shown_run: -shown_run.summary.changed)

    def find(self, id: str) -> ShownRun | None:
        """Return the run of this id, or the described folder that has not run yet; None if there is none."""
        with self.runs.lock:
            runs = self.runs.list_all()
            # a described folder (plan) has the id of the training that it defines, begun or not
            plan = next((plan for plan in self.list_plans() if plan.id == id), None)
            run = None
            preparation = None  # the run that downloads and caches before the training, if it is listed
            for listed in runs:
                if listed.id == id:
                    run = listed
                if plan is not None and listed.history == plan.preparation:
                    preparation = listed
            if run is None:  # its history may be new, or no longer listed
                run = self.runs.find(id)
        if plan is None:
            return None if run is None else ShownRun(run, read_run_state(run))
        jobs = self._list_jobs()
        of_folder = [job for job in jobs if is_run_of_folder(job, plan.folder)]
        return self._show(plan, run, preparation, of_folder, self._list_waiting(jobs))

    def find_job_states(self, jobs: Sequence[Job]) -> dict[int, ShownRun]:
        """Return the run of each waiting or running job that runs a described folder, by job number."""
        shown = {}
        for one in self.list_all():
            job = one.state.job
            if job is not None and job.state in (WAITING, RUNNING):
                shown[job.id] = one
        numbers = {job.id for job in jobs}
        return {number: one for number, one in shown.items() if number in numbers}

    def _list_jobs(self) -> list[Job]:
        try:
            return self.queue.jobs()
        except UserError:
            return []  # the queue's page reports the reason

    # ---- how a run stands

    def _list_waiting(self, jobs: Sequence[Job]) -> WaitingJobs:
        numbers = [job.id for job in jobs if job.state == WAITING]
        return WaitingJobs(numbers, is_paused=bool(numbers) and self._is_paused())

    def _show(
        self,
        plan: FolderPlan,
        run: RunSummary | None,
        preparation: RunSummary | None,
        of_folder: Sequence[Job],
        waiting: WaitingJobs,
    ) -> ShownRun:
        """Return a described folder's run with its state.

        Args:
            plan: The described folder.
            run: Summary of the training's history; None if it does not exist.
            preparation: Summary of the history in which `run` notes downloads and caching; None if it does
                not exist.
            of_folder: Jobs that run the folder.
            waiting: Waiting jobs of all folders.
        """
        job = newest_job(of_folder)
        if job is not None and job.state == RUNNING and run is not None and run.state != RUNNING:
            later = [entry for entry in of_folder if entry.state == WAITING]
            # the training ended after the job began, so the job is about to end: show the one that waits
            if later and run.changed > job.born + SECOND:
                job = later[0]
        state = self._find_state(plan, run, preparation, job)
        if state.name == WAITING and job is not None:
            position = waiting.numbers.index(job.id) + 1
            text = say("place %(place)s in the queue", place=position)
            if waiting.is_paused:
                text = say("%(place)s, which is paused", place=text)
            reason = "" if waiting.is_paused else self.queue.problem
            state = replace(state, words=text, reason=reason, is_paused=waiting.is_paused)
        # time by which the list sorts the run
        changed = max(entry.changed for entry in (plan, run, preparation) if entry is not None)
        if job is not None and (job.state == RUNNING or state.job is job):
            changed = max(changed, job.born)
        if state.name == WAITING:
            with contextlib.suppress(OSError):
                changed = max(changed, (self.queue.folder / QUEUE).stat().st_mtime)
        summary = plan.summary if run is None else run
        return ShownRun(replace(summary, changed=changed), state, plan)

    def _is_paused(self) -> bool:
        try:
            return self.queue.worker == ""
        except UserError:
            return False

    def _find_state(
        self, plan: FolderPlan, run: RunSummary | None, preparation: RunSummary | None, job: Job | None
    ) -> RunState:
        """Return the state of a described folder's run: its active process, or else its latest ending.

        `preparation` is the history of the downloads and caching before the training.
        """
        # a stop was requested
        is_asked = job is not None and job.state == RUNNING and job.stops > 0
        if run is not None and run.state == RUNNING:
            state = read_run_state(run)
            return replace(state, job=job, is_asked=state.is_asked or is_asked)
        if preparation is not None and preparation.state == RUNNING:
            return replace(read_preparation_state(preparation), job=job, is_asked=is_asked)
        if job is not None and job.state == RUNNING:
            return _find_running_job_state(job, run, preparation)
        if job is not None and job.state == WAITING:
            return RunState(WAITING, job=job)
        # no active job: the folder may be checked just now (`run --check` in the background)
        check = self.background_jobs.find(name_background_job(CHECK, plan.folder))
        if check is not None and check.state == RUNNING:
            return RunState(CHECKING, background_job=check)
        return _find_last_ending(plan, run, preparation, job=job, check=check)

    # ---- starting

    def is_known(self, plan: FolderPlan) -> bool:
        """Return whether the user has described or read a folder on this machine.

        Otherwise it may come from somebody else. Files below the roots, such as histories and the queue,
        prove nothing, because they may have been copied.
        """
        return recall_folder(plan.folder) is not None

    def start(self, folder: Path, argv: Sequence[str], is_read: bool = False) -> None:
        """Add the run of a described folder to the queue, and start the queue unless other jobs wait.

        Args:
            folder: The described folder.
            argv: Command of the run.
            is_read: The user has read its run.toml; this is remembered.

        Raises:
            OptionError: If the run is active, or its run.toml comes from elsewhere and was not read.
            OutputError: If the queue cannot be written.
        """
        with self._only_one_starts():
            self._start(real_path(folder), argv, is_read)

    def reject_while_it_runs(self, folder: Path) -> None:
        """Raise OptionError if a training run of the folder is running, because its files must not change."""
        for shown in self.list_all():
            is_of_folder = shown.plan is not None and shown.plan.folder == folder
            if is_of_folder and shown.state.name in BUSY and shown.state.name != CHECKING:
                raise OptionError(
                    say(
                        "%(name)s is %(text)s. It has read its files already, and would continue with "
                        "others: stop it first, or wait until it has ended.",
                        name=shown.summary.name,
                        text=shown.state.text,
                    )
                )

    def add_jobs(self, jobs: Sequence[tuple[Sequence[str], Path]]) -> None:
        """Add commands, each with its working folder, to the queue.

        Raises OptionError if one of them already waits or runs, OutputError if the queue cannot be written.
        """
        with self._only_one_starts():
            present = [(job.line, job.folder) for job in self._list_jobs() if job.state in (WAITING, RUNNING)]
            if any((as_line(words), str(real_path(folder))) in present for words, folder in jobs):
                raise OptionError(say("It is in the queue already."))
            for words, folder in jobs:
                self.queue.add(words, folder)

    @contextlib.contextmanager
    def _only_one_starts(self) -> Iterator[None]:
        """Let one request at a time, on any server, check the queue and add to it."""
        with explain_errors(self.queue.folder):
            self.queue.folder.mkdir(parents=True, exist_ok=True)
            with only_one(self.queue.folder / ".start.lock"):
                yield

    def _start(self, folder: Path, argv: Sequence[str], is_read: bool) -> None:
        """Add the run of a described folder to the queue, unless it is unread, waits or runs.

        The caller holds the lock that keeps two requests from starting runs at the same time.
        """
        jobs = [job for job in self._list_jobs() if is_run_of_folder(job, folder)]
        if any(job.state == WAITING for job in jobs):
            raise OptionError(say("It is in the queue already."))
        with self.runs.lock:
            self.runs.list_all()  # finds new folders, which `list_plans` then reads
            plans = [plan for plan in self.list_plans() if plan.folder == folder]
        for plan in plans:
            if not is_read and not self.is_known(plan):
                raise OptionError(
                    say(
                        "%(folder)s comes from elsewhere. Read what it may do first, on the page of "
                        "%(name)s, and start it there.",
                        folder=plan.folder / RUN_FILE,
                        name=plan.name,
                    )
                )
            shown = self.find(plan.id)  # a job whose training has ended is about to end
            # a background job is a check, during which the run may start
            if shown is not None and shown.state.is_active and shown.state.background_job is None:
                raise OptionError(say("It runs already: it is %(text)s.", text=shown.state.text))
        if is_read and recall_folder(folder) is None:  # the user has read what it may do: ask no more
            remember_folder(folder)
        self.queue.add_and_begin(argv, Path.cwd())


def make_run_argv(described: DescribedFolder, models: Path) -> list[str]:
    """Return the command that trains on a described folder and downloads missing files."""
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
    """Return the command that checks a described folder."""
    return ["reelsmith", "run", str(folder), "--check"]


def find_start_argv(plan: FolderPlan, models: Path) -> list[str]:
    """Return the command that trains on a described folder, even if `new` did not write its run.toml."""
    try:
        return make_run_argv(read_described(plan.folder), models)
    except (OSError, ValueError):
        return ["reelsmith", "run", str(plan.folder)]


def find_run_folder(job: Job) -> Path | None:
    """Return the folder that a job's `reelsmith run FOLDER` trains in, as a real path.

    Returns None for other jobs, and for commands that only check or print.
    """
    try:
        argv = job.argv
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
    """Return the jobs that run a described folder (`reelsmith run`), by the real path of the folder."""
    by_folder: dict[Path, list[Job]] = {}
    for job in jobs:
        folder = find_run_folder(job)
        if folder is not None:
            by_folder.setdefault(folder, []).append(job)
    return by_folder


def is_run_of_folder(job: Job, folder: Path) -> bool:
    """Return whether a job runs a described folder (`reelsmith run`), and does not only check it."""
    return find_run_folder(job) == folder


def newest_job(jobs: Sequence[Job]) -> Job | None:
    """Return the running job, else a waiting job, else the job that started last; None without jobs."""
    for state in (RUNNING, WAITING):
        for job in jobs:
            if job.state == state:
                return job
    return max(jobs, key=lambda job: (job.born, job.id), default=None)


def read_run_state(run: RunSummary) -> RunState:
    """Return the state of a run with a history."""
    if run.state == RUNNING:
        state = (
            read_preparation_state(run)
            if run.name.endswith(BEFORE_TRAINING)
            else _read_training_state(run.doing)
        )
        return replace(state, is_asked=(run.history.parent / f"{run.name}.stop").exists())
    if run.state == DIED:
        reason: str = say(
            "It ended after step %(step)s without a word: it was killed, or the machine went off.",
            step=f"{run.step:,}",
        )
        if run.ending is not None:
            reason = translate_line(run.ending[0])
        # the check before the training has found errors: that is not a crash
        is_at_check = run.name.endswith(BEFORE_TRAINING) and "while checking" in reason
        return RunState(FAULTS if is_at_check else DIED, reason=reason)
    return RunState(run.state)


def _read_training_state(doing: str) -> RunState:
    """Return the state of a running training; `doing` names its work between two steps, such as sampling."""
    sample = SAMPLE.fullmatch(doing)
    if sample is not None:
        progress = say("%(step)s of %(total_steps)s", step=sample[1], total_steps=sample[2])
        return RunState(SAMPLING, words=join("", (progress, sample[3])))
    if doing in DURING:
        return RunState(doing)
    return RunState(TRAINING, words=doing)


def read_preparation_state(preparation: RunSummary) -> RunState:
    """Return the state of a run that still downloads or caches, as `reelsmith run` does before training."""
    step, _, progress = preparation.doing.partition(": ")
    if step not in STEPS:
        return RunState(STARTING, words=preparation.doing)
    name, about = STEPS[step]
    size = BYTES.fullmatch(progress)
    if size is not None:
        progress = say("%(done)s of %(total)s %(unit)s", done=size[1], total=size[3], unit=size[2])
        if name == CACHING:  # count only files, not the bytes of a model that is loaded
            return RunState(
                name, words=say("%(about)s, loading %(progress)s", about=about, progress=progress)
            )
    return RunState(name, words=join(", ", filter(None, (progress, about))))


def _find_last_ending(
    plan: FolderPlan,
    run: RunSummary | None,
    preparation: RunSummary | None,
    job: Job | None,
    check: Job | None,
) -> RunState:
    """Return the state of an inactive run: that of its job, histories or check, whichever ended last.

    `preparation` is the history of the downloads and caching before the training.
    """
    # time 0: it counts only if nothing has ended
    candidates: list[tuple[float, RunState]] = [(0.0, RunState(DRAFT, reason=plan.problem))]
    histories = [history for history in (run, preparation) if history is not None]
    for history in histories:
        candidates.append((history.changed, _read_ended_run_state(history, job)))
    if job is not None and _has_no_history(job, plan, histories):
        candidates.append((job.born + job.seconds, _read_job_state(job)))
    # a check of an earlier run.toml says nothing about this one
    if check is not None and check.born + SECOND >= plan.changed:
        candidates.append((check.born + check.seconds, _read_check_state(check)))
    _, latest = max(candidates, key=lambda candidate: candidate[0])
    # a passed check does not change the state of a run that has begun
    if latest.name == DRAFT and run is not None:
        return read_run_state(run)
    return latest


def _find_running_job_state(job: Job, *histories: RunSummary | None) -> RunState:
    """Return the state of a run whose job is running but does not write a history yet."""
    for history in histories:
        if history is not None and history.changed > job.born + SECOND:
            return _read_ended_run_state(history, job)  # the process is about to end
    return RunState(STARTING, words=job.last_lines(1), job=job, is_asked=job.stops > 0)


def _read_ended_run_state(run: RunSummary, job: Job | None) -> RunState:
    """Return the state of an ended run with a history; `job` is its folder's latest, None without one."""
    state = read_run_state(run)
    if job is None or job.born > run.changed + SECOND:  # a job that started after the run's last change
        return state
    is_silent = run.ending is None or run.name.endswith(BEFORE_TRAINING)
    if state.name == DIED and run.ending is None and job.stops > 1:
        return RunState(STOPPED, reason=explain_end_at_once(run), job=job)
    if state.name == DIED and is_silent:
        state = replace(state, reason=_explain(job, state.reason))
    return replace(state, job=job)


def explain_end_at_once(run: RunSummary) -> str:
    """Describe where a run that was killed by a second Stop will continue."""
    if run.name.endswith(BEFORE_TRAINING):
        return say("Ended at once from the page, before its training began. Continue begins where it was.")
    states = state_pattern(run.name)
    saved = []
    with contextlib.suppress(OSError):
        folders = [entry for entry in run.history.parent.iterdir() if states.fullmatch(entry.name)]
        saved = sorted(folders, key=lambda folder: (folder.stat().st_mtime, folder.name))
    text = say("Ended at once from the page after step %(step)s", step=f"{run.step:,}")
    if not saved:
        return say("%(text)s. No state was saved: it begins anew.", text=text)
    step = re.search(r"-step(\d+)-state$", saved[-1].name)
    continuation = (
        say("step %(step)s", step=f"{int(step[1]):,}")
        if step is not None
        else say("its last state, %(name)s", name=saved[-1].name)
    )
    return say("%(text)s; continues from %(place)s.", text=text, place=continuation)


def _has_no_history(job: Job, plan: FolderPlan, histories: Sequence[RunSummary]) -> bool:
    """Return whether a job has written no history, so that only its exit code shows how the run ended."""
    # run.toml may have had another name when an older job ran
    if not histories and job.born + SECOND < plan.changed:
        return False
    return all(history.changed + SECOND < job.born for history in histories)


def _read_check_state(check: Job) -> RunState:
    if check.code == 0:
        return RunState(DRAFT, words=say("checked, no fault"), background_job=check)
    if check.state == STOPPED:
        return RunState(DRAFT, words=say("its check was stopped"), background_job=check)
    return RunState(FAULTS, reason=_explain(check, say("The check found faults.")), background_job=check)


def _read_job_state(job: Job) -> RunState:
    """Return the state of a run whose job has ended before its training began."""
    if job.state != DIED:
        return RunState(job.state, job=job)
    return RunState(DIED, reason=_explain(job, say("It ended without a word.")), job=job)


def _explain(job: Job, otherwise: str) -> str:
    """Return why a command has ended: its last error, or how it was killed; else `otherwise`."""
    lines = job.last_lines(READ_LINES)
    if job.code in KILLED:
        return say("It was killed: memory ran out, or somebody ended it.")
    if ERROR_LINE.search(lines):
        return translate_reason(shorten_lines(extract_error_message(lines), MAX_OF_REASON))
    if job.state == RUNNING:  # it is about to end
        return otherwise
    # UNWRITTEN: exit codes that a full disk causes, among other errors
    if job.code in (None, *UNWRITTEN) and _is_full(job.log.parent):  # None: not even the code was written
        return say(
            "The disk of %(parent)s is full: it could not write why it ended. Free some "
            "space, and start it again; what it has saved is used.",
            parent=job.log.parent,
        )
    if job.code is None:
        return say("Its process has ended without a word: it was killed, or the machine went off.")
    return otherwise


def _is_full(folder: Path) -> bool:
    """Return whether the disk of a folder is full."""
    with contextlib.suppress(OSError):
        return free_bytes(folder) < SPARE_BYTES
    return False


def mark_state(shown: ShownRun) -> str:
    """Return a key that changes when anything that a page shows of a run's state has changed."""
    state = shown.state
    lines = state.last_lines if state.name in BEFORE else ""
    changed = 0.0 if shown.plan is None else shown.plan.changed
    info = (state.text, state.reason, state.is_asked, state.is_paused, lines, changed)
    return short_digest(repr(info))
