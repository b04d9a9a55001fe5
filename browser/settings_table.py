"""All settings of a described folder: run.toml as a table of all options of its training script, and as text.

The options and their helps come from the script's own --help, printed as JSON by a process. Edits are checked
by the script too, shown as a difference, and written only into the file that the page was made from.
"""

import difflib
import functools
import json
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from browser import launch
from browser.described_folder import (
    DATASET_FILE,
    PROMPTS_FILE,
    TRAINING_TABLE,
    DraftFile,
    change_steps,
    edit_toml,
)
from generation.prompt_lines import numbered_lines
from generation.sample_lines import parse_sample_line, read_all
from modules.errors import OptionError, UserError
from modules.installation import HELP_AS_JSON, program_environment
from modules.run_limits import temporary_folder
from modules.text_files import bad_character, parse_toml
from modules.version import VERSION
from project.options import RUN_FILE, STARTING
from training.config_options import OTHERS_TABLE, toml_value

HELP_SECONDS = 60
TRAINS = ("train", "finetune")  # first words of the commands that train
CACHES = "cache"  # likewise, of those that cache
NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
STEPS = "max_train_steps"
NOT_IN_FILE = {"config_file", "help", *STARTING}  # the first two name the file itself; others are only typed


@dataclass(frozen=True)
class Setting:
    """An option of a training script, as its help describes it."""

    name: str
    flags: Sequence[str]
    help: str
    group: str
    kind: str  # switch, whole, number, text or other
    is_list: bool
    choices: Sequence[str]
    default: str

    @property
    def about(self) -> str:
        """Return the first sentence of the help."""
        return re.split(r"(?<!e\.g)\. ", self.help)[0]

    def convert(self, text: str) -> Any:
        """Return the TOML value that a typed text stands for. Raises OptionError for an open quote.

        A text that is no number or no choice becomes a text: the script explains what it takes.
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
    """A row of the table: a key, its value in the file, and what `new` chose."""

    key: str  # as the file spells it
    setting: Setting | None  # None: no option of the script has this name
    text: str  # of the value; "": it is not in the file
    chosen: str | None  # by `new`; "": nothing; None: not known
    is_simple: bool = True  # its value can be typed in one line

    @property
    def is_changed(self) -> bool:
        return self.chosen is not None and self.chosen != self.text

    @property
    def choices(self) -> list[str]:
        """Return the choices of a setting, with the present value; empty if it is typed."""
        if self.setting is None or self.setting.is_list:
            return []
        choices = ["true", "false"] if self.setting.kind == "switch" else list(self.setting.choices)
        if choices and self.text and self.text not in choices:
            choices.append(self.text)
        return choices


def read_settings(script: str) -> Sequence[Setting]:
    """Return all options of a training script. Raises OptionError if it cannot be asked."""
    return _ask_script(script, VERSION)


@functools.lru_cache(maxsize=64)
def _ask_script(script: str, version: str) -> Sequence[Setting]:
    """Return the options that the script prints. version: of Reelsmith, as another one has other options."""
    _, program = launch.find_program(["python", script, "--help"], Path.cwd())
    try:
        process = subprocess.run(
            program,
            env=program_environment(**{HELP_AS_JSON: "1", "NO_COLOR": "1"}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=HELP_SECONDS,
        )
        options = [Setting(**option) for option in json.loads(process.stdout)]
    except (OSError, subprocess.TimeoutExpired, ValueError, TypeError) as error:
        raise OptionError(f"{script} --help cannot be read: {error}") from None
    return [setting for setting in options if setting.name not in NOT_IN_FILE]


def find_training_script(text: str) -> str:
    """Return the script that trains a described folder. text: of its run.toml.

    Raises ValueError if the file does not name one, OptionError if it names no training of ours.
    """
    try:
        words = parse_toml(text)[OTHERS_TABLE]["commands"][-1]
        script = str(words[1])
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{RUN_FILE} names no training script") from None
    command, _ = launch.find_program(["python", script], Path.cwd())
    if command.words[0] not in TRAINS:
        raise OptionError(f"{RUN_FILE}: {script} does not train")
    return script


def read_keys(text: str) -> dict[str, Any]:
    """Return the options of a run.toml by key, as `--config_file` reads them. Raises ValueError."""
    try:
        document = tomlkit.parse(text)
    except TOMLKitError as error:
        raise ValueError(f"{RUN_FILE} is no TOML: {error}") from None
    keys: dict[str, Any] = {}
    tables: list[Any] = [document]
    while tables:
        for key, value in tables.pop(0).items():
            if not isinstance(value, dict):
                keys[key] = value
            elif key != OTHERS_TABLE:
                tables.append(value)
    return keys


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


def list_rows(text: str, settings: Sequence[Setting], chosen_text: str | None) -> list[SettingRow]:
    """Return all rows: the keys of the file in its order, then all other options in that of the help.

    text: of run.toml. chosen_text: as `new` would write it; None if that is not known. Raises ValueError.
    """
    by_flag = {flag.lstrip("-"): setting for setting in settings for flag in setting.flags}
    by_name = by_flag | {setting.name: setting for setting in settings}
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
            )
        )
    in_file = {row.setting.name for row in rows if row.setting is not None}
    # what `new` chose and the file lacks comes first
    lacking = [setting for setting in settings if setting.name not in in_file]
    lacking.sort(key=lambda setting: setting.name not in (chosen_values or {}))
    for setting in lacking:
        chosen = _show_chosen(chosen_values, setting.name)
        rows.append(SettingRow(key=setting.name, setting=setting, text="", chosen=chosen))
    return rows


def _show_chosen(values: Mapping[str, Any] | None, key: str) -> str | None:
    if values is None:
        return None
    return show_value(values[key]) if key in values else ""


def field_of(key: str) -> str:
    """Return the name of the field of a row."""
    return f"set {key}"


def apply_edits(text: str, rows: Sequence[SettingRow], fields: Mapping[str, str]) -> str:
    """Return run.toml with what was typed into the table. rows: of the same text.

    Only keys whose text differs are changed; an emptied one is removed. Raises OptionError, ValueError.
    """
    changes: dict[str, Any] = {}
    for row in rows:
        if row.setting is None or not row.is_simple:
            continue
        typed = fields.get(field_of(row.key), "").strip()
        if typed == row.text:
            continue
        reason = bad_character(typed)
        if reason is not None:
            raise OptionError(f"{row.key} cannot hold {reason}")
        changes[row.key] = row.setting.convert(typed) if typed else None
    return edit_toml(text, changes)


def describe_following(before: str, after: str) -> str:
    """Describe the values that `new` derives from the steps but a changed run.toml leaves; empty if none.

    before, after: texts of the file.
    """
    keys, changed = read_keys(before), read_keys(after)
    steps = changed.get(STEPS)
    if not isinstance(steps, int) or steps < 1 or steps == keys.get(STEPS):
        return ""
    derived = change_steps(keys, steps).changes
    stays = {
        name: value
        for name, value in derived.items()
        if value is not None and name != STEPS and changed.get(name) == keys.get(name)
    }
    if not stays:
        return ""
    now = ", ".join(f"{name} = {toml_value(keys[name])}" for name in stays)
    wanted = ", ".join(f"{name} = {toml_value(value)}" for name, value in stays.items())
    return (
        f"{now}: as for the steps before. For {steps:,} steps `new` writes {wanted}. The field Steps, at the "
        "top, changes them together."
    )


def describe_difference(before: str, after: str) -> list[str]:
    """Return the lines that go and come, marked with - and +."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def check_text(name: str, text: str, folder: Path, run_text: str) -> str:
    """Check one of the three files of a folder, before it is written, as the scripts will read it.

    run_text: of the folder's run.toml. Return the script's warnings, or why no script has checked it; empty
    without either. Raises UserError or ValueError with the script's own message.
    """
    reason = bad_character(text)
    if reason is not None:
        raise ValueError(f"{name} cannot hold {reason}")
    if name == PROMPTS_FILE:
        lines = numbered_lines(text)
        read_all(lines, lambda line: parse_sample_line(line[1], f"{PROMPTS_FILE}, line {line[0]}"))
        return ""
    try:
        content = parse_toml(text)
    except ValueError as error:
        raise ValueError(f"{name} is not valid TOML: {error}") from None
    if name == RUN_FILE:
        if not isinstance(content.get(TRAINING_TABLE), dict):
            raise ValueError(f"{RUN_FILE}: the table [{TRAINING_TABLE}] is missing")
        script = find_training_script(text)
        return _check_by_script(["python", script, "--config_file", name], name, text=text, folder=folder)
    if name == DATASET_FILE:
        try:
            words = find_caching_words(run_text)
        except OptionError as error:
            return f"No script has checked {name}: {error}."
        return _check_by_script(words, name, text=text, folder=folder)
    return ""


