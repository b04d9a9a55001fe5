"""Make the optimizer from a short name, a class name of torch.optim, or an import path; keep its state.

A state is restored bit for bit. `Optimizer.load_state_dict` alone is not enough: it casts restored
tensors to the parameters' dtype, which ruins 8-bit states and float32 moments of bf16 parameters. Parameters
are known by name, so a state fits only the network it was saved with.
"""

import contextlib
import importlib
import inspect
import logging
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from modules.command import did_you_mean
from modules.console import quiet
from modules.errors import CheckpointError, OptionError
from modules.installation import EXTENSIONS, describe_missing, reject_standard_module
from protocols.family import DitSpec
from training.learning_options import OptimizerOptions
from training.saving.states import to_builtin_types
from training.trainable import Trainable

logger = logging.getLogger(__name__)

# short names, any case -> import path
SHORT_NAMES = {
    "": "torch.optim.AdamW",
    "adamw": "torch.optim.AdamW",
    "adafactor": "transformers.optimization.Adafactor",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "pagedadamw8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "lion8bit": "bitsandbytes.optim.Lion8bit",
    "lion": "lion_pytorch.Lion",
    "prodigy": "prodigyopt.Prodigy",
    "adamwschedulefree": "schedulefree.AdamWScheduleFree",
    "radamschedulefree": "schedulefree.RAdamScheduleFree",
    "sgdschedulefree": "schedulefree.SGDScheduleFree",
}
# import path of each optimizer by its lowercase name
PATHS = {
    key.lower(): f"torch.optim.{key}"
    for key, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
} | SHORT_NAMES
if os.environ.get(EXTENSIONS):
    from modules.extensions import OPTIMIZERS, find_values

    PATHS |= {name.lower(): value.replace(":", ".") for name, value in find_values(OPTIMIZERS).items()}
MUON, AUTOMAGIC = "muon", "automagic"  # optimizers of our own
# class -> why the training loop cannot step it
UNUSABLE = {
    "LBFGS": "it computes the loss several times a step, and the loop computes it once",
    "SparseAdam": "it takes sparse gradients only, and these are dense",
}
# names of optimizer states with the shape of their parameter
MOMENT_NAMES = frozenset({"exp_avg", "exp_avg_sq", "momentum_buffer", "state1", "state2"})


def make_optimizer(
    options: OptimizerOptions, parameter_groups: Sequence[Mapping[str, Any]]
) -> tuple[Optimizer, str]:
    """Build the optimizer over `parameter_groups` ({"params": [...], "lr": ...}).

    Returns:
        The optimizer, and its name for metadata.

    Raises:
        OptionError: If the class is missing or does not accept the arguments.
    """
    optimizer_class = find_optimizer(options.optimizer_type)
    class_name, module = optimizer_class.__name__, optimizer_class.__module__
    arguments = options.arguments()
    groups = [dict(group) for group in parameter_groups]
    rate: float | None = options.learning_rate
    # transformers' Adafactor can find its own rate, and then rejects a given one
    if class_name == "Adafactor" and module.startswith("transformers"):
        arguments, rate = _select_adafactor_arguments(options, arguments)
        if rate is None:
            for group in groups:
                group.pop("lr", None)
    elif class_name == "Prodigy" and rate is not None and rate < 0.1:
        logger.warning(f"Prodigy finds its own rate and multiplies it by --learning_rate {rate}: 1 is usual.")
    if arguments:
        check_arguments("--optimizer_args", optimizer_class, arguments, {"params"})
    arguments_text = ",".join(f"{key}={value}" for key, value in arguments.items())
    try:
        optimizer = optimizer_class(groups, lr=rate, **arguments)
    except Exception as error:  # classes raise errors of any type for unsuitable arguments
        raise _make_rejection_error(options, arguments_text, error) from None
    name = f"{module}.{class_name}"
    return optimizer, f"{name}({arguments_text})" if arguments_text else name


