"""The New page: select a folder and a model, let `new` write run.toml, check it, and start the training run.

The state of the form is stored only in the folder's own files, in the last `new` command for the folder, and
in the URL of the page. So a reload, a restarted server and a terminal see the same state.
"""

import contextlib
import functools
import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import escape
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from browser.core.bin_folder import FOLDER as BIN
from browser.core.graphics_cards import CardReader
from browser.core.responses import (
    Form,
    answer_form,
    answer_move,
    answer_not_found,
    answer_page,
    answer_template,
    answer_unknown,
    read_query,
)
from browser.core.server_command import make_server_argv
from browser.core.server_state import Site
from browser.core.short_names import free_name, short_digest
from browser.core.templates import POLICY
from browser.folders.caption_keys import describe_formats, find_folder_caption_format
from browser.folders.captioning import (
    CAPTION_SCRIPT,
    TRIED,
    TYPED_OPTIONS,
    CaptionForm,
    describe_engine,
    make_caption_argv,
    read_tries,
)
from browser.folders.captions import compute_checksum
from browser.folders.described_folder import (
    FILES,
    ChangedMeanwhileError,
    DescribedFolder,
    KeyChanges,
    change_keys,
    is_described,
    keep_copies,
    mark_files,
    read_commands,
    read_described,
)
from browser.folders.durations import describe_duration
from browser.folders.folder_files import FolderFiles, file_routes, list_names, picture_address
from browser.folders.folder_tools import find_tool_job
from browser.folders.folders import (
    CHECK_PAGE,
    MediaFolder,
    find_file,
    find_folder,
    find_typed,
    list_media_folders,
    read_media_folder,
    read_outer_folder,
)
from browser.folders.new_form import (
    KIND_NOTES,
    KIND_TITLES,
    NewForm,
    check_form,
    find_model,
    hint_at_word,
    list_changed_fields,
    list_field_errors,
    list_fitting_recipes,
    list_key_changes,
    list_shown_kinds,
    list_unsaved,
    make_new_argv,
    name_field,
    read_steps,
)
from browser.folders.offered_folders import find_open_folder, require_inside
from browser.jobs.background_jobs import has_changed_since, name_background_job
from browser.jobs.command_lines import format_command
from browser.jobs.jobs import WAITING, Job
from browser.jobs.launch import command_part, find_program, split_arguments
from browser.jobs.model_files import Download, TaskFiles, find_download, find_task, name_download
from browser.jobs.printed_lines import is_for_terminal, translate_line
from browser.pages.new.checklist import BAD, Checklist, make_checklist
from browser.pages.new.command_output import (
    REPAIR_CAPTIONS,
    OutputLine,
    find_command,
    read_changes,
    read_output_lines,
)
from browser.pages.new.model_table import (
    ModelRow,
    describe_file,
    find_misfit,
    has_login,
    is_gated,
    list_licenses,
    list_missing,
    list_model_rows,
)
from browser.pages.new.new_steps import FolderProgress, NextStep, select_step
from browser.pages.new.upload_parts import ADDRESS as PIECE
from browser.pages.new.upload_parts import PIECE_BYTES, PieceUploads
from browser.pages.new.uploads import ADDRESS as UPLOAD
from browser.pages.new.uploads import FileUploads, name_upload_folder
from browser.runs.run_start import (
    CHECK,
    DESCRIBE,
    is_folder_run,
    make_check_argv,
    make_run_argv,
    newest_job,
    parse_run_config,
)
from browser.runs.runs import DIED, RUNNING
from downloads.catalogue import Component, ModelSet
from downloads.listing import describe_licenses, gigabytes, total_bytes
from modules.atomic_write import free_bytes
from modules.errors import OptionError, UserError
from modules.line_kinds import CAPTIONS, MEND
from modules.pages.language import join, refusal, say, say_count
from modules.pages.page import encode_address
from modules.paths import complete_home
from modules.text_encodings import NAMES
from modules.text_files import read_content, real_path
from project.kinds.composing import BY_NAME, LORA
from project.kinds.whole_model import FULL
from project.media import find_folder_kind
from project.model_sizes import find_memory
from project.options import CAPTION_MODEL, RUN_FILE, find_models
from protocols.families import caption_formats

MAX_FAILURE_LINES = 3
DRY_RUN = "compare"  # kind of background job: shows how `new` would change existing files
TRY_CAPTIONS = "try"  # kind of background job: captions a few files as a trial
BACKGROUND_KINDS = (DESCRIBE, DRY_RUN, CHECK, TRY_CAPTIONS, REPAIR_CAPTIONS)
FULL_PAGE_ACTIONS = ("describe", "replace", "keep")  # buttons that change more than the progress part
MESSAGE_HEADER = "x-reelsmith-said"  # header with the message of an action, when the page reopens
FOLDERS_PER_PART = 24  # number of folders shown at once
MAX_TILES = 12  # number of files in the row of images
CAPTION_CHARACTERS = 160  # maximum length of a displayed caption, which takes two lines
# the page shows check.html of the folder in a frame
PAGE_POLICY = f"{POLICY}; frame-src 'self'"
# check.html may come from somebody else: it runs no scripts, loads nothing, and has a separate origin
CHECK_POLICY = (
    "sandbox; default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; "
    "frame-ancestors 'self'"
)
WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]|\\\\")  # starts with a drive letter, or is a network path
MAX_CHECK_PAGE_BYTES = 256 << 20  # maximum bytes of check.html


@dataclass(frozen=True)
class PreparePlan:
    """What the Prepare button will do: run a `new` command, or change keys of run.toml."""

    argv: list[str]  # arguments of the command; empty if keys of run.toml are changed instead
    key_changes: KeyChanges = KeyChanges({})  # changed keys of run.toml
    is_comparison: bool = False  # the command only shows how it would change existing files

    @property
    def text(self) -> str:
        """Text next to the button: the changed keys, or the command line."""
        if self.key_changes.new_values:
            return self.key_changes.text
        return format_command(self.argv)


@dataclass(frozen=True)
class PressedButton:
    """A button's request: the selected folder, the form, and all fields of the request as strings."""

    folder: Path
    form: NewForm
    fields: Mapping[str, str]

    @property
    def files_checksum(self) -> str:
        """Checksum of the folder's files when the page was loaded; "" if the request has none."""
        return self.fields.get("mark", "")

    @property
    def displayed_address(self) -> str:
        """URL of the page with the form's values as the browser loaded it; "" if the request has none."""
        return self.fields.get("shown", "")

    @property
    def has_accepted_licenses(self) -> bool:
        """Whether the user has accepted the licenses of the model."""
        return bool(self.fields.get("accept"))


