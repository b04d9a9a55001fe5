"""Edit run.toml, dataset.toml and prompts.txt: show the difference, let the scripts check it, and save it.

The server stores nothing between requests. A form contains the text that it showed before the edits, to find
the edits, and the file's checksum, so that a file that has changed meanwhile is never overwritten.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tomlkit
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from tomlkit.exceptions import TOMLKitError

from browser.core.responses import Form, answer_form, answer_not_found, answer_text
from browser.core.server_state import Site
from browser.folders.described_folder import (
    DATASET_FILE,
    PROMPTS_FILE,
    TRAINING_TABLE,
    DraftFile,
    change_steps,
    is_described,
    tidy_lines,
)
from browser.folders.folders import find_folder
from browser.folders.sample_sizes import describe_changed_sizes
from browser.jobs import launch
from browser.runs.runs import Runs
from generation.prompt_lines import numbered_lines
from generation.sample_lines import parse_sample_line, read_all
from modules.errors import OptionError, UserError
from modules.pages.language import join, refusal, say
from modules.run_limits import temporary_folder
from modules.text_files import bad_character, parse_toml, read_content
from package.reelsmith.commands import ScriptCommand
from project.kinds.composing import kinds_by_script
from project.options import RUN_FILE
from training.config_options import PROJECT_TABLE, toml_value

TRAINING_COMMANDS = ("train", "finetune")  # first words of the commands that train
CACHING_COMMAND = "cache"  # first word of the commands that cache
MAX_TRAIN_STEPS = "max_train_steps"


@dataclass(frozen=True)
class DraftChange:
    """The changes that saving a form would make to files, shown as a preview on the page."""

    section: str  # section of the page: SETTINGS_TABLE, the name of a file edited as text, or `samples`
    diff_lines: Sequence[str] = ()  # removed and added lines
    error: str = ""  # why the change cannot be saved
    message: str = ""  # result of saving
    typed_text: str | None = None  # text of a file that the user typed in full
    note: str = ""  # warnings of the script that checked the change, or why none did


def read_draft_file(site: Site, folder: Path, name: str) -> DraftFile:
    """Read a file of a folder. Raises OSError if it cannot be read, or is a link that leads outside."""
    path = folder / name
    if not path.exists():
        return DraftFile(path, None)
    if not site.runs.is_below(path):
        raise OSError(say("%(path)s is outside the folders that are shown", path=path))
    return DraftFile(path, read_content(path))


def read_keys(text: str) -> dict[str, Any]:
    """Return the options of a run.toml by key, as `--config_file` reads them.

    Raises ValueError if the text is not valid TOML.
    """
    try:
        document = tomlkit.parse(text)
    except TOMLKitError as error:
        raise ValueError(
            say("%(run_file)s is not valid TOML: %(error)s", run_file=RUN_FILE, error=error)
        ) from None
    keys: dict[str, Any] = {}
    tables: list[Any] = [document]
    while tables:  # keys of inner tables become options too
        for key, value in tables.pop(0).items():
            if not isinstance(value, dict):
                keys[key] = value
            elif key != PROJECT_TABLE:  # the table of `run`: commands and files, no options
                tables.append(value)
    return keys


def plan_change(
    site: Site,
    section: str,
    new_texts: Mapping[DraftFile, str],
    run: DraftFile,
    typed_text: str | None = None,
) -> DraftChange:
    """Return the preview of a change to run.toml, dataset.toml or prompts.txt, with the scripts' warnings.

    While the folder trains, only the prompts may change, because the run has already read the other files.

    Args:
        section: The section of the page, as in `DraftChange.section`.
        new_texts: Maps each file, as it is on disk, to its new text.
        run: The folder's current run.toml, which names the scripts.
        typed_text: Text of a file that the user typed in full; None if it was edited by fields.
    """
    diff_lines: list[str] = []
    for draft, new_text in new_texts.items():
        diff_lines += describe_difference(draft.text, new_text)
    notes: list[str] = []
    error = ""
    try:
        for draft, new_text in new_texts.items():
            if new_text != draft.text:
                if draft.name != PROMPTS_FILE:
                    site.tracked_runs.reject_while_it_runs(draft.path.parent)
                warnings = [reject_new_errors(draft, new_text, run.text)]
                if draft.name == RUN_FILE:
                    warnings.append(describe_underived_intervals(draft.text, new_text))
                notes += list(filter(None, warnings))
    except (ValueError, UserError) as problem:
        error = str(problem)
    return DraftChange(section, diff_lines, error=error, typed_text=typed_text, note=" ".join(notes))


def save_change(change: DraftChange, new_texts: Mapping[DraftFile, str]) -> DraftChange:
    """Write a change unless it has an error, and return it with the message for the page.

    `new_texts` maps each file, as it was read, to its new text. Raises ChangedMeanwhileError if a file has
    changed since it was read, OutputError if it cannot be written.
    """
    if change.error:
        return change
    changed = {draft: new_text for draft, new_text in new_texts.items() if new_text != draft.text}
    if not changed:
        return DraftChange(section=change.section, message=say("Nothing was changed."))
    for draft, new_text in changed.items():
        draft.save(new_text)
    names = ", ".join(draft.name for draft in changed)
    message = say("Saved into %(names)s: %(names2)s", names=names, names2=join("; ", change.diff_lines))
    return DraftChange(section=change.section, message=message, note=change.note)


def describe_underived_intervals(before: str, after: str) -> str:
    """Describe the intervals in a changed run.toml that do not fit its new number of steps.

    `new` derives such intervals, for example `save_every_n_steps`, from the number of steps.

    Returns:
        The description; "" if all intervals fit.
    """
    old_options = read_keys(before)
    new_options = read_keys(after)
    steps = new_options.get(MAX_TRAIN_STEPS)
    if not isinstance(steps, int) or steps < 1 or steps == old_options.get(MAX_TRAIN_STEPS):
        return ""
    underived = {}
    for name, derived_value in change_steps(old_options, steps).new_values.items():
        is_untouched = new_options.get(name) == old_options.get(name)
        # None: `change_steps` would remove this key
        if name != MAX_TRAIN_STEPS and derived_value is not None and is_untouched:
            underived[name] = derived_value
    if not underived:
        return ""
    current_values = ", ".join(f"{name} = {toml_value(old_options[name])}" for name in underived)
    derived_values = ", ".join(f"{name} = {toml_value(value)}" for name, value in underived.items())
    return say(
        "%(now)s: derived from the previous number of steps. For %(steps)s steps, `new` writes "
        "%(wanted)s. The field Training steps, at the top, changes them together.",
        now=current_values,
        steps=f"{steps:,}",
        wanted=derived_values,
    )


def describe_difference(before: str, after: str) -> list[str]:
    """Return the removed lines marked with - and the added lines marked with +."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def reject_new_errors(draft: DraftFile, after: str, run_text: str) -> str:
    """Raise UserError or ValueError if a changed file has an error that it did not have before the change.

    Args:
        draft: The file before the change.

    Returns:
        Warnings to show, as `check_text` returns them.
    """
    folder = draft.path.parent
    try:
        return check_text(draft.name, after, folder, run_text)
    except (UserError, ValueError) as error:
        try:
            check_text(draft.name, draft.text, folder, run_text)
        except (UserError, ValueError) as earlier:
            if str(earlier) == str(error):  # the change did not cause this error
                return ""
        raise


