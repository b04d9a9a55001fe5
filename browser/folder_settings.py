"""All settings on the page New: the table of run.toml's keys, and the three files of a folder as text.

Nothing is kept between two requests. A form carries the text that it was made from, so that its edits are
known, and the file's mark, so that a file that changed meanwhile is never overwritten.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from browser.background_jobs import name_background_job
from browser.described_folder import (
    FILES,
    PROMPTS_FILE,
    ChangedMeanwhileError,
    DraftFile,
    is_described,
    read_described,
    tidy_lines,
)
from browser.folders import find_folder
from browser.new_form import NewForm, new_words
from browser.responses import Form, answer_form, answer_template, answer_unknown
from browser.run_start import DESCRIBE
from browser.runs import RUNNING
from browser.settings_table import (
    SettingRow,
    apply_edits,
    describe_difference,
    describe_following,
    field_of,
    find_training_script,
    list_rows,
    read_chosen,
    read_settings,
    refuse_new_faults,
)
from browser.site import Site
from modules.errors import OptionError, UserError
from modules.text_files import read_content, read_text
from project.options import RUN_FILE

CHOSEN = "chosen"  # kind of the background job that makes run.toml again
TABLE = "table"  # the part of the page for the keys of run.toml; the others are files


@dataclass(frozen=True)
class DraftChange:
    """Change that a form would save of a part of the page."""

    part: str  # TABLE or the name of a file
    difference: Sequence[str] = ()
    fault: str = ""  # why it cannot be saved
    message: str = ""  # after a press of its button
    text: str | None = None  # that was typed, of a file
    note: str = ""  # of the script that has checked it, or why none has


def plan_change(
    site: Site, part: str, texts: Mapping[DraftFile, str], run: DraftFile, typed: str | None = None
) -> DraftChange:
    """Return the change that a form would save, after the scripts have checked it.

    A running training has read all files but the prompts, so these are not changed under it. texts: the new
    text of each file. run: the folder's current run.toml. typed: the text of a file that was typed as a
    whole.
    """
    difference: list[str] = []
    for draft, after in texts.items():
        difference += describe_difference(draft.text, after)
    change = DraftChange(part, difference, text=typed)
    try:
        for draft, after in texts.items():
            if after == draft.text:
                continue
            if draft.name != PROMPTS_FILE:
                site.tracked_runs.refuse_while_it_runs(draft.path.parent)
            notes = [change.note, refuse_new_faults(draft, after, run.text)]
            if draft.name == RUN_FILE:
                notes.append(describe_following(draft.text, after))
            change = replace(change, note=" ".join(filter(None, notes)))
    except (ValueError, UserError) as error:
        return replace(change, fault=str(error))
    return change


def save_change(change: DraftChange, texts: Mapping[DraftFile, str]) -> DraftChange:
    """Write a change unless it has a fault, and return what is left to say.

    texts: see `plan_change`. Raises as `replace_content`, also if a file changed since it was read.
    """
    if change.fault:
        return change
    changed = {draft: after for draft, after in texts.items() if after != draft.text}
    if not changed:
        return DraftChange(part=change.part, message="Nothing is changed.")
    for draft, after in changed.items():
        draft.save(after)
    names = " and ".join(draft.name for draft in changed)
    message = f"Saved into {names}: {'; '.join(change.difference)}"
    return DraftChange(part=change.part, message=message, note=change.note)


@dataclass(frozen=True)
class SettingsView:
    """Values that the template shows."""

    folder: Path
    files: Mapping[str, DraftFile]
    rows: Sequence[SettingRow]
    is_chosen_known: bool
    is_asking: bool  # what `new` chose is being found out
    chosen_problem: str = ""  # why it could not be found out
    problem: str = ""  # why there are no rows
    change: DraftChange = field(default_factory=lambda: DraftChange(part=""))


def read_file(site: Site, folder: Path, name: str) -> DraftFile:
    """Read a file of a folder. Raises OSError if it cannot be read or a link in its place leads outside."""
    path = folder / name
    if not path.exists():
        return DraftFile(path, None)
    if not site.runs.is_below(path):
        raise OSError(f"{path} leads out of the folders that are shown")
    return DraftFile(path, read_content(path))


def find_described(site: Site, text: str) -> Path | None:
    """Return a described folder below the roots; None for any other text."""
    folder = find_folder(site.runs, text)
    if folder is None or not is_described(folder) or not site.runs.is_below(folder / RUN_FILE):
        return None
    return folder


def require_whole(fields: Mapping[str, str]) -> None:
    """Raise OptionError if the end of a form is missing."""
    if "complete" not in fields:
        raise OptionError("The form did not arrive as a whole. Load the page again.")


class FolderSettingsPages:
    """Show the settings of a folder, and save them."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def show(self, folder: Path, _: Mapping[str, str]) -> Response:
        return self.answer(folder)

    def answer(
        self,
        folder: Path,
        change: DraftChange | None = None,
        is_refused: bool = False,
        chosen_problem: str = "",
    ) -> Response:
        """Return the settings of a folder.

        change: what a form would save. chosen_problem: why it cannot be found out what `new` chose.
        """
        view = self.view(folder, change or DraftChange(part=""))
        values = {
            "view": replace(view, chosen_problem=chosen_problem or view.chosen_problem),
            "field_of": field_of,
            "can_write": not self.site.read_only,
            "table_part": TABLE,
        }
        return answer_template("folder_settings.html", RUN_FILE, values, is_refused)

    def view(self, folder: Path, change: DraftChange) -> SettingsView:
        chosen = self.read_chosen_text(folder)
        problem = ""
        rows: list[SettingRow] = []
        files = {}
        try:
            files = {name: read_file(self.site, folder, name) for name in FILES}
            rows = self.read_rows(files[RUN_FILE].text, chosen)
        except (OSError, ValueError, UserError) as error:
            problem = str(error)
        job = self.site.background_jobs.find(name_background_job(CHOSEN, folder))
        is_failed = job is not None and job.state != RUNNING and job.code != 0
        return SettingsView(
            folder=folder,
            files=files,
            rows=rows,
            is_chosen_known=chosen is not None,
            is_asking=job is not None and job.state == RUNNING,
            chosen_problem=job.last_lines(3) if job is not None and is_failed else "",
            problem=problem,
            change=change,
        )

    def read_rows(self, text: str, chosen: str | None) -> list[SettingRow]:
        return list_rows(text, read_settings(find_training_script(text)), chosen)

    def chosen_words(self, folder: Path) -> list[str]:
        """Return the command that makes the run.toml of a folder again, and only prints it.

        It is the command with which a page described the folder, or what the files say if a terminal did that
        since.
        """
        described = read_described(folder)
        words = new_words(NewForm.of_described(described, self.site.models), self.site.models)
        job = self.site.background_jobs.find(name_background_job(DESCRIBE, folder))
        if job is not None and job.code == 0:
            typed = NewForm.of_words(shlex.split(job.line))
            if (typed.family, typed.task) == (described.family, described.task):
                words = shlex.split(job.line)
        return [*(word for word in words if word != "--overwrite"), "--print_run"]

    def read_chosen_text(self, folder: Path) -> str | None:
        """Return the run.toml text that `new` chose for a folder; None if it is not known (any more)."""
        job = self.site.background_jobs.find(name_background_job(CHOSEN, folder))
        if job is None or job.code != 0:
            return None
        try:
            if job.words != self.chosen_words(folder):
                return None
            return read_chosen(read_text(job.log))
        except (OSError, ValueError, UserError):
            return None

    def change(self, folder: Path, what: str, fields: Mapping[str, str]) -> Response:
        """Show what a form would save, save it, or find out what `new` chose."""
        if what == CHOSEN:
            return self.ask_chosen(folder)
        part = fields.get("part", TABLE)
        if what not in ("look", "save") or part not in (TABLE, *FILES):
            return answer_unknown()
        name = RUN_FILE if part == TABLE else part
        try:
            present = read_file(self.site, folder, name)
            if present.mark != fields.get("have", ""):
                return self.answer_conflict(folder, part, present, fields)
            texts = {present: self.read_edited(part, present, fields)}
            typed = None if part == TABLE else texts[present]
            change = plan_change(self.site, part, texts, read_file(self.site, folder, RUN_FILE), typed)
            if what == "save":
                change = save_change(change, texts)
        except ChangedMeanwhileError:
            return self.answer_conflict(folder, part, read_file(self.site, folder, name), fields)
        except (OSError, ValueError, UserError) as error:
            change = DraftChange(part=part, fault=str(error), text=fields.get("text"))
        return self.answer(folder, change, is_refused=what == "save" and change.fault != "")

    def read_edited(self, part: str, present: DraftFile, fields: Mapping[str, str]) -> str:
        """Return the text of a file with the edits of a form."""
        if part != TABLE:
            return fields.get("text", "")
        require_whole(fields)
        return apply_edits(present.text, self.read_rows(present.text, None), fields)

    def answer_conflict(
        self, folder: Path, part: str, present: DraftFile, fields: Mapping[str, str]
    ) -> Response:
        """Return the page of the current file, with the text that was typed for the earlier one."""
        typed = fields.get("text")
        base = fields.get("base", "")
        now = describe_difference(base, present.text)
        try:
            edited = typed or ""
            if part == TABLE:
                edited = apply_edits(base, self.read_rows(base, None), fields)
            wanted = describe_difference(base, edited)
        except (ValueError, UserError) as error:
            wanted = [str(error)]
        fault = (
            f"{present.name} has changed meanwhile, and nothing was overwritten. The file now: "
            f"{'; '.join(now) or 'as before'}. What you changed: {'; '.join(wanted) or 'nothing'}"
        )
        change = DraftChange(part=part, fault=fault, text=typed)
        return self.answer(folder, change, is_refused=True)

    def ask_chosen(self, folder: Path) -> Response:
        """Start the process that makes run.toml again."""
        try:
            words = self.chosen_words(folder)
            job = self.site.background_jobs.find(name_background_job(CHOSEN, folder))
            if job is None or job.words != words or job.state != RUNNING:
                self.site.background_jobs.start(
                    name_background_job(CHOSEN, folder), words, Path.cwd(), within=folder
                )
        except (OSError, ValueError, UserError) as error:
            return self.answer(folder, is_refused=True, chosen_problem=str(error))
        return self.answer(folder)


