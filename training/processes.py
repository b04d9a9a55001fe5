"""Join the processes of a run, and sum their gradients.

Gradients are summed once per optimizer step, in flat buffers: the model needs no wrapper.
"""

import logging
import os
from collections.abc import Collection, Iterable, Iterator
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor
from torch.nn import Parameter

from modules.command import RANK
from modules.devices import acts_on_cuda, allow_fp16_accumulation
from modules.errors import OptionError
from modules.lost_processes import reconnect
from runtime.ways.composing import reject_other_splits
from training.run_options import AcceleratorOptions

logger = logging.getLogger(__name__)

# minutes that processes wait for each other: with NCCL, torch would end a run after 10 minutes, but one
# process may need longer to generate samples or to encode its part of a dataset
DEFAULT_TIMEOUT = 24 * 60


def make_accelerator(options: AcceleratorOptions) -> Accelerator:
    """Join the processes that the launcher started and choose device and precision.

    1. Check the environment, and create the accelerator.
    2. Set the options of CUDA's matrix products and convolutions.
    3. Log the device, and warn about options that have no effect on it.

    Raises:
        OptionError: If the device does not support this precision.
    """
    reject_other_splits()  # first, because accelerate would import the packages that split a model
    if "WORLD_SIZE" in os.environ or "LOCAL_RANK" in os.environ:
        _check_environment()
    is_distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if is_distributed:
        reconnect()
    minutes = DEFAULT_TIMEOUT if options.ddp_timeout is None else options.ddp_timeout
    try:
        accelerator = Accelerator(
            # otherwise accelerate would let each of several processes without a GPU train alone
            cpu=is_distributed and not torch.cuda.is_available(),
            mixed_precision=options.mixed_precision,
            # always 1, whatever the launcher sets: the loop accumulates itself, so backward() must not divide
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=minutes))],
        )
    except ValueError as error:
        raise OptionError(f"--mixed_precision {options.mixed_precision}: {error}") from None
    # set after creating the accelerator, which allows TF32 for compiled float32 models
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.cuda_allow_tf32
    torch.backends.cudnn.benchmark |= options.cuda_cudnn_benchmark
    if options.mixed_precision != "no" and not accelerator.native_amp:  # accelerate would ignore it silently
        raise OptionError(
            f"--mixed_precision {options.mixed_precision} has no effect on {accelerator.device.type}: use "
            "bf16 or no"
        )
    count, device = accelerator.num_processes, accelerator.device
    if accelerator.is_main_process:
        devices = f"{count} processes on {device.type}" if count > 1 else f"Training on {device}"
        logger.info(f"{devices}, mixed precision {options.mixed_precision}, torch {torch.__version__}")
        # warn about options that have no effect with this device, or with one process
        if options.cuda_allow_tf32:
            acts_on_cuda("--cuda_allow_tf32", "float32 products", device)
        if options.cuda_cudnn_benchmark:
            acts_on_cuda("--cuda_cudnn_benchmark", "convolutions", device)
        if options.ddp_timeout is not None and count == 1:
            logger.warning(
                "--ddp_timeout %d has no effect with one process, which has no others to wait for.",
                options.ddp_timeout,
            )
    if options.fp16_accumulation:
        is_active = allow_fp16_accumulation(device)
        if is_active and accelerator.is_main_process:
            logger.warning(
                "--fp16_accumulation: gradients are less exact too; compare with a run without it."
            )
    return accelerator


def _check_environment() -> None:
    """Raise OptionError if a multi-process launcher's environment variables are only partly set."""
    variables = {}
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ.get(name)
        if text:
            variables[name] = text
    is_single = variables.get("WORLD_SIZE", "1") == "1" and variables.get("LOCAL_RANK", "-1") == "-1"
    if not is_single and not any(name in os.environ for name in RANK):
        raise OptionError(
            f"the environment has {' and '.join(map('='.join, variables.items()))}, but no RANK. Unset what "
            "is there, or start several processes with accelerate launch or torchrun, which set all of them"
        )


BUCKET_ELEMENTS = 64 << 20  # elements of a buffer: a LoRA fits into one, a whole DiT needs several


def fill_missing_gradients(parameters: Iterable[Parameter]) -> None:
    """Set missing gradients to zero, for parameters that no micro-batch of this process used.

    All processes must step the same parameters, whichever micro-batches they got.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def compute_gradient_norm(parameters: Iterable[Parameter], sharded: Collection[Tensor] = ()) -> Tensor:
    """Return the total norm of all gradients, in float32.

    For bf16 gradients, torch would round the norm to 3 digits.

    Args:
        parameters: The trained parameters.
        sharded: Parameters whose rows are spread over the processes; if any, all processes must call
            this.
    """
    if sharded:
        parameters = list(parameters)
        # each process has only some rows of sharded gradients, and all other gradients whole
        sharded_square = compute_gradient_norm(
            parameter for parameter in parameters if parameter in sharded
        ).square()
        torch.distributed.all_reduce(sharded_square)
        unsharded = compute_gradient_norm(parameter for parameter in parameters if parameter not in sharded)
        return (sharded_square + unsharded.square()).sqrt()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


def sum_over_processes(parameters: list[Parameter], numbers: Tensor) -> Tensor:
    """Add up all gradients over the processes, in place; return the sums of `numbers` (float32, 1-D)."""
    for bucket in _buckets(parameters):
        gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        torch.distributed.all_reduce(flat)
        totals = flat.split([gradient.numel() for gradient in gradients])
        for gradient, total in zip(gradients, totals, strict=True):
            gradient.copy_(total.view_as(gradient))
    torch.distributed.all_reduce(numbers)
    return numbers


def reduce_max(value: int, processes: int, device: torch.device) -> int:
    """Return the largest value among the processes. All processes must call this."""
    if processes == 1:
        return value
    number = torch.tensor(int(value), device=device)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return int(number)


def _buckets(parameters: Iterable[Parameter]) -> Iterator[list[Parameter]]:
    """Yield groups of consecutive parameters of one dtype, with at most BUCKET_ELEMENTS elements each."""
    bucket: list[Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size + parameter.numel() > BUCKET_ELEMENTS or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
            size = 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket
