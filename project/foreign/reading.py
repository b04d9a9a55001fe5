"""Recognise another trainer's file, and take its values or note why they are left. Nothing of it is run."""

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from downloads.naming import plain_name
from modules.control_codes import shorten
from modules.errors import OptionError, UserError
from modules.option_values import split_pairs
from modules.text_files import parse_json, parse_toml, read_text, real_path
from project.foreign import ai_toolkit, contract, diffusion_pipe, kohya_gui, onetrainer, simpletuner
from project.foreign.contract import ForeignRun, KeyRule, NoRun, Parts, Program
from project.options import find_models

PROGRAMS: tuple[Program, ...] = (
    ai_toolkit.PROGRAM,
    diffusion_pipe.PROGRAM,
    simpletuner.PROGRAM,
    onetrainer.PROGRAM,
    kohya_gui.PROGRAM,
)
MOST_BYTES = 1 << 20  # of a file; those that people have are below a hundredth
MOST_KEYS = 5000
MOST_DEPTH = 12
# folders around that of the file in which a further file may lie: paths begin where the program is started
MOST_AROUND = 4
NO_REASON = "this program has no such thing"
_KINDS: dict[str, str | None] = {  # spellings of a network -> its module; None: a LoRA, the usual one
    **dict.fromkeys(
        ("lora", "standard", "flux1", "locon", "kohyalocon", "lycorislocon", "lierla", "lora-peft")
    ),
    **dict.fromkeys(("loha", "lycorisloha"), "networks.loha"),
    **dict.fromkeys(("lokr", "lycorislokr"), "networks.lokr"),
}


class EpochsSaid(NamedTuple):
    """Epochs that a key names, and whether they count before a number of steps."""

    key: str
    number: int
    counts: str


@dataclass
class ForeignDataset:
    """A folder of a list of datasets, with the keys of its table."""

    path: Path | None = None
    key: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    num_drawn: int | None = None  # files of an epoch; None: all, as often as num_repeats says
    is_unused: bool = False


@dataclass
class ForeignProject:
    """What another trainer's file asks for, in our terms."""

    path: Path
    program: Program
    run: ForeignRun = ForeignRun("lora", "")
    parts: Parts = Parts()
    new: dict[str, Any] = field(default_factory=dict)  # options of `new`
    training: dict[str, Any] = field(default_factory=dict)  # keys of [training]
    data: dict[str, Any] = field(default_factory=dict)  # keys of [general] in dataset.toml
    arguments: dict[str, Any] = field(default_factory=dict)  # of the optimizer
    network_arguments: dict[str, Any] = field(default_factory=dict)
    places: dict[str, ForeignDataset] = field(default_factory=dict)  # by the key of the dataset
    folders: dict[str, Path] = field(default_factory=dict)  # by key
    epochs: list[EpochsSaid] = field(default_factory=list)
    per_epoch: dict[str, EpochsSaid] = field(default_factory=dict)  # by the option with steps
    warmup_share: tuple[str, float] | None = None  # the key, and the share of the steps
    others: dict[str, Any] = field(default_factory=dict)  # keys without a rule, of a program that knows ours
    said: dict[str, str] = field(default_factory=dict)  # option or key here -> the key there
    models: dict[str, str] = field(
        default_factory=dict
    )  # keys that name a model -> value, if it is not known
    has_other_optimizer: bool = False  # than the one that is taken
    keeps_few: bool = False  # saves have gigabytes
    assumed: dict[str, Any] = field(default_factory=dict)  # keys that the file lacks -> their usual values
    taken: list[str] = field(default_factory=list)  # keys whose values stay
    changed: list[str] = field(default_factory=list)  # lines
    left: list[str] = field(default_factory=list)  # lines
    reasons: dict[str, list[str]] = field(default_factory=dict)  # reason -> keys that are left for it
    idle: list[str] = field(default_factory=list)  # keys that do nothing there, and nothing here
    empty: list[str] = field(default_factory=list)  # keys without a value
    unknown: list[str] = field(default_factory=list)  # keys of which nothing is known

    @property
    def title(self) -> str:
        return self.program.title

    def lines(self, folder: Path) -> list[str]:
        """Return what is told of the file: every key once. folder: that is described."""
        lines = [f"{self.path} is a project of {self.title}; nothing of it is run."]
        is_here = {key: is_same_folder(self.path, place, folder) for key, place in self.folders.items()}
        taken = [*self.taken, *(key for key, is_same in is_here.items() if is_same)]
        if taken:
            lines.append(f"  taken: {', '.join(dict.fromkeys(taken))}")
        if self.assumed:
            usual = ", ".join(f"{key} = {show(value)}" for key, value in self.assumed.items())
            lines.append(f"  taken as {self.title} has it if a file does not say it: {usual}")
        lines += [f"  changed: {text}" for text in self.changed]
        for key, is_same in is_here.items():
            if not is_same:
                lines.append(f"  left: {key} = {show(self.folders[key])}: {folder} is described")
        lines += [f"  left: {text}" for text in self.left]
        lines += [f"  left: {', '.join(keys)}: {reason}" for reason, keys in self.reasons.items()]
        if self.idle:
            lines.append(f"  of no effect there or here: {', '.join(self.idle)}")
        if self.empty:
            lines.append(f"  left, without a value: {', '.join(self.empty)}")
        if self.unknown:
            lines.append(f"  left, {NO_REASON}: {', '.join(self.unknown)}")
        return lines

    def leave(self, key: str, reason: str) -> None:
        """Note a key that is left. Keys of one reason share a line."""
        self.reasons.setdefault(reason, []).append(show(key))