def _make_rejection_error(options: OptimizerOptions, arguments: str, error: Exception) -> OptionError:
    """Return the error for arguments that an optimizer class rejected with `error`."""
    reason = str(error) or type(error).__name__
    name = options.optimizer_type or "AdamW"
    given = f" with --optimizer_args {arguments}" if arguments else ""
    return OptionError(f"--optimizer_type {name}{given}: {reason}")


def arrange_weights(trainable: Trainable, options: OptimizerOptions, spec: DitSpec) -> Trainable:
    """Return `trainable` with its parameter groups split as the optimizer needs, for example for Muon."""
    if options.optimizer_type.lower() != MUON:
        return trainable
    from training.optimizers.muon import NUM_MATRICES, arrange_groups  # few runs use it

    arranged = arrange_groups(trainable, spec)
    num_matrices = sum(len(group["params"]) for group in arranged.groups if group[NUM_MATRICES])
    logger.info(
        "Muon steps %d weights in blocks, AdamW the %d others (norms, biases, and layers outside of blocks)",
        num_matrices,
        len(arranged.parameters) - num_matrices,
    )
    return arranged


def check_rates(options: OptimizerOptions, rates: Mapping[str, float]) -> None:
    """Raise OptionError if the optimizer does not support these learning rates for parts of a network.

    Some optimizers reject several rates only in their first step, so one step is tried on small tensors.

    Args:
        options: Options of the run.
        rates: Learning rates by the option that sets each; the first one applies to most weights.
    """
    if len(rates) < 2:
        return
    (_, default), *other_rates = rates.items()
    error = _try_step(options, [*rates.values()])
    if error is None:
        return
    fails_with_one_rate = _try_step(options, [default]) is not None
    if fails_with_one_rate:  # for another reason, which creating the real optimizer reports
        return
    # name the options whose rates differ from the rate of most weights; if none differs, all but the first
    blamed = [option for option, rate in other_rates if rate != default] or [
        option for option, _ in other_rates
    ]
    them = "it" if len(blamed) == 1 else "them"
    raise OptionError(
        f"{' and '.join(blamed)}: --optimizer_type {options.optimizer_type or 'AdamW'} takes one group of "
        f"weights at one learning rate ({error.rstrip('.')}).\n  Omit {them}, or use an optimizer that "
        "takes several rates, such as AdamW"
    )


def _try_step(options: OptimizerOptions, rates: Sequence[float]) -> str | None:
    """Step a new optimizer once on small tensors, one group for each rate; return its error, if any."""
    groups = []
    for rate in rates:
        parameter = Parameter(torch.ones(2, 2))
        parameter.grad = torch.ones_like(parameter)
        groups.append({"params": [parameter], "lr": rate})
    try:
        with quiet():
            optimizer, _ = make_optimizer(options, groups)
        averaging = find_averaging_optimizer(optimizer)
        if averaging is not None:  # schedule-free optimizers step in training mode only
            averaging.train()
        optimizer.step()
    except Exception as error:  # classes raise errors of any type
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def check_arguments(
    option: str, target_class: Callable[..., Any], arguments: Mapping[str, Any], excluded: Container[str]
) -> None:
    """Raise OptionError for an argument that a class does not accept; the message suggests the nearest one.

    Args:
        option: Option that sets the arguments.
        target_class: The class.
        arguments: Arguments by name.
        excluded: Names of arguments that the option cannot set.
    """
    try:
        parameters = inspect.signature(target_class).parameters
    except (ValueError, TypeError):  # compiled code without a signature
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return  # with **kwargs, any name may be right
    names = [name for name in parameters if name not in excluded and name != "lr"]
    for key, value in arguments.items():
        if key in names:
            continue
        if key == "lr":
            raise OptionError(f"{option} lr: set the learning rate with --learning_rate")
        raise OptionError(
            f"{option} {key}={value}: {getattr(target_class, '__name__', target_class)} has no such argument."
            f"{did_you_mean(key, names)} The arguments are: {', '.join(names)}."
        )


# names in early guides of video trainers -> ours
NAMES_IN_EARLY_GUIDES = dict.fromkeys(
    (
        "adamw8bit_apex_fused",
        "adamw8bit_apex_fused_legacy",
        "adamw8bit_apex_fused_legacy_no_scale",
    ),
    "AdamW8bit",
)
GUIDE_NAME_HINT = "No trainer has this name of early guides; it stands for AdamW with 8-bit states."


