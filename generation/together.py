"""Generate in several processes that share the transformer (--shard_base) or the passes of each step
(--cfg_parallel).

All make every prompt from the same noise, as a block is gathered from all of them, and the velocity of a pass
from the process that runs it. The first one decodes, writes and talks; the others keep their latents in a
folder that goes with them.
"""

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, distributed

from blissful_tuner.guidance_formulas import Calls, Made
from blissful_tuner.options import NO_PREVIEW, PromptRewriteOptions
from generation.options import GenerationOptions
from modules.contract.family import Family
from modules.contract.steps import Predict, Section, Tweaks
from modules.devices import choose_device
from modules.errors import OptionError, UserError
from modules.offload.mesh import ProcessGrid, device_mesh
from modules.offload.sharding import LAUNCH, agree, is_of_processes, join_processes, launched_processes
from modules.speed_options import ShardingOptions

logger = logging.getLogger(__name__)

Generate = Callable[[Family, GenerationOptions, torch.device], None]


def generate_together(generate: Generate, family: Family, options: GenerationOptions) -> None:
    """Run `generate` in all processes of the launcher; in the first one alone if it runs no transformer.

    Raises UserError as `generate` does, and if another process was lost.
    """
    if launched_processes() == 1:
        asked = " and ".join(options.speed.shared_by)
        logger.warning("%s has no effect with one process, which does all. Use %s", asked, LAUNCH)
        generate(family, options, choose_device(options.device))
        return
    _check(family, options)
    if options.latent_path or options.save_merged_model or options.speed.plan.is_asked:
        if os.environ.get("RANK", "0") == "0":
            generate(family, options, choose_device(options.device))
        return
    device = join_processes(options.device, options.speed.shared_by[0])
    is_first = distributed.get_rank() == 0
    try:
        if is_first:
            generate(family, options, device)
        else:
            logging.getLogger().setLevel(logging.ERROR)  # one process tells what all do
            with tempfile.TemporaryDirectory() as folder:
                generate(family, _without_files(options, Path(folder)), device)
    except Exception as error:
        if not is_of_processes(error):
            raise
        if is_first:
            raise UserError(
                "another process of this run was lost: it was killed, or ended by an error. Run the command "
                f"again. torch says: {error}"
            ) from None
        raise SystemExit(1) from None  # the first one tells why
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
    """The passes of each step, divided over processes: `RunPasses`.

    Each pass is run by itself. If the transformer is split too, all processes run equal passes: those that
    skip the same blocks, and where there are fewer than processes some are run twice.
    """

    def __init__(self, sharding: ShardingOptions, device: torch.device) -> None:
        """device: of this one of the processes, which have joined."""
        grid = _grid(sharding, distributed.get_world_size(), distributed.get_rank())
        self.processes = grid.passes
        self._rank = grid.pass_rank
        self._group = device_mesh(grid, device)["passes"].get_group()
        self._in_lockstep = sharding.shard_base

    def __call__(self, calls: Calls, predict: Predict, section: Section) -> Made:
        """Run this process' share of a step's passes, and return the velocities of all, float32."""
        alike: dict[object, list[tuple[Tweaks, int]]] = {}
        for tweaks, together in calls.items():
            places = [(tweaks, key) for key in together]
            alike.setdefault(tweaks.skip_blocks if self._in_lockstep else None, []).extend(places)
        made: dict[tuple[Tweaks, int], Tensor] = {}
        for places in alike.values():
            for start in range(0, len(places), self.processes):
                at_once = places[start : start + self.processes]
                mine = section.noise.new_zeros(section.noise.shape, dtype=torch.float32)
                if self._in_lockstep or self._rank < len(at_once):
                    tweaks, key = at_once[self._rank % len(at_once)]
                    (velocity,) = predict(calls[tweaks][key], tweaks=tweaks)
                    mine.copy_(velocity)
                found = mine.new_empty(self.processes * len(mine), *mine.shape[1:])
                distributed.all_gather_into_tensor(found, mine, self._group)
                made.update(zip(at_once, found.chunk(self.processes), strict=False))
        return made


def _grid(sharding: ShardingOptions, processes: int, rank: int = 0) -> ProcessGrid:
    """Return how processes share prompts if all passes are shared too. Raises OptionError."""
    passes = max(processes // sharding.context_parallel, 1)
    groups = sharding.groups_of(processes, passes)
    return ProcessGrid(rank, groups, passes, sharding.context_parallel)


def _check(family: Family, options: GenerationOptions) -> None:
    """Raise OptionError for what processes that make prompts together cannot do."""
    speed, asked = options.speed, " and ".join(options.speed.shared_by)
    if speed.cfg_parallel:
        _grid(speed.sharding, launched_processes())
        cache = options.step_cache
        if cache.magcache_calibration or cache.teacache_calibration:
            raise OptionError(
                "--cfg_parallel: a step cache is calibrated by one process, which sees all passes. Leave "
                "--cfg_parallel out"
            )
        if cache.is_on and speed.sharding.shard_base:
            raise OptionError(
                "--cfg_parallel and --shard_base cannot be used together with a step cache: it decides for "
                "each pass by itself, and processes that gather blocks have to run the same ones. Leave one "
                "of the three out"
            )
    if len(family.experts) > 1 and speed.sharding.shard_base:
        raise OptionError(
            "--shard_base: transformers that take turns are not split over processes. Use "
            "--offload_inactive_dit, --lazy_loading or --blocks_to_swap with one process"
        )
    if options.sheet.is_asked:
        raise OptionError(
            f"--sheet and {asked} cannot be used together: a sheet is made by one process, which has the "
            f"whole weights. Use --from_file with a line for each, or leave {asked} out"
        )
    if options.post.tools:  # a line that it can do nothing with would be left out by the first process alone
        raise OptionError(
            f"--post and {asked} cannot be used together. Run the tools on the finished files, with the "
            "scripts in blissful_tuner/"
        )


def _without_files(options: GenerationOptions, folder: Path) -> GenerationOptions:
    """Return the options of a process that writes nothing but latents, into a folder of its own."""
    return replace(
        options,
        output=replace(options.output, save_path=folder, output_type="latent", save_last_frame=False),
        preview=NO_PREVIEW,
        rewriting=PromptRewriteOptions(),
    )
