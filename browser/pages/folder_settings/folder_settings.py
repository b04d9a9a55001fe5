"""All settings of a training run, on the New page: a table of options in run.toml, and three text boxes.

The options and their help come from the training script's own --help, printed as JSON by a process.
"""

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomlkit
from starlette.responses import Response

from browser.core.responses import answer_template, answer_unknown
from browser.core.server_state import Site
from browser.folders.described_folder import (
    DATASET_FILE,
    FILES,
    TRAINING_TABLE,
    ChangedMeanwhileError,
    DraftFile,
    edit_toml,
    read_described,
)
from browser.folders.draft_changes import (
    DraftChange,
    describe_difference,
    find_training_script,
    plan_change,
    read_draft_file,
    read_keys,
    require_full,
    save_change,
)
from browser.folders.new_form import NewForm, make_new_argv
from browser.folders.training_settings import Setting, read_settings
from browser.jobs.background_jobs import name_background_job
from browser.pages.folder_settings.dataset_keys import (
    BATCH,
    BATCH_OPTION,
    DatasetKeys,
    read_batch_field,
    write_batch,
)
from browser.pages.folder_settings.idle_settings import explain_idle
from browser.pages.folder_settings.setting_words import DATASET_KEYS, rank_words
from browser.runs.run_start import DESCRIBE
from browser.runs.runs import RUNNING
from modules.errors import UserError
from modules.pages.language import join, refusal, say
from modules.text_files import bad_character, parse_toml, read_text
from project.options import RUN_FILE
from training.config_options import PROJECT_TABLE

PROPOSAL = "chosen"  # kind of the background job that generates run.toml again
SETTINGS_TABLE = "table"  # the part of the page for the keys of run.toml; the others are files


@dataclass(frozen=True)
class SettingRow:
    """A key of run.toml as a row of the table: its value in the file, and the value that `new` chose."""

    key: str  # as the file spells it
    setting: Setting | None  # None: no option of the script has this name
    value: str  # as the user types it; "" if the file does not set it
    proposed: str | None  # value that `new` would write; "": it writes none; None: not known
    is_simple: bool = True  # whether the value can be typed in one line
    unused_reason: str = ""  # why the dataset leaves it without effect, so that it cannot be set
    idle_reason: str = ""  # why the other settings leave it without effect

    @property
    def is_changed(self) -> bool:
        """Whether the value in the file differs from what `new` chose; False if that is not known."""
        return self.proposed is not None and self.proposed != self.value

    @property
    def choices(self) -> dict[str, str] | None:
        """Title of each value to choose from, "" and the current value included; None if it is typed."""
        if self.setting is None or self.setting.is_list:
            return None
        values = ["true", "false"] if self.setting.kind == "switch" else list(self.setting.choices)
        if not values:
            return None
        if self.value:
            values.append(self.value)
        return {"": join(": ", filter(None, (say("not set"), self.setting.default)))} | dict(
            zip(values, values, strict=True)
        )


def show_value(value: Any) -> str:
    """Return a TOML value as a user types it into the table."""
    if isinstance(value, list):
        return shlex.join(show_value(item) for item in value)
    if isinstance(value, str):
        return str(value)
    return tomlkit.item(value).as_string().strip()


def _is_simple(value: Any) -> bool:
    """Return whether a value can be typed in one line."""
    if isinstance(value, list):
        return all(_is_simple(item) and not isinstance(item, list) for item in value)
    if isinstance(value, str):
        return value == value.strip() and len(value.splitlines()) <= 1
    return isinstance(value, (bool, int, float))


def list_rows(
    text: str, settings: Sequence[Setting], proposed_run: str | None, dataset: DatasetKeys | None = None
) -> list[SettingRow]:
    """Return the rows of the settings table: the keys in run.toml, then all other options.

    The keys are in the order of the file, and the other options in the order of the help.

    Among the other options, the ones that `new` proposes come first, and options that have no effect with the
    folder's dataset or with the other settings come last.

    Args:
        proposed_run: The run.toml that `new` would write; None if that is not known.
        dataset: Keys of dataset.toml; None if that file cannot be read.

    Raises:
        ValueError: If a text is not TOML.
    """
    by_name = {flag.lstrip("-"): setting for setting in settings for flag in setting.flags}
    by_name |= {setting.name: setting for setting in settings}  # a name takes precedence over an equal flag
    values = read_keys(text)
    proposed_values = None if proposed_run is None else read_keys(proposed_run)
    rows = []
    for key, value in values.items():
        setting = by_name.get(key)
        rows.append(
            SettingRow(
                key=key,
                setting=setting,
                value=show_value(value),
                proposed=_show_proposed(proposed_values, key),
                is_simple=_is_simple(value),
                unused_reason="" if setting is None else _explain_unused(dataset, setting.name),
            )
        )
    set_values = {by_name[key].name: value for key, value in values.items() if key in by_name}
    rows += _list_unset_rows(settings, set_values, proposed_values, dataset)
    # the sort is stable: it only moves unset options without effect to the end
    return sorted(rows, key=lambda row: (row.unused_reason != "" or row.idle_reason != "") and not row.value)


