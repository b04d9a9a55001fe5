"""Compose the options of all run modes (ways to run a transformer), and apply the active ones.

Standard library only.
"""

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modules.command import LAUNCH
from modules.errors import OptionError
from modules.options import NO_PIXELS, Options, get_option_info, option
from runtime.ways import WAYS
from runtime.ways.contract import Division, RunModes, RunUses, SpeedOptions, WayOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from protocols.loading import BlockSharder
    from protocols.steps import RunPasses
    from runtime.offload.context import ProcessGrid

logger = logging.getLogger(__name__)

# prefixes of variables that make accelerate split
SPLIT_VARIABLE_PREFIXES = (
    "ACCELERATE_USE_",
    "PARALLELISM_CONFIG_",
)


def make_way_options_class(is_training: bool) -> type[Options]:
    """Return a record class with the options of a script's run modes, one field named after each mode."""
    records = {way.name: way.options for way in WAYS if way.options.in_training or not is_training}
    content: dict[str, Any] = {
        name: option(facts=NO_PIXELS if record.keeps_pixels and not is_training else None)
        for name, record in records.items()
    }
    content["__annotations__"] = records
    return type("OptionsOfWays", (Options,), content)


def join_ways(speed: SpeedOptions) -> RunModes:
    """Return the combined contributions of all active run modes.

    Raises:
        OptionError: If other options conflict with them.
    """
    run = RunModes(speed)
    for way in WAYS:
        options = getattr(speed.ways, way.name, None)
        if options is not None and way.is_on(options):
            way.join(run, options)
    return run


def check_launch(speed: SpeedOptions, processes: int, uses: RunUses) -> None:
    """Raise OptionError if several processes would generate the same clip, or cannot share the work."""
    times = count_groups(speed, processes)
    if speed.modes.divides_passes:
        times = 1
    for check in speed.modes.hooks.check_launch:
        check(processes, times, uses)


def count_groups(speed: SpeedOptions, processes: int, passes: int = 1) -> int:
    """Return the number of groups of processes that work on different micro-batches.

    Args:
        speed: Options of memory and speed.
        processes: Number of processes.
        passes: Number of processes that share the passes of a step.

    Raises:
        OptionError: If the processes cannot be divided into such groups.
    """
    group_size = speed.modes.processes_per_model * passes
    if processes % group_size:
        options_text = " ".join(speed.modes.process_counts_by_option)
        raise OptionError(
            f"{options_text}: {processes} processes cannot form groups of {group_size}. Start a multiple of "
            f"{group_size}: accelerate launch --multi_gpu --num_processes {group_size}"
        )
    return processes // group_size


def count_shared_passes(speed: SpeedOptions, processes: int) -> int:
    """Return the number of processes that divide the passes of a step; 1 if every process runs all passes.

    Raises OptionError if the processes cannot be divided into groups of that size.
    """
    if not speed.modes.divides_passes:
        return 1
    passes = max(processes // speed.modes.processes_per_model, 1)
    count_groups(speed, processes, passes)
    return passes


def lay_out(speed: SpeedOptions, shares_passes: bool) -> "ProcessGrid":
    """Arrange all processes in a grid by the work that they share; call it after they have joined.

    Raises OptionError if the processes cannot be divided into equal groups.
    """
    from torch import distributed  # only with several processes

    from runtime.offload.context import ProcessGrid

    processes = distributed.get_world_size()
    passes = count_shared_passes(speed, processes) if shares_passes else 1
    groups = count_groups(speed, processes, passes)
    return ProcessGrid(distributed.get_rank(), groups, passes, speed.modes.processes_per_model)


def make_block_sharder(speed: SpeedOptions, device: "torch.device") -> "BlockSharder | None":
    """Return the object that splits blocks over processes as they load; None if no run mode splits them."""
    places = [make_place(device) for make_place in speed.modes.hooks.make_block_sharder]
    return next(filter(None, places), None)


def finish_network(network: "nn.Module", speed: SpeedOptions, device: "torch.device") -> None:
    """Let the active modes prepare a complete network, as its last change before the first step.

    Raises:
        OptionError: If an active mode does not support this network.
    """
    for finish in speed.modes.hooks.finish_network:
        finish(network, lay_out(speed, False), device)


def make_passes(speed: SpeedOptions, device: "torch.device") -> "RunPasses | None":
    """Return the function that divides the passes of a step over processes; None if each process runs all.

    Call it after the processes have joined.
    """
    in_lockstep = bool(speed.modes.splits_weights)
    made = [make(lay_out(speed, True), in_lockstep, device) for make in speed.modes.hooks.make_pass_runner]
    return next(iter(made), None)


def warn_if_alone(speed: SpeedOptions) -> None:
    """Warn about active run modes that have no effect in a single process."""
    for typed, alone in speed.modes.single_process_effects.items():
        logger.warning("%s has no effect with one process, which %s. Use %s", typed, alone, LAUNCH)


def _list_info() -> dict[str, Mapping[str, Any]]:
    """Return the metadata of the options of all run modes, by option name."""
    return {name: info for way in WAYS for name, info in get_option_info(way.options).items()}


def list_block_options() -> list[str]:
    """Return the options of run modes that act on a transformer's blocks."""
    return [name for name, info in _list_info().items() if info.get("of_blocks")]


def divided_options(division: Division) -> dict[str, Any]:
    """Return the options that divide a step over GPUs, by name."""
    parts = {name: info["division"] for name, info in _list_info().items() if "division" in info}
    return {name: getattr(division, part) for name, part in parts.items()}


def list_shared_things() -> str:
    """Return what processes share in each run mode, with its option, such as "weights with --shard_base"."""
    return " and ".join(f"{way.options.shares} with --{way.name}" for way in WAYS if way.options.shares)


def reject_other_splits() -> None:
    """Raise OptionError if accelerate's launcher is configured to split the model itself.

    accelerate splits only a model that a script passes to it. The loops here never pass one, so nothing
    would be split.
    """
    if not any(name.startswith(SPLIT_VARIABLE_PREFIXES) for name in os.environ):
        return
    options_by_variable: dict[str, list[type[WayOptions]]] = {}
    for mode in WAYS:
        for variable in mode.options.accelerate_features:
            options_by_variable.setdefault(variable, []).append(mode.options)
    # a variable with several remedies comes last, because it is set together with a more specific one
    for variable, options in sorted(options_by_variable.items(), key=lambda item: len(item[1])):
        # Whether this environment variable of accelerate's launcher requests splitting the model
        value = os.environ.get(variable, "0").lower()
        # a switch is on with 1; a number of processes splits the model only if it is 2 or more
        min_value = 1 if "_USE_" in variable else 2
        if value in {"true", "yes", "y", "t", "on"} or (value.isdecimal() and int(value) >= min_value):
            feature = options[0].accelerate_features[variable]
            raise OptionError(
                f"accelerate launch asks for {feature} "
                f"({variable}={os.environ[variable]}): the loops here never pass it the model. Choose plain "
                f"multi-GPU ({LAUNCH}, or run accelerate config again) and pass "
                f"{', or '.join(record.accelerate_advice for record in options)} over those processes"
            )