def check_text(name: str, text: str, folder: Path, run_text: str) -> str:
    """Check the new text of run.toml, dataset.toml or prompts.txt, as scripts will read it, before saving.

    Returns:
        The script's warnings, or the reason why no script has checked the text; "" if there are neither.

    Raises:
        UserError: With the script's own message, if the script rejects the text.
        ValueError: If the text cannot be parsed.
    """
    reason = bad_character(text)
    if reason is not None:
        raise ValueError(say("%(name)s cannot contain %(reason)s", name=name, reason=reason))
    if name == PROMPTS_FILE:  # not TOML: read line by line
        lines = numbered_lines(text)
        read_all(lines, lambda line: parse_sample_line(line[1], f"{PROMPTS_FILE}, line {line[0]}"))
        return describe_changed_sizes(text, folder)
    try:
        content = parse_toml(text)
    except ValueError as error:
        raise ValueError(say("%(name)s is not valid TOML: %(error)s", name=name, error=error)) from None
    if name == RUN_FILE:
        if not isinstance(content.get(TRAINING_TABLE), dict):
            raise ValueError(
                say(
                    "%(run_file)s: the table [%(training_table)s] is missing",
                    run_file=RUN_FILE,
                    training_table=TRAINING_TABLE,
                )
            )
        argv = ["python", find_training_script(text), "--config_file", RUN_FILE]
        return _check_by_script(argv, RUN_FILE, text=text, folder=folder)
    if name == DATASET_FILE:
        return _check_dataset(text, folder, run_text)
    return ""


def _check_dataset(text: str, folder: Path, run_text: str) -> str:
    """Check the text of a dataset.toml with the caching script of the model that run.toml names."""
    try:
        argv = find_caching_argv(run_text)
    except OptionError as error:
        return say("No script has checked %(name)s: %(error)s.", name=DATASET_FILE, error=error)
    return _check_by_script(argv, DATASET_FILE, text=text, folder=folder)


