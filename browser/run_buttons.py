"""Answer the buttons of a run: start, stop and continue it, train on, edit its samples, remove it."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from browser.background_jobs import name_background_job
from browser.bin_folder import FOLDER as BIN
from browser.bin_folder import BinFolder
from browser.captions import CaptionConflictError, compute_checksum
from browser.command_lines import format_cd, format_command, format_move
from browser.compare import group_options, read_source, working_folder
from browser.described_folder import (
    FILES,
    ChangedMeanwhileError,
    change_keys,
    change_steps,
    read_described,
)
from browser.jobs import ENDED, QUEUE, WAITING, Job
from browser.launch import check_options, command_part, find_program, split_arguments
from browser.new_form import read_steps
from browser.permissions import read_permissions, read_shown_text
from browser.queue_pages import is_started_by, read_jobs
from browser.responses import (
    Form,
    answer_form,
    answer_json,
    answer_message,
    answer_move,
    answer_not_found,
    answer_page,
    answer_template,
)
from browser.run_samples import RunSamples, read_fields
from browser.run_start import (
    BUSY,
    CHECK,
    CHECKING,
    DRAFT,
    FAULTS,
    TRAINING,
    FolderPlan,
    ShownRun,
    find_start_argv,
    is_run_of_folder,
    make_check_argv,
    mark_state,
)
from browser.run_views import HERE, POLICY
from browser.runs import DIED, FINISHED, RUNNING, STOPPED, RunSummary
from browser.samples import list_images
from browser.score_jobs import make_score_argv
from browser.server_state import Site
from browser.short_names import free_name, short_digest
from modules.command import quote_command
from modules.console import format_size
from modules.errors import OptionError, UserError
from modules.pages.language import say, say_count
from modules.pages.page import render_page
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
class MakingCommand:
    """The command in a run's history that generates with the trained file, split into form fields."""

    place: int  # index among the commands of the history
    argv: Sequence[str]
    is_of_here: bool  # the user wrote it here, so it is queued without review
    missing: Sequence[str] = ()  # placeholders that the user has to replace
    pictures: Sequence[str] = ()  # control images that it can use, as paths in its folder

    def find_index(self, flags: Sequence[str]) -> int:
        """Return the index of the word after the first of these options; 0 if the command has none."""
        return next((index for index, flag in enumerate(self.argv[:-1], 1) if flag in flags), 0)

    def read(self, index: int) -> str:
        """Return the text of a field; "" for a placeholder that the user has to replace."""
        word = self.argv[index]
        return "" if word in self.missing else word

    @property
    def fields(self) -> list[tuple[int, str, str]]:
        """Words that the user fills in: index in the command, label and text of each."""
        prompt = self.find_index([PROMPT])
        control = self.control_index
        fields: list[tuple[int, str, str]] = []
        if prompt:
            fields.append((prompt, say("Prompt"), self.read(prompt)))
        if control:
            fields.append((control, say("Control picture"), self.read(control)))
        for index, word in enumerate(self.argv):
            if index > 1 and word in self.missing and index not in (prompt, control):
                fields.append((index, self.argv[index - 1], ""))
        return fields

    @property
    def control_index(self) -> int:
        """Index of the path of the control image or clip; 0 if the command has none."""
        return self.find_index(CONTROL_FLAGS)

    def fill(self, form: Form) -> list[str]:
        """Return the command with the user's input filled in. Raises OptionError if a field is empty."""
        argv = list(self.argv)
        for index, label, text in self.fields:
            typed = "".join(form.get(f"word {index}", ())).strip() or text
            if not typed:
                raise OptionError(say("Fill in %(label)s.", label=label))
            argv[index] = complete_home(typed) if index == self.control_index else typed
        return argv


@dataclass(frozen=True)
class RunActions:
    """The commands of a run's current buttons; "" for a button that is not shown."""

    start: str = ""
    start_label: str = say("Continue")
    is_known: bool = True  # False: the user has to read its run.toml before it starts
    check: str = ""
    stop: str = ""
    train_on: str = ""
    steps: int = 0  # initial number of steps for the button Train on
    have: str = ""  # checksum of the run.toml that Train on changes
    again: str = ""  # suggested name of the next run
    folder: str = ""  # folder for the button Again with changes
    samples: str = ""  # prompt file
    has_lora: bool = False  # images can be generated with it
    generate: bool = False  # whether the history has a command from which the page Generate can fill its form
    make: "MakingCommand | None" = None  # generating command, if the page Generate cannot be used
    score: str = ""
    remove: str = ""
    read_line: str = ""  # address of the queue's page for reviewing a foreign command