def read_foreign(path: Path, trains: str | None = None) -> ForeignProject:
    """Read the project of another trainer.

    trains: the kind of run that is typed. Raises OptionError if the file is none of those that are known, or
    if it trains what `new` does not set up and nothing else is typed.
    """
    values = dict(_flatten(_read_file(path, "--from"), ""))
    program = _recognise(path, values)
    project = ForeignProject(path, program)
    for companion in program.companions:
        name = values.get(companion)
        if isinstance(name, str) and name.strip():
            values |= _read_companion(project, companion, name)
    _join_units(project, program, values)
    try:
        project.run = program.find_run(values)
    except NoRun as error:
        if trains is None:
            remedy = "Give --train lora to train a LoRA in its place"
            raise OptionError(f"--from {path}: {error}. {remedy}") from None
        project.run = ForeignRun("", str(error))
    project.parts = program.find_parts(values)
    for key, value in program.usual.items():
        if key not in values:
            project.assumed[key] = values[key] = value
    idle = program.find_idle(values)
    models: list[tuple[str, str | None]] = []
    for key, value in values.items():
        if key in program.companions and isinstance(value, str):
            continue  # it is read above
        if key in project.parts.keys:
            continue  # `settle` says what becomes of them
        rule = program.rules.get(re.sub(r"\[\d+\]", "[]", key))
        if key in idle:
            project.idle.append(show(key))
        elif rule is None:
            _note_unknown(project, key, value)
        elif is_empty(value):
            project.empty.append(show(key))
        elif rule.to in {contract.MODEL, contract.FILE}:
            models += _read_model(project, rule, key, value)
        else:
            _apply(project, rule, key, value)
    _join_places(project)
    if not models and program.otherwise is not None and program.is_old_model(values):
        models.append(program.otherwise)
        said = " --task ".join(program.otherwise)
        project.changed.append(f"no key says another model: --family {said}")
    if models:  # a name with a task says more than that of a family
        family, task = next((model for model in models if model[1] is not None), models[0])
        project.new["family"] = family
        if task is not None:
            project.new["task"] = task
    return project


def is_empty(value: Any) -> bool:
    return value is None or value in ("", [])


