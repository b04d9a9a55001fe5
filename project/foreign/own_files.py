"""Take the files that another trainer's project names: base model, other networks, a LoRA to start from."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath

from downloads.catalogue import ModelSet
from modules.errors import OptionError
from modules.option_values import to_path
from modules.paths import explain_path, is_on_foreign_share
from modules.text_files import real_path
from project.foreign.project import ForeignFile, ForeignProject, find_beside, show
from project.model_files import typed_files
from project.model_sizes import list_transformers
from project.new_options import NewOptions
from project.options import own_command

START_OPTION = "network_weights"
TRAINING_OPTIONS = {START_OPTION, "training_adapter"}  # files that are no part of the model


def use_own_files(
    project: ForeignProject, options: NewOptions, model: ModelSet, typed_options: NewOptions
) -> NewOptions:
    """Return the options of `new` with the model files that the project names.

    A LoRA to start from becomes a training option of the project. Whether a file fits the model is checked
    with the files that the user typed.

    Args:
        project: The other trainer's project, whose report is completed.
        options: Options of `new`, completed from the project.
        model: The model to train.
        typed_options: Options as the user typed them.

    Raises:
        OptionError: If a file of the project does not exist here, and the user typed no other.
    """
    typed_names = typed_files(options).keys()
    names_model = typed_options.family is not None and typed_options.task is not None
    for file in project.own_files:
        name = _find_option(file, model)
        path = _find_file(project, file, options.models)
        if name is None:
            project.report_omitted_value(
                file.key, file.value, f"{model.family} {model.task} has no such file"
            )
        elif name in typed_names:
            project.report_omitted_value(file.key, file.value, f"--model_file {name} sets another file")
        elif path is not None and name in TRAINING_OPTIONS:
            project.training_options[name] = path.absolute().as_posix()
            project.source_keys[name] = file.key
            project.report_change(file.key, file.value, f"{name} = {path.absolute().as_posix()}")
        elif path is not None:
            options = replace(options, model_files=(*options.model_files, f"{name}={path.absolute()}"))
            project.report_change(file.key, file.value, f"--model_file {name}={path}")
        elif file.is_released:
            continue  # a released model, which is downloaded
        elif names_model and file.is_base_model:
            project.report_omitted_value(file.key, file.value, "--family and --task name another model")
        else:
            raise _make_missing_error(project, file, name, typed_options)
    return options


def _find_option(file: ForeignFile, model: ModelSet) -> str | None:
    """Return the option of the model's file that a key of the project names; None if it has no such file."""
    if TRAINING_OPTIONS.issuperset(file.options) and file.options:
        return file.options[0]
    transformers = [part.option for part in list_transformers(model) if part.option]
    parts = [part.option for part in model.components if part.option]
    names: Sequence[str] = transformers[:1] if file.is_base_model else parts
    available = [name.lstrip("-") for name in names]
    wanted = available if file.is_base_model else file.options
    return next((name for name in wanted if name in available), None)


def _find_file(project: ForeignProject, file: ForeignFile, models: Path) -> Path | None:
    """Return the file or folder that a key names, around the project or in the models' folder, or None."""
    # Windows would log in to a machine that somebody else's project names
    if is_on_foreign_share(PurePath(file.value), real_path(project.path)):
        return None
    # a project of another machine, perhaps with \ in its paths
    file_name = re.split(r"[/\\]", file.value)[-1]
    if not file.is_released and PurePath(file_name).suffix and (models / file_name).is_file():
        return models / file_name
    try:
        path = to_path(file.key, file.value)
    except OptionError:
        return None
    found = find_beside(project.path, str(path.expanduser()))
    # a released model's name is also that of a folder of another layout: only a file is certain
    return None if found is not None and file.is_released and not found.is_file() else found


def _make_missing_error(
    project: ForeignProject, file: ForeignFile, name: str, typed_options: NewOptions
) -> OptionError:
    """Return the error about a file that the project names and that is not here, with the command to type."""
    placeholder = "PATH"
    if name in TRAINING_OPTIONS:
        what = "starts from the LoRA" if name == START_OPTION else "trains with the adapter"
        remedy = f"Copy it there, or remove {file.key} from a copy of the project. Then"
        argv = typed_options.make_argv(typed_options.folder)
    else:
        what = "trains on" if file.is_base_model else "uses"
        others = ", or name a released model with --family and --task" if file.is_base_model else ""
        remedy = f"First: pass the file in place of {placeholder}{others}"
        argv = [*typed_options.make_argv(typed_options.folder), "--model_file", f"{name}={placeholder}"]
    hint = explain_path(file.value)
    reason = "it is not here" if hint is None else f"it is not here: {hint}"
    return OptionError(
        f"--from {project.path}: the project {what} {show(file.value)} ({file.key}), and {reason}. "
        f"With another one, the result differs. {remedy}:\n  {own_command(*argv)}"
    )