class RunButtons:
    """Shows the state of a run with its buttons, and handles the buttons."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.tracked_runs = site.tracked_runs
        self.samples = RunSamples(site)
        self.actions: dict[str, Callable[[ShownRun, Form], str]] = {
            "start": self.start,
            "check": self.check,
            "stop": self.stop,
            "train_on": self.train_on,
            "make": self.make,
            "score": self.score,
            "go_on": self.go_on,
            "prompts": self.write_prompts,
        }

    # ---- what is shown

    def show_page(self, shown: ShownRun) -> str:
        """Return the page of a run that has no history yet."""
        values = {
            "actions": Markup(self.render(shown)),
            "further": Markup(self.render(shown, "more_actions.html")),
            "plan": shown.plan,
            "is_known": shown.plan is None or self.tracked_runs.is_known(shown.plan),
        }
        return render_page(HERE / "folder_plan.html", shown.summary.name, values, POLICY)

    def render(self, shown: ShownRun, template: str = "actions.html") -> str:
        """Return the buttons of a run, and the texts next to them, as HTML.

        Args:
            shown: The run.
            template: `actions.html` for the buttons above the samples, `more_actions.html` for those below.
        """
        return render_page(HERE / template, shown.summary.name, self.values(shown))

    def values(self, shown: ShownRun) -> dict[str, Any]:
        """Return the values for the template of a run's buttons."""
        run = shown.summary
        state = shown.state
        return {
            "id": run.id,
            "name": run.name,
            "state": state,
            "mark": mark_state(shown),
            "is_begun": run.history.exists(),
            "last_lines": self.last_lines(shown),
            "actions": RunActions() if self.site.read_only else self.list_actions(shown),
            "can_write": not self.site.read_only,
            "work_command": self.work_command(),
            "is_over": state.name in (DIED, FINISHED, STOPPED, FAULTS),
        }

    def last_lines(self, shown: ShownRun) -> str:
        """Return the last lines of the log or history of a run that has not begun or has failed."""
        state = shown.state
        if state.name in (TRAINING, FINISHED, STOPPED, WAITING):
            return ""
        if state.last_lines:
            return state.last_lines
        if state.name not in (DIED, FAULTS):
            return ""
        with contextlib.suppress(OSError), self.site.runs.lock:
            messages = self.site.runs.open(shown.summary).run_history.messages[-12:]
            return "\n".join(text for _, _, text in messages)
        return ""

    def list_actions(self, shown: ShownRun) -> RunActions:
        """Return the buttons that a run's page offers in its present state, with their commands."""
        prompts = self.find_prompts(shown)
        actions = RunActions(
            remove=say("moves its files into %(bin)s", bin=BIN),
            samples="" if prompts is None else str(prompts),
        )
        if has_lora(shown.summary):
            generates = self.generates(shown.summary)
            # without the page Generate, the command in the history can still generate with the file
            making = None if generates else self.find_making(shown.summary)
            actions = replace(actions, generate=generates, has_lora=True, make=making)
        if shown.state.is_active:  # no other button makes sense while the run is active
            return replace(actions, stop=self.stop_command(shown))
        scoring = make_score_argv(shown.summary, self.site.models)
        actions = replace(actions, score=format_command(scoring) if scoring else "")
        if shown.plan is None:
            return self.add_history_actions(actions, shown)
        return self.add_plan_actions(actions, shown, shown.plan)

    def add_plan_actions(self, actions: RunActions, shown: ShownRun, plan: FolderPlan) -> RunActions:
        """Return `actions` with the buttons that start or continue a run from its described folder `plan`.

        `train_on` extends a run by steps, `have` is the checksum by which a changed run.toml is noticed, and
        `again` is the name of a repeated run.
        """
        run = shown.summary
        has_run = run.history.exists()
        is_draft = shown.state.name == DRAFT
        start_command = format_command(find_start_argv(plan, self.site.models))
        actions = replace(actions, folder=str(plan.folder), is_known=self.tracked_runs.is_known(plan))
        if shown.state.name != FINISHED:
            actions = replace(
                actions, start=start_command, start_label=say("Start") if is_draft else say("Continue")
            )
        if shown.state.name in (DRAFT, FAULTS):
            actions = replace(actions, check=format_command(make_check_argv(plan.folder)))
        if has_run and plan.steps:
            actions = replace(
                actions,
                train_on=start_command,
                steps=suggest_steps(run, plan.steps),
                have=compute_checksum(read_content(plan.folder / RUN_FILE)),
            )
        if has_run or not is_draft:
            actions = replace(actions, again=free_name(plan.output, plan.name))
        return actions

    def add_history_actions(self, actions: RunActions, shown: ShownRun) -> RunActions:
        """Return `actions` with the buttons that continue a run from the training command in its history.

        Used for a run without a described folder.
        """
        run = shown.summary
        command = self.find_resuming(run)
        if command is None:
            return actions
        index, page_command = command
        resume_command = f"{format_cd(run.working_folder)}{page_command.bash}"
        if not run.is_of_here:  # written by another machine or user: the command is shown before it may run
            return replace(actions, read_line=f"/queue?run={run.id}&command={index}#words")
        if shown.state.name != FINISHED:
            actions = replace(actions, start=resume_command)
        if STEPS_OPTION in page_command.bash:
            steps = suggest_steps(run, run.total_steps)
            actions = replace(actions, steps=steps, train_on=resume_command)
        return actions

    def work_command(self) -> str:
        """Return the command that starts a page which also runs the jobs of the queue."""
        folders = [str(top) for top in self.site.runs.tops]
        return format_command(["python", "tools/run_browser.py", *folders, "--work"])

    def stop_command(self, shown: ShownRun) -> str:
        """Return what the button Stop does, as a sentence or as the equivalent command."""
        state, run = shown.state, shown.summary
        if state.background_job is not None:
            return say("ends the check")
        if state.name == WAITING and state.job is not None:
            return say("takes job %(id)s out of %(queue)s", id=state.job.id, queue=QUEUE)
        job = self.find_running_job(shown)
        if job is not None:
            return say("Ctrl-C for job %(id)s of the queue", id=job.id)
        return quote_command(["touch", str(run.history.parent / f"{run.name}.stop")])

    def find_running_job(self, shown: ShownRun) -> Job | None:
        """Return the running job of the queue that trains a run; None if it was started elsewhere."""
        job = shown.state.job
        if job is not None and job.state == RUNNING:
            return job
        with contextlib.suppress(UserError):
            for candidate in self.site.queue.jobs():
                if candidate.state == RUNNING and is_started_by(shown.summary, candidate):
                    return candidate
        return None

    def generates(self, run: RunSummary) -> bool:
        """Return whether the page Generate can generate with the files of a run."""
        with contextlib.suppress(OSError), self.site.runs.lock:
            return read_source(self.site.runs, run) is not None
        return False

    def find_making(self, run: RunSummary) -> MakingCommand | None:
        """Return the history's command that generates with the trained file; None if the history has none."""
        with contextlib.suppress(OSError, UserError), self.site.runs.lock:
            commands = current_commands(self.site.runs.open(run).run_history, run.history.parent)
            for index, command in enumerate(commands):
                if command.title == GENERATE:
                    argv = split_arguments(command_part(command.bash))
                    find_program(argv, Path.cwd())
                    making = MakingCommand(index, argv, run.is_of_here, split_arguments(command.missing))
                    folder = working_folder(run, group_options(argv))
                    if making.control_index and self.site.runs.is_below(folder):
                        return replace(making, pictures=list_images(folder))
                    return making
        return None

    def make(self, shown: ShownRun, form: Form) -> str:
        """Queue the generation command of the run's history, with the typed prompt and control image."""
        run = shown.summary
        making = self.find_making(run)
        if making is None or not making.is_of_here:
            raise OptionError(say("Its history has no command that can be queued as it stands."))
        argv = making.fill(form)
        folder = working_folder(run, group_options(making.argv))
        index = making.control_index
        if index:  # 0: the command has no control image
            control = argv[index]
            is_typed = control != making.argv[index]  # the run's own image may lie anywhere
            if is_typed and not self.site.runs.is_inside(folder / control):
                raise OptionError(
                    say("%(path)s is no file in the folders that this page shows.", path=control)
                )
        check_options(argv, folder)
        self.site.queue.add_and_begin(argv, folder)
        return say("It is in the queue.")

    def score(self, shown: ShownRun, form: Form) -> str:
        """Queue the command that scores the samples of a run."""
        argv = make_score_argv(shown.summary, self.site.models)
        if not argv:
            raise OptionError(say("There are no samples to score, or no model that scores them."))
        self.site.queue.add_and_begin(argv, Path.cwd())
        return say("It is in the queue.")

    def find_resuming(self, run: RunSummary) -> tuple[int, PageCommand] | None:
        """Return the history's command that continues its run, with its index; None if there is none."""
        with contextlib.suppress(OSError), self.site.runs.lock:
            for index, command in enumerate(
                current_commands(self.site.runs.open(run).run_history, run.history.parent, run.name)
            ):
                is_again = run.name.endswith(BEFORE_TRAINING)
                if (RESUME in command.bash or is_again) and not command.missing:
                    return index, command
        return None

    def find_prompts(self, shown: ShownRun) -> Path | None:
        """Return the prompt file of a run if it lies below the roots and can be edited as text."""
        run = shown.summary
        path = None
        if shown.plan is not None:
            path = shown.plan.prompts
        elif run.start is not None and run.working_folder is not None:
            text = dict(run.start.changed).get("sample_prompts")
            with contextlib.suppress(ValueError):
                path = expand_path(text, run.working_folder) if text else None
        if path is None or path.suffix.lower() not in PROMPT_FILES:
            return None
        existing_path = path if path.exists() or path.is_symlink() else path.parent
        return path if self.site.runs.is_below(existing_path) else None

    # ---- parts of the page

    def find(self, request: Request) -> ShownRun | None:
        """Return the run that an address names; None if it does not exist."""
        return self.tracked_runs.find(request.path_params["id"])

    def show_actions(self, request: Request) -> Response:
        """Respond with the buttons of a run as HTML."""
        shown = self.find(request)
        if shown is None:
            return answer_not_found()
        return answer_page(self.render(shown) + self.render(shown, "more_actions.html"))

    def show_standing(self, request: Request) -> Response:
        """Respond with the state of a run, which its page requests every few seconds."""
        shown = self.find(request)
        if shown is None:
            return answer_not_found()
        return answer_json(
            {
                "mark": mark_state(shown),
                "state": shown.state.text,
                "is_active": shown.state.is_active,
                "is_begun": shown.summary.history.exists(),
            }
        )

    def show_panel(self, request: Request) -> Response:
        """Respond with a button's panel: the prompts, the files to remove, or a run.toml's permissions."""
        shown = self.find(request)
        if shown is None:
            return answer_not_found()
        query = {name: [text] for name, text in request.query_params.items() if name == "rows"}
        return self.answer_panel(shown, request.path_params["what"], fields=query)

    def answer_panel(
        self,
        shown: ShownRun,
        panel: str,
        error: str = "",
        extra_values: Mapping[str, Any] | None = None,
        fields: Form | None = None,
    ) -> Response:
        """Return the panel of a button.

        Args:
            shown: The run.
            panel: Name of the panel: "read", "prompts" or "remove".
            error: Reason why a request was rejected.
            extra_values: Values for the template that replace the panel's own.
            fields: Sample fields that the user has typed and that are not saved.
        """
        values: dict[str, Any] = {
            "id": shown.summary.id,
            "name": shown.summary.name,
            "state": shown.state,
            "message": error,
            "what": panel,
            "can_write": not self.site.read_only,
            "mine": "",  # prompts that the user typed for a file that has changed meanwhile
        }
        try:
            if panel == "read":
                values |= self.describe_plan(shown)
            elif panel == "prompts":
                path = self.require_prompts(shown)
                values |= self.samples.describe(shown, path, read_fields(fields or {}))
            elif panel == "remove":
                values |= self.describe_removal(shown)
            else:
                return answer_not_found()
        except (OptionError, OSError, ValueError) as problem:
            values["message"] = error or str(problem)
            values["what"] = ""
        values |= extra_values or {}
        return answer_template("panel.html", shown.summary.name, values, is_rejected=error != "")

    def describe_plan(self, shown: ShownRun) -> dict[str, Any]:
        """Return the content of a run.toml that a page shows before it is started."""
        if shown.plan is None:
            raise OptionError(say("There is no run.toml below the folders of this page."))
        path = shown.plan.folder / RUN_FILE
        return {
            "permissions": read_permissions(shown.plan.folder),
            "path": path,
            "text": read_shown_text(path),
            "have": compute_checksum(read_content(path)),
            "command": format_command(find_start_argv(shown.plan, self.site.models)),
            "is_known": self.tracked_runs.is_known(shown.plan),
        }

    def require_prompts(self, shown: ShownRun) -> Path:
        """Return the prompt file of a run. Raises OptionError if it has none that can be edited."""
        path = self.find_prompts(shown)
        if path is None:
            raise OptionError(say("It has no prompt file (.txt) below the folders of this page."))
        return path

    def look_at_samples(self, request: Request, form: Form) -> Response:
        """Respond with the sample panel for the typed values, noting sizes that the model cannot generate."""
        shown = self.find(request)
        if shown is None:
            return answer_not_found()
        fields = {**form, "rows": [request.query_params.get("rows", "")]}
        return self.answer_panel(shown, "prompts", fields=fields)

    def describe_removal(self, shown: ShownRun) -> dict[str, Any]:
        """Return the values for the panel that asks before the run's files are moved into the bin.

        Raises OptionError if the run is active or has no files.
        """
        if shown.state.is_active:
            raise OptionError(say("It is %(text)s: stop it first.", text=shown.state.text))
        paths = self.list_removed(shown)
        if not paths:
            raise OptionError(say("It has no files that can be removed."))
        sizes = {path: measure_size(path) for path in paths}
        bin_folder = self.bin_folder.find_folder(paths[0])
        name = shown.summary.name.removesuffix(BEFORE_TRAINING)
        return {
            "files": [(path, format_size(sizes[path])) for path in paths[:MAX_LISTED]],
            "more": max(0, len(paths) - MAX_LISTED),
            "count": say_count(len(paths), "%(n)s file or folder", "%(n)s files and folders"),
            "size": format_size(sum(sizes.values())),
            "have": mark_removed(paths),
            "bin": bin_folder,
            "command": format_move(paths, bin_folder / name) if len(paths) <= MAX_LISTED else "",
            "is_draft": not shown.summary.history.exists(),
        }

    # ---- what is removed

    @property
    def bin_folder(self) -> BinFolder:
        """The bin, with a folder in each root."""
        return BinFolder(*(top / BIN for top in self.site.runs.tops))

    def list_removed(self, shown: ShownRun) -> list[Path]:
        """Return the files and folders of a run, or, if it has not begun, the files that `new` wrote.

        Media, captions and caches are not listed: they belong to the dataset.
        """
        results = self.list_trained(shown.summary)
        if not shown.summary.history.exists() and shown.plan is not None:
            results = []  # a draft has no results; files with its name belong to another run
        name = shown.summary.name.removesuffix(BEFORE_TRAINING)
        # history of the downloads and caching that `run` did before the training
        early_history = history_path(shown.summary.history.parent, f"{name}{BEFORE_TRAINING}")
        if early_history.exists():
            results.append(early_history)
        if not results and shown.plan is not None:
            has_runs = any(early_history.parent.glob(f"*{END}"))
            # the other files in the output folder belong to other runs of this folder
            names = [RUN_FILE] if has_runs else FILES
            results = [path for path in (shown.plan.folder / name for name in names) if path.is_file()]
        below = [path for path in dict.fromkeys(results) if self.site.runs.is_below(path)]
        return sorted(below)

    def list_trained(self, run: RunSummary) -> list[Path]:
        """Return the files written by a training run, found by their names and in the run's history."""
        folder = run.history.parent
        results = list_results(folder, run.name.removesuffix(BEFORE_TRAINING))
        if run.history.exists() and not run.name.endswith(BEFORE_TRAINING):
            with contextlib.suppress(OSError), self.site.runs.lock:
                for name in self.site.runs.open(run).run_history.saved:
                    if Path(name).name == name and (folder / name).is_file():
                        results.append(folder / name)
        return results

    def remove(self, shown: ShownRun, form: Form) -> Response:
        """Move the files of a run into the bin, if they are still those that the page listed."""
        try:
            self.describe_removal(shown)  # raises OptionError if the run cannot be removed now
            paths = self.list_removed(shown)
            if "".join(form.get("have", ())) != mark_removed(paths):  # checksum of the list on the page
                return self.answer_panel(
                    shown, "remove", say("Its files have changed meanwhile: look again.")
                )
            base = next(top for top in self.site.runs.tops if paths[0].is_relative_to(top))
            self.bin_folder.move_in(shown.summary.name, base, paths)
            self.forget_jobs(shown)
        except (UserError, OSError, ValueError) as error:
            return self.answer_panel(shown, "remove", str(error))
        return answer_move("/")

    def forget_jobs(self, shown: ShownRun) -> None:
        """Remove the ended jobs of a described folder from the queue."""
        if shown.plan is None:
            return
        for job in self.site.queue.jobs():
            if job.state in ENDED and is_run_of_folder(job, shown.plan.folder):
                self.site.queue.remove(job.id)

    # ---- what the buttons do

    def act(self, request: Request, form: Form) -> Response:
        """Carry out a button of a run, and respond with its message."""
        action = request.path_params["what"]
        shown = self.find(request)
        if shown is None:
            return answer_not_found()
        if action == "remove":
            return self.remove(shown, form)
        if action not in self.actions:
            return answer_not_found()
        try:
            message = self.actions[action](shown, form)
        except CaptionConflictError:  # show the new prompts together with the user's text
            mine = self.samples.read_text(shown, self.require_prompts(shown), form)
            error = say("The file has changed since this page read it. Nothing was written.")
            return self.answer_panel(shown, "prompts", error, {"mine": mine})
        except ChangedMeanwhileError:
            text = say(
                "%(run_file)s has changed meanwhile. Nothing was written: look at it again.",
                run_file=RUN_FILE,
            )
            return answer_message(text, is_rejected=True)
        except (UserError, OSError, ValueError) as error:
            if action == "prompts" and "row 1" in form:  # keep the user's input
                return self.answer_panel(shown, "prompts", str(error), fields=form)
            return answer_message(str(error), is_rejected=True)
        return answer_message(message)

    def start(self, shown: ShownRun, form: Form) -> str:
        """Start or continue a run. The form has the checksum of the run.toml that the user has read."""
        if shown.plan is None:
            self.add_command(shown.summary, steps=0)
        else:
            checksum = "".join(form.get("read", ()))
            if checksum and checksum != compute_checksum(read_content(shown.plan.folder / RUN_FILE)):
                raise ChangedMeanwhileError
            argv = find_start_argv(shown.plan, self.site.models)
            self.tracked_runs.start(shown.plan.folder, argv, is_read=bool(checksum))
        return say("It is in the queue.")

    def add_command(self, run: RunSummary, steps: int) -> None:
        """Queue the command that continues a run up to `steps`; with 0, the command's own number stays."""
        command = self.find_resuming(run)
        if command is None:
            raise OptionError(say("Its history has no command that continues it: no state was saved."))
        if not run.is_of_here:
            raise OptionError(
                say("It comes from elsewhere: read its command on the page of the queue first.")
            )
        _, page_command = command
        jobs: list[tuple[list[str], Path]] = []
        for argv, folder in read_jobs(page_command.bash, run):
            changed = [*argv]
            if steps:
                index = changed.index(STEPS_OPTION) + 1
                changed[index] = str(steps)
            jobs.append((changed, folder))
        self.tracked_runs.add_jobs(jobs)

    def train_on(self, shown: ShownRun, form: Form) -> str:
        """Raise a run's number of steps in its run.toml, or else in its command, and queue it again."""
        steps = read_steps("".join(form.get("steps", ())).strip())
        run = shown.summary
        if steps <= run.step:
            raise OptionError(
                say("It has trained %(step)s steps already: give more than that.", step=f"{run.step:,}")
            )
        if shown.state.is_active:
            raise OptionError(say("It is %(text)s: stop it first.", text=shown.state.text))
        if shown.plan is None:  # no described folder: the command in the run's history is queued
            self.add_command(run, steps)
            return say(
                "It is in the queue, to %(steps)s steps. All other options of its command stay.",
                steps=f"{steps:,}",
            )
        plan = shown.plan
        if not self.tracked_runs.is_known(plan):
            raise OptionError(
                say(
                    "%(folder)s comes from elsewhere. Press Continue to read it.",
                    folder=plan.folder / RUN_FILE,
                )
            )
        if not plan.steps:  # 0: run.toml sets max_train_epochs instead
            raise OptionError(
                say(
                    "%(folder)s counts in epochs. Change max_train_epochs there.",
                    folder=plan.folder / RUN_FILE,
                )
            )
        path = plan.folder / RUN_FILE
        checksum = "".join(form.get("have", ()))
        changes = change_steps(read_described(plan.folder).values, steps)
        change_keys(path, changes.changes, checksum)
        self.tracked_runs.start(plan.folder, find_start_argv(plan, self.site.models))
        return say(
            "It is in the queue, to %(steps)s steps. Written into %(text)s.",
            steps=f"{steps:,}",
            text=changes.text,
        )

    def check(self, shown: ShownRun, _: Form) -> str:
        """Start the check of a run's described folder. Raises OptionError if there is none."""
        if shown.plan is None:
            raise OptionError(say("There is no prepared folder to check."))
        folder = shown.plan.folder
        self.site.background_jobs.start(
            name_background_job(CHECK, folder), make_check_argv(folder), Path.cwd()
        )
        return ""

    def stop(self, shown: ShownRun, _: Form) -> str:
        """End a run: remove it from the queue, end its check, or stop its process."""
        state, run = shown.state, shown.summary
        if not state.is_active:
            raise OptionError(say("It does not run: it is %(text)s.", text=state.text))
        # before a training: its folder is being checked, or its command still waits
        if state.name == CHECKING and state.background_job is not None and shown.plan is not None:
            self.site.background_jobs.stop(name_background_job(CHECK, shown.plan.folder))
            return say("Its check was ended.")
        if state.name == WAITING and state.job is not None:
            self.site.queue.remove(state.job.id)
            return say("It was taken out of the queue.")
        job = self.find_running_job(shown)
        if job is not None:
            self.site.queue.stop(job.id)
            if job.stops:  # it had been asked before: this second request kills the process
                return say("Ended at once.")
            return say("Asked: it saves and ends when its step is done.")
        # the queue did not start this training, but it watches for request files
        if run.state == RUNNING and run.start is not None and run.start.listens:
            (run.history.parent / f"{run.name}.stop").touch()
            return say("Asked: it saves and ends when its step is done.")
        raise OptionError(say("It was started from a terminal: end it there with Ctrl-C."))

    def go_on(self, _: ShownRun, __: Form) -> str:
        """Start the paused queue."""
        self.site.queue.begin_work()
        return say("The queue goes on.")

    def write_prompts(self, shown: ShownRun, form: Form) -> str:
        """Write the edited prompts of a run. Raises OptionError if it has no prompt file of its own."""
        path = self.require_prompts(shown)
        text = self.samples.read_text(shown, path, form)
        self.samples.write(path, text, "".join(form.get("have", ())))
        if shown.state.name in BUSY:
            return say(
                "Written into %(name)s. The training takes it in its next round of samples.", name=path.name
            )
        return say("Written into %(name)s.", name=path.name)


