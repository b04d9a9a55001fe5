"""The files of a model: released files, files of --model_file, and networks inside a checkpoint."""

import shlex
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from checkpoints.opening import checkpoint_paths, open_checkpoint
from downloads.catalogue import Component, Inside, ModelSet
from modules.errors import CheckpointError, OptionError
from modules.option_values import to_path
from modules.paths import explain_missing, strip_quotes
from project.new_options import NewOptions


def typed_files(options: NewOptions) -> dict[str, str]:
    """Return the paths from --model_file, by model file option.

    Raises:
        OptionError: If one option has two files.
    """
    texts: dict[str, str] = {}
    for typed in options.model_files:
        name, _, text = typed.partition("=")
        name = name.strip().lstrip("-")
        text = strip_quotes(text.strip())
        if texts.get(name, text) != text:
            raise OptionError(f"--model_file {name}: {texts[name]} and {text} are given. Pass one of them")
        texts[name] = text
    return texts


def name_files(options: NewOptions, model: ModelSet) -> dict[str, str]:
    """Return the paths of the model's files by option: those on the command line, otherwise downloaded files.

    Raises:
        OptionError: If a file is given for an unknown option, or does not exist.
    """
    parts = {part.option.lstrip("-"): part for part in model.components if part.option}
    files = {name: options.models / part.path for name, part in parts.items()}
    for name, text in typed_files(options).items():
        if name not in files or not text:
            typed = f"{name}={text}" if text else name
            raise OptionError(f"--model_file {typed}: pass NAME=PATH with one of {', '.join(files)} as NAME")
        files[name] = _require_typed_file(name, text, parts[name])
    # links are not followed: in the hub's cache the name that says what a file is belongs to the link
    return {name: path.absolute().as_posix() for name, path in files.items()}


def _require_typed_file(name: str, text: str, part: Component) -> Path:
    """Return the path that --model_file gives for an option."""
    path = to_path(f"--model_file {name}", text)
    if not path.exists():
        raise OptionError(
            f"--model_file {name}={text}: there is no such file.{explain_missing(path)} Fix the path, or "
            "omit it to use the file that tools/download.py downloads"
        )
    names = {Path(file.name).name for file in part.files}
    has_part_files = any(
        (path / file).is_file() for file in names
    )  # such as a tokenizer, which has no weights
    # a folder of the model's own layout is accepted as it is
    if path.is_dir() and not has_part_files and not any(path.glob("*/*.safetensors")):
        checkpoint_paths(path)  # raises if the folder has no checkpoint
    return path


def find_embedded_files(model: ModelSet, typed: Mapping[str, str]) -> dict[str, str]:
    """Find networks that are part of another model file on the command line instead of a file of their own.

    `typed` contains the paths by option. Returns the path of the containing file by the network's option.
    """
    holders = {}
    for part in model.components:
        if part.option is None or part.inside is None or part.option.lstrip("-") in typed:
            continue
        text = typed.get(part.inside.option.lstrip("-"))
        if text and _has_inside(to_path(part.inside.option, text), part.inside):
            holders[part.option.lstrip("-")] = text
    return holders


def _has_inside(path: Path, inside: Inside) -> bool:
    if path.is_dir():
        return (path / inside.folder).is_dir()
    try:
        with open_checkpoint(path) as checkpoint:
            return any(name.startswith(inside.tensors) for name in checkpoint.tensors)
    except CheckpointError:
        return False  # another check reports the error


def without_files(model: ModelSet, names: Collection[str]) -> ModelSet:
    """Return a model without some of its files; its commands then omit the options for them.

    `names` are the options of these files, without dashes; commands have a placeholder such as {vae} for
    each.
    """
    placeholders = {f"{{{name}}}" for name in names}
    commands = {}
    for step, command in model.commands.items():
        arguments: list[str] = []
        for word in shlex.split(command):
            if word in placeholders:
                arguments.pop()  # also removes the option before this value
            else:
                arguments.append(word)
        commands[step] = shlex.join(arguments)
    parts = tuple(part for part in model.components if (part.option or "").lstrip("-") not in names)
    return replace(model, commands=commands, components=parts)