class NewPages:
    """Shows the New page, and handles its buttons."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.files = FolderFiles(site.runs, site.read_only)
        self.uploads = FileUploads(site.runs)
        self.pieces = PieceUploads(self.uploads)
        # each returns a message, and raises UserError, OSError or ValueError if it fails
        self.actions: dict[str, Callable[[PressedButton], str]] = {
            "describe": self.prepare,
            "replace": self.replace,
            "keep": self.keep_files,
            "check": self.check,
            "load": self.start_download,
            "stop": self.stop,
            "start": self.start,
            "try": self.try_captions,
            "write": self.write_captions,
            "remedy": self.run_remedy,
            REPAIR_CAPTIONS: self.repair_captions,
        }

    @functools.cached_property
    def memory(self) -> float:
        """GPU memory in GiB, read once."""
        return find_memory()

    @functools.cached_property
    def cards(self) -> list[str]:
        """Names of this machine's GPUs, read once."""
        return [card.name for card in CardReader(shutil.which("nvidia-smi")).read()]

    def show(self, request: Request) -> Response:
        """Return the New page for the form in the query.

        If the query names only a folder, the form is filled from the folder's files. If the files have
        changed since the page was loaded, the form shows their values, with a message.
        """
        query = read_query(request)
        form = NewForm.from_fields(query)
        # a choice of a LoRA counts for the folder and the model for which it was shown
        if "train" not in query or (
            not form.train and query.get("train_of", [form.subject]) != [form.subject]
        ):
            form = replace(form, train=self.suggest_kind(form))
        message = ""
        is_link = "folder" in query and set(query) <= {"folder", "name"}  # not a sent form
        if is_link:
            saved_form = self.read_form(form.folder)
            form = replace(saved_form, name=form.name or saved_form.name)
        elif self._has_changed_since_displayed(form.folder, query):
            form = self.read_form(form.folder)
            message = say(
                "The files of this folder have changed in the meantime. The form shows their current values."
            )
        is_part = "hx-request" in request.headers
        return self.answer(form, message=message, is_part=is_part)

    def _has_changed_since_displayed(self, folder_text: str, query: Form) -> bool:
        """Return whether a folder's files have changed since the browser loaded the page of the form."""
        # In the query, `mark` is the checksum that the files had then, `shown` the URL with their values.
        folder = find_folder(self.site.runs, folder_text) if "mark" in query else None
        if folder is None:
            return False
        has_changed = mark_files(folder) != "".join(query["mark"])
        return has_changed and not self.has_displayed_values(folder, "".join(query.get("shown", ())))

    def suggest_kind(self, form: NewForm) -> str:
        """Return the value of `train` that `new` selects by default for a folder without a run.toml."""
        folder, model = find_folder(self.site.runs, form.folder), find_model(form.family, form.task)
        if folder is None or model is None or is_described(folder):
            return ""
        return name_field(find_folder_kind(folder, model, has_word=bool(form.trigger)))

    def read_form(self, folder_text: str) -> NewForm:
        """Return a folder's form, read from its files or else from the last `new` command for the folder."""
        folder = find_folder(self.site.runs, folder_text)
        if folder is None:
            return NewForm(folder=folder_text)
        dry_run_job = self.find_background_job(DRY_RUN, folder)
        if dry_run_job is not None and self.is_dry_run_current(dry_run_job, folder):
            # until the user accepts the changes that `new --dry_run` shows, only its command has them
            return NewForm.from_argv(shlex.split(dry_run_job.line))
        describe_job = self.find_background_job(DESCRIBE, folder)
        has_failed = describe_job is not None and describe_job.state != RUNNING and describe_job.code != 0
        if is_described(folder) and not has_failed:
            try:
                return self.make_form(read_described(folder))
            except (OSError, ValueError):
                return NewForm(folder=str(folder))
        if describe_job is not None:  # it failed: its values can be corrected
            return NewForm.from_argv(shlex.split(describe_job.line))
        return NewForm(folder=str(folder), name=find_free_name(folder / "output", folder.name))

    def has_displayed_values(self, folder: Path, displayed_address: str) -> bool:
        """Return whether a folder's files still have the values that the page showed when it was loaded.

        `displayed_address` is the URL of that page with its form values; "" if the folder had no run.toml
        then.
        """
        described, _ = self.try_read(folder)
        return described is not None and self.make_form(described).address == displayed_address

    def is_dry_run_current(self, dry_run_job: Job, folder: Path) -> bool:
        """Return whether saving would still make the changes that a `new --dry_run` job has found."""
        return dry_run_job.state == RUNNING or not has_changed_since(dry_run_job, folder, FILES)

    def answer(self, form: NewForm, error: str = "", message: str = "", is_part: bool = False) -> Response:
        """Return the New page with a filled form.

        Args:
            message: Message to show that is not an error.
            is_part: Omit the list of folders, because the browser uses only other parts of the page.
        """
        folder = find_folder(self.site.runs, form.folder)
        described, reading_error = self.try_read(folder)
        folder_error = self.find_folder_error(form.folder, folder, described)
        unknown_folder_error = folder_error if folder is None and not error else ""
        values = {
            **self.collect_values(form, folder, described, is_part),
            "folder_fault": folder_error,
            # the template has room for one message: the most urgent one is shown
            "message": unknown_folder_error or error or message or reading_error,
            "error": error if folder is None else "",  # error of a button whose folder no longer exists
        }
        response = answer_template(
            "new/new.html", say("New"), values, is_rejected=error != "", policy=PAGE_POLICY
        )
        # also as a header: in a meta element, frame-ancestors is ignored
        response.headers["content-security-policy"] = f"{PAGE_POLICY}; frame-ancestors 'none'"
        return response

    def collect_values(
        self, form: NewForm, folder: Path | None, described: DescribedFolder | None, is_part: bool
    ) -> dict[str, Any]:
        """Return the template values of all sections of the page, but not of its messages.

        Args:
            folder: The form's folder; None if it does not exist.
            described: Content of its run.toml and dataset.toml; None if they are missing or cannot be read.
            is_part: Omit the list of folders, because the browser uses only other parts of the page.
        """
        content = None if folder is None else read_media_folder(folder)
        if content is not None:
            content = replace(content, num_unreadable=self.files.count_unreadable(content.path))
        progress_values = self.collect_progress(folder, described)
        duration = self.describe_duration(form, described)
        return {
            **progress_values,
            **self.collect_folder_values(folder, content, is_part),
            **self.collect_model_values(form, content),
            **self.collect_caption_values(folder),
            "form": form,
            "plan": self.preview_prepare(form, folder, described),
            "duration": duration,
            "step": self.select_step(form, folder, described, progress_values["folder_progress"]),
            "field_faults": list_field_errors(form),
            "word_hint": hint_at_word(form.trigger),
            "free": self.describe_free_space(),
            "facts": self.list_info(form, described, duration),
            "shown": "" if described is None else self.make_form(described).address,
            "free_name": _suggest_free_name(form, folder, described),
        }

    def select_step(
        self, form: NewForm, folder: Path | None, described: DescribedFolder | None, progress: FolderProgress
    ) -> NextStep:
        """Return the next step towards a training run. A folder that does not exist counts as not chosen."""
        is_saved = False  # whether the folder's files have all values of the form
        if described is not None:
            saved_form = self.make_form(described)
            is_saved = not list_unsaved(form, saved_form, saved_form)
        dry_run_job = progress.description_job
        if progress.has_changes and dry_run_job is not None:
            compared_form = NewForm.from_argv(shlex.split(dry_run_job.line))
            # the changes are shown for other values if something was typed since
            if list_unsaved(form, compared_form, compared_form):
                progress = replace(progress, has_changes=False)
        existing_form = form if folder is not None else replace(form, folder="")
        return select_step(existing_form, progress, is_saved)

    def collect_caption_values(self, folder: Path | None) -> dict[str, Any]:
        """Return the template values of the section for captioning with a model."""
        caption_form = CaptionForm(format=find_folder_caption_format(folder))  # initial values of its fields
        return {
            "engine": CAPTION_MODEL,
            "engine_size": describe_engine(CAPTION_MODEL),
            "tried": TRIED,
            "caption_line": format_command(make_caption_argv(caption_form), folder),
            "try_line": format_command(make_caption_argv(caption_form, TRIED), folder),
            "caption_format": caption_form.format,
            "format_title": caption_formats()[caption_form.format].title if caption_form.format else "",
            "caption_formats": describe_formats(),
        }

    def collect_folder_values(
        self, folder: Path | None, content: MediaFolder | None, is_part: bool
    ) -> dict[str, Any]:
        """Return the template values for the list of folders and for the selected folder.

        Args:
            is_part: Omit the list of folders, because the browser uses only other parts of the page.
        """
        root_folders = self.site.runs.root_folders
        has_files = folder is not None and (content is not None or is_described(folder))
        opened = find_open_folder(self.site.runs, str(folder)) if has_files else None
        folders = [] if is_part else list_media_folders(self.site.runs)
        return {
            "content": content,
            "folders": folders[:FOLDERS_PER_PART],
            "num_folders": len(folders),
            "next_folder": FOLDERS_PER_PART,
            "tool_folders": [] if opened is None else [opened],
            "roots": root_folders,
            "is_chosen": folder is not None,
            # where dropped files go: into the selected folder, or else into a new one
            "unnamed": str(folder or name_upload_folder(root_folders[0], date.today())),
            **self.list_tiles(content),
            "upload": UPLOAD,
            "piece": PIECE,
            "piece_bytes": PIECE_BYTES,
            "picture_address": picture_address,
            "rows_address": "" if content is None else self.files.address(content.path),
            "files_address": "" if folder is None else self.files.address(folder),
            "left_out": [] if folder is None else self.files.left_out.list_names(folder),
        }

    def list_tiles(self, content: MediaFolder | None) -> dict[str, Any]:
        """Return the template values of the thumbnails: a folder's first files; none if `content` is None."""
        names: list[str] = []
        if content is not None:
            with contextlib.suppress(OSError):
                names = list_names(content.path)
        return {
            "tiles": [self.files.show(content.path, name) for name in names[:MAX_TILES]] if content else [],
            "num_files": len(names),
            "shown_letters": CAPTION_CHARACTERS,
        }

    def collect_model_values(self, form: NewForm, content: MediaFolder | None) -> dict[str, Any]:
        """Return the template values of the page's section about the models and the selected model.

        `content` is the media of the selected folder; models that generate this kind of media come first.
        """
        rows = list_model_rows(self.site.models, self.memory, content)
        selected_row = next((row for row in rows if row.value == f"{form.family} {form.task}"), None)
        return {
            "rows": rows,
            "families": list({row.model.family: row.model for row in rows}.values()),  # one model of each
            "tasks": [row for row in rows if row.model.family == form.family],
            "options": _file_options(selected_row),
            **self.collect_kind_values(form, None if selected_row is None else selected_row.model),
            "memory": self.memory,
        }

    def collect_kind_values(self, form: NewForm, model: ModelSet | None) -> dict[str, Any]:
        """Return the template values of the field `train`. `model` is the selected model, if any."""
        if model is None:
            return {"kinds": [], "recipes": []}
        chosen = BY_NAME[form.train or LORA.name]
        return {
            "recipes": list_fitting_recipes(form.family, form.task, form.train),
            "kinds": [(name_field(kind), KIND_TITLES[kind.name]) for kind in list_shown_kinds(model)],
            "whole": FULL.name,
            "whole_refusal": translate_line(FULL.why_unsupported(model, self.memory) or ""),
            "kind_lines": [translate_line(line) for line in chosen.describe(model, self.memory)]
            or [KIND_NOTES.get(chosen.name, "")],
        }

    def list_info(self, form: NewForm, described: DescribedFolder | None, duration: str) -> list[str]:
        """Return the notes next to the button: the steps or their duration, and the GB to download.

        `duration` is the estimated duration of the training run, as text.
        """
        if duration:
            notes = [duration]
        else:
            notes = []
            with contextlib.suppress(OptionError):
                steps = read_steps(form.steps)
                notes.append(say_count(steps, "%(steps)s step", "%(steps)s steps", steps=steps))
        missing = self._list_missing_components(form, described)
        if missing:
            notes.append(say("%(total_bytes)s to download", total_bytes=gigabytes(total_bytes(missing))))
        elif missing is not None:
            notes.append(say("its model is here"))
        return notes

    def _list_missing_components(
        self, form: NewForm, described: DescribedFolder | None
    ) -> list[Component] | None:
        """Return the missing files of the model in the form; None for an unknown model."""
        # If the folder's run.toml names this model, the files that it names are the ones to look for.
        if described is not None and (described.family, described.task) == (form.family, form.task):
            return self.list_missing_parts(described)
        missing: list[Component] | None = None
        for model in find_models():
            if (model.family, model.task) == (form.family, form.task):
                missing = list_missing(model, self.site.models, form.model_files)
        return missing

    def describe_free_space(self) -> str:
        """Return the free disk space for models in GB; "" if it is not known."""
        with contextlib.suppress(OSError):
            return gigabytes(free_bytes(self.site.models.absolute()))
        return ""

    def make_form(self, described: DescribedFolder) -> NewForm:
        """Return the New form, filled with the values of a folder's run.toml and dataset.toml."""
        return NewForm.from_described(described, self.site.models)

    def describe_duration(self, form: NewForm, described: DescribedFolder | None) -> str:
        """Describe how long the form's number of training steps takes; "" if that is not known."""
        if described is None or described.steps is None:
            return ""
        try:
            steps = read_steps(form.steps)
        except OptionError:
            return ""
        return describe_duration(self.site.runs, described, steps, self.cards)

    def try_read(self, folder: Path | None) -> tuple[DescribedFolder | None, str]:
        """Return the parsed run.toml and dataset.toml of a folder, or None and why they cannot be read."""
        if folder is None or not is_described(folder):
            return None, ""
        try:
            return read_described(folder), ""
        except (OSError, ValueError) as reason:
            return None, str(reason)

    def collect_progress(self, folder: Path | None, described: DescribedFolder | None) -> dict[str, Any]:
        """Return the template values of the part of the page that is reloaded while commands run.

        1. Find the folder's background jobs and its jobs in the queue.
        2. Collect their output, the missing downloads, the checklist, and the progress of the preparation.
        3. Decide whether the browser reloads this part again.
        """
        site = self.site
        background_jobs = {kind: self.find_background_job(kind, folder) for kind in BACKGROUND_KINDS}
        queue = site.queue.now()
        training_job, caption_job = _find_queued_jobs(queue.jobs, folder)
        command_output = self.collect_command_output(folder, background_jobs)
        download_values = self.collect_download_values(described)
        folder_progress = self.find_folder_progress(
            folder,
            described,
            background_jobs[CHECK],
            command_output=command_output,
            download_values=download_values,
        )
        run_address = self.find_run(described, training_job)
        return {
            **command_output,
            **download_values,
            **self.collect_commands(folder, described),
            "folder_progress": replace(folder_progress, training_job=training_job, run_address=run_address),
            "kind_titles": KIND_TITLES,
            "checklist": self.make_checklist(
                folder, described, background_jobs, queue.jobs, command_output["new_lines"]
            ),
            "folder": folder,
            "described": described,
            "tries": [] if folder is None else read_tries(background_jobs[TRY_CAPTIONS], folder),
            "training_job": training_job,
            "run_address": run_address,
            "caption_job": caption_job,
            # the browser reloads this part while anything is waiting or running
            "is_busy": _is_any_active(
                background=[*background_jobs.values(), download_values["download"]],
                queued=[training_job, caption_job],
            ),
            "is_paused": queue.worker == "",
            "queue_problem": site.queue.problem,
            "can_write": not site.read_only,
            "mark": find_files_checksum(folder, described),
            "error": "",
            "is_part_of_page": False,
        }

    def collect_commands(self, folder: Path | None, described: DescribedFolder | None) -> dict[str, Any]:
        """Return the command lines to display: those in run.toml, and the run, check and repair commands."""
        if folder is None:
            return {"repair_line": "", "commands": [], "run_command": "", "check_command": ""}
        # a run.toml that cannot be read in full may still list commands
        commands = read_commands(folder) if described is None else described.commands
        repair_argv = make_repair_argv(commands, folder)
        return {
            "repair_line": format_command(repair_argv) if repair_argv else "",
            "commands": [format_command(argv, folder) for argv in commands],
            "run_command": "" if described is None else format_command(self.make_run_argv(described)),
            "check_command": format_command(make_check_argv(folder)),
        }

    def find_folder_progress(
        self,
        folder: Path | None,
        described: DescribedFolder | None,
        check_job: Job | None,
        *,
        command_output: Mapping[str, Any],
        download_values: Mapping[str, Any],
    ) -> FolderProgress:
        """Return how far the preparation of a folder for training has progressed, without its training job.

        Args:
            command_output: Template values from `collect_command_output`.
            download_values: Template values from `collect_download_values`.
        """
        download = download_values["download"]
        # if this page cannot download the missing files, `run` downloads them before training
        can_download = download_values["download_command"] != ""
        return replace(
            self.find_missing_inputs(folder, described, check_job, command_output["new_lines"]),
            is_described=described is not None,
            description_job=command_output["new_job"],
            has_changes=bool(command_output["dry_run_job"] is not None and command_output["changes"]),
            download=download,
            missing_gigabytes=download_values["missing_gigabytes"] if can_download else "",
            download_failure=describe_failure(download) if can_download else "",
            # parts are missing if there are licenses to show
            downloads_at_start=bool(download_values["licenses"]) and not can_download,
            check_job=check_job,
            is_check_old=command_output["is_check_old"],
        )

    def find_missing_inputs(
        self,
        folder: Path | None,
        described: DescribedFolder | None,
        check_job: Job | None,
        lines: Sequence[OutputLine],
    ) -> FolderProgress:
        """Return a FolderProgress with only the missing captions and the errors that `new` has reported.

        `lines` are lines that `new` has printed about files that still exist.
        """
        description_job = self.find_background_job(DESCRIBE, folder)
        if folder is None or described is None or description_job is None or description_job.code != 0:
            return FolderProgress()  # `new` has reported nothing about this folder
        line_kinds = {line.kind for line in lines}
        progress = FolderProgress()
        if CAPTIONS in line_kinds and not described.trigger:
            progress = _count_uncaptioned(folder)
        if MEND in line_kinds and not (
            check_job is not None and check_job.log.stat().st_mtime > description_job.log.stat().st_mtime
        ):
            # a later check reports the remaining errors itself
            has_errors = any(row.grade == BAD for row in make_checklist(None, lines).rows)
            progress = replace(progress, has_listed_errors=has_errors)
        return progress

    def collect_command_output(
        self, folder: Path | None, background_jobs: Mapping[str, Job | None]
    ) -> dict[str, Any]:
        """Return the template values about the output of the `new`, check and repair commands of a folder.

        `new_job` is the `new` command whose lines are shown: a current dry run, or the last that wrote files.
        """
        file_names: list[str] = []
        if folder is not None:
            with contextlib.suppress(OSError):
                file_names = list_names(folder)
        dry_run_job = background_jobs[DRY_RUN]
        if dry_run_job is not None and folder is not None:
            # after the files have changed, the changes that the dry run has listed are out of date
            dry_run_job = dry_run_job if self.is_dry_run_current(dry_run_job, folder) else None
        displayed_job = dry_run_job or background_jobs[DESCRIBE]
        displayed_lines = read_output_lines(displayed_job, file_names)
        check_job = background_jobs[CHECK]
        repair_job = background_jobs[REPAIR_CAPTIONS]
        repair_lines = read_output_lines(repair_job, file_names)
        return {
            "new_job": displayed_job,
            "ended_new_jobs": _list_ended(background_jobs[DRY_RUN], background_jobs[DESCRIBE]),
            "new_lines": [line for line in displayed_lines if not is_for_terminal(line.text)],
            "dry_run_job": dry_run_job,
            "changes": read_changes(dry_run_job),
            "check_job": check_job,
            "check_lines": read_output_lines(check_job, file_names),
            "check_page": self.find_check_page(folder),
            "is_check_old": self.is_check_old(check_job, folder),
            "try_captions_job": background_jobs[TRY_CAPTIONS],
            "repair_job": repair_job,
            "repair_lines": [line for line in repair_lines if line.is_about_repair],
        }

    def make_checklist(
        self,
        folder: Path | None,
        described: DescribedFolder | None,
        background_jobs: Mapping[str, Job | None],
        jobs: Sequence[Job],
        lines: Sequence[OutputLine],
    ) -> Checklist:
        """Return the checklist of a folder: what is ready, needs attention or would end a training run.

        `jobs` are the queued jobs. `lines` are the output of `new`; the checklist includes its warnings only
        if `new` has succeeded.
        """
        if folder is None:
            return Checklist([])
        content = read_media_folder(folder)
        unreadable = [] if content is None else self.files.list_unreadable(folder)
        new_job = background_jobs[DRY_RUN] or background_jobs[DESCRIBE]  # both run `new`
        has_succeeded = new_job is not None and new_job.code == 0
        return make_checklist(
            content or read_outer_folder(folder),
            lines if has_succeeded else [],
            unreadable=unreadable,
            trigger_word="" if described is None else described.trigger,
            applied_remedies=list_applied_remedies(lines, new_job, [*jobs, background_jobs[REPAIR_CAPTIONS]]),
        )

    def collect_download_values(self, described: DescribedFolder | None) -> dict[str, Any]:
        """Return the template values about the download of model files: size, licenses, command and login."""
        missing_parts = self.list_missing_parts(described)
        licenses = list_licenses(missing_parts)
        files = None if described is None else self.find_files_to_download(described)
        download_argv: list[str] = []
        download = None
        if described is not None and files is not None:
            download_argv = self.make_download_argv(described, files)
            download = find_download(self.site.background_jobs, files, self.site.models)
        return {
            "download": download,
            "download_command": format_command(download_argv) if download_argv else "",
            "licenses": licenses,
            "is_gated": is_gated,  # a function that the template calls for each license
            "has_login": any(map(is_gated, licenses)) and has_login(),
            "missing_gigabytes": gigabytes(total_bytes(missing_parts)),
        }

    def show_progress(self, request: Request) -> Response:
        """Respond with the HTML of the section that changes while commands run."""
        folder = find_folder(self.site.runs, request.query_params.get("folder", ""))
        if folder is None:
            return answer_not_found()
        return self.answer_progress(folder)

    def answer_progress(self, folder: Path, error: str = "") -> Response:
        """Return the section that `show_progress` shows. `error` says why a pressed button had no effect."""
        described, _ = self.try_read(folder)
        values = self.collect_progress(folder, described) | {"error": error, "is_part_of_page": True}
        return answer_template("new/new_progress.html", say("New"), values, is_rejected=error != "")

    def show_caption_line(self, request: Request) -> Response:
        """Respond with the captioning command for the form's values, or with an error message."""
        query = request.query_params
        folder = find_folder(self.site.runs, query.get("folder", ""))
        try:
            count = TRIED if "tries" in query else None
            argv = make_caption_argv(CaptionForm.read(query), count)
            text = format_command(argv, folder)
        except OptionError as error:
            text = str(error)
        return answer_page(str(escape(text)))

    def show_folders(self, request: Request) -> Response:
        """Respond with the HTML of the next part of the list of media folders."""
        first_text = request.query_params.get("from", "")
        first = int(first_text[:6]) if first_text.isascii() and first_text.isdecimal() else 0
        folders = list_media_folders(self.site.runs)
        values = {
            "folders": folders[first : first + FOLDERS_PER_PART],
            "num_folders": len(folders),
            "next_folder": first + FOLDERS_PER_PART,
            "picture_address": picture_address,
        }
        return answer_template("new/new_folders.html", say("New"), values)

    def show_check(self, request: Request) -> Response:
        """Respond with the check.html that the check has written into a folder.

        The folder may come from somebody else, so the page may not run scripts or load other files.
        """
        folder = find_folder(self.site.runs, request.query_params.get("folder", ""))
        path = self.find_check_page(folder)
        if path is None:
            return answer_not_found()
        try:
            content = read_content(path, MAX_CHECK_PAGE_BYTES)
        except OSError:
            return answer_not_found()
        headers = {"content-security-policy": CHECK_POLICY}
        return Response(content, media_type="text/html; charset=utf-8", headers=headers)

    def find_check_page(self, folder: Path | None) -> Path | None:
        """Return the page of a folder's last check; None if it does not exist or is outside the roots."""
        path = None if folder is None else folder / CHECK_PAGE
        return path if path is not None and self.site.runs.is_inside(path) else None

    def is_check_old(self, check_job: Job | None, folder: Path | None) -> bool:
        """Return whether a folder's files have changed since the job `check_job` began."""
        return check_job is not None and folder is not None and has_changed_since(check_job, folder, FILES)

    def find_folder_error(self, text: str, folder: Path | None, described: DescribedFolder | None) -> str:
        """Return why the typed folder cannot be used; "" if it can, or if nothing is typed.

        `folder` is the existing folder that `text` names, `described` the content of its run.toml.
        """
        if folder is None:
            return self.explain_folder(text) if text else ""
        return explain_missing_media(folder) if described is None else ""

    def explain_folder(self, text: str) -> str:
        """Return the reason why the page cannot use the typed path `text` as a folder."""
        roots = ", ".join(str(top) for top in self.site.runs.root_folders)
        text = complete_home(text)
        if WINDOWS_PATH.match(text) and os.name != "nt":
            return say(
                "%(text)s is a Windows path, but this page runs on another system. Drop the files "
                "here, or enter a folder below %(roots)s.",
                text=text,
                roots=roots,
            )
        file = find_file(self.site.runs, text)
        if file is not None:
            return say("%(text)s is a file. Enter its folder: %(folder)s", text=text, folder=file.parent)
        try:
            path = find_typed(self.site.runs, text)
        except (OSError, UnicodeError):
            path = None
        except ValueError as error:
            return f"{text}: {error}."
        if path is not None:
            command = make_server_argv(self.site, extra_folders=[real_path(path)])
            return say(
                "%(path)s is outside the folders of this page, %(roots)s. End the server, and start "
                "it with that folder: %(format_command)s",
                path=real_path(path),
                roots=roots,
                format_command=format_command(command, Path.cwd()),
            )
        return say(
            "%(text)s: no such folder below %(roots)s. Choose one from the list, or drop files here.",
            text=text,
            roots=roots,
        )

    def find_background_job(self, kind: str, folder: Path | None) -> Job | None:
        """Return the background job of a kind in a folder; None if there is none."""
        return None if folder is None else self.site.background_jobs.find(name_background_job(kind, folder))

    def find_run(self, described: DescribedFolder | None, job: Job | None) -> str:
        """Return the URL of the page about a folder's training run; "" if there is no page yet.

        `job` is the queue's job that runs the folder.
        """
        if described is None:
            return ""
        for run in self.site.runs.list_all():
            if run.history.parent == described.output and run.name.startswith(described.name):
                return f"/run/{run.id}/"
        plan = None
        if job is not None:
            plan = parse_run_config(described.folder / RUN_FILE, described.run_content, changed=0.0)
        return "" if plan is None else f"/run/{plan.id}/"

    def list_missing_parts(self, described: DescribedFolder | None) -> list[Component]:
        """Return the missing parts of the model that a run.toml names, to download before training."""
        if described is None:
            return []
        is_there = {
            name: path for name, path in described.model_files.items() if (described.folder / path).exists()
        }
        for model in find_models():
            if (model.family, model.task) == (described.family, described.task):
                missing = list_missing(model, self.site.models, is_there)
                return [part for part in missing if (part.option or "").lstrip("-") in described.model_files]
        return []

    def find_files_to_download(self, described: DescribedFolder) -> TaskFiles | None:
        """Return the files of the model in run.toml if some are missing and a download can provide them.

        Returns None if no file is missing, or if run.toml names a missing file that is not a released file
        in this page's models folder, because only `run` can find the source of such a file.
        """
        paths = [described.folder / path for path in described.model_files.values()]
        missing = {real_path(path) for path in paths if not path.exists()}
        if not missing:
            return None
        for in_fp8 in (False, True):  # the files are released in two precisions
            files = find_task(self.site.models, described.family, described.task, in_fp8)
            if files is None:
                return None
            released = {real_path(self.site.models / part.path) for part in files.parts}
            if missing <= released:
                return files
        return None

    def make_download_argv(self, described: DescribedFolder, files: TaskFiles) -> list[str]:
        """Return the command that downloads the missing files of the model that a run.toml names."""
        missing_options = {
            name for name, path in described.model_files.items() if not (described.folder / path).exists()
        }
        options = {(part.component.option or "").lstrip("-") for part in files.parts}
        present_options = sorted(options - missing_options - {""})
        argv = files.download_words(self.site.models)
        return [*argv, "--without", *present_options] if present_options else argv

    def make_run_argv(self, described: DescribedFolder) -> list[str]:
        """Return the command that starts the folder's training run, with this page's models folder."""
        return make_run_argv(described, self.site.models)

    def preview_prepare(
        self, form: NewForm, folder: Path | None, described: DescribedFolder | None
    ) -> PreparePlan:
        """Return what the Prepare button would do; an incomplete form yields an incomplete command."""
        with contextlib.suppress(UserError, ValueError):
            if folder is not None:
                return self.plan_prepare(form, folder, described)
        form = form if form.folder else replace(form, folder="FOLDER")
        return PreparePlan(make_new_argv(form, self.site.models))

    def plan_prepare(self, form: NewForm, folder: Path, described: DescribedFolder | None) -> PreparePlan:
        """Return what the Prepare button does with a folder: a `new` command, or changed keys of run.toml.

        In a folder without these files, `new` writes them. Otherwise, a changed name or number of steps is
        written into run.toml; for all other changes, `new` first shows how the files would change. Raises
        OptionError if the number of steps is not valid.
        """
        form = form.with_folder(folder)
        models = self.site.models
        if not any((folder / name).exists() for name in FILES):
            return PreparePlan(make_new_argv(form, models))
        if described is not None:
            before = NewForm.from_described(described, models)
            key_changes = list_key_changes(form, before, described.values)
            if key_changes.new_values and not list_changed_fields(form, before):
                return PreparePlan([], key_changes)
        return PreparePlan(make_new_argv(form, models, dry_run=True), is_comparison=True)

    def change(self, request: Request, form: Form) -> Response:
        """Apply a button's action to the selected folder, and show the folder's page again."""
        sent_form = NewForm.from_fields(form)
        action = request.path_params["what"]
        folder = find_folder(self.site.runs, sent_form.folder)
        if folder is None:
            folder_error = (
                self.explain_folder(sent_form.folder) if sent_form.folder else say("Choose a folder.")
            )
            return self.answer(sent_form, folder_error)
        if action not in self.actions:
            return answer_unknown()
        fields = {name: "".join(values) for name, values in form.items()}
        message = problem = ""
        try:
            message = self.actions[action](PressedButton(folder, sent_form, fields))
        except ChangedMeanwhileError:  # since the page was built
            problem = say(
                "The files of %(folder)s have changed in the meantime. Reload this page to see them.",
                folder=folder,
            )
        except (UserError, OSError, ValueError) as error:
            problem = str(error)
        if action not in FULL_PAGE_ACTIONS:  # the browser replaces only the progress part of the page
            return self.answer_progress(folder, problem)
        if problem:
            keeps_typed_values = action == "describe"  # Prepare: the user corrects the values
            return self.answer(sent_form if keeps_typed_values else self.read_form(str(folder)), problem)
        response = answer_move(f"/new?{encode_address({'folder': str(folder)})}")
        response.headers[MESSAGE_HEADER] = quote(message)
        return response

    def reject_unsaved(self, button: PressedButton) -> None:
        """Raise OptionError if the user has changed fields whose values are not in the folder's files yet."""
        if not button.displayed_address:  # no fields were sent
            return
        displayed_form = NewForm.from_address(button.displayed_address)
        saved_form = self.make_form(read_described(button.folder))
        labels = list_unsaved(button.form, displayed_form, saved_form)
        if labels:
            raise refusal(
                "What you have typed is not in the files of this folder yet (%(names)s). Press "
                "Prepare first.",
                names=join(", ", labels),
            )

    def prepare(self, button: PressedButton) -> str:
        """Write a folder's run.toml and dataset.toml from the form's values, and return a message.

        Small changes are written directly. Otherwise, a `new` command is started, and the message is "".
        """
        folder, form = button.folder, button.form
        check_form(form)
        has_changed = button.files_checksum != "" and button.files_checksum != mark_files(folder)
        # changed files do not conflict while they still have the values that the page showed
        if has_changed and not self.has_displayed_values(folder, button.displayed_address):
            raise ChangedMeanwhileError
        self.site.tracked_runs.reject_while_it_runs(folder)
        reason = explain_missing_media(folder)
        if reason:
            raise OptionError(reason)
        described, _ = self.try_read(folder)
        plan = self.plan_prepare(form, folder, described)
        if plan.key_changes.new_values:
            run_checksum = compute_checksum(read_content(folder / RUN_FILE))
            change_keys(folder / RUN_FILE, plan.key_changes.new_values, run_checksum)
            return say("Written into %(text)s.", text=plan.key_changes.text)
        kind = DRY_RUN if plan.is_comparison else DESCRIBE
        self.site.background_jobs.start(
            name_background_job(kind, folder), plan.argv, Path.cwd(), within=folder
        )
        return ""

    def replace(self, button: PressedButton) -> str:
        """Copy the folder's files into the bin, then let `new` rewrite them with the changes shown before."""
        folder = button.folder
        dry_run_job = self.find_background_job(DRY_RUN, folder)
        if (
            dry_run_job is None
            or dry_run_job.state == RUNNING
            or not self.is_dry_run_current(dry_run_job, folder)
        ):
            raise refusal("There are no changes to make. Press Prepare to look for changes.")
        if button.files_checksum != mark_files(folder):
            raise ChangedMeanwhileError
        self.site.tracked_runs.reject_while_it_runs(folder)
        copy_name = f"{folder.name} {time.strftime('%Y-%m-%d %H.%M.%S')}"
        keep_copies(folder, self.site.runs.find_top(folder) / BIN / "replaced" / copy_name)
        # the command of the comparison, which now writes the files
        form = NewForm.from_argv(shlex.split(dry_run_job.line))
        argv = make_new_argv(form, self.site.models, overwrite=True)
        self.site.background_jobs.start(
            name_background_job(DESCRIBE, folder), argv, Path.cwd(), within=folder
        )
        self.site.background_jobs.forget(name_background_job(DRY_RUN, folder))
        return ""

    def keep_files(self, button: PressedButton) -> str:
        """Reject the changes that `new --dry_run` has shown, leaving the files as they are."""
        self.site.background_jobs.forget(name_background_job(DRY_RUN, button.folder))
        return ""

    def check(self, button: PressedButton) -> str:
        """Start the background job that checks the folder's run.toml and dataset."""
        self.reject_unsaved(button)
        name = name_background_job(CHECK, button.folder)
        self.site.background_jobs.start(name, make_check_argv(button.folder), Path.cwd())
        return ""

    def stop(self, button: PressedButton) -> str:
        """Stop all background commands of the folder."""
        for kind in BACKGROUND_KINDS:
            self.site.background_jobs.stop(name_background_job(kind, button.folder))
        return ""

    def try_captions(self, button: PressedButton) -> str:
        """Start the command that captions a few files as a trial and prints the captions."""
        folder = button.folder
        argv = make_caption_argv(CaptionForm.read(button.fields), TRIED)
        require_inside(self.site.runs, folder)  # the command writes into the folder
        self.site.background_jobs.start(
            name_background_job(TRY_CAPTIONS, folder), argv, folder, within=folder, typed=TYPED_OPTIONS
        )
        return ""

    def write_captions(self, button: PressedButton) -> str:
        """Queue the command that writes the folder's captions."""
        folder = button.folder
        argv = make_caption_argv(CaptionForm.read(button.fields))
        require_inside(self.site.runs, folder)
        self.site.queue.add_and_begin(argv, folder, within=folder, typed=TYPED_OPTIONS)
        return ""

    def start_download(self, button: PressedButton) -> str:
        """Start the download of the missing files of the model that the folder's run.toml names."""
        described = read_described(button.folder)
        files = self.find_files_to_download(described)
        if files is None:
            raise refusal("No files of its model are missing. Reload this page.")
        if not button.has_accepted_licenses:
            raise refusal("Read the licenses of the model next to the button, and accept them.")
        name = name_download(self.site.models, described.family, described.task)
        self.site.background_jobs.start(name, self.make_download_argv(described, files), Path.cwd())
        return ""

    def start(self, button: PressedButton) -> str:
        """Add the run of a folder to the queue, and start the queue unless other jobs are waiting."""
        self.reject_unsaved(button)
        folder = button.folder
        if not is_described(folder):
            raise refusal("It is not prepared yet: press Prepare first.")
        argv = self.make_run_argv(read_described(folder))
        if "--download" in argv and not button.has_accepted_licenses:
            raise refusal("Its model will be downloaded: read the licenses next to Start, and accept them.")
        self.site.tracked_runs.start(folder, argv)
        return ""

    def run_remedy(self, button: PressedButton) -> str:
        """Run the pressed button's command, which `new` or `run --check` has printed for this folder.

        Raises OptionError if the folder's jobs have not printed this command.
        """
        folder = button.folder
        printed_lines: list[OutputLine] = []
        for kind in (DRY_RUN, DESCRIBE, CHECK):
            printed_lines += read_output_lines(self.find_background_job(kind, folder))
        argv = find_command(printed_lines, button.fields.get("line", ""))
        if argv is None:
            raise refusal("This command was not printed for this folder, or is out of date.")
        require_inside(self.site.runs, folder)
        command, _ = find_program(argv, folder)
        if command.words[0] == "cache":  # it repairs captions: short, so it does not wait in the queue
            self.site.background_jobs.start(
                name_background_job(REPAIR_CAPTIONS, folder), argv, folder, within=folder
            )
        else:
            self.site.queue.add_and_begin(argv, folder, within=folder)
        return ""

    def repair_captions(self, button: PressedButton) -> str:
        """Convert captions of a folder to UTF-8. The field `encoding` is their encoding; "" to guess it."""
        folder, encoding = button.folder, button.fields.get("encoding", "")
        if encoding and encoding not in NAMES:
            raise refusal("%(encoding)s: unknown encoding.", encoding=encoding)
        argv = make_repair_argv(read_commands(folder), folder)
        if not argv:
            raise refusal("It is not prepared yet: press Prepare first.")
        require_inside(self.site.runs, folder)
        if encoding:
            argv = [*argv, encoding]
        name = name_background_job(REPAIR_CAPTIONS, folder)
        self.site.background_jobs.start(name, argv, folder, within=folder)
        return ""

    def show_file_description(self, request: Request, form: Form) -> Response:
        """Respond with a description of the file whose path is typed for a model option.

        The page then also asks whether the file fits the model (`show_misfit`), unless the folder's run.toml
        already names this file.
        """
        option = request.query_params.get("option", "")
        path = "".join(form.get(f"file_{option}", ()))
        sent_form = NewForm.from_fields(form)
        has_model = find_model(sent_form.family, sent_form.task) is not None
        described, _ = self.try_read(find_folder(self.site.runs, sent_form.folder))
        saved_form = NewForm() if described is None else self.make_form(described)
        # `new` has already checked the file that run.toml names
        uses_saved_model = (saved_form.family, saved_form.task) == (sent_form.family, sent_form.task)
        uses_saved_file = saved_form.model_files.get(option) == sent_form.model_files.get(option)
        is_checked = uses_saved_model and uses_saved_file
        values = {
            "text": describe_file(path),
            "option": option,
            "asks": has_model and not is_checked and bool(path.strip()),
        }
        return answer_template("new/new_file.html", say("New"), values)

    def show_misfit(self, request: Request, form: Form) -> Response:
        """Respond with the error message of `new` if a file does not fit the selected model."""
        option = request.query_params.get("option", "")
        sent_form = NewForm.from_fields(form)
        path = "".join(form.get(f"file_{option}", ()))
        model = find_model(sent_form.family, sent_form.task)
        components = [] if model is None else model.components
        if any(f"--{option}" == part.option for part in components):
            reason = find_misfit(sent_form.family, sent_form.task, option, path)
        else:
            reason = ""  # not an option of this model
        return answer_page(str(escape(reason)))


