"""All settings on the page New: the table of run.toml's keys, and the three files of a folder as text.

Nothing is kept between two requests. A form carries the text that it was made from, so that its edits are
known, and the file's mark, so that a file that changed meanwhile is never overwritten.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from browser.answers import Form, answer_form, answer_template, answer_unknown
from browser.beginnings import DESCRIBE
from browser.captions import mark_bytes
from browser.described import FILES, ChangedMeanwhileError, is_described, read_described, replace_content
from browser.errands import errand_name
from browser.folders import find_folder
from browser.new_form import NewForm, new_words
from browser.runs import RUNNING
from browser.settings_table import (
    SettingRow,
    TextForm,
    apply_edits,
    describe_difference,
    field_of,
    find_training_script,
    list_rows,
    read_chosen,
    read_settings,
    refuse_new_faults,
    tidy_lines,
)
from browser.site import Site
from modules.errors import OptionError, UserError
from modules.text_files import read_content, read_text
from project.options import RUN_FILE

CHOSEN = "chosen"  # kind of the errand that makes run.toml again
TABLE = "table"  # the part of the page for the keys of run.toml; the others are files
LOOK_AGAIN = "This is what would be saved. Press the button once more to save it."


@dataclass(frozen=True)
class DraftFile:
    """A file of a described folder as it is now."""

    name: str
    content: bytes | None  # None: there is no such file

    @property
    def mark(self) -> str:
        return mark_bytes(self.content)

    @property
    def form(self) -> TextForm:
        return TextForm.of(self.content or b"")


@dataclass(frozen=True)
class DraftChange:
    """What a form would save of a part of the page."""

    part: str  # TABLE or the name of a file
    difference: Sequence[str] = ()
    fault: str = ""  # why it cannot be saved
    said: str = ""  # after a press of its button
    mark: str = ""  # of the text that would be saved
    text: str | None = None  # that was typed, of a file


@dataclass(frozen=True)
class SettingsView:
    """What the template shows."""

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
        return DraftFile(name, None)
    if not site.runs.is_below(path):
        raise OSError(f"{path} leads out of the folders that are shown")
    return DraftFile(name, read_content(path))


def find_described(site: Site, text: str) -> Path | None:
    """Return a described folder below the roots; None for any other text."""
    folder = find_folder(site.runs, text)
    if folder is None or not is_described(folder) or not site.runs.is_below(folder / RUN_FILE):
        return None
    return folder


def list_fields(form: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {name: tidy_lines("".join(values)) for name, values in form.items()}


class FolderSettingsPages:
    """Show the settings of a folder, and save them."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def show(self, request: Request) -> Response:
        folder = find_described(self.site, request.query_params.get("folder", ""))
        if folder is None:
            return PlainTextResponse("There is no such described folder.", 404)
        return self.answer(folder)

    def answer(self, folder: Path, change: DraftChange | None = None, is_refused: bool = False) -> Response:
        """Return the settings of a folder. change: what a form would save."""
        values = {
            "view": self.view(folder, change or DraftChange(part="")),
            "field_of": field_of,
            "can_write": not self.site.read_only,
            "table_part": TABLE,
        }
        return answer_template("settings_table.html", RUN_FILE, values, is_refused)

    def view(self, folder: Path, change: DraftChange) -> SettingsView:
        chosen = self.read_chosen_text(folder)
        problem = ""
        rows: list[SettingRow] = []
        files = {}
        try:
            files = {name: read_file(self.site, folder, name) for name in FILES}
            rows = self.read_rows(files[RUN_FILE].form.text, chosen)
        except (OSError, ValueError, UserError) as error:
            problem = str(error)
        errand = self.site.errands.find(errand_name(CHOSEN, folder))
        is_failed = errand is not None and errand.state != RUNNING and errand.code != 0
        return SettingsView(
            folder=folder,
            files=files,
            rows=rows,
            is_chosen_known=chosen is not None,
            is_asking=errand is not None and errand.state == RUNNING,
            chosen_problem=errand.last_lines(3) if errand is not None and is_failed else "",
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
        errand = self.site.errands.find(errand_name(DESCRIBE, folder))
        if errand is not None and errand.code == 0:
            typed = NewForm.of_words(shlex.split(errand.line))
            if (typed.family, typed.task) == (described.family, described.task):
                words = shlex.split(errand.line)
        return [*(word for word in words if word != "--overwrite"), "--print_run"]

    def read_chosen_text(self, folder: Path) -> str | None:
        """Return what `new` chose for a folder; None if that is not known (any more)."""
        errand = self.site.errands.find(errand_name(CHOSEN, folder))
        if errand is None or errand.code != 0:
            return None
        try:
            if errand.words != self.chosen_words(folder):
                return None
            return read_chosen(read_text(errand.log))
        except (OSError, ValueError, UserError):
            return None

    def change(self, request: Request, form: Form) -> Response:
        """Show what a form would save, save it, or find out what `new` chose."""
        fields = list_fields(form)
        folder = find_described(self.site, fields.get("folder", ""))
        if folder is None:
            return PlainTextResponse("There is no such described folder.", 404)
        what = request.path_params["what"]
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
            after = self.read_edited(folder, part, present, fields)
            change = self.describe_change(folder, part, present, after)
            if what == "save":
                change = self.save(
                    folder, change, after=after, present=present, shown=fields.get("shown", "")
                )
        except ChangedMeanwhileError:
            return self.answer_conflict(folder, part, read_file(self.site, folder, name), fields)
        except (OSError, ValueError, UserError) as error:
            change = DraftChange(part=part, fault=str(error), text=fields.get("text"))
        is_refused = what == "save" and (change.fault != "" or change.said == LOOK_AGAIN)
        return self.answer(folder, change, is_refused)

    def read_edited(self, folder: Path, part: str, present: DraftFile, fields: Mapping[str, str]) -> str:
        """Return the text of a file with the edits of a form."""
        if part != TABLE:
            return fields.get("text", "")
        if "complete" not in fields:
            raise OptionError("The form did not arrive as a whole. Load the page again.")
        rows = self.read_rows(present.form.text, None)
        return apply_edits(present.form.text, rows, fields)

    def describe_change(self, folder: Path, part: str, present: DraftFile, after: str) -> DraftChange:
        """Return the change from a file's text to another one, after it is checked."""
        before = present.form.text
        text = None if part == TABLE else after
        difference = describe_difference(before, after)
        mark = mark_bytes(after.encode("utf-8", "surrogatepass"))
        if before != after:
            try:
                run_text = read_file(self.site, folder, RUN_FILE).form.text
                refuse_new_faults(present.name, before, after=after, folder=folder, run_text=run_text)
            except (ValueError, UserError) as error:
                return DraftChange(part, difference, fault=str(error), mark=mark, text=text)
        return DraftChange(part, difference, mark=mark, text=text)

    def save(
        self, folder: Path, change: DraftChange, *, after: str, present: DraftFile, shown: str
    ) -> DraftChange:
        """Write a change that the page has shown, and return what is left to say."""
        if change.fault:
            return change
        if after == present.form.text:
            return DraftChange(part=change.part, said="Nothing is changed.")
        if shown != change.mark:
            return DraftChange(
                change.part, change.difference, said=LOOK_AGAIN, mark=change.mark, text=change.text
            )
        replace_content(folder / present.name, present.form.with_text(after), present.mark)
        return DraftChange(
            part=change.part, said=f"Saved into {present.name}: {'; '.join(change.difference)}"
        )

    def answer_conflict(
        self, folder: Path, part: str, present: DraftFile, fields: Mapping[str, str]
    ) -> Response:
        """Return the page of the file as it is now, with what was typed for the earlier one."""
        typed = fields.get("text")
        base = fields.get("base", "")
        if part == TABLE:
            try:
                edited = apply_edits(base, self.read_rows(base, None), fields)
                wanted = describe_difference(base, edited)
            except (ValueError, UserError) as error:
                wanted = [str(error)]
            now = describe_difference(base, present.form.text)
        else:
            wanted = describe_difference(base, typed or "")
            now = describe_difference(base, present.form.text)
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
            errand = self.site.errands.find(errand_name(CHOSEN, folder))
            if errand is None or errand.words != words or errand.state != RUNNING:
                self.site.errands.start(errand_name(CHOSEN, folder), words, Path.cwd())
        except (OSError, ValueError, UserError) as error:
            return self.answer(folder, DraftChange(part=TABLE, fault=str(error)), is_refused=True)
        return self.answer(folder)


def guard(show: Callable[..., Response]) -> Callable[..., Response]:
    """Return a handler that answers what cannot be read with its reason."""

    def answer(*asked: Request | Form) -> Response:  # the request, and the form if it has one
        try:
            return show(*asked)
        except (OSError, ValueError, UserError) as error:
            return PlainTextResponse(str(error), 422)

    return answer


def folder_settings_routes(site: Site) -> list[Route]:
    """Return the routes of the settings of a folder."""
    pages = FolderSettingsPages(site)
    return [
        Route("/new/settings", guard(pages.show)),
        Route("/new/settings/{what}", answer_form(guard(pages.change)), methods=["POST"]),
    ]
