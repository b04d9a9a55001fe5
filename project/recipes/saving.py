"""Make a recipe of a finished run from its history and, in a described folder, from its run.toml."""

import argparse
import itertools
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from downloads.listing import print_lines
from modules.atomic_write import write_text
from modules.control_codes import shorten
from modules.errors import OptionError, OutputError
from modules.options import Options, find_rejection, option
from modules.text_files import parse_toml, read_text
from project.kinds.composing import BY_NAME, find_run_kind
from project.options import RUN_FILE, find_models, own_command
from project.recipes.reading import (
    MAX_TEXT_LENGTH,
    OWN,
    TrainingRecipe,
    check_values,
    describe_recipe,
    find_recipe_model,
    find_recipe_options,
    list_paths,
    list_shipped,
    read_recipe,
)
from training.config_options import PROJECT_TABLE, toml_value
from training.reports.history import END, RunHistory, Start, history_name, read_history, read_session

SAVE, LIST = "save", "list"
NAME = re.compile(r"\w[\w-]{0,80}")

DIGITS = 4  # significant digits of figures


class RecipeOptions(Options):
    """Options of `recipe`: list the recipes, or save a run's recipe."""

    action: str = option(
        "save: make a recipe of a finished run; list: show all recipes", positional=True, choices=(SAVE, LIST)
    )
    run: Path | None = option(
        "for save: folder of a run, or its ...-history.jsonl; a folder that `new` described has its run in "
        "it",
        positional=True,
        nargs="?",
        place="there",
        hint="a folder with a run, or its history",
    )
    name: str | None = option("for save: name of the recipe (default: that of the run)")
    title: str | None = option(
        "for save: what the recipe is for, in a few words (default: its model and name)"
    )
    tried_on: str | None = option(
        "for save: what was trained and on which data, in a few words (default: the name of the model's file)"
    )
    to: Path = option("for save: folder to write NAME.toml into", default=Path("recipes"))
    overwrite: bool = option("for save: replace the file if it exists")

    def __post_init__(self) -> None:
        if self.action == SAVE and self.run is None:
            raise OptionError("recipe save: pass the folder of a run, such as clips/output")
        if self.name is not None and NAME.fullmatch(self.name) is None:
            raise OptionError(f"--name {self.name!r}: pass a name of letters, digits, _ and -")


def run_recipe_command(options: RecipeOptions) -> None:
    """List all recipes, or save the recipe of a run.

    Raises:
        UserError: If the run has not ended, or if its recipe cannot be written.
    """
    if options.action == LIST:
        shipped_names = {recipe.name for recipe in list_shipped()}
        for path in list_paths():
            try:
                lines = describe_recipe(read_recipe(path))
            except OptionError as error:  # one file, which may be somebody else's, hides no other
                lines = [str(error)]
            if path.parent == OWN and path.stem in shipped_names:
                lines.append(
                    f"  It has the name of a recipe of this program: pass its path, {path.as_posix()}"
                )
            print_lines(lines)
        return
    assert options.run is not None  # checked by the options
    save_recipe(options, find_history(options.run))


def find_history(path: Path) -> Path:
    """Return the history file of a run: `path` itself, or the only one in the folder or its `output`.

    Raises:
        OptionError: If there is none, or if there are several.
    """
    if path.name.endswith(END):
        return path
    for folder in (path, path / "output"):
        # .run files are histories of `run`, not of a training run
        histories = [path for path in sorted(folder.glob(f"*{END}")) if not path.name.endswith(f".run{END}")]
        if len(histories) == 1:
            return histories[0]
        if histories:
            names = ", ".join(map(str, histories))
            raise OptionError(f"{path} has {len(histories)} runs. Pass the history of one: {names}")
    raise OptionError(
        f"{path} has no run: there is no {END.removeprefix('-')} file in it or in its folder output"
    )


