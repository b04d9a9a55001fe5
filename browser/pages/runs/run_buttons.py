"""Answer the buttons of a run: start, stop and continue it, train on, edit its samples, remove it."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from browser.core.bin_folder import FOLDER as BIN
from browser.core.bin_folder import BinFolder
from browser.core.responses import (
    Form,
    answer_form,
    answer_json,
    answer_message,
    answer_move,
    answer_not_found,
    answer_page,
    answer_template,
)
from browser.core.server_state import Site
from browser.core.short_names import free_name, short_digest
from browser.core.templates import show_page
from browser.folders.captions import CaptionConflictError, compute_checksum
from browser.folders.described_folder import (
    FILES,
    ChangedMeanwhileError,
    change_keys,
    change_steps,
    read_described,
)
from browser.folders.new_form import read_steps
from browser.folders.sample_rows import list_images
from browser.jobs.background_jobs import name_background_job
from browser.jobs.command_lines import format_cd, format_command, format_move
from browser.jobs.jobs import ENDED, QUEUE, WAITING, Job
from browser.jobs.launch import check_options, command_part, find_program, split_arguments
from browser.jobs.typed_jobs import read_jobs
from browser.pages.runs.permissions import read_permissions, read_shown_text
from browser.pages.runs.run_samples import RunSamples, read_fields
from browser.pages.runs.score_jobs import make_score_argv
from browser.runs.comparable_runs import group_options, read_source, working_folder
from browser.runs.run_start import (
    ACTIVE_STATES,
    CHECK,
    CHECKING,
    DRAFT,
    FAILED_CHECK,
    TRAINING,
    RunConfig,
    TrackedRun,
    find_start_argv,
    is_folder_run,
    is_started_by,
    make_check_argv,
    mark_state,
)
from browser.runs.runs import DIED, FINISHED, RUNNING, STOPPED, RunSummary
from modules.command import quote_command
from modules.console import format_size
from modules.errors import OptionError, UserError
from modules.pages.language import refusal, say, say_count
from modules.paths import complete_home, expand_path
from modules.text_files import read_content
from project.options import RUN_FILE
from training.reports.history import BEFORE_TRAINING, END, PageCommand, history_path
from training.reports.present_files import current_commands
from training.saving.files import Names, find_results

PROMPT_FILES = (".txt",)  # endings of prompt files that are edited as text
MAX_LISTED = 200  # maximum number of files listed in a question
RESUME = "--resume"
STEPS_OPTION = "--max_train_steps"


GENERATE = "Generate with it"  # title of the generating command in a history
PROMPT = "--prompt"
# options for a control image in the generation commands that ControlNet trainings print
CONTROL_FLAGS = ("--control_image", "--guide_image_path")


@dataclass(frozen=True)
class GenerationCommand:
    """The command in a run's history that generates with the trained file, split into form fields."""

    index_in_history: int  # index among the commands of the history
    argv: Sequence[str]
    is_trusted: bool  # the user wrote it here, so it is queued without review
    placeholders: Sequence[str] = ()  # arguments that the user has to replace
    control_images: Sequence[str] = ()  # images that it can use as control image, as paths in its folder

    def find_value_index(self, flags: Sequence[str]) -> int:
        """Return the index of the argument after the first of these options; 0 if the command has none."""
        return next((index for index, flag in enumerate(self.argv[:-1], 1) if flag in flags), 0)

    def initial_text(self, index: int) -> str:
        """Return the argument at an index to fill its form field; "" for a placeholder."""
        word = self.argv[index]
        return "" if word in self.placeholders else word

    @property
    def fields(self) -> list[tuple[int, str, str]]:
        """Form fields: the prompt, the control image and each other placeholder, as (index, label, text)."""
        prompt_index = self.find_value_index([PROMPT])
        control_index = self.control_index
        fields: list[tuple[int, str, str]] = []
        if prompt_index:
            fields.append((prompt_index, say("Prompt"), self.initial_text(prompt_index)))
        if control_index:
            fields.append((control_index, say("Control image"), self.initial_text(control_index)))
        for index, word in enumerate(self.argv):
            if index > 1 and word in self.placeholders and index not in (prompt_index, control_index):
                option = self.argv[index - 1]
                fields.append((index, option, ""))
        return fields

    @property
    def control_index(self) -> int:
        """Index of the argument with the control image or clip; 0 if the command has none."""
        return self.find_value_index(CONTROL_FLAGS)

    def fill(self, form: Form) -> list[str]:
        """Return the command with the user's input filled in. Raises OptionError if a field is empty."""
        argv = list(self.argv)
        for index, label, text in self.fields:
            typed = "".join(form.get(f"word {index}", ())).strip() or text
            if not typed:
                raise refusal("Fill in %(label)s.", label=label)
            argv[index] = complete_home(typed) if index == self.control_index else typed
        return argv