def find_optimizer(name: str) -> Callable[..., Optimizer]:
    """Return the optimizer class for a value of --optimizer_type.

    Raises:
        OptionError: If a package is missing, the name is unknown, or the object is not an optimizer.
    """
    if name.lower() == MUON:
        from training.optimizers.muon import MuonWithAdam  # few runs use it

        return MuonWithAdam  # torch.optim.Muon takes only matrices, and networks have other weights too
    if name.lower() == AUTOMAGIC:
        from training.optimizers.automagic import Automagic  # few runs use it

        return Automagic
    module, _, class_name = PATHS.get(name.lower(), name).rpartition(".")
    if not module:  # neither a known name nor an import path
        from modules.extensions import OPTIMIZERS
        from modules.mistyped import explain_switched_off  # only mistakes need them

        advice = explain_switched_off(OPTIMIZERS, name)
        if advice:
            raise OptionError(f"--optimizer_type {name}: unknown.{advice}")
        names = sorted(filter(None, (*PATHS, AUTOMAGIC)))
        present_name = NAMES_IN_EARLY_GUIDES.get(name.lower())
        remedy = (
            "" if present_name is None else f"\n  {GUIDE_NAME_HINT} Pass --optimizer_type {present_name}."
        )
        raise OptionError(
            f"--optimizer_type {name}: unknown.{did_you_mean(name.lower(), names)} Use one of "
            f"{', '.join(names)}, or an import path such as package.module.Class.{remedy}"
        )
    optimizer_class: Any = import_object("--optimizer_type", name, module, class_name)
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise OptionError(
            f"--optimizer_type {name}: is not an optimizer class. Pass a subclass of torch.optim.Optimizer, "
            "such as AdamW"
        )
    if optimizer_class.__name__ in UNUSABLE:
        raise OptionError(
            f"--optimizer_type {name}: {UNUSABLE[optimizer_class.__name__]}. Use another optimizer, such as "
            "AdamW"
        )
    return optimizer_class


def import_object(option: str, name: str, module: str, attribute: str) -> Any:
    """Import the object that an option names as `module.attribute`.

    Raises:
        OptionError: If the import fails. The message names the package to install, or the cause.
    """
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise OptionError(f"{option} {name}: is not an import path. Write package.module.Class")
    reject_standard_module(option, name, module)
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise OptionError(f"{option} {name}: {describe_missing(error)}") from None
    except Exception as error:  # the module may run arbitrary code
        raise OptionError(f"{option} {name}: cannot be imported ({type(error).__name__}: {error})") from None


def _with_wrapped(optimizer: Optimizer) -> list[Any]:
    """Return an optimizer and all optimizers that it wraps, directly or not, the outermost first."""
    optimizers = [optimizer]
    for outer in optimizers:  # grows while it is iterated over
        for inner in vars(outer).values():
            is_new = all(inner is not known for known in optimizers)
            if isinstance(inner, Optimizer) and is_new:
                optimizers.append(inner)
    return optimizers


def needs_no_schedule(optimizer: Optimizer) -> bool:
    """Return whether the class name of an optimizer, or of one that it wraps, says it is schedule-free."""
    kinds = (
        optimizer_class for wrapped in _with_wrapped(optimizer) for optimizer_class in type(wrapped).__mro__
    )
    return any("schedulefree" in optimizer_class.__name__.lower() for optimizer_class in kinds)


def find_averaging_optimizer(optimizer: Optimizer) -> Any:
    """Return the optimizer or wrapped optimizer that saves averaged weights; None if there is none.

    The methods `train()` and `eval()`, which switch between trained and averaged weights, identify it.
    """
    averaging = (
        wrapped
        for wrapped in _with_wrapped(optimizer)
        if callable(getattr(wrapped, "train", None)) and callable(getattr(wrapped, "eval", None))
    )
    return next(averaging, None)


