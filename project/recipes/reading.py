"""Read recipes: TOML files with training values, which may come from somebody else.

A recipe sets options that decide what is learned: numbers, switches, and names from our own lists. Any other
key is refused by its name, so a recipe cannot name a path, a program, a module or a URL.
"""

import argparse
import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from downloads.catalogue import ModelSet
from modules.command import did_you_mean
from modules.control_codes import escape_control_codes, shorten
from modules.errors import OptionError
from modules.installation import find_script
from modules.option_checks import check_value
from modules.option_tables import find_table, list_rows
from modules.options import find_rejection
from modules.table_parser import build_parser
from modules.text_files import parse_toml, read_text
from networks.kinds.composing import RANKED_NETWORKS
from project.foreign.contract import read_optimizer, read_scheduler
from project.kinds.composing import BY_NAME
from project.new_options import NewOptions
from project.options import KIND_NAMES, find_models
from training.config_options import convert_value

SHIPPED = Path(__file__).resolve().parent
OWN = Path("recipes")  # folder of own recipes in the working folder, where `recipe save` writes them
MAX_BYTES = 1 << 16
MAX_TEXT_LENGTH = 300  # characters
MAX_FIGURES = 20
MAX_NAMED = 20  # names in a message
TEXT_KEYS = ("title", "family", "task", "train", "tried_on")
TABLE_KEYS = ("training", "figures")
# options that any resumed run may change, although they affect what is learned
ALSO_ALLOWED = {"max_train_steps", "gradient_accumulation_steps", "ema_decay", "ema_update_every"}
# options that the model or the kind of run decides
DECIDED_BY_NEW = {"make_adapter", "model_prediction_type", "task"}
_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
_PAIR = re.compile(rf"[A-Za-z_]\w{{0,60}}=(?:{_NUMBER}|\(?{_NUMBER}(?:, ?{_NUMBER})*\)?|[A-Za-z_]\w{{0,60}})")
_NAME = re.compile(r"\w[\w-]{0,80}")


@dataclass(frozen=True)
class TrainingRecipe:
    """Training options that worked, with their model, data and measured figures."""

    name: str
    title: str
    family: str
    task: str
    train: str  # kind of run, as `new --train` names it
    tried_on: str
    training: Mapping[str, Any]  # values by option
    figures: Mapping[str, str]

    @property
    def values_text(self) -> str:
        """The [training] options as one line: `network_dim = 16, learning_rate = 0.001`."""
        return ", ".join(f"{name} = {value}" for name, value in self.training.items())

    @property
    def figures_text(self) -> str:
        """The measured figures as one line."""
        return "; ".join(f"{name}: {value}" for name, value in self.figures.items())


def find_recipe(name: str) -> TrainingRecipe:
    """Return a recipe by its name or file path.

    Raises:
        OptionError: If there is no such recipe, if one of the user's has the name of a shipped one, or if it
            contains something that a recipe must not set.
    """
    if name.endswith(".toml"):
        return read_recipe(Path(name))
    paths = [path for path in list_paths() if path.stem == name]
    if not paths:
        names = list(dict.fromkeys(path.stem for path in list_paths()))
        near = did_you_mean(name, names)
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        raise OptionError(
            f"--recipe {name}: there is no such recipe.{near} There are {', '.join(names[:MAX_NAMED])}{more}"
        )
    if len(paths) > 1:
        raise OptionError(
            f"--recipe {name}: a recipe of this program has that name, and {paths[-1].as_posix()} too. Pass "
            f"the path of the one that you want, {' or '.join(path.as_posix() for path in paths)}"
        )
    return read_recipe(paths[0])


def complete_options_from_recipe(recipe: TrainingRecipe, options: NewOptions) -> NewOptions:
    """Return the options of `new` with a recipe's model, kind of run and steps, unless others are typed.

    Raises:
        OptionError: If another model or kind of run is typed.
    """
    typed = {"family": options.family, "task": options.task, "train": options.trains}
    for name, value in typed.items():
        recipe_value = getattr(recipe, name)
        if value not in (None, recipe_value):
            raise OptionError(
                f"--recipe {options.recipe} is for --{name} {recipe_value}, not {value}. Omit one of them"
            )
    steps = recipe.training.get("max_train_steps", options.max_train_steps)
    # a number that differs from the default was typed: it has precedence
    if options.max_train_steps != NewOptions(folder=options.folder).max_train_steps:
        steps = options.max_train_steps
    return dataclasses.replace(
        options,
        family=recipe.family,
        task=recipe.task,
        train=recipe.train,
        # `train` is already the kind of run that --whole_model stands for
        whole_model=False,
        max_train_steps=steps,
    )


