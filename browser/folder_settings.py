"""All settings of a described folder, on the page New: a table of the options in run.toml, and three texts.

The options and their help come from the training script's own --help, printed as JSON by a process.
"""

import functools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomlkit
from starlette.responses import Response

from browser.background_jobs import name_background_job
from browser.dataset_keys import BATCH, BATCH_OPTION, DatasetKeys, read_batch_field, write_batch
from browser.described_folder import (
    DATASET_FILE,
    FILES,
    TRAINING_TABLE,
    ChangedMeanwhileError,
    DraftFile,
    edit_toml,
    read_described,
)
from browser.draft_changes import (
    DraftChange,
    describe_difference,
    find_training_script,
    plan_change,
    read_draft_file,
    read_keys,
    require_full,
    save_change,
)
from browser.idle_settings import explain_idle
from browser.new_form import NewForm, make_new_argv
from browser.responses import answer_template, answer_unknown
from browser.run_start import DESCRIBE
from browser.runs import RUNNING
from browser.server_state import Site
from browser.setting_words import DATASET_KEYS, rank_words
from modules.errors import OptionError, UserError
from modules.help_text import DescribedOption, describe_options
from modules.installation import find_script
from modules.option_tables import find_table
from modules.pages.language import TranslatableText, join, say
from modules.table_parser import build_parser
from modules.text_files import bad_character, parse_toml, read_text
from project.options import RUN_FILE
from project.run_options import STARTING
from training.config_options import PROJECT_TABLE

NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
# options with which a run ends before training
ENDING = ("check", "html", "show_timesteps", "plan", "debug_dataset", "debug_mode", "output_config")
# the first two name the file itself; the others are only used on the command line
NOT_IN_FILE = {"config_file", "help", *ENDING, "repair_captions", *STARTING}
CHOSEN = "chosen"  # kind of the background job that makes run.toml again
TABLE = "table"  # the part of the page for the keys of run.toml; the others are files


class Setting(DescribedOption):
    """An option of a training script, as the page shows it."""

    @property
    def about(self) -> TranslatableText:
        """First sentence of the help text, which has a translation."""
        return say(re.split(r"(?<!e\.g)\. ", self.help)[0])

    def convert(self, text: str) -> Any:
        """Return the TOML value of a typed text. Raises OptionError if a quote is not closed.

        A text that is not a valid number or choice stays a text: the script's error explains what it accepts.
        """
        if self.kind == "switch" and text in ("true", "false"):
            return text == "true"
        if not self.is_list:
            return self._convert_word(text)
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise OptionError(f"{self.name}: {error}. Put quotes round a value with blanks") from None
        return [self._convert_word(word) for word in words]

    def _convert_word(self, text: str) -> Any:
        if self.kind != "text" and NUMBER.fullmatch(text):
            return tomlkit.value(text)
        return text


@dataclass(frozen=True)
class SettingRow:
    """A key of run.toml as a row of the table: its value in the file, and the value that `new` chose."""

    key: str  # as the file spells it
    setting: Setting | None  # None: no option of the script has this name
    text: str  # text of the value; "" if the file does not set it
    chosen: str | None  # by `new`; "": nothing; None: not known
    is_simple: bool = True  # whether the value can be typed in one line
    unused: str = ""  # why the dataset leaves it without effect, so that it cannot be set
    idle: str = ""  # why the other settings leave it without effect

    @property
    def is_changed(self) -> bool:
        """Whether the value in the file differs from what `new` chose; False if that is not known."""
        return self.chosen is not None and self.chosen != self.text

    @property
    def choices(self) -> list[str]:
        """Choices of the setting, with the current value; empty if the value is typed."""
        if self.setting is None or self.setting.is_list:
            return []
        choices = ["true", "false"] if self.setting.kind == "switch" else list(self.setting.choices)
        if choices and self.text and self.text not in choices:
            choices.append(self.text)
        return choices