def _count_uncaptioned(folder: Path) -> FolderProgress:
    """Return a FolderProgress with only the number of files without a caption."""
    content = read_media_folder(folder) or read_outer_folder(folder)
    if content is None:
        return FolderProgress()
    only_pictures = not content.num_clips and not content.num_audios
    return FolderProgress(uncaptioned=content.num_uncaptioned, only_pictures=only_pictures)


def _find_queued_jobs(jobs: Sequence[Job], folder: Path | None) -> tuple[Job | None, Job | None]:
    """Return the queue's jobs that train on a folder and that caption its files, the newest of each."""
    if folder is None:
        return None, None
    training_jobs = [job for job in jobs if is_folder_run(job, folder)]
    return newest_job(training_jobs), find_tool_job(jobs, folder, CAPTION_SCRIPT)


def _is_any_active(background: Sequence[Job | Download | None], queued: Sequence[Job | None]) -> bool:
    """Return whether a background command or download is running, or a queued job is running or waiting."""
    if any(process is not None and process.state == RUNNING for process in background):
        return True
    return any(job is not None and job.state in (WAITING, RUNNING) for job in queued)


def explain_missing_media(folder: Path) -> str:
    """Return the reason why `new` cannot use a folder, because it has no media; "" if it may have some."""
    if read_media_folder(folder) is not None or any(path.is_dir() for path in folder.iterdir()):
        return ""
    return say("%(folder)s has no clips, images or sounds. Drop some here first.", folder=folder)


