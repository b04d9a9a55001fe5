"""Convert another trainer's optimizer: its name, its arguments and its learning rates."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from modules.installation import DISTRIBUTIONS
from project.foreign.contract import OPTIMIZER_ARGUMENTS, is_off, is_on
from project.foreign.project import ForeignProject

# -> optimizer for a CPU
_CPU_OPTIMIZERS = {
    "adamw8bit": "adamw",
    "pagedadamw8bit": "adamw",
    "lion8bit": "lion",
}
_PACKAGE_BY_OPTIMIZER = {"lion": "lion_pytorch", "prodigy": "prodigyopt"}  # optimizer -> package
# optimizers that support only one learning rate for all parameters
SINGLE_RATE_OPTIMIZERS = frozenset({"prodigy"})
_ADAFACTOR_SETS_RATE = "Adafactor with relative_step finds its own rate, there and here"
_ADAFACTOR_SETS_WARMUP = "Adafactor with relative_step has its own warm-up, warmup_init"


def resolve_optimizer(project: ForeignProject, memory: float) -> None:
    """Set another trainer's optimizer and its arguments as training options; report unsupported ones.

    `memory` is the GPU memory in GiB; 0 means a CPU.
    """
    training = project.training_options
    if training.get("optimizer_type") is None:
        for name in project.optimizer_arguments:
            project.report_omitted_key(project.get_file_key(name), "no key names its optimizer")
        project.optimizer_arguments = {}
        return
    if not memory:
        # an optimizer that needs a GPU becomes the most similar one for the CPU
        typed = project.training_options["optimizer_type"]
        if typed in _CPU_OPTIMIZERS:
            cpu_optimizer = _CPU_OPTIMIZERS[typed]
            project.training_options["optimizer_type"] = cpu_optimizer
            project.report_change("optimizer_type", typed, f"it needs a card, so it is {cpu_optimizer} here")
    optimizer: str = training["optimizer_type"]
    # some optimizers come in packages of their own
    package = _PACKAGE_BY_OPTIMIZER.get(str(optimizer))
    if package is not None and find_spec(package) is None:
        project.missing_packages.append(DISTRIBUTIONS[package])
    arguments = {
        **project.program.default_optimizer_arguments.get(optimizer, {}),
        **_join_arguments(project, optimizer),
    }
    _write_optimizer_arguments(project, optimizer, arguments)
    # unless relative_step is off, Adafactor sets its learning rate itself: rates and schedules are dropped
    if optimizer == "adafactor" and is_on(arguments.get("relative_step", True)):
        _omit_adafactor_rates(project)
    elif training.get("lr_scheduler") == "adafactor":
        project.remove_option("lr_scheduler", "it belongs to Adafactor with relative_step=True")


def _join_arguments(project: ForeignProject, optimizer: str) -> dict[str, Any]:
    """Return the optimizer arguments, with the two betas (Adam) or eps values (Adafactor) in one."""
    arguments = {name: value for name, value in project.optimizer_arguments.items() if value is not None}
    for name in project.optimizer_arguments.keys() - arguments.keys():
        project.empty_keys.append(project.get_file_key(name))
    if optimizer == "adafactor":
        _join_eps(project, arguments)
    else:
        _join_betas(project, arguments)
    return arguments


def _join_betas(project: ForeignProject, found: dict[str, Any]) -> None:
    """Combine beta1 and beta2 into `betas`; a missing one gets its default."""
    if not {"beta1", "beta2"} & found.keys():
        return
    first = found.pop("beta1", 0.9)
    second = found.pop("beta2", 0.999)
    found["betas"] = [first, second]
    keys = [project.source_keys[name] for name in ("beta1", "beta2") if name in project.source_keys]
    project.source_keys["betas"] = keys[0]
    project.adopted_keys += keys


def _join_eps(project: ForeignProject, found: dict[str, Any]) -> None:
    """Combine Adafactor's eps and eps2 into the pair `eps`, if both are set."""
    if {"eps", "eps2"} <= found.keys():
        found["eps"] = [found["eps"], found.pop("eps2")]
        project.adopted_keys.append(project.get_file_key("eps2"))
    for name in ("eps", "eps2"):
        if name in found and not isinstance(found[name], list | tuple):
            found.pop(name)
            project.report_omitted_key(project.get_file_key(name), "Adafactor has two of them")
    if "beta2" in found:  # Adafactor has decay_rate instead
        found.pop("beta2")
        project.ineffective_keys.append(project.get_file_key("beta2"))


def _write_optimizer_arguments(project: ForeignProject, optimizer: str, arguments: Mapping[str, Any]) -> None:
    """Write the optimizer's arguments to `optimizer_args`; report those that are not supported here."""
    known_arguments = OPTIMIZER_ARGUMENTS.get(optimizer)  # None: all arguments are accepted
    assignments = []
    for name, value in arguments.items():
        key = project.get_file_key(name)
        is_in_file = key != name or name in project.optimizer_arguments  # otherwise the trainer's default
        if known_arguments is None or name in known_arguments:
            assignments.append(f"{name}={_as_literal(value)}")
            if is_in_file:
                project.adopted_keys.append(key)
        elif is_off(value):
            project.ineffective_keys.append(key)
        else:
            project.report_omitted_key(key, f"{optimizer} has no argument {name} here")
    if assignments:
        project.training_options["optimizer_args"] = assignments
        project.source_keys["optimizer_args"] = "optimizer arguments"
        project.change_lines.append(f"arguments of the optimizer: optimizer_args = {assignments}")


def _as_literal(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_as_literal, value))
    return str(value).strip()


def _omit_adafactor_rates(project: ForeignProject) -> None:
    """Use Adafactor's own learning rate (the "adafactor" schedule) instead of rates, schedule and warm-up."""
    training = project.training_options
    for name in ("learning_rate", "unet_lr"):
        if name in training:
            project.remove_option(name, _ADAFACTOR_SETS_RATE)
    if training.get("lr_scheduler", "adafactor") != "adafactor":
        project.remove_option("lr_scheduler", _ADAFACTOR_SETS_RATE)
    training["lr_scheduler"] = "adafactor"
    if "lr_warmup_steps" in training:
        project.remove_option("lr_warmup_steps", _ADAFACTOR_SETS_WARMUP)
    if project.warmup_fraction is not None:
        key, fraction = project.warmup_fraction
        if fraction:
            project.report_omitted_key(key, _ADAFACTOR_SETS_WARMUP)
        else:
            project.ineffective_keys.append(key)
        project.warmup_fraction = None
    training["lr_warmup_steps"] = 0