def _list_unset_rows(
    settings: Sequence[Setting],
    set_values: Mapping[str, Any],
    proposed_values: Mapping[str, Any] | None,
    dataset: DatasetKeys | None,
) -> list[SettingRow]:
    """Return the rows of options that run.toml does not set; options that `new` proposes come first."""
    # `set_values` are the values that run.toml sets, by option name.
    unset_settings = [setting for setting in settings if setting.name not in set_values]
    unset_settings.sort(key=lambda setting: setting.name not in (proposed_values or {}))
    defaults = {setting.name: setting.convert(setting.default) for setting in settings if setting.default}
    idle_reasons = explain_idle(set_values, defaults=defaults)
    rows = []
    for setting in unset_settings:
        # unused because of the dataset, or idle because of other options
        unused_reason = _explain_unused(dataset, setting.name)
        rows.append(
            SettingRow(
                key=setting.name,
                setting=setting,
                value="",
                proposed=_show_proposed(proposed_values, setting.name),
                unused_reason=unused_reason,
                idle_reason="" if unused_reason else idle_reasons.get(setting.name, ""),
            )
        )
    return rows


def _explain_unused(dataset: DatasetKeys | None, option: str) -> str:
    """Return why an option has no effect with a dataset; "" if it has one or no dataset is known."""
    return "" if dataset is None else dataset.explain_unused(option)


def _show_proposed(values: Mapping[str, Any] | None, key: str) -> str | None:
    if values is None:
        return None
    return show_value(values[key]) if key in values else ""


def name_field(key: str) -> str:
    """Return the name of the form field for a key of run.toml."""
    return f"set {key}"


def name_dataset_field(key: str) -> str:
    """Return the name of the form field for a key of dataset.toml."""
    return f"dataset {key}"


def read_dataset_keys(draft: DraftFile) -> DatasetKeys | None:
    """Return the keys of a dataset.toml.

    Returns None if it is missing or not TOML, which its own text box reports.
    """
    if draft.content is None:
        return None
    try:
        return DatasetKeys.from_text(draft.text)
    except ValueError:
        return None


def apply_edits(text: str, rows: Sequence[SettingRow], fields: Mapping[str, str]) -> str:
    """Apply the edits from the page's table of training options to the text of run.toml.

    `rows` are the rows of the table before the edits.

    Only keys whose text differs are changed. A key whose field is empty is removed.

    Raises:
        OptionError: If a typed value cannot be parsed.
        ValueError: If the text is not TOML.
    """
    changes: dict[str, Any] = {}
    for row in rows:
        field = name_field(row.key)
        if row.setting is None or not row.is_simple:
            continue
        has_field = field in fields
        if row.unused_reason and not has_field:  # the page shows no field for it: it was not emptied
            continue
        typed_text = fields.get(field, "").strip()
        if typed_text == row.value:
            continue
        reason = bad_character(typed_text)
        if reason is not None:
            raise refusal("%(key)s cannot contain %(reason)s", key=row.key, reason=reason)
        changes[row.key] = row.setting.convert(typed_text) if typed_text else None
    return edit_toml(text, changes)


def parse_proposed_run(lines: str) -> str | None:
    """Return the run.toml in the output of `new --print_run`; None if the output has none."""
    begin = lines.find(f"[{TRAINING_TABLE}]\n")
    end = lines.find(f"\n[{PROJECT_TABLE}]\n", begin)
    if begin < 0 or end < 0:
        return None
    text = lines[begin : end + 1]
    try:
        parse_toml(text)
    except ValueError:
        return None
    return text


@dataclass(frozen=True)
class SettingsView:
    """Template values of a folder's settings: the texts of its files, and the table of options."""

    folder: Path
    files: Mapping[str, DraftFile]
    rows: Sequence[SettingRow]
    is_proposal_known: bool
    is_computing: bool  # the values that `new` chose are being determined
    batch_size: str = ""  # as text; "": not known
    proposal_problem: str = ""  # why those values could not be determined
    problem: str = ""  # why there are no rows
    change: DraftChange = field(default_factory=lambda: DraftChange(section=""))