class ResumeCommand(NamedTuple):
    """The command in a run's history that resumes the run."""

    index_in_history: int
    command: PageCommand


@dataclass(frozen=True)
class RunActions:
    """The commands of a run's current buttons; "" for a button that is not shown."""

    start: str = ""
    start_label: str = say("Continue")
    is_trusted: bool = True  # False: the user has to read its run.toml before it starts
    check: str = ""
    stop: str = ""
    train_on: str = ""
    initial_steps: int = 0  # number of steps suggested by the button Train on
    run_checksum: str = ""  # checksum of the run.toml that Train on changes
    next_name: str = ""  # name suggested for another run by the button Again with changes
    folder: str = ""  # folder for the button Again with changes
    prompt_file: str = ""
    has_lora: bool = False  # images can be generated with it
    can_generate: bool = False  # whether the Generate page can fill its form from a command in the history
    generation: "GenerationCommand | None" = None  # generation command, if the Generate page cannot be used
    score: str = ""
    remove: str = ""
    review_address: str = ""  # address of the queue's page for reviewing a foreign command


class RunButtons:
    """Shows the state of a run with its buttons, and handles the buttons."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.tracked_runs = site.tracked_runs
        self.samples = RunSamples(site)
        self.actions: dict[str, Callable[[TrackedRun, Form], str]] = {
            "start": self.start,
            "check": self.check,
            "stop": self.stop,
            "train_on": self.train_on,
            "make": self.make,
            "score": self.score,
            "go_on": self.go_on,
            "prompts": self.write_prompts,
        }

    # ---- showing a run

    def show_page(self, tracked_run: TrackedRun) -> str:
        """Return the HTML page of a run that has not written a history file yet."""
        values = {
            "actions": Markup(self.render(tracked_run)),
            "further": Markup(self.render(tracked_run, "runs/more_actions.html")),
            "run_config": tracked_run.run_config,
            "is_trusted": tracked_run.run_config is None
            or self.tracked_runs.is_trusted(tracked_run.run_config),
        }
        return show_page("runs/folder_plan.html", tracked_run.summary.name, values)

    def render(self, tracked_run: TrackedRun, template: str = "runs/actions.html") -> str:
        """Return the buttons of a run, and the texts next to them, as HTML.

        Args:
            template: `actions.html` for the buttons above the samples, `more_actions.html` for those below.
        """
        return show_page(template, tracked_run.summary.name, self.values(tracked_run))

    def values(self, tracked_run: TrackedRun) -> dict[str, Any]:
        """Return the template values of a run's buttons."""
        run = tracked_run.summary
        state = tracked_run.state
        return {
            "id": run.id,
            "name": run.name,
            "state": state,
            "mark": mark_state(tracked_run),
            "is_begun": run.history.exists(),
            "last_lines": self.last_lines(tracked_run),
            "actions": RunActions() if self.site.read_only else self.list_actions(tracked_run),
            "can_write": not self.site.read_only,
            "work_command": self.work_command(),
            "is_over": state.name in (DIED, FINISHED, STOPPED, FAILED_CHECK),
        }

    def last_lines(self, tracked_run: TrackedRun) -> str:
        """Return the last lines of the log or history of a run that has not begun or has failed."""
        state = tracked_run.state
        if state.name in (TRAINING, FINISHED, STOPPED, WAITING):
            return ""
        if state.last_lines:
            return state.last_lines
        if state.name not in (DIED, FAILED_CHECK):
            return ""
        with contextlib.suppress(OSError), self.site.runs.lock:
            messages = self.site.runs.open(tracked_run.summary).run_history.messages[-12:]
            return "\n".join(text for _, _, text in messages)
        return ""

    def list_actions(self, tracked_run: TrackedRun) -> RunActions:
        """Return the buttons that a run's page offers in its current state, with their commands."""
        prompts = self.find_prompts(tracked_run)
        actions = RunActions(
            remove=say("moves its files into %(bin)s", bin=BIN),
            prompt_file="" if prompts is None else str(prompts),
        )
        if has_lora(tracked_run.summary):
            can_generate = self.can_generate(tracked_run.summary)
            # without the Generate page, the command in the history can still generate with the file
            generation = None if can_generate else self.find_generation_command(tracked_run.summary)
            actions = replace(actions, can_generate=can_generate, has_lora=True, generation=generation)
        if tracked_run.state.is_active:  # no other button makes sense while the run is active
            return replace(actions, stop=self.stop_command(tracked_run))
        score_argv = make_score_argv(tracked_run.summary, self.site.models)
        actions = replace(actions, score=format_command(score_argv) if score_argv else "")
        if tracked_run.run_config is None:
            return self.add_history_actions(actions, tracked_run)
        return self.add_config_actions(actions, tracked_run, tracked_run.run_config)

    def add_config_actions(
        self, actions: RunActions, tracked_run: TrackedRun, run_config: RunConfig
    ) -> RunActions:
        """Return `actions` with the buttons that start, check, extend or repeat the run of a run.toml."""
        run = tracked_run.summary
        has_run = run.history.exists()
        is_draft = tracked_run.state.name == DRAFT  # run.toml was written, but never run
        start_command = format_command(find_start_argv(run_config, self.site.models))
        actions = replace(
            actions, folder=str(run_config.folder), is_trusted=self.tracked_runs.is_trusted(run_config)
        )
        if tracked_run.state.name != FINISHED:
            actions = replace(
                actions, start=start_command, start_label=say("Start") if is_draft else say("Continue")
            )
        if tracked_run.state.name in (DRAFT, FAILED_CHECK):
            actions = replace(actions, check=format_command(make_check_argv(run_config.folder)))
        if has_run and run_config.steps:  # 0: run.toml sets max_train_epochs instead
            actions = replace(
                actions,
                train_on=start_command,
                initial_steps=suggest_steps(run, run_config.steps),
                run_checksum=compute_checksum(read_content(run_config.folder / RUN_FILE)),
            )
        if has_run or not is_draft:  # it can be repeated under another name
            actions = replace(actions, next_name=free_name(run_config.output, run_config.name))
        return actions

    def add_history_actions(self, actions: RunActions, tracked_run: TrackedRun) -> RunActions:
        """Return `actions` with the buttons Continue and Train on for a run without a run.toml.

        Both use the resume command in the run's history. A history from another machine or user gets only a
        link to the Queue page, where the user reviews the command first.
        """
        run = tracked_run.summary
        resume = self.find_resume_command(run)
        if resume is None:
            return actions
        if not run.is_trusted:
            review_address = f"/queue?run={run.id}&command={resume.index_in_history}#words"
            return replace(actions, review_address=review_address)
        command_line = f"{format_cd(run.working_folder)}{resume.command.bash}"
        if tracked_run.state.name != FINISHED:
            actions = replace(actions, start=command_line)
        if STEPS_OPTION in resume.command.bash:
            steps = suggest_steps(run, run.total_steps)
            actions = replace(actions, initial_steps=steps, train_on=command_line)
        return actions

    def work_command(self) -> str:
        """Return the command that starts the browser server with --work, so that it runs queued jobs."""
        folders = [str(top) for top in self.site.runs.root_folders]
        return format_command(["python", "tools/run_browser.py", *folders, "--work"])

    def stop_command(self, tracked_run: TrackedRun) -> str:
        """Return the tooltip of the Stop button: a sentence, or the equivalent command."""
        state, run = tracked_run.state, tracked_run.summary
        if state.background_job is not None:
            return say("ends the check")
        if state.name == WAITING and state.job is not None:
            return say("removes job %(id)s from %(queue)s", id=state.job.id, queue=QUEUE)
        job = self.find_running_job(tracked_run)
        if job is not None:
            return say("Ctrl-C for job %(id)s of the queue", id=job.id)
        return quote_command(["touch", str(run.history.parent / f"{run.name}.stop")])

    def find_running_job(self, tracked_run: TrackedRun) -> Job | None:
        """Return the running job that trains a run; None if the queue did not start the run."""
        job = tracked_run.state.job
        if job is not None and job.state == RUNNING:
            return job
        with contextlib.suppress(UserError):
            for candidate in self.site.queue.jobs():
                if candidate.state == RUNNING and is_started_by(tracked_run.summary, candidate):
                    return candidate
        return None

    def can_generate(self, run: RunSummary) -> bool:
        """Return whether the Generate page can generate with a run's saved files."""
        with contextlib.suppress(OSError), self.site.runs.lock:
            return read_source(self.site.runs, run) is not None
        return False

    def find_generation_command(self, run: RunSummary) -> GenerationCommand | None:
        """Return the command in the run's history that generates with the trained file; None without one."""
        with contextlib.suppress(OSError, UserError), self.site.runs.lock:
            commands = current_commands(self.site.runs.open(run).run_history, run.history.parent)
            for index, command in enumerate(commands):
                if command.title == GENERATE:
                    argv = split_arguments(command_part(command.bash))
                    find_program(argv, Path.cwd())  # only for its error
                    placeholders = split_arguments(command.missing)
                    generation = GenerationCommand(index, argv, run.is_trusted, placeholders)
                    folder = working_folder(run, group_options(argv))
                    if generation.control_index and self.site.runs.is_below(folder):
                        return replace(generation, control_images=list_images(folder))
                    return generation
        return None

    def make(self, tracked_run: TrackedRun, form: Form) -> str:
        """Queue the generation command from the run's history, with the typed prompt and control image."""
        run = tracked_run.summary
        generation = self.find_generation_command(run)
        if generation is None or not generation.is_trusted:
            raise refusal("Its history has no command that can be queued unchanged.")
        argv = generation.fill(form)
        folder = working_folder(run, group_options(generation.argv))
        control_index = generation.control_index
        if control_index:
            path = argv[control_index]
            original_path = generation.argv[control_index]
            if path != original_path and not self.site.runs.is_inside(folder / path):
                raise refusal("%(path)s is not a file in the folders that this page shows.", path=path)
        check_options(argv, folder)
        self.site.queue.add_and_begin(argv, folder)
        return say("It is in the queue.")

    def score(self, tracked_run: TrackedRun, form: Form) -> str:
        """Queue the command that scores the samples of a run."""
        argv = make_score_argv(tracked_run.summary, self.site.models)
        if not argv:
            raise refusal("There are no samples to score, or no model that scores them.")
        self.site.queue.add_and_begin(argv, Path.cwd())
        return say("It is in the queue.")

    def find_resume_command(self, run: RunSummary) -> ResumeCommand | None:
        """Return the command in the run's history that resumes the run; None if there is none."""
        is_preparation = run.name.endswith(BEFORE_TRAINING)  # `run` continues it, without --resume
        with contextlib.suppress(OSError), self.site.runs.lock:
            run_history = self.site.runs.open(run).run_history
            commands = current_commands(run_history, run.history.parent, run.name)
            for index, command in enumerate(commands):
                if (RESUME in command.bash or is_preparation) and not command.missing:
                    return ResumeCommand(index, command)
        return None

    def find_prompts(self, tracked_run: TrackedRun) -> Path | None:
        """Return the prompt file of a run if it is below the roots and can be edited as text.

        Its path comes from run.toml or, without a run.toml, from the options in the run's history.
        """
        run = tracked_run.summary
        path = None
        if tracked_run.run_config is not None:
            path = tracked_run.run_config.prompts
        elif run.start is not None and run.working_folder is not None:
            recorded_path = dict(run.start.changed).get("sample_prompts")
            with contextlib.suppress(ValueError):
                path = expand_path(recorded_path, run.working_folder) if recorded_path else None
        if path is None or path.suffix.lower() not in PROMPT_FILES:
            return None
        # a missing file can be created if its folder is below the roots
        is_new_file = not (path.exists() or path.is_symlink())
        is_below_roots = self.site.runs.is_below(path.parent if is_new_file else path)
        return path if is_below_roots else None

    # ---- parts of the page

    def find(self, request: Request) -> TrackedRun | None:
        """Return the run that a request's URL names; None if it does not exist."""
        return self.tracked_runs.find(request.path_params["id"])

    def show_actions(self, request: Request) -> Response:
        """Respond with the buttons of a run as HTML."""
        tracked_run = self.find(request)
        if tracked_run is None:
            return answer_not_found()
        return answer_page(self.render(tracked_run) + self.render(tracked_run, "runs/more_actions.html"))

    def show_standing(self, request: Request) -> Response:
        """Respond with the state of a run, which its page requests every few seconds."""
        tracked_run = self.find(request)
        if tracked_run is None:
            return answer_not_found()
        return answer_json(
            {
                "mark": mark_state(tracked_run),
                "state": tracked_run.state.text,
                "is_active": tracked_run.state.is_active,
                "is_begun": tracked_run.summary.history.exists(),
            }
        )

    def show_panel(self, request: Request) -> Response:
        """Respond with a button's panel: the prompts, the files to remove, or a run.toml's permissions."""
        tracked_run = self.find(request)
        if tracked_run is None:
            return answer_not_found()
        query = {name: [text] for name, text in request.query_params.items() if name == "rows"}
        panel = request.path_params["what"]
        return self.answer_panel(tracked_run, panel, fields=query)

    def answer_panel(
        self,
        tracked_run: TrackedRun,
        panel: str,
        error: str = "",
        extra_values: Mapping[str, Any] | None = None,
        fields: Form | None = None,
    ) -> Response:
        """Return the HTML of the panel that a button opens.

        Args:
            panel: Name of the panel: "read", "prompts" or "remove".
            error: Reason why a request was rejected.
            extra_values: Values for the template that replace the panel's own.
            fields: Sample fields that the user has typed and that are not saved.
        """
        values: dict[str, Any] = {
            "id": tracked_run.summary.id,
            "name": tracked_run.summary.name,
            "state": tracked_run.state,
            "message": error,
            "what": panel,
            "can_write": not self.site.read_only,
            "mine": "",  # prompts that the user typed for a file that has changed meanwhile
        }
        try:
            if panel == "read":
                values |= self.describe_run_config(tracked_run)
            elif panel == "prompts":
                path = self.require_prompts(tracked_run)
                values |= self.samples.describe(tracked_run, path, read_fields(fields or {}))
            elif panel == "remove":
                values |= self.describe_removal(tracked_run)
            else:
                return answer_not_found()
        except (OptionError, OSError, ValueError) as problem:
            values["message"] = error or str(problem)
            values["what"] = ""
        values |= extra_values or {}
        return answer_template("runs/panel.html", tracked_run.summary.name, values, is_rejected=error != "")

    def describe_run_config(self, tracked_run: TrackedRun) -> dict[str, Any]:
        """Return the content of a run.toml that a page shows before it is started."""
        if tracked_run.run_config is None:
            raise refusal("There is no run.toml in the folders of this page.")
        path = tracked_run.run_config.folder / RUN_FILE
        return {
            "permissions": read_permissions(tracked_run.run_config.folder),
            "path": path,
            "text": read_shown_text(path),
            "have": compute_checksum(read_content(path)),
            "command": format_command(find_start_argv(tracked_run.run_config, self.site.models)),
            "is_trusted": self.tracked_runs.is_trusted(tracked_run.run_config),
        }

    def require_prompts(self, tracked_run: TrackedRun) -> Path:
        """Return the prompt file of a run. Raises OptionError if it has none that can be edited."""
        path = self.find_prompts(tracked_run)
        if path is None:
            raise refusal("It has no prompt file (.txt) below the folders of this page.")
        return path

    def look_at_samples(self, request: Request, form: Form) -> Response:
        """Respond with the samples section for the typed values, noting sizes the model cannot generate."""
        tracked_run = self.find(request)
        if tracked_run is None:
            return answer_not_found()
        fields = {**form, "rows": [request.query_params.get("rows", "")]}
        return self.answer_panel(tracked_run, "prompts", fields=fields)

    def describe_removal(self, tracked_run: TrackedRun) -> dict[str, Any]:
        """Return the template values of the panel that asks before the run's files are moved into the bin.

        Raises OptionError if the run is active or has no files.
        """
        if tracked_run.state.is_active:
            raise refusal("It is %(text)s: stop it first.", text=tracked_run.state.text)
        paths = self.list_removed(tracked_run)
        if not paths:
            raise refusal("It has no files that can be removed.")
        sizes = {path: measure_size(path) for path in paths}
        bin_folder = self.bin_folder.find_folder(paths[0])
        name = tracked_run.summary.name.removesuffix(BEFORE_TRAINING)
        return {
            "files": [(path, format_size(sizes[path])) for path in paths[:MAX_LISTED]],
            "more": max(0, len(paths) - MAX_LISTED),
            "count": say_count(len(paths), "%(n)s file or folder", "%(n)s files and folders"),
            "size": format_size(sum(sizes.values())),
            "have": compute_list_checksum(paths),
            "bin": bin_folder,
            "command": format_move(paths, bin_folder / name) if len(paths) <= MAX_LISTED else "",
            "is_draft": not tracked_run.summary.history.exists(),
        }

    # ---- removing a run

    @property
    def bin_folder(self) -> BinFolder:
        """The bin, with a folder in each root."""
        return BinFolder(*(top / BIN for top in self.site.runs.root_folders))

    def list_removed(self, tracked_run: TrackedRun) -> list[Path]:
        """Return the files and folders to remove with a run; if it has not begun, the files of `new`.

        Media, captions and caches are not listed, because they belong to the dataset.
        """
        run, run_config = tracked_run.summary, tracked_run.run_config
        output = run.history.parent
        has_run = run_config is None or run.history.exists()
        # a run.toml that never ran has no results: files with its name belong to another run
        paths = self.list_trained(run) if has_run else []
        name = run.name.removesuffix(BEFORE_TRAINING)
        # history of the downloads and caching that `run` did before the training
        preparation_history = history_path(output, f"{name}{BEFORE_TRAINING}")
        if preparation_history.exists():
            paths.append(preparation_history)
        if not paths and run_config is not None:
            # other runs of this folder use the other files that `new` wrote
            has_other_runs = any(output.glob(f"*{END}"))
            names = [RUN_FILE] if has_other_runs else FILES
            described_files = [run_config.folder / name for name in names]
            paths = [path for path in described_files if path.is_file()]
        return sorted(path for path in dict.fromkeys(paths) if self.site.runs.is_below(path))

    def list_trained(self, run: RunSummary) -> list[Path]:
        """Return the files that a training run has written, found by name and in the run's history."""
        folder = run.history.parent
        results = list_results(folder, run.name.removesuffix(BEFORE_TRAINING))
        if run.history.exists() and not run.name.endswith(BEFORE_TRAINING):
            with contextlib.suppress(OSError), self.site.runs.lock:
                for name in self.site.runs.open(run).run_history.saved:
                    if Path(name).name == name and (folder / name).is_file():
                        results.append(folder / name)
        return results

    def remove(self, tracked_run: TrackedRun, form: Form) -> Response:
        """Move the files of a run into the bin, if they are still the files that the page listed."""
        try:
            self.describe_removal(tracked_run)  # raises OptionError if the run cannot be removed now
            paths = self.list_removed(tracked_run)
            displayed_checksum = "".join(form.get("have", ()))
            if displayed_checksum != compute_list_checksum(paths):
                return self.answer_panel(
                    tracked_run, "remove", say("Its files have changed in the meantime: review them again.")
                )
            root_folder = next(top for top in self.site.runs.root_folders if paths[0].is_relative_to(top))
            self.bin_folder.move_in(tracked_run.summary.name, base=root_folder, paths=paths)
            self.forget_jobs(tracked_run)
        except (UserError, OSError, ValueError) as error:
            return self.answer_panel(tracked_run, "remove", str(error))
        return answer_move("/")

    def forget_jobs(self, tracked_run: TrackedRun) -> None:
        """Remove the ended jobs of the run's folder from the queue."""
        if tracked_run.run_config is None:
            return
        for job in self.site.queue.jobs():
            if job.state in ENDED and is_folder_run(job, tracked_run.run_config.folder):
                self.site.queue.remove(job.id)

    # ---- handling the buttons

    def act(self, request: Request, form: Form) -> Response:
        """Handle a pressed button on the page of a training run, and respond with its message."""
        action = request.path_params["what"]
        tracked_run = self.find(request)
        if tracked_run is None:
            return answer_not_found()
        if action == "remove":
            return self.remove(tracked_run, form)
        if action not in self.actions:
            return answer_not_found()
        try:
            message = self.actions[action](tracked_run, form)
        except CaptionConflictError:  # show the new prompts together with the user's text
            typed_prompts = self.samples.read_text(tracked_run, self.require_prompts(tracked_run), form)
            error = say("The file has changed since this page read it. Nothing was written.")
            return self.answer_panel(tracked_run, "prompts", error, {"mine": typed_prompts})
        except ChangedMeanwhileError:
            text = say(
                "%(run_file)s has changed in the meantime. Nothing was written: look at it again.",
                run_file=RUN_FILE,
            )
            return answer_message(text, is_rejected=True)
        except (UserError, OSError, ValueError) as error:
            if action == "prompts" and "row 1" in form:  # keep the user's input
                return self.answer_panel(tracked_run, "prompts", str(error), fields=form)
            return answer_message(str(error), is_rejected=True)
        return answer_message(message)

    def start(self, tracked_run: TrackedRun, form: Form) -> str:
        """Start or continue a run. The form contains the checksum of the run.toml that the user has read."""
        if tracked_run.run_config is None:
            self.add_command(tracked_run.summary, steps=0)
        else:
            run_config = tracked_run.run_config
            read_checksum = "".join(form.get("read", ()))
            if read_checksum and read_checksum != compute_checksum(
                read_content(run_config.folder / RUN_FILE)
            ):
                raise ChangedMeanwhileError
            argv = find_start_argv(run_config, self.site.models)
            self.tracked_runs.start(run_config.folder, argv, is_reviewed=bool(read_checksum))
        return say("It is in the queue.")

    def add_command(self, run: RunSummary, steps: int) -> None:
        """Queue the command that resumes a run up to `steps`; 0 keeps the command's own number of steps."""
        resume = self.find_resume_command(run)
        if resume is None:
            raise refusal("Its history has no command that continues it: no state was saved.")
        if not run.is_trusted:
            raise refusal("It comes from elsewhere: review its command on the page of the queue first.")
        jobs: list[tuple[list[str], Path]] = []
        for argv, folder in read_jobs(resume.command.bash, run):
            changed_argv = [*argv]
            if steps:
                value_index = changed_argv.index(STEPS_OPTION) + 1
                changed_argv[value_index] = str(steps)
            jobs.append((changed_argv, folder))
        self.tracked_runs.add_jobs(jobs)

    def train_on(self, tracked_run: TrackedRun, form: Form) -> str:
        """Increase a run's number of steps, in its run.toml or else in its command, and queue it again."""
        steps = read_steps("".join(form.get("steps", ())).strip())
        run = tracked_run.summary
        if steps <= run.step:
            raise refusal(
                "It has already trained %(step)s steps: enter a larger number.", step=f"{run.step:,}"
            )
        if tracked_run.state.is_active:
            raise refusal("It is %(text)s: stop it first.", text=tracked_run.state.text)
        if tracked_run.run_config is not None:
            return self._extend_by_run_config(tracked_run.run_config, steps, "".join(form.get("have", ())))
        self.add_command(run, steps)
        return say(
            "It is in the queue and trains to %(steps)s steps. All other options of its command stay.",
            steps=f"{steps:,}",
        )

    def _extend_by_run_config(self, run_config: RunConfig, steps: int, checksum: str) -> str:
        """Write a number of steps into run.toml, queue its run, and return a message."""
        path = run_config.folder / RUN_FILE
        if not self.tracked_runs.is_trusted(run_config):
            raise refusal("%(folder)s comes from elsewhere. Press Continue to review it.", folder=path)
        if not run_config.steps:  # 0: run.toml sets max_train_epochs instead
            raise refusal("%(folder)s counts in epochs. Change max_train_epochs there.", folder=path)
        key_changes = change_steps(read_described(run_config.folder).values, steps)
        change_keys(path, key_changes.new_values, checksum)
        self.tracked_runs.start(run_config.folder, find_start_argv(run_config, self.site.models))
        return say(
            "It is in the queue and trains to %(steps)s steps. Written into %(text)s.",
            steps=f"{steps:,}",
            text=key_changes.text,
        )

    def check(self, tracked_run: TrackedRun, _: Form) -> str:
        """Start the check of the run's folder. Raises OptionError if no run.toml defines the run."""
        if tracked_run.run_config is None:
            raise refusal("There is no prepared folder to check.")
        folder = tracked_run.run_config.folder
        self.site.background_jobs.start(
            name_background_job(CHECK, folder), make_check_argv(folder), Path.cwd()
        )
        return ""

    def stop(self, tracked_run: TrackedRun, _: Form) -> str:
        """End a run: remove it from the queue, end its check, or stop its process."""
        state, run = tracked_run.state, tracked_run.summary
        if not state.is_active:
            raise refusal("It is not running: it is %(text)s.", text=state.text)
        # before a training run: its folder is being checked, or its command is still waiting
        if state.name == CHECKING and state.background_job is not None and tracked_run.run_config is not None:
            self.site.background_jobs.stop(name_background_job(CHECK, tracked_run.run_config.folder))
            return say("Its check was ended.")
        if state.name == WAITING and state.job is not None:
            self.site.queue.remove(state.job.id)
            return say("It was removed from the queue.")
        job = self.find_running_job(tracked_run)
        if job is not None:
            self.site.queue.stop(job.id)
            if job.stops:  # a stop was requested before: this second request kills the process
                return say("Ended immediately.")
            return say("Requested: it saves and ends after its current step.")
        # the queue did not start this training run, but the run watches for request files
        if run.state == RUNNING and run.start is not None and run.start.listens:
            (run.history.parent / f"{run.name}.stop").touch()
            return say("Requested: it saves and ends after its current step.")
        raise refusal("It was started from a terminal: end it there with Ctrl-C.")

    def go_on(self, _: TrackedRun, __: Form) -> str:
        """Start the paused queue."""
        self.site.queue.begin_work()
        return say("The queue goes on.")

    def write_prompts(self, tracked_run: TrackedRun, form: Form) -> str:
        """Write the edited prompts of a run. Raises OptionError if it has no prompt file of its own."""
        path = self.require_prompts(tracked_run)
        text = self.samples.read_text(tracked_run, path, form)
        self.samples.write(path, text, "".join(form.get("have", ())))
        if tracked_run.state.name in ACTIVE_STATES:
            return say(
                "Written into %(name)s. The training uses it in its next round of samples.", name=path.name
            )
        return say("Written into %(name)s.", name=path.name)


