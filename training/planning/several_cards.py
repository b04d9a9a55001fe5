"""Compare the ways to train on several GPUs: `--plan 2x24` of a training script."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch

from dataset.table import DatasetTable
from protocols.family import Family
from runtime.planning.device_memory import DeviceMemory
from runtime.planning.division import TokenCounter, divide_tokens
from runtime.planning.memory_plan import share_blocks
from runtime.planning.several_cards import SingleGpuRun, print_layouts, with_division
from runtime.ways.contract import Division
from training.checks import list_run_uses
from training.data.live import LiveTextEncoders
from training.loss import NoisyBatch
from training.optimizers.stepping import check_fused_backward
from training.options import TrainingOptions
from training.planning.memory import MemoryPrediction, list_memory_savings, predict_memory


def plan_several_cards(
    family: Family,
    options: TrainingOptions,
    noisy_batch: NoisyBatch,
    device: torch.device,
    num_gpus: int,
    room: DeviceMemory,
    sampling: Family | None,
    live_encoders: LiveTextEncoders | None,
    tables: Sequence[DatasetTable],
) -> None:
    """Print the memory of each way to divide a training run over several GPUs, and the cheapest that fits.

    Args:
        family: The model family.
        options: Options of the run.
        noisy_batch: Batch with noise and timesteps.
        device: Device of the run.
        num_gpus: Number of GPUs.
        room: Memory of each GPU.
        sampling: Model of samples, if an option names transformers that only samples use.
        live_encoders: Text encoders that are loaded.
        tables: Tables of the dataset.
    """

    def predict_on_one_gpu(options: TrainingOptions, counter: TokenCounter) -> MemoryPrediction:
        return predict_memory(
            family,
            options,
            noisy_batch,
            device=device,
            sampling=sampling,
            live_encoders=live_encoders,
            watch=counter.watch,
            tables=tables,
        )

    undivided = replace(options, speed=with_division(options.speed, Division(1)))
    runs = _estimate_with_savings(family, undivided, num_gpus, predict_on_one_gpu)
    print_layouts(runs, num_gpus, room, is_training=True)


def _estimate_with_savings(
    family: Family,
    options: TrainingOptions,
    num_gpus: int,
    predict_on_one_gpu: Callable[[TrainingOptions, TokenCounter], MemoryPrediction],
) -> Iterator[SingleGpuRun]:
    """Yield estimates of the run with its own options, then with memory-saving options added one at a time.

    Each estimate is for one GPU, and has a function that divides it over `num_gpus` GPUs.
    """
    added_flags: tuple[str, ...] = ()
    savings = list_memory_savings(options, len(family.experts) - 1)
    for flags, changed_options in chain([("", options)], savings):  # "": no flag is added
        added_flags = (*added_flags, *flags.split())
        counter = TokenCounter()
        prediction = predict_on_one_gpu(changed_options, counter)
        divide = partial(_divide_prediction, family, changed_options, prediction, counter, num_gpus)
        yield SingleGpuRun(added_flags, counter.heads, changed_options.can_swap, divide)


def _divide_prediction(
    family: Family,
    options: TrainingOptions,
    prediction: MemoryPrediction,
    counter: TokenCounter,
    num_gpus: int,
    division: Division,
) -> MemoryPrediction:
    """Derive the memory prediction for each of several GPUs from the prediction for a single one."""
    if options.is_fused:
        check_fused_backward(options.optimizer.optimizer_type, num_gpus)
    if division != Division(num_gpus):  # more than data parallelism: the method may not support this run
        run_uses = list_run_uses(family, options)
        for check in with_division(options.speed, division).modes.hooks.check_uses:
            check(run_uses)
    if division.num_context_parallel > 1:  # this many GPUs share the tokens of a clip
        prediction = replace(
            prediction,
            phase_peaks=divide_tokens(prediction.phase_peaks, division.num_context_parallel, counter),
            host_activation_bytes=prediction.host_activation_bytes // division.num_context_parallel,
        )
    if division.shards_weights:  # the weights of blocks are spread over the GPUs
        prediction = replace(prediction, swaps=[share_blocks(prediction.block_weights, num_gpus)])
    return prediction
