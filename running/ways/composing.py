"""What options, phases and plans ask all ways to run a transformer for. Standard library only."""

import logging
import os
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from modules.command import LAUNCH
from modules.errors import OptionError
from modules.options import NO_PIXELS, Options, option
from running.ways import WAYS
from running.ways.contract import Division, RunUses, SpeedOptions, WayToRun

if TYPE_CHECKING:
    import torch
    from torch import nn

    from contract.loading import BlockPlace
    from contract.steps import RunPasses
    from running.offload.context import ProcessGrid

logger = logging.getLogger(__name__)


def options_of_ways(is_training: bool) -> type[Options]:
    """Return a record with the options of the ways that a script has: a field for each, by its name."""
    ways = [way for way in WAYS if way.in_training or not is_training]
    content: dict[str, Any] = {
        way.name: option(facts=NO_PIXELS if way.keeps_pixels and not is_training else None) for way in ways
    }
    content["__annotations__"] = {way.name: way.options for way in ways}
    return type("WayOptions", (Options,), content)


def _own_options(speed: SpeedOptions, way: WayToRun) -> Any:
    return getattr(speed.ways, way.name)


def active_ways(speed: SpeedOptions) -> list[WayToRun]:
    ways = [way for way in WAYS if hasattr(speed.ways, way.name)]
    return [way for way in ways if way.typed(_own_options(speed, way))]


def typed_ways(speed: SpeedOptions, has: Callable[[WayToRun], object] = lambda way: True) -> tuple[str, ...]:
    """Return the options of the active ways that have a property, as a user would type them."""
    return tuple(way.typed(_own_options(speed, way)) for way in active_ways(speed) if has(way))


def splitting_option(speed: SpeedOptions) -> str:
    """Return the option that splits every block over processes; "" if there is none."""
    return " ".join(typed_ways(speed, lambda way: way.splits_weights))


def passes_option(speed: SpeedOptions) -> str:
    """Return the option that divides the passes of a step among processes; "" if there is none."""
    return " ".join(typed_ways(speed, lambda way: way.divides_passes))


def tokens_option(speed: SpeedOptions) -> str:
    """Return the option that divides the tokens of a clip among processes; "" if there is none."""
    return " ".join(typed_ways(speed, lambda way: way.divides_tokens))


def refuse_conflicts(speed: SpeedOptions) -> None:
    """Raise OptionError for other options of memory and speed that a way does not go with."""
    for way in active_ways(speed):
        if way.refuse is not None:
            way.refuse(speed)


def refuse_whole(speed: SpeedOptions, precision: str) -> None:
    """Raise OptionError if a whole model cannot learn in this --mixed_precision."""
    for way in active_ways(speed):
        if way.refuse_whole is not None:
            way.refuse_whole(precision)


def check_ways(speed: SpeedOptions, uses: RunUses) -> None:
    """Raise OptionError for what a run does and a way does not go with."""
    for way in active_ways(speed):
        if way.check is not None:
            way.check(uses, splitting_option(speed))


def check_launch(speed: SpeedOptions, processes: int, uses: RunUses) -> None:
    """Raise OptionError if the processes of a launcher would make a prompt several times, or cannot make it
    together.
    """
    times = count_groups(speed, processes)
    if passes_option(speed):
        times = 1
    for way in active_ways(speed):
        if way.check_launch is not None:
            way.check_launch(_own_options(speed, way), processes, times, uses)


def count_peers(speed: SpeedOptions) -> int:
    """Return the number of processes that have the same micro-batch, or the same pass of a step."""
    peers = 1
    for way in active_ways(speed):
        if way.peers is not None:
            peers *= way.peers(_own_options(speed, way))
    return peers


def count_groups(speed: SpeedOptions, processes: int, passes: int = 1) -> int:
    """Return the number of groups of processes that have micro-batches of their own.

    passes: processes that share the passes of a step. Raises OptionError if they cannot be grouped so.
    """
    peers = count_peers(speed) * passes
    if processes % peers:
        typed = " ".join(typed_ways(speed, lambda way: way.peers))
        raise OptionError(
            f"{typed}: {processes} processes make no groups of {peers}. Start a multiple of {peers}: "
            f"accelerate launch --multi_gpu --num_processes {peers}"
        )
    return processes // peers


