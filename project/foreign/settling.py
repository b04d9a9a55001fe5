"""Fit another trainer's values to a model, a kind of run and its training script."""

import dataclasses
from typing import Any, NamedTuple

from dataset.config import KEYS
from dataset.subset_options import SUBSET_KEYS
from downloads.catalogue import ModelSet
from project.foreign.learning import remove_unsuitable_rates, resolve_trained_networks
from project.foreign.named import adopt_by_name
from project.foreign.optimizing import resolve_optimizer
from project.foreign.project import ForeignProject
from project.kinds.composing import LORA
from project.kinds.contract import RunKind
from project.new_options import NewOptions
from project.script_facts import ScriptOptions

_LORA_OPTIONS = ("network_module", "network_dim", "network_alpha", "network_dropout", "network_args")
_EMBEDDING_OPTIONS = ("init_word", "num_vectors_per_token")
# network arguments in other programs that only LoRAs have
_LORA_ONLY_ARGUMENTS = ("dora_wd", "rank_dropout", "module_dropout")
# keys of dataset.toml that vary captions or images at each use
VARYING_TEXTS = frozenset(
    {"shuffle_caption", "caption_tag_dropout_rate", "caption_dropout_every_n_epochs", "token_warmup_step"}
    | {"enable_wildcard"}
)
VARYING_IMAGES = frozenset({"color_aug", "random_crop", "face_crop_aug_range"})
_SHUFFLING_KEYS = ("keep_tokens", "keep_tokens_separator", "caption_separator", "secondary_separator")


class DatasetLayout(NamedTuple):
    """Which keys the tables of the new dataset.toml may have."""

    side_multiple: int  # sides are multiples of this
    supports_subsets: bool  # the model supports [[datasets.subsets]]
    uses_subsets: bool  # this layout is used in any case
    has_regularization: bool = False  # the folder has regularization images


def complete_options(project: ForeignProject, options: NewOptions) -> NewOptions:
    """Return options of `new`, completed by values of the foreign project; typed options have precedence."""
    default = NewOptions(folder=options.folder)  # an option with this value counts as not typed
    file_values = dict(project.new_options)
    if project.run.kind not in {LORA.name, ""} and options.trains is None:
        file_values["train"] = project.run.kind
    if options.family not in {None, project.new_options.get("family")}:
        task = file_values.pop("task", None)
        if task is not None and options.task is None:  # the typed task belongs to the project's family
            project.report_omitted_value("task", task, "--family says otherwise")
    file_values.pop("max_train_steps", None)  # `select_length` compares it with the epochs
    values = {}
    for name, value in file_values.items():
        if getattr(options, name) == getattr(default, name):
            values[name] = value
        elif getattr(options, name) != value:
            project.report_omitted_value(name, value, f"--{name} says otherwise")
    return dataclasses.replace(options, **values)


def resolve_project(
    project: ForeignProject,
    model: ModelSet,
    kind: RunKind,
    script: ScriptOptions,
    memory: float,
    dataset_layout: DatasetLayout,
) -> None:
    """Reduce a foreign project's values to those that the run accepts, and report why others are omitted.

    `memory` is the graphics card's memory in GiB; 0 means a CPU. `forms` says which keys dataset.toml can
    have. "Foreign" is a project file of another trainer.
    """
    remove_unsuitable_rates(project, kind)
    resolve_trained_networks(project, model, kind, script)
    adopt_by_name(project, script, _list_options_set_by_new(model))
    resolve_optimizer(project, memory)
    _resolve_network(project, kind)
    if kind.saves_large_files:  # large networks, for which `new` sets Adafactor
        _adapt_adafactor_defaults(project, script)
    project.keeps_only_latest = kind.saves_large_files  # whole models are large, so only the latest are kept
    if "min_snr_gamma" in script.accepted and "min_snr_gamma" not in project.training_options:
        project.training_options["min_snr_gamma"] = None  # `new` sets it for models that predict noise
        project.change_lines.append(
            f"min_snr_gamma is left out, which {project.title} has only if it is said"
        )
    for name in list(project.training_options):
        if name not in script.accepted:
            project.remove_option(name, script.rejected.get(name, f"{script.name} has no such option"))
    _resolve_data(project, dataset_layout)


def _list_options_set_by_new(model: ModelSet) -> set[str]:
    """Return the names of the options that `new` sets itself for a model."""
    words = f"{model.commands['train']} {model.properties.get('train', '')}".split()
    return {word.removeprefix("--") for word in words if word.startswith("--")}


def _resolve_network(project: ForeignProject, kind: RunKind) -> None:
    """Write the network's rank, alpha and arguments; omit them if the run trains no network of that kind."""
    if kind is LORA:
        _omit_lora_only_settings(project)
        _write_network_arguments(project)
        _select_alpha(project)
    else:
        reason = f"{kind.title} is trained"
        for name in project.network_arguments:
            project.report_omitted_key(project.source_keys[name], reason)
        for name in _LORA_OPTIONS:
            if name in project.training_options:
                project.remove_option(name, reason)
    if not kind.trains_embedding:
        for name in _EMBEDDING_OPTIONS:
            if name in project.training_options:
                project.remove_option(name, f"{kind.title} is trained")


