"""Generate in several processes that share the transformer, the tokens of a clip or the passes of each step.

The ways to do so are in `runtime/ways/`; `--plan 2x24` compares them on several cards.

All processes make every prompt from the same noise: blocks and tokens are gathered from all of them, and the
velocity of a pass comes from the process that runs it. Only the first process decodes, writes and logs.
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property

import torch
from torch import distributed

from blissful_tuner.options import NO_PREVIEW, PromptRewriteOptions
from generation.expert_memory import all_requests
from generation.memory import PhasePrediction, predict_largest_request, predict_request
from generation.options import GenerationOptions
from generation.script_options import NOTHING
from modules.command import LAUNCH
from modules.console import quiet
from modules.devices import select_device
from modules.errors import OptionError
from modules.lost_processes import OtherProcesses, reconnect
from modules.options import override_options
from protocols.family import Family
from protocols.requests import Prepared
from runtime.offload.joining import agree, join_processes, launched_processes
from runtime.planning.device_memory import DeviceMemory
from runtime.planning.division import TokenCounter, divide_tokens
from runtime.planning.several_cards import SingleGpuRun, print_layouts, with_division
from runtime.ways.composing import check_launch, count_shared_passes
from runtime.ways.contract import Division, RunUses


def plan_divisions(
    family: Family, options: GenerationOptions, device: torch.device, cards: int, device_memory: DeviceMemory
) -> None:
    """Print the ways to divide a clip over several GPUs, their memory, and the cheapest one that fits.

    Args:
        family: The model family.
        options: Options of the run.
        device: Device of the run.
        cards: Number of GPUs.
        device_memory: Memory of each GPU.
    """
    alone = replace(options, speed=with_division(options.speed, Division(1)))
    with quiet():
        prepared, _ = predict_largest_request(
            family, alone, all_requests(family, alone), device=device, device_memory=device_memory
        )

    def runs() -> Iterator[SingleGpuRun]:
        """Yield the run with the given options, then the run with fp8 weights if they are not quantized."""
        run = _DividedRun(family, alone, prepared, device=device, cards=cards, device_memory=device_memory)
        yield SingleGpuRun((), run.counter.heads, can_swap=True, divide=run.divide)
        if alone.speed.fp8.quantization is None:
            fp8 = replace(alone, speed=override_options(alone.speed, {"fp8_scaled": True}))
            run = _DividedRun(family, fp8, prepared, device=device, cards=cards, device_memory=device_memory)
            yield SingleGpuRun(("--fp8_scaled",), run.counter.heads, can_swap=True, divide=run.divide)

    print_layouts(runs(), cards, device_memory, is_training=False)


class _DividedRun:
    """Predicts the memory per GPU from dry runs, with whole weights and with weights sharded over GPUs."""

    def __init__(
        self,
        family: Family,
        options: GenerationOptions,
        prepared: Prepared,
        *,
        device: torch.device,
        cards: int,
        device_memory: DeviceMemory,
    ) -> None:
        """Predict the memory of the full network, and count the tokens of a step."""
        self.family = family
        self.options = options
        self.prepared = prepared
        self.device = device
        self.cards = cards
        self.device_memory = device_memory
        self.counter = TokenCounter()
        with quiet():
            self.full_prediction = predict_request(
                family, options, prepared, device, device_memory=device_memory, watch=self.counter.watch
            )

    @cached_property
    def sharded_prediction(self) -> PhasePrediction:
        """Predict the memory from a dry run with the weights sharded over all GPUs."""
        options = self._with_division(Division(self.cards, shards_weights=True))
        with quiet():
            return predict_request(
                self.family, options, self.prepared, self.device, device_memory=self.device_memory
            )

    def divide(self, division: Division) -> PhasePrediction:
        """Predict the memory per GPU if the run is divided in this way.

        Raises:
            OptionError: If the model does not support this division.
        """
        if division != Division(self.cards):  # not just one complete network on each GPU
            check_together(self.family, self._with_division(division))
        prediction = self.sharded_prediction if division.shards_weights else self.full_prediction
        if division.num_context_parallel == 1:  # the tokens are not divided
            return prediction
        return replace(
            prediction,
            peaks_by_phase=divide_tokens(
                prediction.peaks_by_phase, division.num_context_parallel, self.counter
            ),
        )

    def _with_division(self, division: Division) -> GenerationOptions:
        return replace(self.options, speed=with_division(self.options.speed, division))


logger = logging.getLogger(__name__)

Generate = Callable[[Family, GenerationOptions, torch.device], None]


def generate_together(generate: Generate, family: Family, options: GenerationOptions) -> None:
    """Run `generate` in all processes of the launcher, or in the first one alone if no transformer runs.

    Raises:
        UserError: If `generate` raises it, or if another process was lost.
    """
    speed = options.speed
    launched = launched_processes()
    runs_no_transformer = bool(options.latent_path or options.save_merged_model or speed.plan.is_planning)
    if not runs_no_transformer:
        check_launch(speed, launched, _get_run_uses(family, options))
    if launched == 1:
        flags = " and ".join(speed.modes.flags)
        logger.warning("%s has no effect with one process, which does all the work. Use %s", flags, LAUNCH)
        generate(family, options, select_device(options.device))
        return
    check_together(family, options)
    if runs_no_transformer:  # then one process does all the work
        if os.environ.get("RANK", "0") == "0":
            generate(family, options, select_device(options.device))
        return
    reconnect()  # at a new port, if torchrun has restarted the processes
    device = join_processes(options.device, speed.modes.flags[0])
    rank = distributed.get_rank()
    if rank > 0:
        # only the first process logs and writes files
        logging.getLogger().setLevel(logging.ERROR)
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
    """Return a function that asks for a line in the first process and returns it in all processes."""

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


def _get_run_uses(family: Family, options: GenerationOptions) -> RunUses:
    """Return the features of a run that exclude some ways of using several GPUs."""
    turns = {
        "--offload_inactive_dit": options.experts.offload_inactive_dit,
        "--lazy_loading": options.experts.lazy_loading,
    }
    cache = options.step_cache
    return RunUses(
        turn_taking_options=tuple(
            name for name, is_given in turns.items() if is_given and len(family.experts) > 1
        ),
        has_step_cache=cache.is_on,
        calibrates=bool(cache.magcache_calibration or cache.teacache_calibration),
        rewrites_prompts=options.rewriting.prompt_rewrite is not None,
    )


def check_together(family: Family, options: GenerationOptions) -> None:
    """Raise OptionError if options do not work with several processes that generate a prompt together."""
    speed = options.speed
    flags = " and ".join(speed.modes.flags)
    count_shared_passes(speed, launched_processes())
    uses = _get_run_uses(family, options)
    for check in speed.modes.hooks.check_uses:  # of each way in use to divide a run over processes
        check(uses)
    if options.sheet.sheet is not None:
        raise OptionError(
            f"--sheet and {flags} cannot be used together: a sheet is made by a single process, which needs "
            f"the complete weights. Use --from_file with a line for each, or omit {flags}"
        )
    # only the first process runs the tools, so only it would skip a line that they cannot process
    if options.post.tools:
        raise OptionError(
            f"--post and {flags} cannot be used together. Run the tools on the finished files, with the "
            "scripts in blissful_tuner/"
        )
