"""Tags of a folder on the pages New and Datasets: written by a model, and edited together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from browser.core.responses import answer_template, answer_unknown
from browser.core.server_state import Site
from browser.folders.described_folder import DATASET_FILE, is_described
from browser.folders.draft_changes import folder_routes
from browser.folders.folder_tools import FolderTool
from browser.folders.offered_folders import find_open_folder, require_inside
from browser.folders.tool_form import (
    CHOICE,
    NUMBER,
    SWITCH,
    SWITCH_CHOICE,
    TEXT,
    ToolField,
    ToolForm,
    format_option,
)
from browser.jobs.command_lines import format_command
from browser.jobs.model_files import TaskFiles, find_task
from browser.pages.tags.tag_editor import TagEditor
from modules.errors import OptionError, UserError
from modules.pages.language import refusal, say

NUM_TRIAL_FILES = 5  # number of files in a trial run
MAX_TAGS = 60  # maximum number of tags shown at once
EDITOR_ACTIONS = ("rename", "remove", "undo")  # buttons that change tags without a model
FAMILY, TASK = "tools", "wd_tagger"  # model in the catalogue
FORM = ToolForm(
    name="tag",
    script="tools/tag.py",
    fields=(
        ToolField("thresh", say("Least probability"), NUMBER),
        ToolField("character_threshold", say("of characters"), NUMBER),
        ToolField("always_first_tags", say("Always first"), TEXT),
        ToolField("undesired_tags", say("Never written"), TEXT),
        ToolField("num_frames", say("Frames of a clip"), NUMBER),
        ToolField(
            "join_frames",
            say("A tag of a clip counts"),
            CHOICE,
            {"": say("by its best frame"), "mean": say("by the mean of its frames")},
        ),
        ToolField(
            "which",
            say("Captions"),
            SWITCH_CHOICE,
            {
                "": say("only those that are missing"),
                "fill_empty": say("empty ones too"),
                "overwrite": say("those that a program wrote again"),
                "append_tags": say("behind all existing ones, kept as .bak"),
            },
        ),
        ToolField("character_tags_first", say("characters first"), SWITCH),
        ToolField("remove_underscore", say("underscores become spaces"), SWITCH),
        ToolField("use_rating_tags", say("with a rating"), SWITCH),
    ),
)


class TagPages:
    """Shows the page section about the tags in a folder's captions, and handles its buttons."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.tool = FolderTool(site, FORM.script, "trytags")
        self.editor = TagEditor(site.runs)

    def show(self, folder: Path, query: Mapping[str, str]) -> Response:
        """Return the HTML of the tag section, or of its part named in the query."""
        return self.answer(folder, query, query.get("part", ""))

    def answer(
        self, folder: Path, texts: Mapping[str, str], part: str = "", message: str = "", error: str = ""
    ) -> Response:
        """Return the HTML of the tag section or of one part of it.

        Args:
            part: "form", "progress" or "editor"; "" for all three.
            message: Message about the result of a button's action.
        """
        values: dict[str, Any] = {
            "folder": folder,
            "part": part,
            "said": message,
            "refused": error,
            "can_write": not self.site.read_only,
            "form": FORM,
            "texts": texts,
            "tried": NUM_TRIAL_FILES,
        }
        if part in ("", "form"):
            values |= self.collect_form(folder, texts)
        if part in ("", "progress"):
            values |= self.tool.collect_progress(folder)
        if part in ("", "editor"):
            counts = self.editor.count(folder)
            values |= {
                "tags": counts.most_common(MAX_TAGS),
                "num_tags": len(counts),
                "change": self.editor.last_change(folder),
            }
        return answer_template("tags/tags.html", say("Tags"), values, is_rejected=error != "")

    def collect_form(self, folder: Path, texts: Mapping[str, str]) -> dict[str, Any]:
        """Return the template values of the form: the tagger model, and the commands of the buttons."""
        try:
            trial_line = format_command(self.make_argv(folder, texts, NUM_TRIAL_FILES), folder)
            line = format_command(self.make_argv(folder, texts), folder)
        except OptionError as error:
            trial_line = line = str(error)
        return {
            "model": self.find_model(),
            "model_place": self.find_model_folder(),
            "lines": [trial_line, line],
        }

    def find_model(self) -> TaskFiles | None:
        """Return the catalogue's tagger model, with the state of its files."""
        return find_task(self.site.models, FAMILY, TASK)

    def find_model_folder(self) -> str:
        """Return the folder to which the catalogue's tagger model is downloaded."""
        model = self.find_model()
        assert model is not None  # a test guarantees the catalogue entry
        return str((self.site.models / model.parts[0].path).absolute())

    def make_argv(
        self, folder: Path, texts: Mapping[str, str], num_trial_files: int | None = None
    ) -> list[str]:
        """Return the command line of the tagger.

        Args:
            num_trial_files: Number of files whose tags are printed but not saved; None to save all tags.

        Raises:
            OptionError: If a field has a value that its option does not accept.
        """
        argv = FORM.make_argv(DATASET_FILE if is_described(folder) else ".", texts)
        argv += format_option("model_dir", texts.get("model", "").strip() or self.find_model_folder())
        # without a dataset.toml, new caption files get the suffix of the existing ones
        if not is_described(folder) and _has_only(folder, ".caption"):
            argv += ["--caption_extension", ".caption"]
        return argv if num_trial_files is None else [*argv, "--try_on", str(num_trial_files)]

    def change(self, folder: Path, action: str, fields: Mapping[str, str]) -> Response:
        """Handle a pressed tag button, and return the HTML of the section's part that contains the button."""
        part = "editor" if action in EDITOR_ACTIONS else "progress"
        try:
            message = self.carry_out(folder, action, fields)
        except (UserError, OSError, ValueError) as error:
            return self.answer(folder, fields, part, error=str(error))
        return answer_unknown() if message is None else self.answer(folder, fields, part, message)

    def carry_out(self, folder: Path, action: str, fields: Mapping[str, str]) -> str | None:
        """Handle a pressed button of the tag section, and return a message; None if `action` is unknown.

        Raises UserError, OSError or ValueError.
        """
        if action in EDITOR_ACTIONS:
            tag = fields.get("tag", "")
            new_tag = fields.get("name", "")
            if action == "undo":
                return self.editor.undo(folder)
            if not tag.strip():
                raise refusal("Type the tag in the field Old tag, or choose it from its list.")
            if action == "remove":
                return self.editor.rename(folder, tag, "")
            if not new_tag.strip():
                raise refusal("Type the new name of the tag, or press Remove.")
            return self.editor.rename(folder, tag, new_tag)

        def make_argv(is_trial: bool) -> list[str]:
            self.require_ready(folder, fields)
            return self.make_argv(folder, fields, NUM_TRIAL_FILES if is_trial else None)

        is_known = self.tool.handle_button(folder, action, make_argv)
        return "" if is_known else None

    def require_ready(self, folder: Path, fields: Mapping[str, str]) -> None:
        """Raise OptionError if the tagger is not downloaded, or dataset files are outside the roots."""
        if is_described(folder):
            require_inside(self.site.runs, folder)
        model = self.find_model()
        if not fields.get("model", "").strip() and (model is None or not model.is_there):
            raise refusal(
                "%(missing)s is missing: download the model first (Models).", missing=self.find_model_folder()
            )


def _has_only(folder: Path, suffix: str) -> bool:
    """Return whether a folder has files with a suffix, and none with .txt."""
    suffixes = {path.suffix for path in folder.iterdir()}
    return suffix in suffixes and ".txt" not in suffixes


def tag_routes(site: Site) -> list[Route]:
    """Return the routes of the section about tags."""
    return folder_routes(site, "tags", TagPages(site), find_open_folder)