def _note_unknown(project: ForeignProject, key: str, value: Any) -> None:
    """Keep a key without a rule until the script is known, or note that nothing is known of it."""
    if project.program.knows_options:
        project.others[key] = value
    elif is_empty(value):
        project.empty.append(show(key))
    elif key.startswith("optimizer.") and (value is False or value == 0):
        project.idle.append(show(key))  # of other optimizers: files name those of all
    else:
        project.unknown.append(show(key))


def _join_units(project: ForeignProject, program: Program, values: dict[str, Any]) -> None:
    """Write numbers and their units as one value: `10 MINUTE`; those of epochs below another key."""
    for key, unit_key in program.units.items():
        if key not in values or unit_key not in values:
            continue
        project.leave(unit_key, f"it is read with {key}")
        unit = values.pop(unit_key)
        if unit == "EPOCH":
            values[f"{key} (epochs)"] = values.pop(key)
        else:
            values[key] = f"{values[key]} {unit}"


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
    suffix = path.suffix.lower()
    if suffix not in {".yaml", ".yml", ".toml", ".json"}:
        raise OptionError(f"{option} {path}: give a .yaml, .toml or .json file of another trainer")
    try:
        text = read_text(path, MOST_BYTES)
        if suffix == ".toml":
            return parse_toml(text)
        if suffix == ".json":
            return parse_json(text)
        from modules.yaml_files import parse_yaml  # loads a parser, which only such files need

        return parse_yaml(text)
    except (OSError, ValueError, RecursionError) as error:
        why = shorten(" ".join(str(error).split()), 300)
        raise OptionError(f"{option} {path} cannot be read: {why}") from None


