"""Generate in several processes that share the transformer (--shard_base) or the tokens of a clip
(--context_parallel).

All make every prompt from the same noise, as blocks and tokens are gathered from all of them. The first one
decodes, writes and talks; the others keep their latents in a folder that goes with them.
"""

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed

from blissful_tuner.options import NO_PREVIEW, PromptRewriteOptions
from generation.options import GenerationOptions
from modules.contract.family import Family
from modules.devices import choose_device
from modules.errors import OptionError, UserError
from modules.offload.sharding import LAUNCH, agree, is_of_processes, join_processes, launched_processes
from modules.speed_options import ShardingOptions

logger = logging.getLogger(__name__)

Generate = Callable[[Family, GenerationOptions, torch.device], None]


def generate_together(generate: Generate, family: Family, options: GenerationOptions) -> None:
    """Run `generate` in all processes of the launcher; in the first one alone if it runs no transformer.

    Raises UserError as `generate` does, and if another process was lost.
    """
    runs_none = bool(options.latent_path or options.save_merged_model or options.speed.plan.is_asked)
    if not runs_none:
        _check_groups(options.speed.sharding, launched_processes())
    if launched_processes() == 1:
        logger.warning("--shard_base has no effect with one process, which holds the model. Use %s", LAUNCH)
        generate(family, options, choose_device(options.device))
        return
    _check(family, options)
    if runs_none:
        if os.environ.get("RANK", "0") == "0":
            generate(family, options, choose_device(options.device))
        return
    device = join_processes(options.device, options.speed.sharding.shared_by[0])
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


def _check_groups(sharding: ShardingOptions, processes: int) -> None:
    """Raise OptionError unless all processes share the tokens of a clip, or none do."""
    times, peers = sharding.groups_of(processes), sharding.context_parallel
    if times > 1 and peers > 1:
        raise OptionError(
            f"--context_parallel {peers}: {processes} processes would make each prompt {times} times. Give "
            f"--context_parallel {processes}, or start {peers} processes"
        )


def _check(family: Family, options: GenerationOptions) -> None:
    """Raise OptionError for what processes that make a prompt together cannot do."""
    sharding = options.speed.sharding
    asked = " and ".join(sharding.shared_by)
    if len(family.experts) > 1 and sharding.shard_base:
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
