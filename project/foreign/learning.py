"""Select the trained networks and their learning rates from another trainer's project."""

import dataclasses
from collections.abc import Sequence

from downloads.catalogue import ModelSet
from project.foreign.optimizing import SINGLE_RATE_OPTIMIZERS
from project.foreign.project import ForeignProject, show
from project.kinds.composing import LORA
from project.kinds.contract import RunKind
from project.script_facts import ScriptOptions

_RATES = ("learning_rate", "unet_lr", "text_encoder_lr")


def remove_unsuitable_rates(project: ForeignProject, kind: RunKind) -> None:
    """Drop a project's learning rates if this run trains something else or with another optimizer.

    With another optimizer, the arguments of the project's optimizer are dropped, too.
    """
    if kind.name != project.run.kind:
        setting = f" ({project.run.setting})" if project.run.setting else ""
        _remove_all_rates(project, f"it is not the rate of such a run{setting}, and {kind.title} is trained")
    elif project.replaces_optimizer:
        _remove_all_rates(project, "another optimizer is used, with its own rates")
    else:
        return
    if project.replaces_optimizer:
        for name in project.optimizer_arguments:
            project.report_omitted_key(project.get_file_key(name), "it belongs to that optimizer")
        project.optimizer_arguments = {}


def _remove_all_rates(project: ForeignProject, reason: str) -> None:
    """Drop all learning rates of the run and its networks; which networks are trained does not change."""
    for name in _RATES:
        if name in project.training_options:
            project.remove_option(name, reason)
    networks = project.trained_networks
    if networks.dit_rate is not None or any(networks.text_encoder_rates):
        project.omission_lines.append(f"the rates of {_join_network_keys(project)}: {reason}")
    project.trained_networks = dataclasses.replace(
        networks, dit_rate=None, text_encoder_rates=_use_common_rate(networks.text_encoder_rates)
    )


def _use_common_rate(rates: Sequence[float | None]) -> tuple[float | None, ...]:
    """Replace each text encoder's learning rate with None (the common rate); 0 (frozen) stays."""
    return tuple(0 if rate == 0 else None for rate in rates)


def _join_network_keys(project: ForeignProject) -> str:
    return ", ".join(map(show, project.trained_networks.file_keys))


def resolve_trained_networks(
    project: ForeignProject, model: ModelSet, kind: RunKind, script: ScriptOptions
) -> None:
    """Set the training options for the networks and learning rates of another trainer's project.

    Settings that this kind of run, the model or the script does not support are reported.
    """
    if kind.trains_embedding or kind.uses_control_images:
        # an embedding or a control network is trained in place of the networks of the project
        if project.trained_networks.file_keys:
            project.report_omitted_key(_join_network_keys(project), f"only {kind.title} is trained")
        return
    networks = project.trained_networks
    trains_text_encoders = networks.trains_text_encoders and _can_train_text_encoders(model, kind, script)
    _report_text_encoders(project, model, kind, trains_text_encoders)
    if networks.dit_rate is not None and (kind is LORA or networks.trains_text_encoders):
        _use_dit_rate(project, networks.dit_rate)
    if not trains_text_encoders:
        return
    rates = _select_text_encoder_rates(project)
    if kind is LORA:
        _train_lora_text_encoders(project, rates)
    else:
        _train_model_text_encoders(project, script, rates)


def _report_text_encoders(
    project: ForeignProject, model: ModelSet, kind: RunKind, trains_text_encoders: bool
) -> None:
    """Report what becomes of the project's text encoders if this run does not train them."""
    if trains_text_encoders:  # reported where their options are set
        return
    networks = project.trained_networks
    if not networks.trains_text_encoders:  # as by default
        project.adopted_keys += map(show, networks.file_keys)
        return
    keys = _join_network_keys(project) or "text encoders"
    project.omission_lines.append(
        f"{keys}: the project trains a text encoder, which is not possible here: {kind.title} of "
        f"{model.title} does not change text encoders"
    )


def _can_train_text_encoders(model: ModelSet, kind: RunKind, script: ScriptOptions) -> bool:
    if kind is LORA:
        return "--network_train_unet_only" in model.commands["train"] and "text_encoder_lr" in script.accepted
    return "train_text_encoder" in script.accepted


def _use_dit_rate(project: ForeignProject, rate: float) -> None:
    """Use the project's learning rate for the transformer or U-Net as the run's `learning_rate`."""
    key = next(
        (key for key in project.trained_networks.file_keys if "unet" in key or "transformer" in key),
        "unet_lr",
    )
    if project.training_options.get("learning_rate") == rate:
        return
    if "learning_rate" in project.training_options:
        project.remove_option("learning_rate", f"{key} is the rate of the trained network")
    project.training_options["learning_rate"] = rate
    project.report_change(key, rate, f"learning_rate = {rate}")


def _select_text_encoder_rates(project: ForeignProject) -> Sequence[float | None]:
    """Return each text encoder's learning rate; None stands for the common rate, 0 for frozen."""
    rates = project.trained_networks.text_encoder_rates
    optimizer = project.training_options.get("optimizer_type")
    default = project.training_options.get("learning_rate")
    if optimizer not in SINGLE_RATE_OPTIMIZERS or all(rate in {None, 0, default} for rate in rates):
        return rates
    project.omission_lines.append(
        f"the rates of text encoders ({', '.join(str(rate) for rate in rates if rate)}): {optimizer} takes "
        "only one rate for all trained networks"
    )
    return _use_common_rate(rates)


def _train_lora_text_encoders(project: ForeignProject, rates: Sequence[float | None]) -> None:
    """Train the LoRA on the text encoders, too, with these learning rates (None: the common rate)."""
    training = project.training_options
    training["network_train_unet_only"] = False
    if not project.trained_networks.trains_dit:
        training["network_train_text_encoder_only"] = True
    common_rate = training.get("learning_rate")
    encoder_rates = [common_rate if rate is None else rate for rate in rates]
    rates_text = ""
    # without a rate in the file (None), the script's default applies
    if None not in encoder_rates and any(rate != common_rate for rate in encoder_rates):
        are_equal = len(set(encoder_rates)) == 1
        training["text_encoder_lr"] = encoder_rates[:1] if are_equal else encoder_rates
        rates_text = f": text_encoder_lr = {', '.join(map(str, training['text_encoder_lr']))}"
    keys = _join_network_keys(project) or "text encoders"
    project.change_lines.append(f"{keys}: they are trained, too, as in the project{rates_text}")


def _train_model_text_encoders(
    project: ForeignProject, script: ScriptOptions, rates: Sequence[float | None]
) -> None:
    """Train the checkpoint's text encoders, too, at one common learning rate or at one rate each."""
    training = project.training_options
    training["train_text_encoder"] = True
    rate_options = ["learning_rate_te"]
    if "learning_rate_te" not in script.accepted:
        # scripts of models with two text encoders have an option for each
        rate_options = ["learning_rate_te1", "learning_rate_te2"]
    encoder_rates = (*rates, *rates[-1:])  # a second encoder defaults to the rate of the first
    report = ""
    for option, rate in zip(rate_options, encoder_rates, strict=False):
        if rate is not None and option in script.accepted:
            training[option] = rate
            report += f", {option} = {rate}"
    keys = _join_network_keys(project) or "text encoders"
    project.change_lines.append(f"{keys}: train_text_encoder = true, as in the project{report}")
