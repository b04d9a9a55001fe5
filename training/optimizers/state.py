"""Store an optimizer's state, and restore it to the same bits.

`Optimizer.load_state_dict` alone is not enough: it casts restored tensors to the parameters' dtype, which
ruins 8-bit states and float32 moments of bf16 parameters. Parameters are known by name, so a state fits only
the network it was made with.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from modules.errors import CheckpointError
from training.saving.states import plain_state

# have the shape of their parameter
MOMENTS = frozenset({"exp_avg", "exp_avg_sq", "momentum_buffer", "state1", "state2"})


def optimizer_state(optimizer: Optimizer, names: Mapping[Tensor, str]) -> dict[str, Any]:
    """Return everything that `restore_optimizer` needs; its tensors are not copied. names: of all parameters.

    Raises OptionError if the optimizer keeps something else than tensors and plain values.
    """
    states = {
        names[parameter]: plain_state(dict(optimizer.state[parameter]), names[parameter])
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter in optimizer.state
    }
    groups = [
        {
            **plain_state(_settings(group), "group"),
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
    """Bring the optimizer into the state that was saved, on the device where steps are computed.

    Raises CheckpointError if the parameters are not those of the state.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    here = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    there = [group["params"] for group in saved["groups"]]
    if here != there:
        raise CheckpointError(_difference(here, there))
    numbers = {names[parameter]: number for number, parameter in enumerate(parameters)}
    groups = [
        {**_settings(own), **_copied(group), "params": [numbers[name] for name in group["params"]]}
        for own, group in zip(optimizer.param_groups, saved["groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": {}, "param_groups": groups})
    for parameter in parameters:  # one by one, and past the casts of load_state_dict
        kept = saved["states"].get(names[parameter])
        if kept is None:
            continue
        # of what was on the host only step counters stay there: a run on the CPU has all of it there
        state = {
            key: _copied(
                value, "cpu" if key in saved["on_host"] and not getattr(value, "ndim", 0) else device
            )
            for key, value in kept.items()
        }
        optimizer.state[parameter] = state
        if getattr(optimizer, "is_paged", False):
            _page(optimizer, parameter, state, device)


def restore_foreign_optimizer(optimizer: Optimizer, state: Mapping[str, Any], device: torch.device) -> None:
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
    for kept in optimizer.state.values():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.dim():
                kept[name] = value.to(device)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _copied(value: Any, device: torch.device | str = "cpu") -> Any:
    """Return a saved value on a device; its tensors no longer need the file."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {key: _copied(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, device) for item in value)
    return value


def _page(optimizer: Any, parameter: Tensor, state: dict[str, Any], device: torch.device) -> None:
    """Put what of a state is as large as its parameter where a paged optimizer of bitsandbytes keeps it.

    That is memory that the driver moves between host and device. On the device alone it may not fit.
    """
    like = torch.empty_like(parameter, device=device)  # the buffers are for the device that steps
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            state[name] = optimizer.get_state_buffer(like, dtype=value.dtype).copy_(value)


def _check_shapes(optimizer: Optimizer) -> None:
    """Raise ValueError if a state does not have the shape of its parameter: it is numbered, not named."""
    for parameter, state in optimizer.state.items():
        for name in MOMENTS & state.keys():
            if state[name].shape != parameter.shape:
                raise ValueError(
                    f"{name} has the shape {list(state[name].shape)}, its parameter {list(parameter.shape)}"
                )


def _difference(here: list[list[str]], there: list[list[str]]) -> str:
    saved, own = ({name for group in names for name in group} for names in (there, here))
    missing, new = (", ".join(sorted(some)[:3]) or "none" for some in (saved - own, own - saved))
    return (
        f"the saved optimizer state belongs to other parameters (only in the state: {missing}; only in this "
        f"run: {new}; in groups of {[*map(len, there)]} there and {[*map(len, here)]} here).\n"
        "  Use the network options, or --trainable_modules, of the run that made it, or start a new run from "
        "what was trained"
    )