def save_recipe(options: RecipeOptions, history: Path) -> None:
    """Write the recipe of a finished training run, and print how to use it.

    Raises:
        OptionError: If the run has not ended, or is of a kind that `new` does not set up.
        OutputError: If the file exists and may not be replaced.
    """
    # A run's history and its start. Raises OptionError if the run has not ended well.
    session = read_session(history)
    run_history = RunHistory() if session is None else read_history(history, session)
    start, ending = run_history.start, run_history.ending
    if start is None or ending is None or ending[1] != "good":
        raise OptionError(f"{history}: this run has not finished. A recipe is made of a finished one")
    try:
        recipe, reasons = _make_recipe(options, history, run_history, start)
    except ValueError as error:  # the history or run.toml, which may be a stranger's, names no model of ours
        raise OptionError(f"{history}: {error}") from None
    path = options.to / f"{recipe.name}.toml"
    if path.exists() and not options.overwrite:
        raise OutputError(f"{path} already exists. Pass another --name, or --overwrite")
    options.to.mkdir(parents=True, exist_ok=True)
    write_text(path, write_recipe(recipe))
    read_recipe(path)  # verify that the written file can be read
    is_found_by_name = options.to == OWN and recipe.name not in {one.name for one in list_shipped()}
    operand = recipe.name if is_found_by_name else path.as_posix()
    # without the first line, the title of the recipe
    lines = [f"written: {path}", *describe_recipe(recipe)[1:]]
    lines += [f"  left out: {reason}" for reason in reasons]
    lines.append(f"{own_command('new', 'FOLDER', '--recipe', operand)} trains another folder with it")
    print_lines(lines)


def _make_recipe(
    options: RecipeOptions, history: Path, run_history: RunHistory, start: Start
) -> tuple[TrainingRecipe, list[str]]:
    """Return the recipe of a finished run, and why it lacks options that it would have with other values."""
    changed_options = dict(start.changed)
    family, task, train = _find_trained_model(history, changed_options, start)
    name = options.name or history_name(history)
    values, reasons = _select_recipe_options(changed_options, family, task=task, train=train)
    # a run that a feature ended early has taken fewer steps than it was started for
    values["max_train_steps"] = max(run_history.loss, default=start.total_steps)
    # The measured figures of a training run, such as losses and seconds, by name
    figures = {}
    if run_history.average is not None:
        figures["average loss at the end"] = f"{run_history.average:.{DIGITS}g}"
    if run_history.lowest_validation is not None:
        step, loss = run_history.lowest_validation
        figures["lowest validation loss"] = f"{loss:.{DIGITS}g} at step {step}"
    seconds = sorted(value for value in run_history.seconds.values() if value is not None)
    if seconds:
        figures["seconds a step, median"] = f"{seconds[len(seconds) // 2]:.3g}"
    recipe = TrainingRecipe(
        name=name,
        title=options.title or f"{family} {task}: {name}",
        family=family,
        task=task,
        train=train,
        tried_on=options.tried_on or _name_model_file(changed_options, family, task),
        training=values,
        figures=figures,
    )
    return recipe, reasons


def write_recipe(recipe: TrainingRecipe) -> str:
    """Return the text of a recipe file: TOML with the model, its training options and measured figures."""
    header = {
        "title": recipe.title,
        "family": recipe.family,
        "task": recipe.task,
        "train": recipe.train,
        "tried_on": recipe.tried_on,
    }
    lines = [f"{name} = {toml_value(text)}" for name, text in header.items()]
    lines += ["", "[training]"]
    lines += [f"{name} = {toml_value(value)}" for name, value in recipe.training.items()]
    if recipe.figures:
        lines += ["", "[figures]"]
        lines += [f"{toml_value(name)} = {toml_value(text)}" for name, text in recipe.figures.items()]
    return "\n".join([*lines, ""])