@functools.lru_cache(maxsize=64)
def read_settings(script: str) -> Sequence[Setting]:
    """Return all options of a training script. Raises OptionError if it is not a script with options."""
    table = find_table(find_script(script))
    if table is None:
        raise OptionError(f"{script}: there is no such script")
    return [
        Setting(**vars(option))
        for option in describe_options(build_parser(table, script))
        if option.rejection is None and option.name not in NOT_IN_FILE
    ]


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
    text: str, settings: Sequence[Setting], chosen_text: str | None, dataset: DatasetKeys | None = None
) -> list[SettingRow]:
    """Return all rows: the keys of the file in its order, then all other options in the order of the help.

    Options that have no effect with the folder's dataset or with the other settings come last.

    Args:
        text: Text of run.toml.
        settings: All options of the training script.
        chosen_text: The run.toml that `new` would write; None if that is not known.
        dataset: Keys of dataset.toml; None if that file cannot be read.

    Raises:
        ValueError: If a text is not TOML.
    """

    def explain(name: str) -> str:
        """Return why an option has no effect with the dataset; "" if it has one or no dataset is known."""
        return "" if dataset is None else dataset.explain_unused(name)

    by_name = {flag.lstrip("-"): setting for setting in settings for flag in setting.flags}
    by_name |= {setting.name: setting for setting in settings}  # a name wins over an equal flag
    values = read_keys(text)
    chosen_values = None if chosen_text is None else read_keys(chosen_text)
    rows = []
    for key, value in values.items():
        rows.append(
            SettingRow(
                key=key,
                setting=by_name.get(key),
                text=show_value(value),
                chosen=_show_chosen(chosen_values, key),
                is_simple=_is_simple(value),
                unused=explain(by_name[key].name) if key in by_name else "",
            )
        )
    in_file = {row.setting.name for row in rows if row.setting is not None}
    set_values = {by_name[key].name: value for key, value in values.items() if key in by_name}
    defaults = {setting.name: setting.convert(setting.default) for setting in settings if setting.default}
    idle_reasons = explain_idle(set_values, defaults=defaults)
    # options that `new` chose and the file lacks come first
    lacking = [setting for setting in settings if setting.name not in in_file]
    lacking.sort(key=lambda setting: setting.name not in (chosen_values or {}))
    for setting in lacking:
        chosen = _show_chosen(chosen_values, setting.name)
        unused = explain(setting.name)
        idle = "" if unused else idle_reasons.get(setting.name, "")  # one reason is enough
        rows.append(SettingRow(setting.name, setting, text="", chosen=chosen, unused=unused, idle=idle))
    return sorted(rows, key=lambda row: bool(row.unused or row.idle) and not row.text)


def _show_chosen(values: Mapping[str, Any] | None, key: str) -> str | None:
    if values is None:
        return None
    return show_value(values[key]) if key in values else ""


def name_field(key: str) -> str:
    """Return the name of a row's form field."""
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
        return DatasetKeys.of_text(draft.text)
    except ValueError:
        return None


def apply_edits(text: str, rows: Sequence[SettingRow], fields: Mapping[str, str]) -> str:
    """Apply the edits from the table to the text of run.toml. `rows` are the rows before the edits.

    Only keys whose text differs are changed; a key whose field was emptied is removed.

    Raises:
        OptionError: If a typed value cannot be read.
        ValueError: If the text is not TOML.
    """
    changes: dict[str, Any] = {}
    for row in rows:
        field = name_field(row.key)
        if row.setting is None or not row.is_simple:
            continue
        if row.unused and field not in fields:  # the page has no field for it; absent does not mean emptied
            continue
        typed_text = fields.get(field, "").strip()
        if typed_text == row.text:
            continue
        reason = bad_character(typed_text)
        if reason is not None:
            raise OptionError(say("%(key)s cannot hold %(reason)s", key=row.key, reason=reason))
        changes[row.key] = row.setting.convert(typed_text) if typed_text else None
    return edit_toml(text, changes)


def read_chosen(lines: str) -> str | None:
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
    """Values of the settings of a described folder, for the template: its files and the table of options."""

    folder: Path
    files: Mapping[str, DraftFile]
    rows: Sequence[SettingRow]
    is_chosen_known: bool
    is_asking: bool  # what `new` chose is being found out
    batch: str = ""  # images of a step, as text; "": not known
    chosen_problem: str = ""  # why it could not be found out
    problem: str = ""  # why there are no rows
    change: DraftChange = field(default_factory=lambda: DraftChange(part=""))