def has_lora(run: RunSummary) -> bool:
    """Return whether a run has saved a trained file with which images can be generated."""
    with contextlib.suppress(OSError):
        results = list_results(run.history.parent, run.name)
        return any(path.suffix == ".safetensors" for path in results)
    return False


def list_results(folder: Path, name: str) -> list[Path]:
    """Return the files that the training run `name` has written, and its request files such as .stop."""
    results = find_results(Names(folder, name))
    asked = [folder / f"{name}.{kind}" for kind in ("sample", "save", "stop", "items")]
    return [*results, *(path for path in asked if path.is_file())]


def suggest_steps(run: RunSummary, planned: int) -> int:
    """Return the steps that Train on suggests: the planned steps if larger, or twice the steps done."""
    return planned if planned > run.step else 2 * max(run.step, 1)


def measure_size(path: Path) -> int:
    """Return the size of a file, or of all files in a folder, in bytes; links count as 0."""
    if path.is_symlink():
        return 0
    if not path.is_dir():
        return path.stat().st_size
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(folder) / name).lstat().st_size
    return total


def compute_list_checksum(paths: Sequence[Path]) -> str:
    """Return a checksum of the names and sizes of files."""
    names_and_sizes = [(os.fsencode(path), measure_size(path)) for path in paths]
    return short_digest(repr(names_and_sizes))


def run_button_routes(buttons: RunButtons) -> list[Route]:
    """Return the routes of the buttons of runs."""
    return [
        Route("/run/{id}/deeds", buttons.show_actions),
        Route("/run/{id}/standing", buttons.show_standing),
        Route("/run/{id}/panel/{what}", buttons.show_panel),
        Route("/run/{id}/samples/look", answer_form(buttons.look_at_samples), methods=["POST"]),
        Route("/run/{id}/do/{what}", answer_form(buttons.act), methods=["POST"]),
    ]