def has_lora(run: RunSummary) -> bool:
    """Return whether a run has a trained file that images can be generated with."""
    with contextlib.suppress(OSError):
        results = list_results(run.history.parent, run.name)
        return any(path.suffix == ".safetensors" for path in results)
    return False


def list_results(folder: Path, name: str) -> list[Path]:
    """Return the files that a training run has written under a name, and its request files such as .stop."""
    results = find_results(Names(folder, name))
    asked = [folder / f"{name}.{kind}" for kind in ("sample", "save", "stop")]
    return [*results, *(path for path in asked if path.is_file())]


def suggest_steps(run: RunSummary, planned: int) -> int:
    """Return the steps that Train on suggests: the planned steps if larger, else twice the steps done."""
    return planned if planned > run.step else 2 * max(run.step, 1)


def measure_size(path: Path) -> int:
    """Return the size of a file, or of all files in a folder, in bytes; links count as nothing."""
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


def mark_removed(paths: Sequence[Path]) -> str:
    """Return a checksum of the names and sizes of files."""
    info = [(os.fsencode(path), measure_size(path)) for path in paths]
    return short_digest(repr(info))


def run_button_routes(buttons: RunButtons) -> list[Route]:
    """Return the routes of the buttons of runs."""
    return [
        Route("/run/{id}/deeds", buttons.show_actions),
        Route("/run/{id}/standing", buttons.show_standing),
        Route("/run/{id}/panel/{what}", buttons.show_panel),
        Route("/run/{id}/samples/look", answer_form(buttons.look_at_samples), methods=["POST"]),
        Route("/run/{id}/do/{what}", answer_form(buttons.act), methods=["POST"]),
    ]