def list_applied_remedies(
    lines: Sequence[OutputLine], description_job: Job | None, jobs: Sequence[Job | None]
) -> set[str]:
    """Return which of the remedies that `new` has printed have succeeded since.

    These are command lines, and REPAIR_CAPTIONS if the captions were repaired.

    Args:
        lines: Lines that `new` has printed.
        description_job: Background job of the last `new` command for the folder; None if there is none.
        jobs: Jobs that may have applied a remedy.
    """
    if description_job is None or not description_job.log.exists():
        return set()
    # a log's modification time is the time of the last output
    described_at = description_job.log.stat().st_mtime
    succeeded_jobs = [job for job in jobs if job is not None and job.code == 0 and job.log.exists()]
    applied_commands = [
        _split_line(job.line) for job in succeeded_jobs if job.log.stat().st_mtime > described_at
    ]
    remedies = {line.text for line in lines if line.is_command and _split_line(line.text) in applied_commands}
    if any("--repair_captions" in argv for argv in applied_commands):
        remedies.add(REPAIR_CAPTIONS)
    return remedies


def _split_line(line: str) -> list[str]:
    """Return a command line's arguments without its `cd`, or [line] if it cannot be split."""
    try:
        return split_arguments(command_part(line))
    except OptionError:  # a manually written line, which `new` never prints
        return [line]


