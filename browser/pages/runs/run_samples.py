"""Edit the prompts of a run's samples on its page: as rows with fields, or the file as text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from browser.core.responses import Form
from browser.core.server_state import Site
from browser.folders.captions import CaptionFiles
from browser.folders.described_folder import PROMPTS_FILE, read_described
from browser.folders.new_form import find_model, select_single_task
from browser.folders.sample_rows import check_image, describe_rows, edit_prompts, read_rows, read_typed_rows
from browser.runs.run_start import ACTIVE_STATES, TrackedRun
from downloads.catalogue import ModelSet


def read_fields(form: Form) -> dict[str, str]:
    """Return the fields of a form with LF line ends; browsers send CRLF."""
    return {name: "".join(texts).replace("\r\n", "\n") for name, texts in form.items()}


@dataclass(frozen=True)
class RunSamples:
    """Shows and writes the sample prompt file of a run."""

    site: Site
    prompts: CaptionFiles = field(default_factory=CaptionFiles)

    def describe(self, tracked_run: TrackedRun, path: Path, fields: Mapping[str, str]) -> dict[str, Any]:
        """Return the template values of the panel that edits the sample prompts of a training run.

        Args:
            fields: Typed values that are not saved; `rows` is the minimum number of rows.

        Raises:
            OSError: If the file cannot be read.
            UnicodeDecodeError: If the file is not UTF-8.
        """
        prompts, checksum, _ = self.prompts.read(path)
        text = prompts.text
        rows = read_rows(text)
        if "row 1" in fields:  # unsaved rows of the form, with the text and checksum that it was made from
            text, checksum = fields.get("base", ""), fields.get("have", "")
            rows = read_typed_rows(text, fields)
        requested_rows = fields.get("rows", "")
        num_rows = int(requested_rows) if requested_rows.isdecimal() and len(requested_rows) < 4 else 0
        is_described = (
            tracked_run.run_config is not None and path == tracked_run.run_config.folder / PROMPTS_FILE
        )
        return {
            "path": path,
            "text": text,
            "have": checksum,
            "is_running": tracked_run.state.name in ACTIVE_STATES,
            # link to the page where the user edits the sampling interval
            "times": f"/new?{urlencode({'folder': path.parent})}#samples" if is_described else "",
            **describe_rows(rows, find_trained_model(tracked_run), find_folder(tracked_run, path), num_rows),
        }

    def read_text(self, tracked_run: TrackedRun, path: Path, form: Form) -> str:
        """Return the text of the prompt file with the form's edits. Raises OptionError for an invalid row."""
        fields = read_fields(form)
        if "text" in fields:
            return fields["text"]
        folder = find_folder(tracked_run, path)
        return edit_prompts(fields.get("base", ""), fields, lambda text: check_image(self.site, folder, text))

    def write(self, path: Path, text: str, checksum: str) -> None:
        """Write the prompt file. Raises CaptionConflictError if it has changed since it was read."""
        self.prompts.save(path, text, checksum)


def find_trained_model(tracked_run: TrackedRun) -> ModelSet | None:
    """Return the model that a run trains; None if the catalogue does not have it."""
    if tracked_run.run_config is not None:
        described = read_described(tracked_run.run_config.folder)
        return find_model(described.family, described.task)
    start = tracked_run.summary.start
    task = "" if start is None else str(dict(start.changed).get("task", ""))
    return find_model(tracked_run.summary.model, select_single_task(tracked_run.summary.model, task))


def find_folder(tracked_run: TrackedRun, path: Path) -> Path:
    """Return the folder to which a prompt file's relative paths refer."""
    if tracked_run.run_config is not None:
        return tracked_run.run_config.folder
    return tracked_run.summary.working_folder or path.parent
