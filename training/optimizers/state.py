"""Store an optimizer's state as JSON and named tensors, and restore it to the same bits.

`Optimizer.load_state_dict` alone is not enough: it casts what it restores to the parameters' dtype, which
ruins 8-bit states and float32 moments of bf16 parameters. Parameters are known by name, so a state fits only
the network it was made with.
"""

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from modules.errors import CheckpointError, OptionError
from training.optimizers.checks import ANY_STATE, RecordedState, check_optimizer, check_outline
from training.saving.states import require_finite

# have the shape of their parameter
MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "momentum_buffer", "state1", "state2"})
PLAIN = (bool, int, float, str, type(None))


def encode(value: Any, name: str, tensors: MutableMapping[str, Tensor]) -> Any:
    """Return `value` as JSON; move its tensors, unchanged, to `tensors` under names that start with `name`.

    Raises OptionError for other objects.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach()  # no copy: it is written before the next step
        return {"tensor": name, "on_cpu": value.device.type == "cpu"}
    if isinstance(value, Mapping):
        # pairs, because keys may be numbers
        return {
            "mapping": [
                [encode(key, name, tensors), encode(item, f"{name}/{key}", tensors)]
                for key, item in value.items()
            ]
        }
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [encode(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]}
    if isinstance(value, PLAIN):
        return value
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a numpy number
        return value.item()
    raise OptionError(
        f"the optimizer keeps a {type(value).__name__} in {name}, which cannot be saved.\n"
        "  Leave out --save_state, or use another --optimizer_type."
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value that `encode` was given. Tensors are on the CPU."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "mapping" in value:
        return {decode(key, tensors): decode(item, tensors) for key, item in value["mapping"]}
    if "tuple" in value:
        return tuple(decode(item, tensors) for item in value["tuple"])
    return [decode(item, tensors) for item in value["list"]]


def encode_optimizer(
    optimizer: Optimizer, names: Mapping[Tensor, str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return everything that `restore_optimizer` needs, as JSON and the optimizer's own tensors.

    names: of every parameter.
    """
    tensors: dict[str, Tensor] = {}
    groups, states = [], {}
    for index, group in enumerate(optimizer.param_groups):
        rest = {key: value for key, value in group.items() if key != "params"}
        groups.append(
            {
                "params": [names[parameter] for parameter in group["params"]],
                "rest": encode(rest, f"group{index}", tensors),
            }
        )
        for parameter in group["params"]:
            if parameter in optimizer.state:
                name = names[parameter]
                states[name] = encode(dict(optimizer.state[parameter]), name, tensors)
    return {"class": type(optimizer).__name__, "groups": groups, "states": states}, tensors


def restore_optimizer(
    optimizer: Optimizer,
    names: Mapping[Tensor, str],
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    device: torch.device,
    record: RecordedState = ANY_STATE,
) -> None:
    """Bring the optimizer into the recorded state, bit by bit, on the device where steps are computed.

    Raises CheckpointError if the parameters are not those of the record, or if a value of it is none that
    this optimizer keeps.
    """
    check_outline(description, type(optimizer).__name__, record.path)
    here = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    there = [group["params"] for group in description["groups"]]
    if here != there:
        raise CheckpointError(f"{record.path}: {_difference(here, there)}", record.path)
    check_optimizer(optimizer, names, description, tensors, device, record)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {names[parameter]: number for number, parameter in enumerate(parameters)}
    groups = [
        {
            **_settings(own),
            **decode(saved["rest"], tensors),
            "params": [numbers[name] for name in saved["params"]],
        }
        for own, saved in zip(optimizer.param_groups, description["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": {}, "param_groups": groups})
    for parameter in parameters:  # one by one, and past the casts of load_state_dict
        name = names[parameter]
        if name in description["states"]:
            state = _place(description["states"][name], tensors, device, record.path.parent)
            optimizer.state[parameter] = state
            if getattr(optimizer, "is_paged", False):
                _page(optimizer, parameter, state, device)


def restore_foreign_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a `state_dict` of another program, except for the learning rates.

    Raises CheckpointError if it does not fit.
    """
    rates: list[dict[str, Any]] = [
        {key: group[key] for key in ("lr", "initial_lr") if key in group} for group in optimizer.param_groups
    ]
    try:
        optimizer.load_state_dict(dict(state))
        for group, own in zip(optimizer.param_groups, rates, strict=True):
            group.update(own)
        _check_shapes(optimizer)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"the optimizer state does not fit this run: {error}\n"
            "  Use its --optimizer_type and --network_dim, or start a new run from the LoRA: "
            "--network_weights FILE"
        ) from error


def move_states(optimizer: Optimizer, device: torch.device) -> None:
    """Move the states of the parameters to where steps are computed; step counters stay."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                state[name] = value.to(device)


def _check_shapes(optimizer: Optimizer) -> None:
    """Raise ValueError if a state does not have the shape of its parameter: it is numbered, not named."""
    for parameter, state in optimizer.state.items():
        for name in MOMENTS & state.keys():
            if state[name].shape != parameter.shape:
                raise ValueError(
                    f"{name} has the shape {list(state[name].shape)}, its parameter {list(parameter.shape)}"
                )


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _place(encoded: Any, tensors: Mapping[str, Tensor], device: torch.device, folder: Path) -> Any:
    """As `decode`, with tensors where they were: step counters on the CPU, the rest beside the parameter."""
    if not isinstance(encoded, dict):
        return encoded
    if "tensor" in encoded:
        tensor = require_finite(tensors[encoded["tensor"]], encoded["tensor"], folder)
        # when saved on a CPU run, only step counters (0-dim) stay behind
        return tensor.clone() if encoded["on_cpu"] and not tensor.dim() else tensor.clone().to(device)
    if "mapping" in encoded:
        return {
            decode(key, tensors): _place(item, tensors, device, folder) for key, item in encoded["mapping"]
        }
    kind = "tuple" if "tuple" in encoded else "list"
    items = [_place(item, tensors, device, folder) for item in encoded[kind]]
    return tuple(items) if kind == "tuple" else items


def _page(optimizer: Any, parameter: Tensor, state: dict[str, Any], device: torch.device) -> None:
    """Put what of a state is as large as its parameter where a paged optimizer of bitsandbytes keeps it.

    That is memory that the driver moves between host and device. On the device alone it may not fit.
    """
    like = torch.empty_like(parameter, device=device)  # the buffers are for the device that steps
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            state[name] = optimizer.get_state_buffer(like, dtype=value.dtype).copy_(value)


def _difference(here: list[list[str]], there: list[list[str]]) -> str:
    here_names, there_names = (
        {name for group in here for name in group},
        {name for group in there for name in group},
    )
    missing, new = sorted(there_names - here_names)[:3], sorted(here_names - there_names)[:3]
    if missing or new:
        text = (
            f"only in the state: {', '.join(missing) or 'none'}; only in this run: {', '.join(new) or 'none'}"
        )
    else:
        sizes = [len(group) for group in there], [len(group) for group in here]
        text = f"the parameters are grouped differently: {sizes[0]} in the state, {sizes[1]} here"
    return (
        f"the saved optimizer state belongs to other parameters ({text}).\n"
        "  Use the network options, or --trainable_modules, of the run that made it, or start a new run from "
        "what was trained"
    )
