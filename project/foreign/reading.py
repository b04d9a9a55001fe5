"""Recognise another trainer's file, and say what becomes of each of its keys. Nothing of it is run."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from downloads.naming import plain_name
from modules.control_codes import shorten
from modules.errors import OptionError, UserError
from modules.text_files import parse_json, parse_toml, read_text, real_path
from project.foreign import ai_toolkit, contract, diffusion_pipe, kohya_gui, onetrainer, simpletuner
from project.foreign.contract import KeyRule, Program
from project.kinds.composing import LORA
from project.kinds.contract import RunKind
from project.kinds.whole_model import WHOLE
from project.new_options import NewOptions
from project.options import find_models

PROGRAMS: tuple[Program, ...] = (
    ai_toolkit.PROGRAM,
    diffusion_pipe.PROGRAM,
    simpletuner.PROGRAM,
    onetrainer.PROGRAM,
    kohya_gui.PROGRAM,
)
MOST_BYTES = 4 << 20
MOST_KEYS = 5000
MOST_DEPTH = 12
_KINDS = {  # spellings of a network -> its module; None: a LoRA, the usual one
    **dict.fromkeys(("lora", "standard", "flux1")),
    **dict.fromkeys(("loha", "lycorisloha"), "networks.loha"),
    **dict.fromkeys(("lokr", "lycorislokr"), "networks.lokr"),
}


@dataclass
class ForeignProject:
    """What another trainer's file asks for, in our terms."""

    path: Path
    title: str
    new: dict[str, Any] = field(default_factory=dict)  # options of `new`
    training: dict[str, Any] = field(default_factory=dict)  # keys of [training]
    data: dict[str, Any] = field(default_factory=dict)  # keys of [general] in dataset.toml
    folders: dict[str, Path] = field(default_factory=dict)  # by key
    epochs: int | None = None
    epochs_key: str = ""
    trains_whole: bool = False
    taken: list[str] = field(default_factory=list)  # keys whose values stay
    changed: list[str] = field(default_factory=list)  # lines
    left: list[str] = field(default_factory=list)  # lines
    empty: list[str] = field(default_factory=list)  # keys without a value
    unknown: list[str] = field(default_factory=list)  # keys without a rule

    def fill_in(self, options: NewOptions) -> NewOptions:
        """Return options with the values of the project where nothing else is typed."""
        usual = NewOptions(folder=options.folder)
        named = dict(self.new)
        if self.trains_whole and not options.whole_model:
            named["train"] = WHOLE.name
        if options.family not in {None, self.new.get("family")}:
            task = named.pop("task", None)
            if task is not None and options.task is None:  # it is one of the project's family
                self.left.append(f"task = {task}: --family says otherwise")
        values = {}
        for name, value in named.items():
            if getattr(options, name) == getattr(usual, name):
                values[name] = value
            elif getattr(options, name) != value:
                self.left.append(f"{name} = {value}: --{name} says otherwise")
        return dataclasses.replace(options, **values)

    def count_steps(self, options: NewOptions, num_files: int) -> NewOptions:
        """Return options with as many steps as the project's epochs are, if it names no steps."""
        if self.epochs is None:
            return options
        usual = NewOptions(folder=options.folder)
        if "max_train_steps" in self.new or options.max_train_steps != usual.max_train_steps:
            self.left.append(f"{self.epochs_key} = {self.epochs}: there is a number of steps")
            return options
        batch = self.data.get("batch_size", 1) * self.training.get("gradient_accumulation_steps", 1)
        in_epoch = math.ceil(num_files * self.data.get("num_repeats", 1) / batch)
        steps = min(self.epochs * max(in_epoch, 1), contract.MOST_STEPS)
        self.changed.append(
            f"{self.epochs_key} = {self.epochs}: max_train_steps = {steps}, with {num_files} files here"
        )
        return dataclasses.replace(options, max_train_steps=steps)

    def training_values(self, memory: float, kind: RunKind) -> dict[str, Any]:
        """Return the keys of [training]. memory: GiB of the card; 0: a CPU. kind: of the run."""
        values = dict(self.training)
        if not memory and values.get("optimizer_type") == "adamw8bit":
            values["optimizer_type"] = "adamw"
            self.changed.append("optimizer_type = adamw8bit: it needs a card, so it is adamw here")
        if "save_every_n_steps" in values:  # as long as `new` keeps them: until the next one
            values["save_last_n_steps_state"] = values["save_every_n_steps"]
        of_lora = ("network_module", "network_dim", "network_alpha", "unet_lr")
        for name in of_lora if kind is not LORA else ():
            if values.pop(name, None) is not None:
                self.left.append(f"{name}: {kind.title} is trained")
        return values

    def lines(self, folder: Path) -> list[str]:
        """Return what is told of the file: every key once. folder: that is described."""
        lines = [f"{self.path} is a project of {self.title}; nothing of it is run."]
        is_here = {key: _is_same_folder(self.path, place, folder) for key, place in self.folders.items()}
        taken = [*self.taken, *(key for key, is_same in is_here.items() if is_same)]
        if taken:
            lines.append(f"  taken: {', '.join(taken)}")
        lines += [f"  changed: {text}" for text in self.changed]
        for key, is_same in is_here.items():
            if not is_same:
                lines.append(f"  left: {key} = {_show(self.folders[key])}: {folder} is described")
        lines += [f"  left: {text}" for text in self.left]
        if self.empty:
            lines.append(f"  left, without a value: {', '.join(self.empty)}")
        if self.unknown:
            lines.append(f"  left, nothing here reads them: {', '.join(self.unknown)}")
        return lines


