"""Recognize another trainer's file, and convert its values or note why not. No code in it is run."""

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modules.control_codes import shorten
from modules.errors import OptionError
from modules.text_files import parse_json, parse_toml, read_text
from project.foreign import (
    ai_toolkit,
    contract,
    diffusion_pipe,
    kohya_gui,
    ltx_trainer,
    onetrainer,
    simpletuner,
)
from project.foreign.contract import KeyRule, Program, UnsupportedRun
from project.foreign.naming import select_project_model
from project.foreign.places import join_datasets
from project.foreign.project import ForeignProject, find_beside, show, without_numbers
from project.foreign.taking import convert_value, find_rule

PROGRAMS: tuple[Program, ...] = (
    ai_toolkit.PROGRAM,
    diffusion_pipe.PROGRAM,
    simpletuner.PROGRAM,
    onetrainer.PROGRAM,
    kohya_gui.PROGRAM,
    ltx_trainer.PROGRAM,
)
MAX_BYTES = 1 << 20  # maximum size of a file; real ones have less than a hundredth of this
MAX_KEYS = 5000
MAX_DEPTH = 12
# keys in sd-scripts' and musubi-tuner's option files, which the training scripts read themselves
_TRAINING_SCRIPT_KEYS = re.compile(
    r"(?:^|\.)(?:network_module|pretrained_model_name_or_path|dit|optimizer_type)$"
)


def read_foreign(path: Path, typed_kind: str | None = None) -> ForeignProject:
    """Read another trainer's project file, and translate its keys to this program's options.

    1. Read the values of the file, and of additional files that it names.
    2. Find the kind of run and the trained networks, and add the trainer's defaults for missing keys.
    3. Convert each value by the rule of its key; the project records what became of the key.
    4. Find the model, which several keys may name.

    `typed_kind` is the kind of run that --train names.

    Raises:
        OptionError: If the file is of an unknown kind, or if it trains what `new` cannot set up and no other
            kind of run was typed.
    """
    values = _read_values(path, "--from", "")
    program = _recognize_program(path, values)
    values = program.rename_keys(values)
    project = ForeignProject(path, program)
    for key in program.companion_keys:
        file_name = values.get(key)
        if isinstance(file_name, str) and file_name.strip():
            values |= _read_companion_file(project, key, file_name)
    project.file_keys = frozenset(values)  # before defaults are added
    _join_numbers_with_units(project, program, values)
    try:
        project.run = project.program.find_run(values)
    except UnsupportedRun as error:
        if typed_kind is None:
            remedy = "Pass --train lora to train a LoRA in its place"
            raise OptionError(f"--from {project.path}: {error}. {remedy}") from None
        project.run = contract.ForeignRun("", str(error))
    project.trained_networks = program.find_trained_networks(values)
    for key, default in program.default_values.items():
        if key not in values:
            project.assumed_defaults[key] = values[key] = default
    model_rules = _convert_values(project, values)
    project.samples = program.read_samples(values)
    omissions = dict.fromkeys(line for sample in project.samples for line in sample.omissions)
    project.omission_lines += map(show, omissions)
    join_datasets(project)
    select_project_model(project, values, model_rules)
    return project


def _convert_values(project: ForeignProject, values: Mapping[str, Any]) -> dict[str, KeyRule]:
    """Convert the values of another trainer's file, or report why not; return the rules of the model keys."""
    ineffective_keys = project.program.find_ineffective_keys(values)
    model_rules: dict[str, KeyRule] = {}
    for key, value in values.items():
        # it names a further file, or selects the networks to train
        names_companion_file = key in project.program.companion_keys and isinstance(value, str)
        is_read_elsewhere = names_companion_file or key in project.trained_networks.file_keys
        if is_read_elsewhere:
            continue
        rule = find_rule(project.program, key)
        if key in ineffective_keys:
            project.ineffective_keys.append(show(key))
        elif rule is None:
            if project.program.shares_option_names:
                project.keys_without_rule[key] = value
            elif is_empty(value):
                project.empty_keys.append(show(key))
            elif key.startswith("optimizer.") and (value is False or value == 0):
                # an argument of another optimizer: files list the arguments of all optimizers
                project.ineffective_keys.append(show(key))
            else:
                project.unknown_keys.append(show(key))
        elif is_empty(value):
            project.empty_keys.append(show(key))
        elif rule.target in {contract.MODEL, contract.FILE}:
            model_rules[key] = rule
        # a default of the trainer is not reported as omitted
        elif rule.target != contract.OMITTED or key not in project.assumed_defaults:
            convert_value(project, rule, key, value)
    return model_rules


def is_empty(value: Any) -> bool:
    """Return whether a value means the same as a missing key."""
    return value is None or value in ("", [])