def _find_trained_model(
    history: Path, changed_options: Mapping[str, str], start: Start
) -> tuple[str, str, str]:
    """Return family, task and kind of a training run, from its folder's run.toml or from its options."""
    commands = _read_commands(history)
    for argv in commands:
        value_by_option = dict(itertools.pairwise(argv))  # each word with the one after it
        if "--family" in value_by_option and "--task" in value_by_option:
            return value_by_option["--family"], value_by_option["--task"], find_run_kind(commands).name
    task = _find_lora_task(start.model, changed_options)
    if task is None:
        raise OptionError(
            f"{history} does not say which model of `new` was trained. Recipes are made of runs of folders "
            "that `new` described, and of LoRAs of a model with a --task of its name"
        )
    return start.model, task, "lora"


def _find_lora_task(family: str, changed_options: Mapping[str, str]) -> str | None:
    """Return the task of `new` whose LoRA a training script was run for; None if it is none or unknown."""
    if "network_module" not in changed_options:
        return None
    task_options = ("task", "model_version", "model_type")  # training scripts name the task by one of them
    script_task = next((changed_options[name] for name in task_options if changed_options.get(name)), "")
    tasks = [model.task for model in find_models() if model.family == family]
    if script_task in tasks:
        return script_task
    return tasks[0] if len(tasks) == 1 else None


def _read_commands(history: Path) -> list[list[str]]:
    """Return the commands in the run.toml of a run's folder or its parent; [] if there is none."""
    for folder in (history.absolute().parent, history.absolute().parent.parent):
        path = folder / RUN_FILE
        if not path.is_file():
            continue
        try:
            tables = parse_toml(read_text(path))
        except (OSError, ValueError, RecursionError) as error:
            reason = shorten(" ".join(str(error).split()), MAX_TEXT_LENGTH).rstrip(".")
            raise OptionError(
                f"{path} cannot be read: {reason}. Mend it, or move the run elsewhere"
            ) from None
        table = tables.get(PROJECT_TABLE, {})
        commands = table.get("commands", []) if isinstance(table, dict) else None
        if not isinstance(commands, list) or not all(isinstance(words, list) for words in commands):
            raise OptionError(
                f"{path}: [{PROJECT_TABLE}] has no list of commands, as `new` writes it. Mend it, or move "
                "the run"
            )
        return [[str(word) for word in words] for words in commands]
    return []


def _name_model_file(changed_options: Mapping[str, str], family: str, task: str) -> str:
    """Return the file name, without folder, of the first model file on the command line."""
    for part in find_recipe_model(family, task).components:
        name = (part.option or "").lstrip("-")
        if name in changed_options:
            return Path(changed_options[name]).name
    return "the released model"


def _select_recipe_options(
    changed_options: Mapping[str, str], family: str, task: str, train: str
) -> tuple[dict[str, Any], list[str]]:
    """Return those options of a run that a recipe may have, and the reasons against the values of others."""
    model = find_recipe_model(family, task)
    argv = BY_NAME[train].find_training_command(model)
    if not argv:
        raise ValueError(f"{family} {task} has no script for --train {train}")
    recipe_options = find_recipe_options(argv[0])
    values: dict[str, Any] = {}
    reasons = []
    for name, text in changed_options.items():
        action = recipe_options.get(name)
        if action is None or find_rejection(action):
            continue
        if action.nargs == 0:
            value: Any = True
        elif action.nargs in (None, "?"):
            value = _parse_history_value(action, text)
        else:
            value = [_parse_history_value(action, word) for word in shlex.split(text)]
        try:
            values |= check_values("", {name: value}, family, task, train)
        except (ValueError, OptionError) as error:  # a path, or the user's own code
            reasons.append(str(error).removeprefix(": "))
    return values, reasons


def _parse_history_value(action: argparse.Action, text: str) -> int | float | str:
    for kind in (int, float) if action.type is not None else ():
        try:
            return kind(text)
        except ValueError:
            continue
    return text