def read_foreign(path: Path) -> ForeignProject:
    """Read the project of another trainer. Raises OptionError if it is none of those that are known."""
    content = _read_file(path, "--from")
    values = dict(_flatten(content, "", 0))
    program = _recognise(path, values)
    project = ForeignProject(path, program.title)
    for key in program.companions:
        name = values.get(key)
        if isinstance(name, str) and name.strip():
            values |= _read_companion(project, key, path.parent / name)
    models: list[tuple[str, str | None]] = []
    for key, value in values.items():
        rule = program.rules.get(re.sub(r"\[\d+\]", "[]", key))
        if key in program.companions and isinstance(value, str):
            continue  # it is read above
        if rule is None:
            project.unknown.append(_show(key))
        elif value is None or value == "":
            project.empty.append(_show(key))
        elif rule.to == contract.MODEL:
            models += _read_model(project, program, key, value)
        else:
            _apply(project, rule, key, value)
    rank = project.training.get("network_dim")
    if rank is not None and "network_alpha" not in project.training:
        project.training["network_alpha"] = alpha = rank if program.alpha is None else program.alpha
        project.changed.append(f"no alpha is said: network_alpha = {alpha}, as in {program.title}")
    if models:  # a name with a task says more than that of a family
        family, task = next((model for model in models if model[1] is not None), models[0])
        project.new["family"] = family
        if task is not None:
            project.new["task"] = task
    return project


def _recognise(path: Path, values: Mapping[str, Any]) -> Program:
    generic = {re.sub(r"\[\d+\]", "[]", key).removeprefix("--") for key in values}
    for program in PROGRAMS:
        if path.suffix.lower() in program.suffixes and not generic.isdisjoint(program.marks):
            return program
    known = ", ".join(program.title for program in PROGRAMS)
    raise OptionError(
        f"--from {path}: this is no project of {known}. Give the file that describes a training."
    )