def _omit_lora_only_settings(project: ForeignProject) -> None:
    """Remove settings that only a LoRA has from a project that trains another network type."""
    module = project.training_options.get("network_module")
    if module is None:
        return
    reason = f"only a LoRA has it, and {module} is trained"
    for name in _LORA_ONLY_ARGUMENTS:
        value = project.network_arguments.pop(name, 0)
        if value:
            project.report_omitted_value(project.source_keys[name], value, reason)
        elif name in project.source_keys:
            project.ineffective_keys.append(project.source_keys[name])
    if "network_dropout" in project.training_options:
        project.remove_option("network_dropout", reason)


def _write_network_arguments(project: ForeignProject) -> None:
    """Write the network's arguments to `network_args`; list those with an empty value as having no effect."""
    arguments: dict[str, Any] = {}
    for name, value in project.network_arguments.items():
        if value:
            arguments[name] = value
        else:
            project.ineffective_keys.append(project.source_keys[name])
    if not arguments:
        return
    assignments = [f"{name}={_as_text(value)}" for name, value in arguments.items()]
    project.training_options["network_args"] = assignments
    project.source_keys["network_args"] = "arguments of the network"
    project.adopted_keys += [project.source_keys[name] for name in arguments]
    project.change_lines.append(f"arguments of the network: network_args = {assignments}")


def _as_text(value: Any) -> str:
    return str(value) if isinstance(value, bool | str) else f"{value:g}"


def _select_alpha(project: ForeignProject) -> None:
    """Use the other trainer's default alpha if its file sets none."""
    rank = project.training_options.get("network_dim")
    if rank is None or "network_alpha" in project.training_options:
        return
    alpha = rank if project.program.default_alpha is None else project.program.default_alpha
    project.training_options["network_alpha"] = alpha
    project.change_lines.append(f"no alpha is said: network_alpha = {alpha}, as in {project.title}")


def _adapt_adafactor_defaults(project: ForeignProject, script: ScriptOptions) -> None:
    """Remove the Adafactor settings of full training if the project has another optimizer."""
    training = project.training_options
    # gradients of several batches cannot be applied during the backward pass
    accumulates = training.get("gradient_accumulation_steps", 1) > 1
    optimizer = training.get("optimizer_type", "adafactor")
    if "fused_backward_pass" in script.accepted and (optimizer != "adafactor" or accumulates):
        training["fused_backward_pass"] = False
        # without fused_backward_pass, swapped blocks cannot be updated on the card
        if "blocks_to_swap" in script.accepted:
            training["blocks_to_swap"] = None
            project.change_lines.append(
                "blocks_to_swap is left out: trained blocks are swapped only with fused_backward_pass, "
                "which needs Adafactor without accumulation"
            )
    # full training sets these for Adafactor; other optimizers use their defaults
    if "optimizer_type" in training and optimizer != "adafactor":
        training.setdefault("optimizer_args", [])
        training.setdefault("max_grad_norm", 1.0)
    if "lr_scheduler" in training and "lr_warmup_steps" not in training and project.warmup_fraction is None:
        training["lr_warmup_steps"] = 0


def _resolve_data(project: ForeignProject, dataset_layout: DatasetLayout) -> None:
    """Remove keys that the new dataset.toml cannot have, and keys without effect."""
    data = project.general_keys
    # bucket sides have to be multiples of the model's step
    steps = data.get("bucket_reso_steps", dataset_layout.side_multiple)
    if steps % dataset_layout.side_multiple:
        data.pop("bucket_reso_steps")
        project.remove_from_report("bucket_reso_steps")
        project.report_omitted_value(
            "bucket_reso_steps", steps, f"this model needs a multiple of {dataset_layout.side_multiple}"
        )
    for name in list(data):
        key = project.file_key_of(name)
        if name in SUBSET_KEYS and data[name] == SUBSET_KEYS[name].default:
            data.pop(name)
        # KEYS may stand in any table, other keys only in subsets
        elif name not in KEYS and not (dataset_layout.supports_subsets or dataset_layout.uses_subsets):
            data.pop(name)
            project.remove_from_report(key)
            project.omission_lines.append(
                f"{key}: {name} is of [[datasets.subsets]], which this model's script does not take"
            )
    # shuffling keys have no effect unless captions vary
    without_effect = [] if VARYING_TEXTS & data.keys() else [*_SHUFFLING_KEYS]
    if not dataset_layout.has_regularization:
        without_effect.append("prior_loss_weight")
    for name in without_effect:
        if name in data:
            data.pop(name)
            project.remove_from_report(project.file_key_of(name))
            project.ineffective_keys.append(project.file_key_of(name))