def list_paths() -> list[Path]:
    """Return the paths of all recipes: the shipped ones, then the user's."""
    return [path for folder in (SHIPPED, OWN) for path in sorted(folder.glob("*.toml"))]


def describe_recipe(recipe: TrainingRecipe) -> list[str]:
    """Return lines about a recipe: its purpose, where it was tried, its options and measured figures."""
    return [
        f"recipe {recipe.name}: {recipe.title}",
        f"  for {recipe.family} {recipe.task}, {recipe.train}; tried on {recipe.tried_on}",
        f"  {recipe.values_text}",
        *([f"  {recipe.figures_text}"] if recipe.figures else []),
    ]


@cache
def list_shipped() -> tuple[TrainingRecipe, ...]:
    """Return the recipes that ship with this program, sorted by name."""
    return tuple(read_recipe(path) for path in sorted(SHIPPED.glob("*.toml")))


def read_recipe(path: Path) -> TrainingRecipe:
    """Read a recipe file, and check every value in it, because the file may come from a stranger.

    Raises:
        OptionError: If the file cannot be read, or if a value is not valid; the message names its key.
    """
    try:
        content = parse_toml(read_text(path, MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        reason = shorten(" ".join(str(error).split()), MAX_TEXT_LENGTH).rstrip(".")
        raise OptionError(f"recipe {path} cannot be read: {reason}. Pass a file of `recipe save`") from None
    try:
        return _parse_recipe(path, content)
    except ValueError as error:
        raise OptionError(f"recipe {path}: {error}") from None


def _parse_recipe(path: Path, content: Mapping[str, Any]) -> TrainingRecipe:
    """Check the keys of a parsed recipe file, and return the recipe."""
    name = path.stem
    if _NAME.fullmatch(name) is None:
        raise ValueError("its name has to be of letters, digits, _ and -")
    for key in content:
        if key not in (*TEXT_KEYS, *TABLE_KEYS):
            raise ValueError(
                f"{_show(key)} is not a key of a recipe. It has {', '.join(TEXT_KEYS)}, and the tables "
                f"{' and '.join(f'[{table}]' for table in TABLE_KEYS)}"
            )
    texts = {key: _read_text(key, content.get(key)) for key in TEXT_KEYS}
    tables = {key: content.get(key, {}) for key in TABLE_KEYS}
    for key, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"{key} is not a table: write [{key}] and its keys below")
    return TrainingRecipe(
        name=name,
        training=check_values(
            f"recipe {path}", tables["training"], texts["family"], texts["task"], texts["train"]
        ),
        figures=_read_figures(tables["figures"]),
        **texts,
    )


def _show(key: str) -> str:
    return shorten(escape_control_codes(key).replace("\n", " "), 80)


def _read_text(key: str, value: Any) -> str:
    """Return a string that is short enough for pages and tables, on a single line."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{_show(key)} is missing, or is not text")
    if len(value) > MAX_TEXT_LENGTH or escape_control_codes(value) != value or len(value.splitlines()) > 1:
        raise ValueError(f"{_show(key)} has to be a line of at most {MAX_TEXT_LENGTH} characters")
    if "://" in value:
        raise ValueError(f"{_show(key)} contains an address, which a recipe must not")
    return value.strip()


def _read_figures(table: Mapping[str, Any]) -> dict[str, str]:
    if len(table) > MAX_FIGURES:
        raise ValueError(f"[figures] has {len(table)} keys: at most {MAX_FIGURES} are allowed")
    figures = {}
    for name, value in table.items():
        text = f"{value:g}" if type(value) in (int, float) else value
        figures[_read_text(name, name)] = _read_text(name, text)
    return figures


def find_recipe_model(family: str, task: str) -> ModelSet:
    """Return the model that a recipe is for. Raises ValueError if `new` does not support it."""
    models = {(model.family, model.task): model for model in find_models()}
    if (family, task) not in models:
        names = [f"{one} {other}" for one, other in models]
        raise ValueError(
            f"{_show(f'{family} {task}')} is not a model.{did_you_mean(f'{family} {task}', names)} "
            "python reelsmith.py download --list names all"
        )
    return models[family, task]


def check_values(
    place: str, training: Mapping[str, Any], family: str, task: str, train: str
) -> dict[str, Any]:
    """Check the values of a recipe as those of a run.toml, for the script that trains its kind of run.

    Args:
        place: The recipe, for messages.
        training: Values by option.
        family: Family of the model, as `new --family` names it.
        task: Its task.
        train: Kind of run, as `new --train` names it.

    Raises:
        ValueError: If there is no such model or kind, or for a key or value that no recipe may have.
        OptionError: If run.toml could not have the value either.
    """
    model = find_recipe_model(family, task)
    if train not in KIND_NAMES:
        raise ValueError(f"train = {_show(train)!r}: use {', '.join(KIND_NAMES)}")
    argv = BY_NAME[train].find_training_command(model)
    if not argv:
        raise ValueError(f"train = {train!r}: {family} {task} has no script for it")
    recipe_options = find_recipe_options(argv[0])
    # The --network_module values in a model's training command
    argv = model.commands["train"].split()
    modules = {
        *RANKED_NETWORKS,
        *([after for word, after in zip(argv, argv[1:], strict=False) if word == "--network_module"]),
    }
    values = {}
    for name, value in training.items():
        option = recipe_options.get(name)
        if option is None or find_rejection(option):
            suggestion = did_you_mean(_show(name), recipe_options)
            raise ValueError(
                f"{_show(name)} cannot be set by a recipe.{suggestion} A recipe sets options that decide "
                "what is learned: no paths or programs, and nothing about the graphics card, saving or "
                "logging"
            )
        _reject_reach(option, name, value, modules)
        convert_value(place, option, value)
        values[name] = value
        check_value(name, values[name], getattr(option, "facts", {}))
    return values


@cache
def list_allowed(script: str) -> frozenset[str]:
    """Return the names of the training options that a recipe may set.

    These are the options that a resumed run must or should repeat, except for those that depend on the GPU.
    """
    allowed: set[str] = set(ALSO_ALLOWED)
    for name, row in list_rows(script).items():
        noted = row.get("noted", {})
        # what a resumed run does: identity must be equal to the first run's, habit should be
        if noted.get("resume") in ("identity", "habit") and not noted.get("of_hardware"):
            allowed.add(name)
    return frozenset(allowed - DECIDED_BY_NEW)


@cache
def find_recipe_options(script: str) -> Mapping[str, argparse.Action]:
    """Return the options that a recipe may set, by name, including those that this script rejects."""
    table = find_table(find_script(script))
    assert table is not None, script
    actions = {action.dest: action for action in build_parser(table, script)._actions}
    return {name: actions[name] for name in sorted(list_allowed(script) & actions.keys())}


def _reject_reach(action: argparse.Action, name: str, value: Any, modules: set[str]) -> None:
    """Raise ValueError if a value may do more than decide what is learned, as recipes come from strangers."""
    items = value if isinstance(value, list) else [value]
    shown = _show(str(value))
    if name in ("optimizer_args", "network_args", "lr_scheduler_args"):
        wrong = [item for item in items if not isinstance(item, str) or _PAIR.fullmatch(item) is None]
        if wrong:
            raise ValueError(
                f"{name} = {_show(str(wrong[0]))}: write NAME=VALUE, the value a number or a word"
            )
    elif name == "network_module":
        if value not in modules:
            raise ValueError(f"{name} = {shown}: use {', '.join(sorted(modules))}")
    elif name in ("optimizer_type", "lr_scheduler"):
        try:
            ours = read_optimizer(value) if name == "optimizer_type" else read_scheduler(value)
        except ValueError as error:
            raise ValueError(f"{name} = {shown}: {error}") from None
        if value != ours:
            raise ValueError(f"{name} = {shown}: write {ours}")
    elif getattr(action, "reach", "") or getattr(action, "is_secret", False):
        raise ValueError(f"{name} can only be set on the command line: it may affect more than the training")
    elif action.nargs != 0 and action.choices is None:  # free text may be a path, a URL or a program
        for item in items:
            if type(item) not in (int, float):
                raise ValueError(f"{name} = {_show(str(item))}: a recipe gives a number here")
            if not math.isfinite(item):
                raise ValueError(f"{name} = {item} is not a number")