def _flatten(content: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield the values of a file by their keys with dots. Raises OptionError if there are too many."""
    counter = itertools.count(1)
    yield from _flatten_all(content, key, 0, counter)


def _flatten_all(content: Any, key: str, depth: int, counter: Iterator[int]) -> Iterator[tuple[str, Any]]:
    """Yield values by key. counter: counts tables and lists too, which may be empty."""
    if depth > MOST_DEPTH:
        raise OptionError(f"--from: {show(key)} is nested more than {MOST_DEPTH} deep: that is no project")
    if next(counter) > MOST_KEYS:
        raise OptionError(f"--from: the file has more than {MOST_KEYS} keys: that is no project")
    is_list = isinstance(content, list)
    if isinstance(content, dict):
        for name, value in content.items():
            inner = str(name).removeprefix("--")  # of a command line
            separator = "" if not key or key.endswith(":") else "."
            yield from _flatten_all(value, f"{key}{separator}{inner}", depth + 1, counter)
    elif is_list and any(isinstance(item, dict) for item in content):
        for index, item in enumerate(content):
            yield from _flatten_all(item, f"{key}[{index}]", depth + 1, counter)
    else:
        yield key, content


def _read_companion(project: ForeignProject, key: str, name: str) -> dict[str, Any]:
    """Return the values of a further file of a project; {} if it is not there, which is told."""
    path = find_beside(project.path, name)
    if path is None:
        project.left.append(
            f"{key} = {show(name)}: it is not there, nor in the folders around {project.path}"
        )
        return {}
    try:
        values = dict(_flatten(_read_file(path, f"--from: {key}"), f"{key}:"))
        project.taken.append(key)
        return values
    except OptionError as error:
        project.left.append(f"{key} = {show(path)}: {error}")
        return {}


def find_beside(file: Path, name: str) -> Path | None:
    """Return a file or folder that a project names: next to it, or where its program was started."""
    if "\0" in name:
        return None
    around = [file.parent, *list(real_path(file).parents)[1:MOST_AROUND], Path()]
    for place in around:
        with contextlib.suppress(OSError, ValueError):  # a name that no file can have
            if (place / name).exists():
                return place / name
    return None


def _read_model(project: ForeignProject, rule: KeyRule, key: str, value: Any) -> list[tuple[str, str | None]]:
    """Return the models that a value names: none or one."""
    name = str(value)
    last = key.split(".")[-1]
    if isinstance(value, bool):
        if not value:
            project.taken.append(show(key))
            return []
        name = f"{last}=True"
    named = _find_model(project.program, name)
    if named is not None:
        project.changed.append(
            f"{show(key)} = {show(value)}: --family {named[0]} --task {named[1] or '(asked for)'}"
        )
        return [named]
    if rule.to == contract.FILE:
        project.left.append(
            f"{show(key)} = {show(value)}: a file or folder of your own is given as --model_file NAME=PATH"
        )
        project.models.setdefault(show(key), show(value))
    else:
        project.left.append(
            f"{show(key)} = {show(value)}: no model of this name is known. Give --family and --task"
        )
        project.models[show(key)] = show(value)
    return []


def _find_model(program: Program, name: str) -> tuple[str, str | None] | None:
    """Return the family and task of a name of the program, of a repository, or of a released file."""
    by_name: dict[str, tuple[str, str | None]] = {}
    for model in reversed(find_models()):
        of_model = (model.family, model.task)
        by_name[plain_name(model.released_by.split("/")[-1])] = of_model
        by_name[plain_name(model.released_by)] = of_model
        for part in model.components:
            if part.role in {"transformer", "checkpoint"} and part.path.suffix:
                by_name[plain_name(part.path.stem)] = of_model
    by_name |= {plain_name(theirs): model for theirs, model in program.models.items()}
    last = re.split(r"[/\\]", name.strip().rstrip("/\\"))[-1]
    stem = re.sub(r"\.(safetensors|ckpt|sft|gguf|pt)$", "", last)
    stem = re.sub(r"[-_]diffusers$", "", stem, flags=re.IGNORECASE)
    return by_name.get(plain_name(name)) or by_name.get(plain_name(stem))


def _apply(project: ForeignProject, rule: KeyRule, key: str, value: Any) -> None:
    """Take a value, or note why it is left."""
    shown = f"{show(key)} = {show(value)}"
    group = _find_dataset(project.program, key)
    place = None if group is None else project.places.setdefault(group, ForeignDataset())
    name = key if group is None else key[len(group) + 1 :]
    if place is not None:
        if value in project.program.unused.get(name, ()):
            place.is_unused = True
        if project.program.counted.get(name, place) == value:
            place.num_drawn = -1
    if rule.to == contract.LEFT:
        if contract.is_off(value):
            project.idle.append(show(key))
        else:
            project.leave(key, rule.name)
        return
    if rule.to == contract.NETWORK:
        _take_network(project, shown, key, value)
        return
    try:
        read = rule.read(value)
        if rule.to == contract.ARGUMENTS:
            _take_arguments(project, shown, key, value)
            return
    except (UserError, ValueError, TypeError, OverflowError) as error:
        project.has_other_optimizer |= rule.name == "optimizer_type"
        project.left.append(f"{shown}: {shorten(str(error), 200)}")
        return
    if rule.to == contract.FOLDER:
        project.folders[show(key)] = read
        if place is not None:
            place.path, place.key = read, show(key)
    elif rule.to == contract.EPOCHS:
        project.epochs.append(EpochsSaid(show(key), read, rule.name))
    elif rule.to == contract.PER_EPOCH:
        project.per_epoch[rule.name] = EpochsSaid(show(key), read, rule.name)
    elif rule.to == contract.SHARE:
        project.warmup_share = (show(key), read / 100)
    elif rule.to == contract.ARGUMENT:
        project.arguments[rule.name] = value
        project.said[rule.name] = show(key)
    elif rule.to == contract.NETWORK_ARGUMENT:
        project.network_arguments[rule.name] = read
        project.said[rule.name] = show(key)
    else:
        of_place = project.data if place is None else place.data
        targets = {contract.NEW: project.new, contract.TRAINING: project.training, contract.DATA: of_place}
        _set(project, targets[rule.to], rule.name, read, key, value)


def _find_dataset(program: Program, key: str) -> str | None:
    """Return the key of the dataset of a list in which a key stands: `concepts[0]` of `concepts[0].path`."""
    for generic, rule in program.rules.items():
        prefix = generic.rpartition(".")[0]
        if rule.to == contract.FOLDER and prefix.endswith("[]"):
            found = re.match(re.escape(prefix).replace(r"\[\]", r"\[\d+\]") + r"(?=\.)", key)
            if found is not None:
                return found[0]
    return None


def _set(project: ForeignProject, target: dict[str, Any], name: str, read: Any, key: str, value: Any) -> None:
    """Set an option or key, unless another key of the file has set it otherwise."""
    project.said.setdefault(name, show(key))
    shown = f"{show(key)} = {show(value)}"
    is_stated = project.said[name] in project.assumed
    if is_stated and show(key) not in project.assumed:
        target.pop(name, None)
        project.said[name] = show(key)
    if target.setdefault(name, read) != read:
        project.left.append(f"{shown}: {name} is {target[name]} already, from another key")
    elif show(key) in project.assumed:
        return
    elif _is_same(read, value):
        project.taken.append(show(key))
    else:
        project.changed.append(f"{shown}: {name} = {read}")


def _take_network(project: ForeignProject, shown: str, key: str, value: Any) -> None:
    kind = plain_name(str(value))
    if kind not in _KINDS:
        project.left.append(f"{shown}: a LoRA is trained. docs/networks.md has other networks")
    elif _KINDS[kind] is None:
        project.taken.append(show(key))
    else:
        project.training["network_module"] = _KINDS[kind]
        project.said["network_module"] = show(key)
        project.changed.append(f"{shown}: network_module = {_KINDS[kind]}")


def _take_arguments(project: ForeignProject, shown: str, key: str, value: Any) -> None:
    """Take arguments of an optimizer: texts KEY=VALUE, with blanks or commas between them."""
    texts = value if isinstance(value, list) else re.split(r"\s+|,(?=\s*[A-Za-z_]\w*\s*=)", str(value))
    pairs = split_pairs(shown, [str(text).strip("\"' ") for text in texts if str(text).strip("\"' ")])
    for name, text in pairs.items():
        project.arguments[name] = text
        project.said[name] = show(key)


def _join_places(project: ForeignProject) -> None:
    """Move the keys of the only dataset of a list to those of all tables."""
    for place in project.places.values():
        if place.num_drawn is not None:
            place.num_drawn = place.data.pop("num_repeats", None)
    used = {
        key: place for key, place in project.places.items() if not place.is_unused and place.path is not None
    }
    for key in project.places.keys() - used.keys():
        place = project.places[key]
        if place.is_unused and place.key:
            project.folders.pop(place.key, None)
            project.leave(place.key, "it is not learned there")
    sizes = {place.data.pop("resolution") for place in used.values() if "resolution" in place.data}
    if sizes and "resolution" not in project.data:
        project.data["resolution"] = max(sizes, key=lambda size: size[0] * size[1])
    if len({place.path for place in used.values()}) == 1:
        for place in used.values():
            for name, value in place.data.items():
                project.data.setdefault(name, value)
            place.data = {}
    project.places = used


def is_same_folder(file: Path, place: Path, folder: Path) -> bool:
    """Return whether a folder in a project is the one that is described, or one around or below it."""
    found = find_beside(file, str(place))
    there, here = real_path(file.parent / place if found is None else found), real_path(folder)
    return there == here or there in here.parents or here in there.parents


def _is_same(read: Any, value: Any) -> bool:
    """Return whether a value is taken as it stands, perhaps written as a text."""
    if isinstance(read, int | float) and isinstance(value, str):
        try:
            return bool(read == float(value))
        except ValueError:  # `10 STEP`
            return False
    return read == value or str(read) == str(value)


def show(value: Any) -> str:
    return shorten(" ".join(str(value).split()), 120)