class FolderPages(Protocol):
    """A part of the page New about a described folder.

    Its functions raise OSError, ValueError or UserError if a file of the folder cannot be read.
    """

    def show(self, folder: Path, query: Mapping[str, str]) -> Response: ...

    def change(self, folder: Path, what: str, fields: Mapping[str, str]) -> Response: ...


def folder_routes(site: Site, part: str, pages: FolderPages) -> list[Route]:
    """Return the routes of a part of the page New: one that shows it, and one for its buttons."""

    def answer(folder_text: str, act: Callable[[Path], Response]) -> Response:
        folder = find_described(site, folder_text)
        if folder is None:
            return PlainTextResponse("There is no such described folder.", 404)
        try:
            return act(folder)
        except (OSError, ValueError, UserError) as error:
            return PlainTextResponse(str(error), 422)

    def show(request: Request) -> Response:
        query = request.query_params
        return answer(query.get("folder", ""), lambda folder: pages.show(folder, query))

    def change(request: Request, form: Form) -> Response:
        fields = {name: tidy_lines("".join(values)) for name, values in form.items()}
        what = request.path_params["what"]
        return answer(fields.get("folder", ""), lambda folder: pages.change(folder, what, fields))

    return [
        Route(f"/new/{part}", show),
        Route(f"/new/{part}/{{what}}", answer_form(change), methods=["POST"]),
    ]