def describe_failure(download: Download | None) -> str:
    """Return the last lines that a failed download has printed, with advice; "" if it has not failed.

    The lines about licenses, which it prints first, are left out: they are no part of the error.
    """
    if download is None or download.state != DIED:
        return ""
    licenses = {line for model in find_models() for line in describe_licenses(model)}
    lines = download.job.last_lines(MAX_FAILURE_LINES).splitlines()
    return "\n".join(line for line in lines if line not in licenses)


def find_files_checksum(folder: Path | None, described: DescribedFolder | None) -> str:
    """Return a checksum of run.toml and the other files as they were read; "" without a folder."""
    if described is not None:
        return described.checksum
    return "" if folder is None else mark_files(folder)


def make_repair_argv(commands: Sequence[list[str]], folder: Path) -> list[str]:
    """Return the command that converts a folder's captions to UTF-8; [] if there is none.

    `commands` are the commands in the folder's run.toml.
    """
    for argv in commands:
        with contextlib.suppress(OptionError):
            command, _ = find_program(argv, folder)
            if command.words[0] == "cache" and "--check" in argv and "--html" in argv:
                return [*argv, "--repair_captions"]
    return []


def find_free_name(output: Path, name: str) -> str:
    """Return another name for a LoRA if the output folder has one with this name; otherwise ""."""
    return free_name(output, name) if (output / f"{name}.safetensors").exists() else ""