def _select_adafactor_arguments(
    options: OptimizerOptions, arguments: dict[str, Any]
) -> tuple[dict[str, Any], float | None]:
    """Return Adafactor's arguments and learning rate; the rate is None if Adafactor finds its own."""
    arguments = {"relative_step": True, **arguments}
    if arguments.get("warmup_init") and not arguments["relative_step"]:
        logger.warning("Adafactor: relative_step is set to True because warmup_init=True needs it.")
        arguments["relative_step"] = True
    if arguments["relative_step"]:
        logger.warning(
            "Adafactor finds its own learning rate: --learning_rate and --lr_scheduler are ignored "
            "(relative_step=True)."
        )
        return arguments, None
    if options.max_grad_norm != 0:
        logger.warning(
            f"Adafactor clips gradients itself: --max_grad_norm {options.max_grad_norm} clips them twice; 0 "
            "is usual here."
        )
    if arguments.get("clip_threshold", 1.0) != 1.0:
        logger.warning("Adafactor: clip_threshold=1.0 is usual.")
    return arguments, options.learning_rate


@contextlib.contextmanager
def evaluation(
    modules: Sequence[nn.Module], optimizer: Optimizer, parameters: Sequence[Parameter]
) -> Iterator[None]:
    """Set evaluation mode and an optimizer's averaged weights during the block, then restore both."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        with averaged_weights(optimizer, parameters):
            yield
    finally:
        for part, is_training in modes:
            part.training = is_training


@contextlib.contextmanager
@torch.no_grad()
def averaged_weights(optimizer: Optimizer, parameters: Sequence[Parameter]) -> Iterator[None]:
    """Load the averaged weights of a schedule-free optimizer during the block; do nothing for any other.

    Training weights are copied and restored, because the optimizer's `train()` would round them.
    """
    averaging = find_averaging_optimizer(optimizer)
    if averaging is None:
        yield
        return
    trained_weights = [parameter.detach().clone() for parameter in parameters]
    has_stepped = any(averaging.state.values())
    try:
        averaging.eval()  # puts the averages into the parameters
    except Exception:
        if has_stepped:
            raise
        averaging.state.clear()  # before the first step there is no average: the weights are used as is
    try:
        yield
    finally:
        averaging.train()
        for parameter, weights in zip(parameters, trained_weights, strict=True):
            parameter.copy_(weights)


def optimizer_state(optimizer: Optimizer, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """Return the state of an optimizer by parameter name instead of number; tensors are not copied.

    Its entries are `groups`, the settings of the parameter groups; `states`, the tensors and values of each
    parameter; and `on_host`, the keys of tensors on the CPU, where `restore_optimizer` leaves step counters.

    Args:
        optimizer: The optimizer.
        names: Names of all parameters.

    Raises:
        OptionError: If the optimizer keeps anything other than tensors and plain values.
    """
    states: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in optimizer.state:
                name = names[parameter]
                states[name] = to_builtin_types(dict(optimizer.state[parameter]), name)
    groups = [
        {
            **to_builtin_types(_without_params(group), "group"),
            "params": [names[parameter] for parameter in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    on_host = {
        key
        for state in states.values()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.device.type == "cpu"
    }
    return {"groups": groups, "states": states, "on_host": sorted(map(str, on_host))}


def restore_optimizer(
    optimizer: Optimizer, names: Mapping[Tensor, str], saved: Mapping[str, Any], device: torch.device
) -> None:
    """Load a saved state into the optimizer, on the device where steps are computed; empties `saved`.

    Raises:
        CheckpointError: If the optimizer's parameters differ from the parameters in the state.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _restore_group_settings(optimizer, names, saved["groups"])
    # `load_state_dict` would cast the states, so they are set one by one, and freed in `saved` to save memory
    for parameter in parameters:
        saved_state = saved["states"].pop(names[parameter], None)
        if saved_state is None:
            continue
        state: dict[str, Any] = {}
        for key, value in saved_state.items():
            is_step_counter = key in saved["on_host"] and not getattr(value, "ndim", 0)
            state[key] = _copy_state(value, "cpu" if is_step_counter else device)
        optimizer.state[parameter] = state
        if getattr(optimizer, "is_paged", False):
            _move_to_paged_buffers(optimizer, parameter, state, device)


