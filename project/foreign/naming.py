"""Find the model that another trainer's file names."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from downloads.catalogue import TRAINING_ADAPTER
from downloads.naming import name_unsupported, plain_name
from modules.errors import OptionError
from project.foreign import contract
from project.foreign.contract import KeyRule, Program
from project.foreign.project import ForeignFile, ForeignProject, show
from project.options import find_models

# how specific a key is: a variant more than a file or repository, and these more than a kind
_MODEL_VARIANT, _MODEL_FILE, _MODEL_KIND = range(3)


class FileModel(NamedTuple):
    """The model that a key of another trainer's config file names."""

    specificity: int  # _MODEL_VARIANT, _MODEL_FILE or _MODEL_KIND
    family: str
    task: str | None  # None: the key names only the family


def select_project_model(
    project: ForeignProject, values: Mapping[str, Any], model_rules: Mapping[str, KeyRule]
) -> None:
    """Select the model that another trainer's project names, and report how its keys were used.

    1. Read each key that names a model. A variant key names one only together with another key.
    2. If no key names a known model, guess it from the other keys.
    3. Use the most specific of these models: its family and task become options of `new`.

    Args:
        project: The project, whose options and report are completed.
        values: All keys of the file.
        model_rules: Rules of the keys that name a model.
    """
    model_by_key = {key: _read_model_key(project, rule, key, values) for key, rule in model_rules.items()}
    models = [model for model in model_by_key.values() if model is not None]
    if not models:
        models = _guess_model(project, values)
    unknown_keys = {key for key, model in model_by_key.items() if model is None}
    # the default task would be a wrong guess for a variant that is not known
    if unknown_keys & project.program.kind_key_by_variant.keys():
        models = [
            model._replace(task=None) if model.specificity == _MODEL_KIND else model for model in models
        ]
    if models:
        # The one that is named most specifically: one with a task first, then by the order _MODEL_VARIANT,
        # _MODEL_FILE, _MODEL_KIND.
        chosen = min(models, key=lambda model: (model.task is None, model.specificity))
        project.new_options["family"] = chosen.family
        if chosen.task is not None:
            project.new_options["task"] = chosen.task
    for key, value in project.adapters:
        _use_adapter(project, key, value)


def _guess_model(project: ForeignProject, values: Mapping[str, Any]) -> list[FileModel]:
    """Return the model that the other trainer's rules derive from other keys; [] if there is none."""
    guessed = project.program.guess_model(values)
    if guessed is None:
        return []
    family, task = guessed
    project.change_lines.append(f"no key names another model: --family {family} --task {task}")
    return [FileModel(_MODEL_KIND, family, task)]


def _use_adapter(project: ForeignProject, key: str, value: str) -> None:
    """Set the task that has a published training adapter, or note the file of an adapter for later."""
    family, task = project.new_options.get("family"), project.new_options.get("task")
    stem = plain_name(re.split(r"[/\\]", value)[-1].removesuffix(".safetensors"))
    for model in find_models():
        adapters = [part for part in model.components if part.option == TRAINING_ADAPTER]
        names = {plain_name(name) for part in adapters for name in (part.path.stem, *part.path.parts[-2:-1])}
        names |= {plain_name(part.files[0].repository.split("/")[-1]) for part in adapters}
        if model.family == family and stem in names and task in (None, model.task.removesuffix("-adapter")):
            project.new_options["task"] = model.task
            project.report_change(key, value, f"--task {model.task}, with the published adapter")
            return
    project.own_files.append(ForeignFile(key, value, ("training_adapter",), is_released=False))


def _read_model_key(
    project: ForeignProject, rule: KeyRule, key: str, values: Mapping[str, Any]
) -> FileModel | None:
    """Return the model that a key of another trainer's file names, and report how the key was read."""
    value = values[key]
    if value is False:
        project.adopted_keys.append(show(key))
        return None
    if key in project.program.kind_key_by_variant:  # variant names are only unique within a kind of model
        kind_key = project.program.kind_key_by_variant[key]
        name = f"{values.get(kind_key)} {value}"
        specificity = _MODEL_VARIANT
    else:
        # a switch such as `is_flux` names the model by its key
        name = f"{key.split('.')[-1]}=True" if value is True else str(value)
        specificity = _MODEL_FILE if rule.target == contract.FILE else _MODEL_KIND
    # What the name of a model, a repository or a released file stands for: family and task. The task is None
    # if the trainer's name stands for all tasks of a family.
    by_name = _index_models_by_name(project.program)
    file_name = re.split(r"[/\\]", name.strip().rstrip("/\\"))[-1]
    stem = re.sub(r"\.(safetensors|ckpt|sft|gguf|pt)$", "", file_name)
    without_format = re.sub(r"[-_]diffusers$", "", stem, flags=re.IGNORECASE)
    named_model = by_name.get(plain_name(name)) or by_name.get(plain_name(without_format))
    is_file = rule.target == contract.FILE and isinstance(value, str) and key not in project.assumed_defaults
    if is_file:
        project.own_files.append(ForeignFile(show(key), value, (), is_released=named_model is not None))
    if named_model is None:
        project.unknown_models[show(key)] = show(value)
        if not is_file:
            reason = "no model of this name is known. Pass --family and --task"
            project.report_omitted_value(key, value, reason)
        return None
    family, task = named_model
    if key not in project.assumed_defaults:
        project.report_change(key, value, f"--family {family} --task {task or '(asked for)'}")
    return FileModel(specificity, family, task)


def _index_models_by_name(program: Program) -> dict[str, tuple[str, str | None]]:
    """Return the (family, task) of each model, by our names for it and by those of the other trainer."""
    by_name: dict[str, tuple[str, str | None]] = {}
    for model in reversed(find_models()):  # the first model of a repository takes precedence
        family_and_task = (model.family, model.task)
        by_name[plain_name(model.released_by.split("/")[-1])] = family_and_task
        by_name[plain_name(model.released_by)] = family_and_task
        for part in model.components:
            if part.role in {"transformer", "checkpoint"} and part.path.suffix:
                by_name[plain_name(part.path.stem)] = family_and_task
    # names that the other trainer gives to models replace ours
    return by_name | {plain_name(theirs): model for theirs, model in program.model_by_name.items()}


def explain_model(project: ForeignProject, error: OptionError) -> OptionError:
    """Return the error about a missing model, with the project file's keys that name a model added."""
    if "family" not in project.new_options:
        for key, value in project.unknown_models.items():
            model = name_unsupported(value)
            if model is not None:
                return OptionError(
                    f"--from {project.path}: {key} = {value}: {model} is not supported. {error}"
                )
    settings = [f"{key} = {value}" for key, value in project.unknown_models.items()]
    if settings:
        settings[-1] += ", which names no model known here"
    if "family" in project.new_options:
        # the family follows from keys that do not name a model
        settings.append(f"--family {project.new_options['family']}, by its other keys")
    if not settings:
        return error
    return OptionError(f"{error}\n  {project.path} says {', '.join(settings)}")
