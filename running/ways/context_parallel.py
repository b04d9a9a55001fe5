"""Share the tokens of a clip among processes: --context_parallel. Standard library only.

How they are exchanged is in `running/offload/context.py`.
"""

from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import SETTING, Options, option
from running.ways.contract import RunUses, WayToRun

if TYPE_CHECKING:
    import torch
    from torch import nn

    from running.offload.context import ProcessGrid


class ContextParallelOptions(Options):
    """How many processes share the tokens of a clip."""

    context_parallel: int = option(
        "of the processes, N share the tokens of each clip: each has a part of the tokens between attention, "
        "and all tokens of a part of the heads in it. 1: none",
        default=1,
        least=1,
        metavar="N",
        facts=SETTING,
    )


def _typed(options: ContextParallelOptions) -> str:
    return f"--context_parallel {options.context_parallel}" if options.context_parallel > 1 else ""


def _check_launch(options: ContextParallelOptions, processes: int, times: int, uses: RunUses) -> None:
    if times > 1:
        raise OptionError(
            f"{_typed(options)}: {processes} processes would make each prompt {times} times. Give "
            f"--context_parallel {processes}, or start {options.context_parallel} processes"
        )
    if uses.rewrites_prompts:
        raise OptionError(
            "--prompt_rewrite and --context_parallel cannot be used together: one process rewrites, and all "
            "need the same text. Rewrite first, and give the prompt that the log shows"
        )


def _finish(network: "nn.Module", grid: "ProcessGrid", device: "torch.device") -> None:
    from running.offload.context import share_tokens  # torch: only where networks are loaded

    share_tokens(network, grid, device)


CONTEXT_PARALLEL = WayToRun(
    name="context_parallel",
    options=ContextParallelOptions,
    typed=_typed,
    keeps_pixels=True,
    of_blocks=True,
    divides_tokens=True,
    peers=lambda options: options.context_parallel,
    replaces={
        "PARALLELISM_CONFIG_CP_SIZE": "accelerate's context parallelism (ring attention)",
        "PARALLELISM_CONFIG_SP_SIZE": "DeepSpeed's sequence parallelism",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    },
    answer="--context_parallel N, which splits the tokens",
    shares="tokens",
    check_launch=_check_launch,
    in_division=lambda division: division.context,
    finish=_finish,
)