def _join_numbers_with_units(project: ForeignProject, program: Program, values: dict[str, Any]) -> None:
    """Join numbers with the keys of their units to values such as `10 MINUTE`; epochs get their own key."""
    for key, unit_key in program.unit_keys.items():
        if key not in values or unit_key not in values:
            continue
        project.report_omitted_key(unit_key, f"it is read with {key}")
        unit = values.pop(unit_key)
        if unit == "EPOCH":
            values[f"{key} (epochs)"] = values.pop(key)
        else:
            values[key] = f"{values[key]} {unit}"


def _recognize_program(path: Path, values: Mapping[str, Any]) -> Program:
    """Return the trainer that wrote a project file, recognized by the file's suffix and keys."""
    key_patterns = {without_numbers(key).removeprefix("--") for key in values}
    for program in PROGRAMS:
        if path.suffix.lower() in program.suffixes and not key_patterns.isdisjoint(program.identifying_keys):
            return program
    # a file of a training script needs no conversion
    if path.suffix.lower() == ".toml" and any(map(_TRAINING_SCRIPT_KEYS.search, values)):
        raise OptionError(
            f"--from {path}: it looks like a file of options of sd-scripts or musubi-tuner. Pass it to the "
            "training script itself as --config_file: the names of options are the same"
        )
    known_programs = ", ".join(program.title for program in PROGRAMS)
    raise OptionError(
        f"--from {path}: this is not a project of {known_programs}. Pass the file that describes a training."
    )


def _read_values(path: Path, option: str, prefix: str) -> dict[str, Any]:
    """Return the values of a YAML, TOML or JSON file by dotted key, such as `network.rank`."""
    # Each key starts with `prefix`. `option` is the option that names the file, for messages.
    suffix = path.suffix.lower()
    if suffix not in {".yaml", ".yml", ".toml", ".json"}:
        raise OptionError(f"{option} {path}: pass a .yaml, .toml or .json file of another trainer")
    try:
        content = _parse(suffix, read_text(path, MAX_BYTES))
        return dict(_flatten(content, prefix, depth=0, counter=itertools.count(1)))
    except (OSError, ValueError, RecursionError) as error:
        reason = shorten(" ".join(str(error).split()), 300).rstrip(".")
        raise OptionError(
            f"{option} {path} cannot be read: {reason}. Use the file as its trainer has saved it"
        ) from None


def _parse(suffix: str, text: str) -> Any:
    """Parse text as TOML, JSON or YAML, depending on the file suffix."""
    if suffix == ".toml":
        return parse_toml(text)
    if suffix == ".json":
        return parse_json(text)
    from modules.yaml_files import parse_yaml  # loads a parser that only YAML files need

    return parse_yaml(text)


def _flatten(content: Any, key: str, depth: int, counter: Iterator[int]) -> Iterator[tuple[str, Any]]:
    """Yield each value of a parsed file with its dotted key, such as `network.rank` or `datasets[0].path`."""
    # `key` is the key of `content`: "" or a prefix with a colon for the whole file. `counter` counts values,
    # tables and lists, so that no file can produce an endless number of them.
    if depth > MAX_DEPTH:
        raise ValueError(f"{show(key)} is nested more than {MAX_DEPTH} levels deep, more than any project")
    if next(counter) > MAX_KEYS:
        raise ValueError(f"it has more than {MAX_KEYS} keys, more than any project")
    inner_values = _iterate_inner_values(content, key)
    if inner_values is None:
        yield key, content
        return
    for inner_key, inner_content in inner_values:
        yield from _flatten(inner_content, inner_key, depth + 1, counter)


def _iterate_inner_values(content: Any, key: str) -> Iterator[tuple[str, Any]] | None:
    """Yield the values inside a table or a list of tables, with their dotted keys; None for other values."""
    # They are not collected in a list: a file may have any number of them, and `_flatten` stops at its limit.
    if isinstance(content, dict):
        separator = "" if not key or key.endswith(":") else "."
        # some files have names as on a command line
        return ((f"{key}{separator}{str(name).removeprefix('--')}", item) for name, item in content.items())
    if isinstance(content, list) and any(isinstance(item, dict) for item in content):
        return ((f"{key}[{index}]", item) for index, item in enumerate(content))
    return None


def _read_companion_file(project: ForeignProject, key: str, name: str) -> dict[str, Any]:
    """Return the values of an additional file that a project names; {} if it is missing or unreadable."""
    path = find_beside(project.path, name)
    if path is None:
        project.omission_lines.append(
            f"{key} = {show(name)}: it is not there, nor in the folders around {project.path}"
        )
        return {}
    try:
        values = _read_values(path, f"--from: {key}", f"{key}:")
    except OptionError as error:
        project.omission_lines.append(f"{key} = {show(path)}: {error}")
        return {}
    project.adopted_keys.append(key)
    return values
