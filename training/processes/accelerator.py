"""The accelerator: device, mixed precision, processes and trackers.

The loop itself accumulates and sums gradients.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin

from modules.devices import allow_fp16_accumulation, set_cuda_precision
from modules.errors import OptionError
from training.processes.options import AcceleratorOptions

logger = logging.getLogger(__name__)

# minutes that processes wait for each other. torch ends a run on GPUs (NCCL) after 10, and a sample, or a
# share of a data set to be encoded, takes some process longer
USUAL_TIMEOUT = 24 * 60
# what the launcher sets from its config -> what it then asks for
SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def make_accelerator(
    options: AcceleratorOptions, trackers: Sequence[str] = (), logging_folder: Path | None = None
) -> Accelerator:
    """Join the processes that the launcher started and choose device and precision.

    trackers, logging_folder: `LogOptions.trackers` and `logs.run_folder`.
    Raises OptionError if the device does not support this precision or a tracker is not installed.
    """
    _refuse_sharding(os.environ)
    patience = timedelta(minutes=USUAL_TIMEOUT if options.ddp_timeout is None else options.ddp_timeout)
    try:
        accelerator = Accelerator(
            # if launched as several processes without a GPU, accelerate would let each of them train alone
            cpu=int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available(),
            mixed_precision=options.mixed_precision,
            # always 1, whatever the launcher's setting: the loop accumulates, so backward() must not divide
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            step_scheduler_with_optimizer=False,
            log_with=list(trackers) or None,
            project_dir=logging_folder,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)],
        )
    except ValueError as error:
        raise OptionError(f"--mixed_precision {options.mixed_precision}: {error}") from None
    # afterwards: for compiled float32 models accelerate allows TF32
    set_cuda_precision(options.cuda_allow_tf32, options.cuda_cudnn_benchmark)
    if options.mixed_precision != "no" and not accelerator.native_amp:  # accelerate would continue without it
        raise OptionError(
            f"--mixed_precision {options.mixed_precision} has no effect on {accelerator.device.type}: use "
            "bf16 or no"
        )
    if accelerator.is_main_process:
        _report(options, accelerator)
    if (
        options.fp16_accumulation
        and allow_fp16_accumulation(accelerator.device)
        and accelerator.is_main_process
    ):
        logger.warning("--fp16_accumulation: gradients are less exact too; compare with a run without it.")
    return accelerator


def _refuse_sharding(environment: Mapping[str, str]) -> None:
    """Raise OptionError if the launcher is set to split the model.

    Call it before accelerate looks for the packages that split.
    """
    for variable, name in SHARDING.items():
        if environment.get(variable, "false").lower() in {"1", "true", "yes", "y", "t", "on"}:
            raise OptionError(
                f"accelerate launch asks for {name} ({variable}): the model is not split here, each process "
                "holds all of it. "
                "Choose plain multi-GPU: accelerate launch --multi_gpu --num_processes N, or run accelerate "
                "config again"
            )


def _report(options: AcceleratorOptions, accelerator: Accelerator) -> None:
    count, device = accelerator.num_processes, accelerator.device
    where = f"{count} processes on {device.type}" if count > 1 else f"Training on {device}"
    logger.info(f"{where}, mixed precision {options.mixed_precision}, torch {torch.__version__}")
    if options.ddp_gradient_as_bucket_view or options.ddp_static_graph:
        logger.info(
            "--ddp_gradient_as_bucket_view and --ddp_static_graph are ignored because gradients are averaged "
            "without a DDP wrapper."
        )
