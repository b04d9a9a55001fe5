"""The samples of a training run on the New page: lines of prompts.txt as rows, and how often to sample.

A row shows some options of its line. Only options whose field was changed are changed in the line. Other
options, other lines and comments are preserved.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.responses import Response

from browser.core.responses import answer_template, answer_unknown
from browser.core.server_state import Site
from browser.folders.described_folder import PROMPTS_FILE, ChangedMeanwhileError, DraftFile, read_described
from browser.folders.draft_changes import (
    DraftChange,
    plan_change,
    read_draft_file,
    read_keys,
    require_full,
    save_change,
)
from browser.folders.new_form import find_model
from browser.folders.sample_rows import (
    SAMPLE_AT_FIRST,
    SAMPLE_EVERY_N_EPOCHS,
    SAMPLE_EVERY_N_STEPS,
    SAMPLE_PROMPTS,
    check_image,
    describe_conflict,
    describe_rows,
    edit_prompts,
    edit_sampling_intervals,
    find_recipe,
    read_rows,
    read_typed_texts,
)
from browser.folders.sample_sizes import describe_changed_sizes, note_sizes
from modules.errors import UserError
from modules.pages.language import refusal, say
from project.options import RUN_FILE


class SamplePages:
    """Shows and saves the sample prompts in a folder's prompts.txt."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def show(self, folder: Path, query: Mapping[str, str]) -> Response:
        """Return the HTML of the samples section; `rows` in the query is the minimum number of rows."""
        number = query.get("rows", "0")
        return self.answer(folder, num_rows=int(number) if re.fullmatch(r"[0-9]{1,3}", number) else 0)

    def read_drafts(self, folder: Path) -> tuple[DraftFile, DraftFile]:
        """Read prompts.txt and run.toml. Raises OptionError if run.toml names another prompt file."""
        run = read_draft_file(self.site, folder, RUN_FILE)
        name = str(read_keys(run.text).get(SAMPLE_PROMPTS, PROMPTS_FILE))
        if name != PROMPTS_FILE:
            raise refusal(
                "The prompts are in %(name)s (%(prompts)s of %(run_file)s), which is edited "
                'elsewhere. With %(prompts)s = "%(prompts_file)s" they are edited here.',
                name=name,
                prompts=SAMPLE_PROMPTS,
                run_file=RUN_FILE,
                prompts_file=PROMPTS_FILE,
            )
        return read_draft_file(self.site, folder, PROMPTS_FILE), run

    def answer(
        self,
        folder: Path,
        change: DraftChange | None = None,
        num_rows: int = 0,
        is_rejected: bool = False,
        typed: Mapping[str, str] | None = None,
    ) -> Response:
        """Return the HTML of the samples section.

        Args:
            change: What a form would save; None without a form.
            num_rows: Minimum number of rows to show.
            is_rejected: Whether the response explains a rejected request (status 422).
            typed: Typed fields that are not saved; None if the form shows the files.
        """
        values: dict[str, Any] = {
            "folder": folder,
            "change": change or DraftChange(section=""),
            "problem": "",
        }
        try:
            values |= self.collect_values(folder, num_rows)
            if typed is not None:
                described = read_described(folder)
                recipe = find_recipe(find_model(described.family, described.task))
                values["notes"] = note_sizes(read_typed_texts(typed), recipe)
        except (OSError, ValueError, UserError) as error:
            values["problem"] = str(error)
        return answer_template("samples/sample_rows.html", say("Samples"), values, is_rejected)

    def collect_values(self, folder: Path, num_rows: int) -> dict[str, Any]:
        """Return the template values of the samples section.

        Raises OSError, ValueError or OptionError if one of the folder's files is not valid.
        """
        prompts, run = self.read_drafts(folder)
        described = read_described(folder)
        keys = read_keys(run.text)
        model = find_model(described.family, described.task)
        return {
            "prompts": prompts,
            "run": run,
            **describe_rows(read_rows(prompts.text), model, folder, num_rows),
            "every": str(keys.get(SAMPLE_EVERY_N_STEPS, "")),
            "every_epochs": str(keys.get(SAMPLE_EVERY_N_EPOCHS, "")),
            "at_first": bool(keys.get(SAMPLE_AT_FIRST)),
            "can_write": not self.site.read_only,
        }

    def change(self, folder: Path, action: str, fields: Mapping[str, str]) -> Response:
        """Preview or save the changes in the samples form."""
        if action not in ("look", "save"):
            return answer_unknown()
        try:
            require_full(fields)
            prompts, run = self.read_drafts(folder)
            # the form sends the checksums that both files had when the browser loaded it
            if prompts.checksum != fields.get("have", "") or run.checksum != fields.get("have run", ""):
                raise ChangedMeanwhileError
            edited_prompts = edit_prompts(
                prompts.text, fields, lambda path: check_image(self.site, folder, path)
            )
            edited_texts = {prompts: edited_prompts, run: edit_sampling_intervals(run.text, fields)}
            change = plan_change(self.site, "samples", edited_texts, run)
            if action == "save":
                change = save_change(change, edited_texts)
            # changed sizes are reported at their fields, not in the note
            sizes = describe_changed_sizes(edited_prompts, folder)
            change = replace(change, note=change.note.removeprefix(sizes).strip())
        except ChangedMeanwhileError:
            change = DraftChange(section="samples", error=describe_conflict(fields))
        except (OSError, ValueError, UserError) as error:
            change = DraftChange(section="samples", error=str(error))
        is_rejected = action == "save" and change.error != ""
        shows_typed_fields = is_rejected or action == "look"
        if not shows_typed_fields:
            return self.answer(folder, change)
        num_rows = sum(name.startswith("row ") for name in fields)  # a field `row N` for each row of the form
        return self.answer(folder, change, num_rows, is_rejected, fields)
