"""Share the passes of a step among processes: --cfg_parallel, for generation. Standard library only.

How they are divided is in `cfg_parallel_passes.py`.
"""

from functools import partial
from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import option
from runtime.ways.contract import RunModes, RunUses, WayOptions, WayToRun

if TYPE_CHECKING:
    import torch

    from protocols.steps import RunPasses
    from runtime.offload.context import ProcessGrid


class CfgParallelOptions(WayOptions, in_training=False):
    """Option that divides the passes of a step (conditional and unconditional) over processes."""

    cfg_parallel: bool = option(
        "with several processes (accelerate launch --multi_gpu --num_processes N): they share the passes of "
        "each step, such as the one with the prompt and the one with the negative prompt. Each has the whole "
        "transformer, or with --shard_base a part of it",
    )


def _check(run: RunModes, uses: RunUses) -> None:
    splitting = run.splits_weights
    if uses.calibrates:
        raise OptionError(
            "--cfg_parallel: a step cache is calibrated by one process, which sees all passes. Omit "
            "--cfg_parallel"
        )
    if uses.has_step_cache and splitting:
        raise OptionError(
            f"--cfg_parallel and {splitting} cannot be used together with a step cache: it decides for each "
            "pass by itself, and processes that gather blocks have to run the same ones. Omit one of the "
            "three"
        )


def _make_passes(grid: "ProcessGrid", in_lockstep: bool, device: "torch.device") -> "RunPasses":
    from runtime.ways.cfg_parallel_passes import SharedPasses  # torch: only where networks are loaded

    return SharedPasses(grid, in_lockstep, device)


def _join(run: RunModes, options: CfgParallelOptions) -> None:
    run.flags.append("--cfg_parallel")
    run.divides_passes = "--cfg_parallel"
    run.hooks.check_uses.append(partial(_check, run))
    run.hooks.make_pass_runner.append(_make_passes)


CFG_PARALLEL = WayToRun(
    name="cfg_parallel",
    options=CfgParallelOptions,
    is_on=lambda options: options.cfg_parallel,
    join=_join,
)