class FolderSettingsPages:
    """Shows and saves the settings in a folder's run.toml and dataset.toml."""

    def __init__(self, site: Site) -> None:
        self.site = site
        # by folder: when its last `new` had ended, and the run.toml that it had written
        self.written_runs: dict[Path, tuple[int, str]] = {}

    def show(self, folder: Path, _: Mapping[str, str]) -> Response:
        """Return the HTML of a folder's settings."""
        return self.answer(folder)

    def answer(
        self,
        folder: Path,
        change: DraftChange | None = None,
        is_rejected: bool = False,
        proposal_problem: str = "",
    ) -> Response:
        """Return the HTML of a folder's settings: its files, and a table of the training options.

        Args:
            change: The edit that was previewed or saved; None if only the files are shown.
            is_rejected: Whether the response explains a rejected request (status 422).
            proposal_problem: Why the values that `new` chose cannot be determined; "" if they can.
        """
        view = self.view(folder, change or DraftChange(section=""))
        values = {
            "view": replace(view, proposal_problem=proposal_problem or view.proposal_problem),
            "name_field": name_field,
            "name_dataset_field": name_dataset_field,
            "rank_words": rank_words,
            "dataset_keys": DATASET_KEYS,
            "batch_key": BATCH,
            "dataset_file": DATASET_FILE,
            "can_write": not self.site.read_only,
            "table_part": SETTINGS_TABLE,
        }
        return answer_template("folder_settings/folder_settings.html", RUN_FILE, values, is_rejected)

    def view(self, folder: Path, change: DraftChange) -> SettingsView:
        """Return the values of the settings section. If a file is unreadable, `problem` has the error."""
        proposed_run = self.read_proposed_run(folder)
        problem = ""
        rows: list[SettingRow] = []
        files = {}
        batch_size = ""
        try:
            files = {name: read_draft_file(self.site, folder, name) for name in FILES}
            dataset = read_dataset_keys(files[DATASET_FILE])
            rows = self.read_rows(files[RUN_FILE].text, proposed_run, dataset)
            if dataset is not None:
                batch_size = dataset.read_batch_size(read_keys(files[RUN_FILE].text))
        except (OSError, ValueError, UserError) as error:
            problem = str(error)
        job = self.site.background_jobs.find(name_background_job(PROPOSAL, folder))
        has_failed = job is not None and job.state != RUNNING and job.code != 0
        return SettingsView(
            folder=folder,
            files=files,
            rows=rows,
            is_proposal_known=proposed_run is not None,
            is_computing=job is not None and job.state == RUNNING,
            proposal_problem=job.last_lines(3) if job is not None and has_failed else "",
            batch_size=batch_size,
            problem=problem,
            change=change,
        )

    def read_rows(
        self, text: str, proposed_run: str | None, dataset: DatasetKeys | None = None
    ) -> list[SettingRow]:
        """Return the rows of the settings table for `text`, a run.toml, with all options of its script.

        Raises OptionError if its script is unknown.
        """
        return list_rows(text, read_settings(find_training_script(text)), proposed_run, dataset)

    def proposal_argv(self, folder: Path) -> list[str]:
        """Return the command that prints the run.toml that `new` would write, without writing it.

        It repeats the page's last `new` command for the folder. If `new` has run in a terminal since, the
        command is derived from the files.
        """
        described = read_described(folder)
        argv = make_new_argv(NewForm.from_described(described, self.site.models), self.site.models)
        job = self.site.background_jobs.find(name_background_job(DESCRIBE, folder))
        if job is not None and job.code == 0:
            typed = NewForm.from_argv(shlex.split(job.line))
            if (typed.family, typed.task) == (described.family, described.task):
                argv = shlex.split(job.line)
        return [*(word for word in argv if word != "--overwrite"), "--print_run"]

    def read_proposed_run(self, folder: Path) -> str | None:
        """Return the run.toml that `new` chose for a folder; None if it is unknown or out of date."""
        written_run = self.read_written_run(folder)
        if written_run is not None:
            return written_run
        job = self.site.background_jobs.find(name_background_job(PROPOSAL, folder))
        if job is None or job.code != 0:
            return None
        try:
            if job.argv != self.proposal_argv(folder):
                return None
            return parse_proposed_run(read_text(job.log))
        except (OSError, ValueError, UserError):
            return None

    def read_written_run(self, folder: Path) -> str | None:
        """Return the run.toml that the page's last `new` has written; None if the page has not seen it."""
        job = self.site.background_jobs.find(name_background_job(DESCRIBE, folder))
        if job is None or job.code != 0:
            return None
        with contextlib.suppress(OSError, ValueError, UserError):
            # `new` prints its last line after it has written the files
            ended_ns = job.log.stat().st_mtime_ns
            if (folder / RUN_FILE).stat().st_mtime_ns <= ended_ns:
                self.written_runs[folder] = (ended_ns, read_draft_file(self.site, folder, RUN_FILE).text)
            seen_ns, text = self.written_runs.get(folder, (0, ""))
            return parse_proposed_run(text) if seen_ns == ended_ns else None
        return None

    def change(self, folder: Path, action: str, fields: Mapping[str, str]) -> Response:
        """Preview or save the edited settings, or compute the values that `new` would choose."""
        if action == PROPOSAL:
            return self.compute_proposal(folder)
        # the page edits the options in run.toml in a table, and the text of each file in full
        section = fields.get("part", SETTINGS_TABLE)
        if action not in ("look", "save") or section not in (SETTINGS_TABLE, *FILES):
            return answer_unknown()
        name = RUN_FILE if section == SETTINGS_TABLE else section
        try:
            draft = read_draft_file(self.site, folder, name)
            if draft.checksum != fields.get("have", ""):  # not the file that the page was built from
                return self.answer_conflict(folder, section, draft, fields)
            if section == SETTINGS_TABLE:
                typed_text = None
                new_texts = self.edit_by_table(draft, fields)
            else:
                typed_text = fields.get("text", "")
                new_texts = {draft: typed_text}
            run_file = read_draft_file(self.site, folder, RUN_FILE)
            change = plan_change(self.site, section, new_texts, run_file, typed_text)
            if action == "save":
                change = save_change(change, new_texts)
        except ChangedMeanwhileError:
            return self.answer_conflict(folder, section, read_draft_file(self.site, folder, name), fields)
        except (OSError, ValueError, UserError) as error:
            change = DraftChange(section=section, error=str(error), typed_text=fields.get("text"))
        return self.answer(folder, change, is_rejected=action == "save" and change.error != "")

    def edit_by_table(self, run_draft: DraftFile, fields: Mapping[str, str]) -> dict[DraftFile, str]:
        """Return the new texts of run.toml and, if the batch size was changed, of dataset.toml.

        Args:
            run_draft: run.toml as it is on disk.
            fields: Fields of the table. `have_dataset` is the checksum of the dataset.toml that it shows.

        Raises:
            ChangedMeanwhileError: If dataset.toml has changed since the page was loaded.
            OptionError: If a typed value cannot be parsed.
            ValueError: If a file is not TOML.
        """
        require_full(fields)
        folder = run_draft.path.parent
        dataset_keys = read_dataset_keys(read_draft_file(self.site, folder, DATASET_FILE))
        run_text = apply_edits(run_draft.text, self.read_rows(run_draft.text, None, dataset_keys), fields)
        typed_batch_size = fields.get(name_dataset_field(BATCH), "").strip()
        shown_batch_size = fields.get(f"{name_dataset_field(BATCH)} before", "")
        if typed_batch_size == shown_batch_size:
            return {run_draft: run_text}
        batch_size = read_batch_field(typed_batch_size)
        dataset_draft = read_draft_file(self.site, folder, DATASET_FILE)
        if dataset_draft.checksum != fields.get("have_dataset", ""):  # not the file that the page showed
            raise ChangedMeanwhileError
        # dataset.toml takes precedence: the training run would ignore its own option
        return {
            run_draft: edit_toml(run_text, {BATCH_OPTION: None}),
            dataset_draft: write_batch(dataset_draft.text, batch_size),
        }

    def answer_conflict(
        self, folder: Path, section: str, draft: DraftFile, fields: Mapping[str, str]
    ) -> Response:
        """Return the settings with the error that a file has changed while it was edited, and the typed text.

        Args:
            section: SETTINGS_TABLE, or the name of the file that was edited as text.
            fields: Fields of the form; `base` is the text that the page showed before the edit.
        """
        typed_text = fields.get("text")
        base_text = fields.get("base", "")
        try:
            edited_text = typed_text or ""
            if section == SETTINGS_TABLE:
                edited_text = apply_edits(base_text, self.read_rows(base_text, None), fields)
            user_changes = describe_difference(base_text, edited_text)
        except (ValueError, UserError) as error:
            user_changes = [str(error)]
        file_changes = describe_difference(base_text, draft.text)
        error_message = say(
            "%(name)s has changed in the meantime, and nothing was overwritten. The file now: "
            "%(names)s. What you changed: %(names2)s",
            name=draft.name,
            names=join("; ", file_changes or [say("as before")]),
            names2=join("; ", user_changes or [say("nothing")]),
        )
        change = DraftChange(section=section, error=error_message, typed_text=typed_text)
        return self.answer(folder, change, is_rejected=True)

    def compute_proposal(self, folder: Path) -> Response:
        """Start the process that prints the run.toml that `new` would write."""
        try:
            words = self.proposal_argv(folder)
            job = self.site.background_jobs.find(name_background_job(PROPOSAL, folder))
            if job is None or job.argv != words or job.state != RUNNING:
                self.site.background_jobs.start(
                    name_background_job(PROPOSAL, folder), words, Path.cwd(), within=folder
                )
        except (OSError, ValueError, UserError) as error:
            return self.answer(folder, is_rejected=True, proposal_problem=str(error))
        return self.answer(folder)
