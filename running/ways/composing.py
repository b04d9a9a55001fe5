"""Compose the options of all ways to run a transformer, and act by those that have joined a run.

Standard library only.
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modules.command import LAUNCH
from modules.errors import OptionError
from modules.options import NO_PIXELS, Options, info_of, option
from running.ways import WAYS
from running.ways.contract import Division, JoinedWays, RunUses, SpeedOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from contract.loading import BlockPlace
    from contract.steps import RunPasses
    from running.offload.context import ProcessGrid

logger = logging.getLogger(__name__)

OF_LAUNCHER = ("ACCELERATE_USE_", "PARALLELISM_CONFIG_")  # begin the variables that ask accelerate to split


def options_of_ways(is_training: bool) -> type[Options]:
    """Return a record with the options of the ways that a script has: a field for each, by its name."""
    records = {way.name: way.options for way in WAYS if way.options.in_training or not is_training}
    content: dict[str, Any] = {
        name: option(facts=NO_PIXELS if record.keeps_pixels and not is_training else None)
        for name, record in records.items()
    }
    content["__annotations__"] = records
    return type("OptionsOfWays", (Options,), content)


def join_ways(speed: SpeedOptions) -> JoinedWays:
    """Have the ways that are on join a run. Raises OptionError for options that do not go with them."""
    run = JoinedWays(speed)
    for way in WAYS:
        options = getattr(speed.ways, way.name, None)
        if options is not None and way.is_on(options):
            way.join(run, options)
    return run


def check_launch(speed: SpeedOptions, processes: int, uses: RunUses) -> None:
    """Raise OptionError if launched processes would generate a prompt several times, or cannot share it."""
    times = count_groups(speed, processes)
    if speed.joined.divides_passes:
        times = 1
    for check in speed.joined.on.launch:
        check(processes, times, uses)


def count_groups(speed: SpeedOptions, processes: int, passes: int = 1) -> int:
    """Return the number of groups of processes that have micro-batches of their own.

    passes: processes that share the passes of a step. Raises OptionError if they cannot be grouped so.
    """
    peers = speed.joined.num_peers * passes
    if processes % peers:
        typed = " ".join(speed.joined.peers)
        raise OptionError(
            f"{typed}: {processes} processes make no groups of {peers}. Start a multiple of {peers}: "
            f"accelerate launch --multi_gpu --num_processes {peers}"
        )
    return processes // peers


def count_shared_passes(speed: SpeedOptions, processes: int) -> int:
    """Return the number of processes that divide the passes of a step. Raises as `count_groups` does."""
    if not speed.joined.divides_passes:
        return 1
    passes = max(processes // speed.joined.num_peers, 1)
    count_groups(speed, processes, passes)
    return passes


def lay_out(speed: SpeedOptions, shares_passes: bool) -> "ProcessGrid":
    """Return the places of all processes, which have joined. Raises as `count_groups` does."""
    from torch import distributed  # only with several processes

    from running.offload.context import ProcessGrid

    processes = distributed.get_world_size()
    passes = count_shared_passes(speed, processes) if shares_passes else 1
    groups = count_groups(speed, processes, passes)
    return ProcessGrid(distributed.get_rank(), groups, passes, speed.joined.num_peers)


def make_block_place(speed: SpeedOptions, device: "torch.device") -> "BlockPlace | None":
    """Return where blocks are put while a network is loaded; None if this process has them alone."""
    places = [make_place(device) for make_place in speed.joined.on.place]
    return next(filter(None, places), None)


def finish_network(network: "nn.Module", speed: SpeedOptions, device: "torch.device") -> None:
    """Have ways act on a network behind all other changes. Raises OptionError if they cannot."""
    for finish in speed.joined.on.finish:
        finish(network, lay_out(speed, False), device)


def make_passes(speed: SpeedOptions, device: "torch.device") -> "RunPasses | None":
    """Return what runs the passes of a step in several processes, which have joined; None: each runs all."""
    in_lockstep = bool(speed.joined.splits_weights)
    made = [make(lay_out(speed, True), in_lockstep, device) for make in speed.joined.on.passes]
    return next(iter(made), None)


def warn_if_alone(speed: SpeedOptions) -> None:
    """Warn of ways that do nothing in a single process."""
    for typed, alone in speed.joined.alone.items():
        logger.warning("%s has no effect with one process, which %s. Use %s", typed, alone, LAUNCH)


def _list_info() -> dict[str, Mapping[str, Any]]:
    """Return the facts of the options of all ways, by name."""
    return {name: info for way in WAYS for name, info in info_of(way.options).items()}


def list_block_options() -> list[str]:
    """Return the options of ways that act on the blocks of a transformer."""
    return [name for name, info in _list_info().items() if info.get("of_blocks")]


def divided_options(division: Division) -> dict[str, Any]:
    """Return the options that divide a step among cards, by name."""
    parts = {name: info["division"] for name, info in _list_info().items() if "division" in info}
    return {name: getattr(division, part) for name, part in parts.items()}


def list_shared_things() -> str:
    """Return what processes share, and by which options: "weights with --shard_base"."""
    return " and ".join(f"{way.options.shares} with --{way.name}" for way in WAYS if way.options.shares)


def reject_other_splits() -> None:
    """Raise OptionError if accelerate's launcher is configured to split the model by itself.

    accelerate splits a model that a script hands to it. The loops here never do, so nothing would be split.
    """
    if not any(name.startswith(OF_LAUNCHER) for name in os.environ):
        return
    answers = Counter(variable for way in WAYS for variable in way.options.replaces)
    # what several ways answer is last, as it is set together with one of the others
    for variable in sorted(answers, key=lambda variable: answers[variable]):
        value = os.environ.get(variable, "0").lower()
        least = 1 if "_USE_" in variable else 2
        if value in {"true", "yes", "y", "t", "on"} or (value.isdecimal() and int(value) >= least):
            answering = [way.options for way in WAYS if variable in way.options.replaces]
            raise OptionError(
                f"accelerate launch asks for {answering[0].replaces[variable]} "
                f"({variable}={os.environ[variable]}): the loops here never hand it the model. Choose plain "
                f"multi-GPU ({LAUNCH}, or run accelerate config again) and give "
                f"{', or '.join(way.answer for way in answering)} over those processes"
            )