def _read_file(path: Path, option: str) -> Any:
    """Return the content of a YAML, TOML or JSON file. Raises OptionError."""
    readers = {".yaml": _parse_yaml, ".yml": _parse_yaml, ".toml": parse_toml, ".json": parse_json}
    parse = readers.get(path.suffix.lower())
    if parse is None:
        raise OptionError(f"{option} {path}: give a .yaml, .toml or .json file of another trainer")
    try:
        return parse(read_text(path, MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        why = shorten(" ".join(str(error).split()), 300)
        raise OptionError(f"{option} {path} cannot be read: {why}") from None


def _parse_yaml(text: str) -> Any:
    import yaml  # only such files need it

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _flatten(content: Any, key: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Yield the values of a file by their keys with dots. Raises OptionError if there are too many."""
    pairs = _flatten_all(content, key, depth)
    for count, pair in enumerate(pairs, 1):
        if count > MOST_KEYS:
            raise OptionError(f"--from: the file has more than {MOST_KEYS} keys: that is no project")
        yield pair


def _flatten_all(content: Any, key: str, depth: int) -> Iterator[tuple[str, Any]]:
    if depth > MOST_DEPTH:
        raise OptionError(f"--from: {_show(key)} is nested more than {MOST_DEPTH} deep: that is no project")
    is_list = isinstance(content, list)
    if isinstance(content, dict):
        for name, value in content.items():
            inner = str(name).removeprefix("--")  # of a command line
            separator = "" if not key or key.endswith(":") else "."
            yield from _flatten_all(value, f"{key}{separator}{inner}", depth + 1)
    elif is_list and any(isinstance(item, dict | list) for item in content):
        for index, item in enumerate(content):
            yield from _flatten_all(item, f"{key}[{index}]", depth + 1)
    else:
        yield key, content


def _read_companion(project: ForeignProject, key: str, path: Path) -> dict[str, Any]:
    """Return the values of a further file of a project; {} if it is not there, which is told."""
    if not path.is_file():
        project.left.append(f"{key} = {_show(path)}: it is not there")
        return {}
    try:
        values = dict(_flatten(_read_file(path, f"--from: {key}"), f"{key}:", 0))
        project.taken.append(key)
        return values
    except OptionError as error:
        project.left.append(f"{key} = {_show(path)}: {error}")
        return {}


def _read_model(
    project: ForeignProject, program: Program, key: str, value: Any
) -> Sequence[tuple[str, str | None]]:
    """Return the models that a value names: none or one."""
    name = str(value)
    if isinstance(value, bool):
        if not value:
            project.taken.append(_show(key))
            return []
        name = f"{key}=True"
    by_name = {plain_name(name): model for name, model in program.models.items()}
    for model in reversed(find_models()):
        by_name[plain_name(model.released_by)] = (model.family, model.task)
    named = by_name.get(plain_name(name))
    if named is None:
        project.left.append(
            f"{_show(key)} = {_show(value)}: no model of this name is known. Give --family and --task, and a "
            "file of your own as --model_file NAME=PATH"
        )
    else:
        project.changed.append(
            f"{_show(key)} = {_show(value)}: --family {named[0]} --task {named[1] or '(asked for)'}"
        )
    return [] if named is None else [named]


def _apply(project: ForeignProject, rule: KeyRule, key: str, value: Any) -> None:
    """Take a value, or note why it is left."""
    shown = f"{_show(key)} = {_show(value)}"
    if rule.to == contract.LEFT:
        project.left.append(f"{_show(key)}: {rule.name}")
        return
    if rule.to == contract.KIND:
        kind = plain_name(str(value))
        if kind not in _KINDS:
            project.left.append(f"{shown}: a LoRA is trained. docs/networks.md has other networks")
        elif _KINDS[kind] is None:
            project.taken.append(_show(key))
        else:
            project.training["network_module"] = _KINDS[kind]
            project.changed.append(f"{shown}: network_module = {_KINDS[kind]}")
        return
    try:
        read = rule.read(value)
    except (UserError, ValueError, TypeError, OverflowError) as error:
        project.left.append(f"{shown}: {shorten(str(error), 200)}")
        return
    if rule.to == contract.FOLDER:
        project.folders[_show(key)] = read
        return
    if rule.to == contract.EPOCHS:
        project.epochs_key = _show(key)
        project.epochs = read  # the steps that they make are told when the files are counted
        return
    if rule.to == contract.WHOLE:
        project.trains_whole = read
        project.taken.append(_show(key))
        return
    values = {contract.NEW: project.new, contract.TRAINING: project.training, contract.DATA: project.data}[
        rule.to
    ]
    if values.setdefault(rule.name, read) != read:
        project.left.append(f"{shown}: {rule.name} is {values[rule.name]} already, from another key")
    elif _is_same(read, value):
        project.taken.append(_show(key))
    else:
        project.changed.append(f"{shown}: {rule.name} = {read}")


def _is_same_folder(file: Path, place: Path, folder: Path) -> bool:
    """Return whether a folder in a project is the one that is described, or one around or below it."""
    there, here = real_path(file.parent / place), real_path(folder)
    return there == here or there in here.parents or here in there.parents


def _is_same(read: Any, value: Any) -> bool:
    """Return whether a value is taken as it stands, perhaps written as a text."""
    if isinstance(read, int | float) and isinstance(value, str):
        return bool(read == float(value))
    return read == value or str(read) == str(value)


def _show(value: Any) -> str:
    return shorten(" ".join(str(value).split()), 120)