def find_training_script(text: str) -> str:
    """Return the training script that a run.toml names. `text` is its text.

    Raises:
        ValueError: If the file does not name a script.
        OptionError: If the script is not one of this project's training scripts.
    """
    try:
        # `new` writes the training command, `python SCRIPT ...`, as the last one
        argv = parse_toml(text)[PROJECT_TABLE]["commands"][-1]
        script = str(argv[1])
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{RUN_FILE} names no training script") from None
    command, _ = launch.find_program(["python", script], Path.cwd())
    if not trains(command):
        raise OptionError(f"{RUN_FILE}: {script} does not train")
    return script


def trains(command: ScriptCommand) -> bool:
    """Return whether a command trains a model or an addition to a model (LoRA, ControlNet, embedding)."""
    return command.words[0] in TRAINING_COMMANDS or command.path.name in kinds_by_script()


def find_caching_argv(run_text: str) -> list[str]:
    """Return the command in a run.toml that caches the dataset.

    The file may come from somebody else, so only this project's caching scripts are accepted. They write
    nothing before they have read their options.

    Raises:
        OptionError: If there is no such command, with the reason.
    """
    try:
        commands = parse_toml(run_text)[PROJECT_TABLE]["commands"]
        for line in commands:
            argv = [str(word) for word in line]
            if DATASET_FILE not in argv or "--check" in argv:
                continue
            command, _ = launch.find_program(argv, Path.cwd())
            if command.words[0] == CACHING_COMMAND:
                return argv
        reason: str = say("none of its commands does this")
    except KeyError as error:
        reason = say("it has no %(error)s", error=error)
    except (TypeError, ValueError, OptionError) as error:
        reason = str(error)
    raise refusal(
        "%(run_file)s has no caching command of this program for %(dataset_file)s: %(reason)s",
        run_file=RUN_FILE,
        dataset_file=DATASET_FILE,
        reason=reason,
    )


def _check_by_script(argv: Sequence[str], name: str, text: str, folder: Path) -> str:
    """Let a script read `text` as its options file `name` in `argv`, and return the script's warnings."""
    with temporary_folder() as temporary:
        path = temporary / name
        path.write_text(text, encoding="utf-8")
        try:
            typed = [str(path) if word == name else word for word in argv]
            # the model may not be downloaded yet; Start downloads it
            warnings = launch.check_options(typed, folder, checks_files=False)
        except OptionError as error:
            raise OptionError(str(error).replace(str(path), name)) from None
    return " ".join(warnings).replace(str(path), name)


def find_described(runs: Runs, text: str) -> Path | None:
    """Return the folder with a run.toml below the roots that `text` names; None for any other text."""
    folder = find_folder(runs, text)
    if folder is None or not is_described(folder) or not runs.is_below(folder / RUN_FILE):
        return None
    return folder


def require_full(fields: Mapping[str, str]) -> None:
    """Raise OptionError if a form's last field is missing, which means that the request was cut off."""
    if "complete" not in fields:
        raise refusal("The form arrived incomplete. Load the page again.")


class FolderPages(Protocol):
    """A section of a page about one folder, such as the sample prompts on the New page.

    Its methods raise OSError, ValueError or UserError if a file of the folder cannot be read.
    """

    def show(self, folder: Path, query: Mapping[str, str]) -> Response:
        """Return the HTML of the section for a folder. `query` holds the URL's query parameters."""

    def change(self, folder: Path, action: str, fields: Mapping[str, str]) -> Response:
        """Handle a pressed button of the section: `action` is its name, `fields` are its form's fields."""


def folder_routes(
    site: Site,
    section: str,
    pages: FolderPages,
    find: Callable[[Runs, str], Path | None] = find_described,
) -> list[Route]:
    """Return two routes for a section of a folder's page: to show it, and to handle its buttons.

    `section` is the section's name in URLs. `find` returns the folder that a text names, or None if the
    section does not apply to that folder.
    """

    def answer(folder_text: str, make_response: Callable[[Path], Response]) -> Response:
        folder = find(site.runs, folder_text)
        if folder is None:
            return answer_not_found()
        try:
            return make_response(folder)
        except (OSError, ValueError, UserError) as error:
            return answer_text(str(error), 422)

    def show(request: Request) -> Response:
        query = request.query_params
        return answer(query.get("folder", ""), lambda folder: pages.show(folder, query))

    def change(request: Request, form: Form) -> Response:
        action = request.path_params["what"]
        fields = {name: tidy_lines("".join(values)) for name, values in form.items()}
        return answer(fields.get("folder", ""), lambda folder: pages.change(folder, action, fields))

    return [
        Route(f"/new/{section}", show),
        Route(f"/new/{section}/{{what}}", answer_form(change), methods=["POST"]),
    ]
