"""Generate in several processes that share the transformer (--shard_base), the tokens of a clip
(--context_parallel) or the passes of each step (--cfg_parallel).

`--plan 2x24` compares these ways on several cards.

All processes make every prompt from the same noise: blocks and tokens are gathered from all of them, and the
velocity of a pass comes from the process that runs it. Only the first process decodes, writes and logs.
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, distributed

from blissful_tuner.guidance_formulas import Calls, Made
from blissful_tuner.options import NO_PREVIEW, PromptRewriteOptions
from contract.family import Family
from contract.requests import Prepared
from contract.steps import Predict, Section, Tweaks
from generation.expert_memory import all_requests
from generation.memory import PhasePrediction, predict, predict_largest
from generation.options import GenerationOptions
from generation.script_options import NOTHING
from modules.command import LAUNCH
from modules.console import quiet
from modules.devices import choose_device
from modules.errors import OptionError
from modules.lost_processes import OtherProcesses, meet_anew
from modules.options import override_options
from modules.speed_options import ShardingOptions
from running.offload.context import ProcessGrid, device_mesh
from running.offload.sharding import agree, gather_parts, join_processes, launched_processes
from running.planning.device_memory import Room
from running.planning.division import Division, TokenCounter, divide_tokens
from running.planning.several_cards import Rehearsed, print_ways, with_division


def plan_ways(
    family: Family, options: GenerationOptions, device: torch.device, cards: int, room: Room
) -> None:
    """Print the ways to use `cards` cards, and the cheapest that fits. room: memory of each card."""
    alone = replace(options, speed=with_division(options.speed, Division(1)))
    with quiet():
        prepared, _ = predict_largest(family, alone, all_requests(family, alone), device=device, room=room)

    def runs() -> Iterator[Rehearsed]:
        run = _DividedRun(family, alone, prepared, device=device, cards=cards, room=room)
        yield Rehearsed((), run.counter.heads, True, run.divide)
        if alone.speed.fp8.quantisation is None:
            fp8 = replace(alone, speed=override_options(alone.speed, {"fp8_scaled": True}))
            run = _DividedRun(family, fp8, prepared, device=device, cards=cards, room=room)
            yield Rehearsed(("--fp8_scaled",), run.counter.heads, True, run.divide)

    print_ways(runs(), cards, room, is_training=False)


class _DividedRun:
    """Predict the memory of a run on several cards, from rehearsals of the whole and of the split network."""

    def __init__(
        self,
        family: Family,
        options: GenerationOptions,
        prepared: Prepared,
        *,
        device: torch.device,
        cards: int,
        room: Room,
    ) -> None:
        self.family = family
        self.options = options
        self.prepared = prepared
        self.device = device
        self.cards = cards
        self.room = room
        self.counter = TokenCounter()
        with quiet():
            self.whole_network = predict(
                family, options, prepared, device, room=room, watch=self.counter.watch
            )

    @cached_property
    def shards(self) -> PhasePrediction:
        """Rehearse the run with the network split over all cards."""
        options = self._set_division(Division(self.cards, shards=True))
        with quiet():
            return predict(self.family, options, self.prepared, self.device, room=self.room)

    def divide(self, division: Division) -> PhasePrediction:
        """Predict the memory of one card. Raises OptionError if the model cannot be divided so."""
        if division != Division(self.cards):
            check_together(self.family, self._set_division(division))
        prediction = self.shards if division.shards else self.whole_network
        if division.context == 1:
            return prediction
        return replace(prediction, moments=divide_tokens(prediction.moments, division.context, self.counter))

    def _set_division(self, division: Division) -> GenerationOptions:
        return replace(self.options, speed=with_division(self.options.speed, division))


logger = logging.getLogger(__name__)

Generate = Callable[[Family, GenerationOptions, torch.device], None]


def generate_together(generate: Generate, family: Family, options: GenerationOptions) -> None:
    """Run `generate` in all processes of the launcher; in the first one alone if it runs no transformer.

    Raises UserError as `generate` does, and if another process was lost.
    """
    speed = options.speed
    launched = launched_processes()
    runs_none = bool(options.latent_path or options.save_merged_model or speed.plan.is_planning)
    if not runs_none:
        _check_groups(options, launched)
    if launched == 1:
        flags = " and ".join(speed.shared_by)
        logger.warning("%s has no effect with one process, which does all. Use %s", flags, LAUNCH)
        generate(family, options, choose_device(options.device))
        return
    check_together(family, options)
    if runs_none:
        if os.environ.get("RANK", "0") == "0":
            generate(family, options, choose_device(options.device))
        return
    meet_anew()
    device = join_processes(options.device, options.speed.shared_by[0])
    rank = distributed.get_rank()
    if rank > 0:
        logging.getLogger().setLevel(logging.ERROR)  # only one process logs what all do
        options = replace(
            options,
            output=replace(options.output, output_type=NOTHING, save_last_frame=False),
            preview=NO_PREVIEW,
            rewriting=PromptRewriteOptions(),
        )
    try:
        with OtherProcesses(rank, distributed.get_world_size()) as processes, processes.explain():
            generate(family, options, device)
    finally:
        distributed.destroy_process_group()


def read_together(ask: Callable[[], str]) -> Callable[[], str]:
    """Return a function that asks for a line in the first process and returns it in all of them."""

    def read() -> str:
        line: str | None = None
        if distributed.get_rank() == 0:
            try:
                line = ask()
            except EOFError:
                line = None
        line = agree(line)
        if line is None:
            raise EOFError
        return line

    return read


class SharedPasses:
    """Divide the passes of each step over processes; a `RunPasses`.

    Each pass is run by itself. If the transformer is split too, all processes run passes that skip the same
    blocks at the same time; if there are fewer such passes than processes, some are run twice.
    """

    def __init__(self, sharding: ShardingOptions, device: torch.device) -> None:
        """device: of this process; all have joined before."""
        grid = _choose_grid(sharding, distributed.get_world_size(), distributed.get_rank())
        self.processes = grid.passes
        self._rank = grid.pass_rank
        self._group = device_mesh(grid, device)["passes"].get_group()
        self._in_lockstep = sharding.shard_base

    def __call__(self, calls: Calls, predict: Predict, section: Section) -> Made:
        """Run this process' share of a step's passes, and return the velocities of all, float32."""
        velocities: dict[tuple[Tweaks, int], Tensor] = {}
        for group in self._group_passes(calls):
            for start in range(0, len(group), self.processes):
                at_once = group[start : start + self.processes]
                velocity = section.noise.new_zeros(section.noise.shape, dtype=torch.float32)
                if self._in_lockstep or self._rank < len(at_once):
                    tweaks, key = at_once[self._rank % len(at_once)]
                    (predicted,) = predict(calls[tweaks][key], tweaks=tweaks)
                    velocity.copy_(predicted)
                gathered = velocity.new_empty(self.processes * len(velocity), *velocity.shape[1:])
                gather_parts(gathered, velocity, self._group)
                velocities.update(zip(at_once, gathered.chunk(self.processes), strict=False))
        return velocities

    def _group_passes(self, calls: Calls) -> list[list[tuple[Tweaks, int]]]:
        """Return groups of passes that can run at the same time: in lockstep those that skip equal blocks."""
        groups: dict[object, list[tuple[Tweaks, int]]] = {}
        for tweaks, conditions in calls.items():
            passes = [(tweaks, key) for key in conditions]
            groups.setdefault(tweaks.skip_blocks if self._in_lockstep else None, []).extend(passes)
        return list(groups.values())


def _choose_grid(sharding: ShardingOptions, processes: int, rank: int = 0) -> ProcessGrid:
    """Return the grid of processes if as many passes as possible are shared. Raises OptionError."""
    passes = max(processes // sharding.context_parallel, 1)
    groups = sharding.groups_of(processes, passes)
    return ProcessGrid(rank, groups, passes, sharding.context_parallel)


def _check_groups(options: GenerationOptions, processes: int) -> None:
    """Raise OptionError if processes would make a prompt several times, or options conflict with sharing."""
    sharding = options.speed.sharding
    times = sharding.groups_of(processes)
    peers = sharding.context_parallel
    if times > 1 and peers > 1 and not options.speed.cfg_parallel:
        raise OptionError(
            f"--context_parallel {peers}: {processes} processes would make each prompt {times} times. Give "
            f"--context_parallel {processes}, or start {peers} processes"
        )
    if peers > 1 and options.rewriting.prompt_rewrite is not None:
        raise OptionError(
            "--prompt_rewrite and --context_parallel cannot be used together: one process rewrites, and all "
            "need the same text. Rewrite first, and give the prompt that the log shows"
        )


def check_together(family: Family, options: GenerationOptions) -> None:
    """Raise OptionError if options do not work with several processes that make prompts together."""
    speed = options.speed
    flags = " and ".join(speed.shared_by)
    if speed.cfg_parallel:
        _check_shared_passes(options)
    if len(family.experts) > 1 and speed.sharding.shard_base:
        turns = {
            "--offload_inactive_dit": options.experts.offload_inactive_dit,
            "--lazy_loading": options.experts.lazy_loading,
        }
        for option, is_given in turns.items():
            if is_given:
                raise OptionError(
                    f"{option} and --shard_base cannot be used together: each process has a part of both "
                    "transformers, and they stay on the devices. Leave one of the two options out"
                )
    if options.sheet.sheet is not None:
        raise OptionError(
            f"--sheet and {flags} cannot be used together: a sheet is made by one process, which has the "
            f"whole weights. Use --from_file with a line for each, or leave {flags} out"
        )
    if options.post.tools:  # a line that the tools cannot process would be left out by the first process only
        raise OptionError(
            f"--post and {flags} cannot be used together. Run the tools on the finished files, with the "
            "scripts in blissful_tuner/"
        )


def _check_shared_passes(options: GenerationOptions) -> None:
    """Raise OptionError if processes cannot share the passes of a step."""
    sharding = options.speed.sharding
    _choose_grid(sharding, launched_processes())
    cache = options.step_cache
    if cache.magcache_calibration or cache.teacache_calibration:
        raise OptionError(
            "--cfg_parallel: a step cache is calibrated by one process, which sees all passes. Leave "
            "--cfg_parallel out"
        )
    if cache.is_on and sharding.shard_base:
        raise OptionError(
            "--cfg_parallel and --shard_base cannot be used together with a step cache: it decides for "
            "each pass by itself, and processes that gather blocks have to run the same ones. Leave one "
            "of the three out"
        )