def _list_ended(*background_jobs: Job | None) -> str:
    """Return an identifier for each ended background job, separated by spaces."""
    ended = [job.process for job in background_jobs if job is not None and job.state != RUNNING]
    return " ".join(short_digest(repr(process)) for process in ended)


def _suggest_free_name(form: NewForm, folder: Path | None, described: DescribedFolder | None) -> str:
    """Return another name if a LoRA with the form's name exists; else ""."""
    if folder is None:
        return ""
    output = folder / "output" if described is None else described.output
    return find_free_name(output, form.name or folder.name)


def _file_options(row: ModelRow | None) -> list[str]:
    """Return the options that take the paths of a model's files."""
    if row is None:
        return []
    return list(dict.fromkeys(part.option.lstrip("-") for part in row.model.components if part.option))


def new_routes(site: Site) -> list[Route]:
    """Return the routes of the New page."""
    pages = NewPages(site)
    return [
        Route("/new", pages.show),
        Route("/new/progress", pages.show_progress),
        Route("/new/folders", pages.show_folders),
        Route("/new/checked", pages.show_check),
        Route("/new/caption_line", pages.show_caption_line),
        Route("/new/file", answer_form(pages.show_file_description), methods=["POST"]),
        Route("/new/fits", answer_form(pages.show_misfit), methods=["POST"]),
        Route(UPLOAD, pages.uploads.take, methods=["POST"]),
        Route(PIECE, pages.pieces.take, methods=["POST"]),
        Route(PIECE, pages.pieces.show),
        *file_routes(pages.files),
        # last, because it also matches the paths above
        Route("/new/{what}", answer_form(pages.change), methods=["POST"]),
    ]