class FolderSettingsPages:
    """Shows the settings of a folder, and saves them."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def show(self, folder: Path, _: Mapping[str, str]) -> Response:
        """Return the HTML of a folder's settings."""
        return self.answer(folder)

    def answer(
        self,
        folder: Path,
        change: DraftChange | None = None,
        is_rejected: bool = False,
        chosen_problem: str = "",
    ) -> Response:
        """Return the HTML of a folder's settings: its files, and a table of the training's options.

        Args:
            folder: The described folder.
            change: The edit that was previewed or saved; None if only the files are shown.
            is_rejected: Whether the answer explains a rejected request (status 422).
            chosen_problem: Why the values that `new` chose cannot be determined; "" if they can.
        """
        view = self.view(folder, change or DraftChange(part=""))
        values = {
            "view": replace(view, chosen_problem=chosen_problem or view.chosen_problem),
            "name_field": name_field,
            "name_dataset_field": name_dataset_field,
            "rank_words": rank_words,
            "dataset_keys": DATASET_KEYS,
            "batch_key": BATCH,
            "dataset_file": DATASET_FILE,
            "can_write": not self.site.read_only,
            "table_part": TABLE,
        }
        return answer_template("folder_settings.html", RUN_FILE, values, is_rejected)

    def view(self, folder: Path, change: DraftChange) -> SettingsView:
        """Return the values of the settings table; if a file is unreadable, its error is their `problem`."""
        chosen = self.read_chosen_text(folder)
        problem = ""
        rows: list[SettingRow] = []
        files = {}
        batch = ""
        try:
            files = {name: read_draft_file(self.site, folder, name) for name in FILES}
            dataset = read_dataset_keys(files[DATASET_FILE])
            rows = self.read_rows(files[RUN_FILE].text, chosen, dataset)
            if dataset is not None:
                batch = dataset.read_batch(read_keys(files[RUN_FILE].text))
        except (OSError, ValueError, UserError) as error:
            problem = str(error)
        # the job that computes which values `new` would choose
        job = self.site.background_jobs.find(name_background_job(CHOSEN, folder))
        is_failed = job is not None and job.state != RUNNING and job.code != 0
        return SettingsView(
            folder=folder,
            files=files,
            rows=rows,
            is_chosen_known=chosen is not None,
            is_asking=job is not None and job.state == RUNNING,
            chosen_problem=job.last_lines(3) if job is not None and is_failed else "",
            batch=batch,
            problem=problem,
            change=change,
        )

    def read_rows(
        self, text: str, chosen: str | None, dataset: DatasetKeys | None = None
    ) -> list[SettingRow]:
        """Return the rows of the settings table for `text`, a run.toml, and the training script it names.

        Raises OptionError if its script is unknown.
        """
        return list_rows(text, read_settings(find_training_script(text)), chosen, dataset)

    def chosen_argv(self, folder: Path) -> list[str]:
        """Return the command that prints, without writing it, the run.toml that `new` would write.

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

    def read_chosen_text(self, folder: Path) -> str | None:
        """Return the run.toml that `new` chose for a folder; None if it is not, or no longer, known."""
        job = self.site.background_jobs.find(name_background_job(CHOSEN, folder))
        if job is None or job.code != 0:
            return None
        try:
            if job.argv != self.chosen_argv(folder):
                return None
            return read_chosen(read_text(job.log))
        except (OSError, ValueError, UserError):
            return None

    def change(self, folder: Path, action: str, fields: Mapping[str, str]) -> Response:
        """Preview or save the edited settings, or compute the values that `new` would choose."""
        if action == CHOSEN:
            return self.ask_chosen(folder)
        # the page edits the options in run.toml in a table, and the text of each file in full
        edited_part = fields.get("part", TABLE)
        if action not in ("look", "save") or edited_part not in (TABLE, *FILES):
            return answer_unknown()
        name = RUN_FILE if edited_part == TABLE else edited_part
        try:
            current_draft = read_draft_file(self.site, folder, name)
            if current_draft.mark != fields.get("have", ""):  # not the file that the page was made from
                return self.answer_conflict(folder, edited_part, current_draft, fields)
            edited_text = self.read_edited(edited_part, current_draft, fields)
            texts: Mapping[DraftFile, str] = {current_draft: edited_text}  # file as it is -> its new text
            typed_text: str | None = edited_text  # shown in the answer as the user typed it
            if edited_part == TABLE:  # the table also has the batch size, which is in dataset.toml
                texts = self.with_batch(folder, texts, fields)
                typed_text = None  # the answer shows the fields of the table instead
            run_file = read_draft_file(self.site, folder, RUN_FILE)
            change = plan_change(self.site, edited_part, texts, run_file, typed_text)
            if action == "save":
                change = save_change(change, texts)
        except ChangedMeanwhileError:
            return self.answer_conflict(folder, edited_part, read_draft_file(self.site, folder, name), fields)
        except (OSError, ValueError, UserError) as error:
            change = DraftChange(part=edited_part, fault=str(error), text=fields.get("text"))
        return self.answer(folder, change, is_rejected=action == "save" and change.fault != "")

    def read_edited(self, part: str, present: DraftFile, fields: Mapping[str, str]) -> str:
        """Return the new text of a file: as typed in full, or with the edits of the table (`part` TABLE)."""
        if part != TABLE:
            return fields.get("text", "")
        require_full(fields)
        draft = read_draft_file(self.site, present.path.parent, DATASET_FILE)
        rows = self.read_rows(present.text, None, read_dataset_keys(draft))
        return apply_edits(present.text, rows, fields)

    def with_batch(
        self, folder: Path, texts: Mapping[DraftFile, str], fields: Mapping[str, str]
    ) -> Mapping[DraftFile, str]:
        """Return the texts to save, with the batch size written into dataset.toml if it was changed.

        Args:
            folder: The described folder.
            texts: run.toml as it is on disk, mapped to its new text.
            fields: Fields of the form; `have_dataset` is the checksum of dataset.toml on the page.

        Raises:
            ChangedMeanwhileError: If dataset.toml has changed since the page was made.
            OptionError: If the batch size is not a number.
        """
        typed_size = fields.get(name_dataset_field(BATCH), "").strip()
        before = fields.get(f"{name_dataset_field(BATCH)} before", "")
        if typed_size == before:
            return texts
        size = read_batch_field(typed_size)
        dataset_draft = read_draft_file(self.site, folder, DATASET_FILE)
        if dataset_draft.mark != fields.get("have_dataset", ""):
            raise ChangedMeanwhileError
        # dataset.toml takes precedence: the training would ignore its own option
        runs = {run: edit_toml(text, {BATCH_OPTION: None}) for run, text in texts.items()}
        return {**runs, dataset_draft: write_batch(dataset_draft.text, size)}

    def answer_conflict(
        self, folder: Path, part: str, present: DraftFile, fields: Mapping[str, str]
    ) -> Response:
        """Return the page with the error that a file changed while it was edited, and with the typed text.

        Args:
            folder: The described folder.
            part: TABLE, or the name of the file that was edited as text.
            present: The file as it is now.
            fields: Fields of the form; `base` is the text that the page was made from.
        """
        typed_text = fields.get("text")
        base = fields.get("base", "")
        file_changes = describe_difference(base, present.text)
        try:
            edited = typed_text or ""
            if part == TABLE:  # the fields of the table, applied to the text that the page showed
                edited = apply_edits(base, self.read_rows(base, None), fields)
            user_changes = describe_difference(base, edited)
        except (ValueError, UserError) as error:
            user_changes = [str(error)]
        fault = say(
            "%(name)s has changed meanwhile, and nothing was overwritten. The file now: "
            "%(names)s. What you changed: %(names2)s",
            name=present.name,
            names=join("; ", file_changes or [say("as before")]),
            names2=join("; ", user_changes or [say("nothing")]),
        )
        change = DraftChange(part=part, fault=fault, text=typed_text)
        return self.answer(folder, change, is_rejected=True)

    def ask_chosen(self, folder: Path) -> Response:
        """Start the process that prints the run.toml that `new` would write."""
        try:
            words = self.chosen_argv(folder)
            job = self.site.background_jobs.find(name_background_job(CHOSEN, folder))
            if job is None or job.argv != words or job.state != RUNNING:
                self.site.background_jobs.start(
                    name_background_job(CHOSEN, folder), words, Path.cwd(), within=folder
                )
        except (OSError, ValueError, UserError) as error:
            return self.answer(folder, is_rejected=True, chosen_problem=str(error))
        return self.answer(folder)