def count_shared_passes(speed: SpeedOptions, processes: int) -> int:
    """Return the number of processes that divide the passes of a step. Raises as `count_groups` does."""
    if not passes_option(speed):
        return 1
    passes = max(processes // count_peers(speed), 1)
    count_groups(speed, processes, passes)
    return passes


def lay_out(speed: SpeedOptions, shares_passes: bool) -> "ProcessGrid":
    """Return the places of all processes, which have joined. Raises as `count_groups` does."""
    from torch import distributed  # only with several processes

    from running.offload.context import ProcessGrid

    processes = distributed.get_world_size()
    passes = count_shared_passes(speed, processes) if shares_passes else 1
    groups = count_groups(speed, processes, passes)
    return ProcessGrid(distributed.get_rank(), groups, passes, count_peers(speed))


def make_block_place(speed: SpeedOptions, device: "torch.device") -> "BlockPlace | None":
    """Return where blocks are put while a network is loaded; None if this process has them alone."""
    places = [way.make_place(device) for way in active_ways(speed) if way.make_place is not None]
    return next(filter(None, places), None)


def finish_network(network: "nn.Module", speed: SpeedOptions, device: "torch.device") -> None:
    """Have ways act on a network behind all other changes. Raises OptionError if they cannot."""
    for way in active_ways(speed):
        if way.finish is not None:
            way.finish(network, lay_out(speed, False), device)


def make_passes(speed: SpeedOptions, device: "torch.device") -> "RunPasses | None":
    """Return what runs the passes of a step in several processes, which have joined; None: each runs all."""
    in_lockstep = bool(splitting_option(speed))
    for way in active_ways(speed):
        if way.make_passes is not None:
            return way.make_passes(lay_out(speed, True), in_lockstep, device)
    return None


def warn_if_alone(speed: SpeedOptions) -> None:
    """Warn of ways that do nothing in a single process."""
    for way in active_ways(speed):
        if way.alone:
            typed = way.typed(_own_options(speed, way))
            logger.warning("%s has no effect with one process, which %s. Use %s", typed, way.alone, LAUNCH)


def needed_in_generation(speed: SpeedOptions) -> dict[str, bool]:
    """Return the options of ways that a LoRA needs in generation too, which then has several processes."""
    return {f"--{way.name}": True for way in active_ways(speed) if way.for_generation}


def list_block_options() -> list[str]:
    """Return the options of ways that act on the blocks of a transformer."""
    return [way.name for way in WAYS if way.of_blocks]


def divided_options(division: Division) -> dict[str, Any]:
    """Return the options that divide a step among cards, by name."""
    return {way.name: way.in_division(division) for way in WAYS if way.in_division is not None}


def list_shared_things() -> str:
    """Return what processes share, and by which options: "weights with --shard_base"."""
    return " and ".join(f"{way.shares} with --{way.name}" for way in WAYS if way.shares)


def refuse_other_splits() -> None:
    """Raise OptionError if accelerate's launcher is configured to split the model by itself.

    accelerate splits a model that a script hands to it. The loops here never do, so nothing would be split.
    """
    answers = Counter(variable for way in WAYS for variable in way.replaces)
    # what several ways answer is last, as it is set together with one of the others
    for variable in sorted(answers, key=lambda variable: answers[variable]):
        value = os.environ.get(variable, "0").lower()
        least = 1 if "_USE_" in variable else 2
        if value in {"true", "yes", "y", "t", "on"} or (value.isdecimal() and int(value) >= least):
            answering = [way for way in WAYS if variable in way.replaces]
            raise OptionError(
                f"accelerate launch asks for {answering[0].replaces[variable]} "
                f"({variable}={os.environ[variable]}): the loops here never hand it the model. Choose plain "
                f"multi-GPU ({LAUNCH}, or run accelerate config again) and give "
                f"{', or '.join(way.answer for way in answering)} over those processes"
            )
