"""Share the tokens of a clip among processes: --context_parallel. Standard library only.

How each process runs its part is in `context_parallel_tokens.py`.
"""

from functools import partial
from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import BETWEEN_BLOCKS, SETTING, option
from runtime.ways.contract import RunModes, RunUses, WayOptions, WayToRun

if TYPE_CHECKING:
    import torch
    from torch import nn

    from runtime.offload.context import ProcessGrid


class ContextParallelOptions(
    WayOptions,
    keeps_pixels=True,
    shares="tokens",
    accelerate_advice="--context_parallel N, which splits the tokens",
    accelerate_features={
        "PARALLELISM_CONFIG_CP_SIZE": "accelerate's context parallelism (ring attention)",
        "PARALLELISM_CONFIG_SP_SIZE": "DeepSpeed's sequence parallelism",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    },
):
    """Option for the number of processes that share the tokens of a clip."""

    context_parallel: int = option(
        "N processes share the tokens of each clip: each holds a part of the tokens outside attention, "
        "and all tokens of a part of the heads inside attention. 1: none",
        default=1,
        minimum=1,
        metavar="N",
        facts={**SETTING, **BETWEEN_BLOCKS, "division": "num_context_parallel"},
    )


def _check_launch(options: ContextParallelOptions, processes: int, times: int, uses: RunUses) -> None:
    """Raise OptionError if the number of processes or --prompt_rewrite conflicts with --context_parallel."""
    if times > 1:
        number = options.context_parallel
        raise OptionError(
            f"--context_parallel {number}: {processes} processes would make each prompt {times} times. Pass "
            f"--context_parallel {processes}, or start {number} processes"
        )
    if uses.rewrites_prompts:
        raise OptionError(
            "--prompt_rewrite and --context_parallel cannot be used together: one process rewrites, and all "
            "need the same text. Rewrite first, and pass the prompt that the log shows"
        )


def _finish(network: "nn.Module", grid: "ProcessGrid", device: "torch.device") -> None:
    # imports torch: only where networks are loaded
    from runtime.ways.context_parallel_tokens import (
        share_tokens,
    )

    share_tokens(network, grid, device)


def _join(run: RunModes, options: ContextParallelOptions) -> None:
    typed = f"--context_parallel {options.context_parallel}"
    run.flags.append(typed)
    run.divides_tokens = typed
    run.process_counts_by_option[typed] = options.context_parallel
    run.hooks.check_launch.append(partial(_check_launch, options))
    run.hooks.finish_network.append(_finish)


CONTEXT_PARALLEL = WayToRun(
    name="context_parallel",
    options=ContextParallelOptions,
    is_on=lambda options: options.context_parallel > 1,
    join=_join,
)