def find_caching_words(run_text: str) -> list[str]:
    """Return the command of a run.toml that caches the dataset.

    The file may be somebody else's: only scripts of ours that cache are taken, which write nothing before
    they have read their options. Raises OptionError, with the reason, if there is none.
    """
    try:
        commands = parse_toml(run_text)[OTHERS_TABLE]["commands"]
        for line in commands:
            words = [str(word) for word in line]
            if DATASET_FILE not in words or "--check" in words:
                continue
            command, _ = launch.find_program(words, Path.cwd())
            if command.words[0] == CACHES:
                return words
        reason = "none of its commands does"
    except KeyError as error:
        reason = f"it has no {error}"
    except (TypeError, ValueError, OptionError) as error:
        reason = str(error)
    raise OptionError(f"{RUN_FILE} names no script of ours that caches {DATASET_FILE}: {reason}")


def _check_by_script(words: Sequence[str], name: str, text: str, folder: Path) -> str:
    """Let a script read a text as its file of options; return its warnings.

    words: of its command, with the file's name.
    """
    with temporary_folder() as temporary:
        path = temporary / name
        path.write_text(text, encoding="utf-8")
        try:
            typed = [str(path) if word == name else word for word in words]
            # the model may still have to be loaded, which Start does
            warnings = launch.check_options(typed, folder, checks_files=False)
        except OptionError as error:
            raise OptionError(str(error).replace(str(path), name)) from None
    return " ".join(warnings).replace(str(path), name)


def refuse_new_faults(draft: DraftFile, after: str, run_text: str) -> str:
    """Raise UserError or ValueError if a changed file has a fault that it did not have before.

    after: its text. run_text: of the folder's run.toml. Return what is to be said of it, as `check_text`.
    """
    folder = draft.path.parent
    try:
        return check_text(draft.name, after, folder, run_text)
    except (UserError, ValueError) as error:
        try:
            check_text(draft.name, draft.text, folder, run_text)
        except (UserError, ValueError) as earlier:
            if str(earlier) == str(error):
                return ""
        raise


def read_chosen(lines: str) -> str | None:
    """Return the run.toml in what `new --print_run` has printed; None if there is none."""
    begin = lines.find(f"[{TRAINING_TABLE}]\n")
    end = lines.find(f"\n[{OTHERS_TABLE}]\n", begin)
    if begin < 0 or end < 0:
        return None
    text = lines[begin : end + 1]
    try:
        parse_toml(text)
    except ValueError:
        return None
    return text