def _restore_group_settings(
    optimizer: Optimizer, names: Mapping[Tensor, str], saved_groups: Sequence[Mapping[str, Any]]
) -> None:
    """Load the saved settings of parameter groups, such as learning rates, into the optimizer."""
    groups = optimizer.param_groups
    group_names = [[names[parameter] for parameter in group["params"]] for group in groups]
    _require_equal_names([saved_group["params"] for saved_group in saved_groups], group_names)
    # torch numbers the parameters over all groups
    all_names = [name for names_of_group in group_names for name in names_of_group]
    numbers = {name: number for number, name in enumerate(all_names)}
    loaded_groups = []
    for group, saved_group in zip(groups, saved_groups, strict=True):
        group_numbers = [numbers[name] for name in saved_group["params"]]
        loaded_groups.append({**_without_params(group), **_copy_state(saved_group), "params": group_numbers})
    optimizer.load_state_dict({"state": {}, "param_groups": loaded_groups})


def _require_equal_names(saved_groups: Sequence[Sequence[str]], groups: Sequence[Sequence[str]]) -> None:
    """Raise CheckpointError if the parameter names of this run differ from the saved ones."""
    if saved_groups == groups:
        return
    saved_names = {name for group in saved_groups for name in group}
    names = {name for group in groups for name in group}
    missing = ", ".join(sorted(saved_names - names)[:3]) or "none"
    new = ", ".join(sorted(names - saved_names)[:3]) or "none"
    raise CheckpointError(
        f"the saved optimizer state belongs to different parameters (only in the state: {missing}; only in "
        f"this run: {new}; in groups of {[*map(len, saved_groups)]} there and {[*map(len, groups)]} here).\n"
        "  Use the network options, or --trainable_modules, of the run that made it, or start a new run "
        "from what was trained"
    )


def restore_foreign_optimizer(optimizer: Optimizer, state: Mapping[str, Any], device: torch.device) -> None:
    """Load another program's optimizer state, renumbered for this optimizer; keep this run's learning rates.

    Raises:
        CheckpointError: If the state does not fit this optimizer.
    """
    rates: list[dict[str, Any]] = [
        {key: group[key] for key in ("lr", "initial_lr") if key in group} for group in optimizer.param_groups
    ]
    try:
        optimizer.load_state_dict(dict(state))
        for group, group_rates in zip(optimizer.param_groups, rates, strict=True):
            group.update(group_rates)
        # moments of another shape belong to another weight
        for own_parameter, parameter_moments in optimizer.state.items():
            for moment_name in MOMENT_NAMES & parameter_moments.keys():
                if parameter_moments[moment_name].shape != own_parameter.shape:
                    shapes = list(parameter_moments[moment_name].shape), list(own_parameter.shape)
                    raise ValueError(f"{moment_name} has the shape {shapes[0]}, its parameter {shapes[1]}")
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"the optimizer state does not fit this run: {error}\n"
            "  Use its --optimizer_type and --network_dim, or start a new run from the LoRA: "
            "--network_weights FILE"
        ) from error
    for moments in optimizer.state.values():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.dim():  # scalars, such as `step`, stay where they are
                moments[name] = value.to(device)


def _without_params(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _copy_state(value: Any, device: torch.device | str = "cpu") -> Any:
    """Copy a saved value to a device, so that its tensors no longer need the state file."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {key: _copy_state(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy_state(item, device) for item in value)
    return value


def _move_to_paged_buffers(
    optimizer: Any, parameter: Tensor, state: dict[str, Any], device: torch.device
) -> None:
    """Move state tensors as large as their parameter into the buffers of a paged bitsandbytes optimizer."""
    # The driver pages these buffers between host and device, as they may not fit on the device. This is a
    # separate function so that temporary tensors are freed before the next parameter is moved.
    like = torch.empty_like(parameter, device=device)  # the buffers are for the device that steps
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            state[name] = optimizer.get_state_buffer(like, dtype=value.dtype).copy_(value)
