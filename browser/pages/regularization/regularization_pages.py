"""The form that makes the regularization images of a folder, on the pages New and Datasets."""

from collections.abc import Mapping
from pathlib import Path

from starlette.responses import Response
from starlette.routing import Route

from browser.core.responses import answer_template, answer_unknown
from browser.core.server_state import Site
from browser.folders.described_folder import is_described
from browser.folders.draft_changes import folder_routes
from browser.folders.folder_tools import FolderTool
from browser.folders.offered_folders import find_open_folder, require_inside
from browser.folders.tool_form import TEXT, ToolField, ToolForm
from browser.jobs.command_lines import format_command
from modules.errors import OptionError, UserError
from modules.pages.language import refusal, say

FORM = ToolForm(
    name="regularization",
    script="tools/regularize.py",
    fields=(
        ToolField("class_word", say("Word for the class"), TEXT),
        ToolField("trigger_word", say("Trigger word, if it is not that of dataset.toml"), TEXT),
    ),
)


class RegularizationPages:
    """Shows the form that makes regularization images of a folder, and handles its buttons."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.tool = FolderTool(site, FORM.script, "tryregularization")

    def show(self, folder: Path, query: Mapping[str, str]) -> Response:
        """Return the HTML of the form, or of its part named in the query."""
        return self.answer(folder, query, query.get("part", ""))

    def answer(self, folder: Path, fields: Mapping[str, str], part: str = "", error: str = "") -> Response:
        """Return the HTML of the form and of its progress; `part` is "form", "progress", or "" for both."""
        try:
            line = format_command(FORM.make_argv(".", fields), folder)
        except OptionError as wrong:
            line = str(wrong)
        values = {
            "folder": folder,
            "part": part,
            "refused": error,
            "can_write": not self.site.read_only,
            "is_described": is_described(folder),
            "form": FORM,
            "texts": fields,
            "line": line,
            **self.tool.collect_progress(folder),
        }
        return answer_template(
            "regularization/regularization.html",
            say("Regularization images"),
            values,
            is_rejected=error != "",
        )

    def change(self, folder: Path, action: str, fields: Mapping[str, str]) -> Response:
        """Handle a pressed button of the form, and return the HTML of the tool's progress."""

        def make_argv(is_dry_run: bool) -> list[str]:
            require_inside(self.site.runs, folder)
            if not fields.get("class_word", "").strip():
                raise refusal("Type the word for the class, such as cat.")
            argv = FORM.make_argv(".", fields)
            return [*argv, "--dry_run"] if is_dry_run else argv

        try:
            if not is_described(folder):
                raise refusal("It is not prepared yet: press Prepare first.")
            self.site.tracked_runs.reject_while_it_runs(folder)
            if not self.tool.handle_button(folder, action, make_argv):
                return answer_unknown()
        except (UserError, OSError, ValueError) as error:
            return self.answer(folder, fields, "progress", error=str(error))
        return self.answer(folder, fields, "progress")


def regularization_routes(site: Site) -> list[Route]:
    """Return the routes of the form for regularization images."""
    return folder_routes(site, "regularization", RegularizationPages(site), find_open_folder)
